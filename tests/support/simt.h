#pragma once
// Runs the body of a CUDA kernel on the CPU: one fiber per thread, one block after the other. Warp-wide
// instructions and barriers are rendezvous; a rendezvous that can never be complete is reported as a
// deadlock, two different ones in one warp as divergence. Threads run from one rendezvous to the next in
// ascending or descending order, so that a missing barrier shows in one of the two orders. Shared memory
// starts as NaN patterns, and an asynchronous copy moves its bytes only when its group is waited for.
//
// It finds mistakes of indexing, tails, packing and synchronisation. It proves neither NVIDIA's fragment
// layouts nor speed.

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace stbllm::simt {

struct Index {
  int x = 0, y = 0;
};
enum class Order { kAscending, kDescending };

inline constexpr int kWarpSize = 32;

class Block {
 public:
  Block(int threads, size_t shared_bytes, Order order)
      : order_(order), shared_(shared_bytes + kAlignment), fibers_(threads), warps_(threads / kWarpSize) {
    if (threads % kWarpSize != 0) throw std::logic_error("a block is made of whole warps");
    for (Fiber& fiber : fibers_) fiber.stack = std::make_unique_for_overwrite<std::byte[]>(kStackBytes);
  }

  void run(Index index, const std::function<void()>& body) {
    index_ = index;
    body_ = &body;
    std::memset(shared_.data(), 0xff, shared_.size());
    for (size_t i = 0; i < fibers_.size(); ++i) {
      Fiber& fiber = fibers_[i];
      fiber.state = State::kReady;
      fiber.copies.clear();
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    current() = this;
    for (bool all_done = false; !all_done;) {
      bool progress = false;
      all_done = true;
      for (size_t i = 0; i < fibers_.size(); ++i) {
        running_ = order_ == Order::kAscending ? i : fibers_.size() - 1 - i;
        if (fibers_[running_].state == State::kReady) {
          swapcontext(&scheduler_, &fibers_[running_].context);
          progress = true;
          if (error_) std::rethrow_exception(error_);
        }
        all_done = all_done && fibers_[running_].state == State::kDone;
      }
      if (!all_done && !progress) throw std::logic_error("deadlock: " + describe());
    }
    current() = nullptr;
  }

  /// The block that is running.
  static Block*& current() {
    static thread_local Block* block = nullptr;
    return block;
  }
  int thread_index() const { return static_cast<int>(running_); }
  Index index() const { return index_; }
  std::byte* shared() {
    return reinterpret_cast<std::byte*>((reinterpret_cast<uintptr_t>(shared_.data()) + kAlignment - 1) /
                                        kAlignment * kAlignment);
  }

  void barrier(const char* name) {
    if (++arrived_ < fibers_.size()) return wait(name);
    arrived_ = 0;
    for (Fiber& fiber : fibers_)
      if (fiber.state == State::kWaiting) fiber.state = State::kReady;
  }

  /// All 32 lanes arrive with their `in`; combine(in, out) runs once over the pointers of all lanes.
  template <typename Out, typename In, typename Combine>
  Out collective(const char* name, const In& in, const Combine& combine) {
    Warp& warp = warps_[running_ / kWarpSize];
    const size_t lane = running_ % kWarpSize;
    if (warp.arrived == 0) warp.name = name;
    if (std::strcmp(warp.name, name) != 0)
      throw std::logic_error("divergence: thread " + std::to_string(running_) + " reached " + name +
                             " while its warp waits at " + warp.name);
    Out out{};
    warp.in[lane] = &in;
    warp.out[lane] = &out;
    if (++warp.arrived < kWarpSize) {
      wait(name);
      return out;
    }
    warp.arrived = 0;
    const In* inputs[kWarpSize];
    Out* outputs[kWarpSize];
    for (int i = 0; i < kWarpSize; ++i) {
      inputs[i] = static_cast<const In*>(warp.in[i]);
      outputs[i] = static_cast<Out*>(warp.out[i]);
    }
    combine(inputs, outputs);
    const size_t first = running_ - lane;
    for (size_t i = first; i < first + kWarpSize; ++i)
      if (fibers_[i].state == State::kWaiting) fibers_[i].state = State::kReady;
    return out;
  }

  void copy_async(void* to, const void* from, int bytes, int zero_bytes) {
    fibers_[running_].copies.push_back({to, from, bytes, zero_bytes});
  }
  void commit_copies() { fibers_[running_].copies.push_back({}); }
  /// Performs the copies of all but the newest `pending` groups.
  void wait_copies(int pending) {
    std::deque<Copy>& copies = fibers_[running_].copies;
    int groups = 0;
    for (const Copy& copy : copies) groups += copy.to == nullptr;
    while (groups > pending) {
      const Copy copy = copies.front();
      copies.pop_front();
      if (copy.to == nullptr) {
        --groups;
        continue;
      }
      if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
      std::memset(static_cast<std::byte*>(copy.to) + copy.bytes, 0, copy.zero_bytes);
    }
  }

 private:
  static constexpr size_t kStackBytes = 128 << 10, kAlignment = 128;
  enum class State { kReady, kWaiting, kDone };
  struct Copy {  // to == nullptr: the end of a group
    void* to = nullptr;
    const void* from = nullptr;
    int bytes = 0, zero_bytes = 0;
  };
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<std::byte[]> stack;
    State state = State::kReady;
    const char* waits_at = "";
    std::deque<Copy> copies;
  };
  struct Warp {
    int arrived = 0;
    const char* name = "";
    const void* in[kWarpSize];
    void* out[kWarpSize];
  };

  static void enter() {
    Block& block = *current();
    try {
      (*block.body_)();
    } catch (...) {
      block.error_ = std::current_exception();
    }
    block.fibers_[block.running_].state = State::kDone;
  }

  void wait(const char* name) {
    Fiber& self = fibers_[running_];
    self.state = State::kWaiting;
    self.waits_at = name;
    swapcontext(&self.context, &scheduler_);
  }

  std::string describe() const {
    std::string text;
    for (size_t i = 0; i < fibers_.size(); ++i) {
      const std::string at = fibers_[i].state == State::kDone ? "the end" : fibers_[i].waits_at;
      if (i == 0 || text.substr(text.rfind(' ') + 1) != at)
        text += (i == 0 ? "thread " : ", thread ") + std::to_string(i) + " at " + at;
    }
    return text;
  }

  Order order_;
  std::vector<std::byte> shared_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  ucontext_t scheduler_;
  Index index_;
  size_t running_ = 0, arrived_ = 0;
  const std::function<void()>* body_ = nullptr;
  std::exception_ptr error_;
};

/// Runs `body` as a grid of blocks.
inline void launch(Index grid, int threads, size_t shared_bytes, const std::function<void()>& body,
                   Order order = Order::kAscending) {
  for (int y = 0; y < grid.y; ++y)
    for (int x = 0; x < grid.x; ++x) Block(threads, shared_bytes, order).run({x, y}, body);
}

}  // namespace stbllm::simt
