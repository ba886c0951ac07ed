#pragma once
// Runs the body of a CUDA kernel on the CPU: one fiber per thread, one block after the other. Warp-wide
// instructions and barriers are rendezvous of threads at one place of the source; a rendezvous that can never
// be complete is reported as a deadlock, two different ones in one warp (of barriers: in one block) as
// divergence. Shared memory starts as NaN patterns and has not a byte more than was asked for: behind it is a
// page that nobody may touch. A schedule decides what the hardware leaves open: in which order threads run
// from one rendezvous to the next, so that a missing barrier shows in one of them, and whether an
// asynchronous copy arrives when it is issued or only when its group is waited for.
//
// It finds mistakes of indexing, tails, packing and synchronisation. It proves neither NVIDIA's fragment
// layouts nor speed.

#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "guarded_memory.h"

namespace stbllm::simt {

struct Index {
  int x = 0, y = 0;
};

/// What the hardware leaves open.
struct Schedule {
  enum class Order { kAscending, kDescending, kShuffled };  ///< of threads; shuffled anew each time
  enum class Copies { kAtWait, kAtIssue };                  ///< when asynchronous ones arrive
  Order order = Order::kAscending;
  Copies copies = Copies::kAtWait;
  unsigned seed = 0;  ///< of shuffled orders
};

/// A line of the source. As a default argument of a function, current() is the line of its caller.
/// (std::source_location, which clang 14 does not have.)
struct Place {
  const char* file = "";
  int line = 0;

  static constexpr Place current(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

/// Where a thread meets others: an instruction and the place in the source that asks for it.
struct Site {
  const char* name = "";
  Place place;

  bool operator==(const Site& other) const {
    return std::strcmp(name, other.name) == 0 && place.line == other.place.line &&
           std::strcmp(place.file, other.place.file) == 0;
  }
  std::string str() const {
    const std::string file = place.file;
    return name + (" (" + file.substr(file.rfind('/') + 1)) + ":" + std::to_string(place.line) + ")";
  }
};

inline constexpr int kWarpSize = 32;

class Block {
 public:
  Block(int threads, size_t shared_bytes, const Schedule& schedule)
      : schedule_(schedule),
        shared_(shared_bytes),
        fibers_(threads),
        warps_(threads / kWarpSize),
        turns_(threads) {
    if (threads % kWarpSize != 0) throw std::logic_error("a block is made of whole warps");
    std::iota(turns_.begin(), turns_.end(), size_t{0});
    if (schedule.order == Schedule::Order::kDescending) std::reverse(turns_.begin(), turns_.end());
    for (Fiber& fiber : fibers_) fiber.stack = std::make_unique_for_overwrite<std::byte[]>(kStackBytes);
  }

  void run(Index index, const std::function<void()>& body) {
    index_ = index;
    body_ = &body;
    std::mt19937 random(schedule_.seed);
    shared_.fill(0xff);
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
      if (schedule_.order == Schedule::Order::kShuffled) std::shuffle(turns_.begin(), turns_.end(), random);
      for (const size_t turn : turns_) {
        running_ = turn;
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
    for (const std::byte byte : shared_.slack())
      if (byte != std::byte{0xff}) throw std::logic_error("a write in front of shared memory");
  }

  /// The block that is running.
  static Block*& current() {
    static thread_local Block* block = nullptr;
    return block;
  }
  int thread_index() const { return static_cast<int>(running_); }
  Index index() const { return index_; }
  std::byte* shared() { return shared_.data(); }

  void barrier(const Site& site) {
    if (arrived_ == 0) barrier_ = site;
    if (site != barrier_) diverged(site, "block", barrier_);
    if (++arrived_ < fibers_.size()) return wait(site);
    arrived_ = 0;
    for (Fiber& fiber : fibers_)
      if (fiber.state == State::kWaiting) fiber.state = State::kReady;
  }

  /// All 32 lanes arrive with their `in`; combine(in, out) runs once over the pointers of all lanes.
  template <typename Out, typename In, typename Combine>
  Out collective(const Site& site, const In& in, const Combine& combine) {
    Warp& warp = warps_[running_ / kWarpSize];
    const size_t lane = running_ % kWarpSize;
    if (warp.arrived == 0) warp.site = site;
    if (site != warp.site) diverged(site, "warp", warp.site);
    Out out{};
    warp.in[lane] = &in;
    warp.out[lane] = &out;
    if (++warp.arrived < kWarpSize) {
      wait(site);
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
    const Copy copy{to, from, bytes, zero_bytes};
    if (schedule_.copies == Schedule::Copies::kAtIssue)
      copy.arrive();
    else
      fibers_[running_].copies.push_back(copy);
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
      if (copy.to == nullptr)
        --groups;
      else
        copy.arrive();
    }
  }

 private:
  static constexpr size_t kStackBytes = 128 << 10;
  enum class State { kReady, kWaiting, kDone };
  struct Copy {  // to == nullptr: the end of a group
    void* to = nullptr;
    const void* from = nullptr;
    int bytes = 0, zero_bytes = 0;

    void arrive() const {
      if (bytes > 0) std::memcpy(to, from, bytes);
      std::memset(static_cast<std::byte*>(to) + bytes, 0, zero_bytes);
    }
  };
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<std::byte[]> stack;
    State state = State::kReady;
    Site waits_at;
    std::deque<Copy> copies;
  };
  struct Warp {
    int arrived = 0;
    Site site;
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

  [[noreturn]] void diverged(const Site& site, const char* group, const Site& others) const {
    throw std::logic_error("divergence: thread " + std::to_string(running_) + " reached " + site.str() +
                           " while its " + group + " waits at " + others.str());
  }

  void wait(const Site& site) {
    Fiber& self = fibers_[running_];
    self.state = State::kWaiting;
    self.waits_at = site;
    swapcontext(&self.context, &scheduler_);
  }

  std::string describe() const {
    std::string text, before;
    for (size_t i = 0; i < fibers_.size(); ++i) {
      const std::string at = fibers_[i].state == State::kDone ? "the end" : fibers_[i].waits_at.str();
      if (at != before) text += (i == 0 ? "thread " : ", thread ") + std::to_string(i) + " at " + at;
      before = at;
    }
    return text;
  }

  const Schedule schedule_;
  test::GuardedMemory shared_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<size_t> turns_;  // the order of the threads
  Site barrier_;               // where the first one waits
  ucontext_t scheduler_;
  Index index_;
  size_t running_ = 0, arrived_ = 0;
  const std::function<void()>* body_ = nullptr;
  std::exception_ptr error_;
};

/// Runs `body` as a grid of blocks.
inline void launch(Index grid, int threads, size_t shared_bytes, const std::function<void()>& body,
                   const Schedule& schedule = {}) {
  for (int y = 0; y < grid.y; ++y)
    for (int x = 0; x < grid.x; ++x) Block(threads, shared_bytes, schedule).run({x, y}, body);
}

}  // namespace stbllm::simt
