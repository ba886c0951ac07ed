#pragma once
// Several processes that calibrate one model together, on one machine or on many: libtorch's own c10d with
// Gloo over TCP. What a GPU has summed up passes through host memory: NCCL would need libtorch's CUDA library
// at link time, and all Hessians of a block of LLaMA-2-7B are 0.7 GB.
//
//   MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 WORLD_SIZE=2 RANK=0 stbllm quantize ... &
//   MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 WORLD_SIZE=2 RANK=1 stbllm quantize ...
//
// Every process makes the same calls in the same order; each call returns when all have made it.

#include <ATen/core/Tensor.h>

#include <chrono>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>

namespace stbllm {

class ProcessGroup {
 public:
  /// One process on its own: nothing is exchanged.
  ProcessGroup();
  /// The processes that WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT speak of; waits until all have come.
  /// One process when WORLD_SIZE is not set or 1. Another process is waited for at most half an hour, or
  /// STBLLM_PROCESS_TIMEOUT seconds, here and in every call below. Throws Error(kUsage) for variables that
  /// make no sense, Error(kUnsupported) in a build without Gloo, Error(kInterrupted).
  static ProcessGroup from_environment();
  /// Whether this build can run in more than one process.
  static bool supported();

  ~ProcessGroup();
  ProcessGroup(ProcessGroup&&) noexcept;

  int rank() const { return rank_; }
  int size() const { return size_; }

  // All of these throw Error(kInterrupted) when another process has ended or does not answer in time.

  /// Adds up the tensors of all processes, which have one shape and dtype; each holds the sum afterwards.
  void all_reduce(at::Tensor& tensor) const;
  double all_reduce(double value) const;
  /// Gives every process what `root` holds; shape and dtype come along, and so does an undefined tensor.
  void broadcast(at::Tensor& tensor, int root) const;
  void broadcast(nlohmann::json& value, int root) const;

 private:
  struct Gloo;
  std::unique_ptr<Gloo> gloo_;  // of more than one process
  int rank_ = 0, size_ = 1;
};

/// The place of this process among those of its machine (LOCAL_RANK, as torchrun sets it), which is the GPU
/// it takes; 0 when not set. Throws Error(kUsage).
int local_rank();

/// The part [first, first + count) of `items` that falls to one process.
struct Share {
  int64_t first = 0, count = 0;
};
Share share_of(int64_t items, const ProcessGroup& group);

}  // namespace stbllm
