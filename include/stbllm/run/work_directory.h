#pragma once
// The finished blocks of an unfinished run, on disk beside the output.

#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "stbllm/calibrate/quantized_block.h"
#include "stbllm/train/training_store.h"

namespace stbllm {

/// Where the work directory of an output is.
std::filesystem::path work_path(const std::filesystem::path& output);

class WorkDirectory {
 public:
  /// work_path(output) with a fingerprint of everything that decides the blocks. With `resume` the directory
  /// of an earlier run is continued: Error(kMismatch) says which part of the fingerprint differs,
  /// Error(kNotFound) that there is none. Otherwise an existing one is discarded with `force`, and
  /// Error(kExists) without, where it is not a work directory, or where another run is at work in it.
  WorkDirectory(const std::filesystem::path& output, const nlohmann::json& fingerprint, bool resume,
                bool force);
  /// A directory without a plan or a finished block is of no use and goes.
  ~WorkDirectory();
  WorkDirectory(const WorkDirectory&) = delete;
  WorkDirectory& operator=(const WorkDirectory&) = delete;

  /// Refuses what the constructor would refuse whatever the fingerprint is.
  static void check(const std::filesystem::path& output, bool resume, bool force);
  const std::filesystem::path& path() const { return path_; }
  /// What an unfinished run beside `output` was told to remember, or null.
  static nlohmann::json remembered(const std::filesystem::path& output);
  void remember(const nlohmann::json& choice) const;
  /// What save_plan() was given, or null. The file appears by rename.
  nlohmann::json load_plan() const;
  void save_plan(const nlohmann::json& plan) const;
  /// A block's file appears by rename: it is complete or not there.
  void save(int64_t block, const QuantizedBlock& quantized) const;
  /// Block `block` of an earlier run, or nothing.
  std::optional<QuantizedBlock> load(int64_t block) const;
  /// The blocks after the whole model was distilled, all of them, with the recipe and the calibration that
  /// did it; load_distilled gives nothing when they are not all there or others made them.
  void save_distilled(const std::vector<QuantizedBlock>& blocks, const nlohmann::json& inputs,
                      const DistillReport& report) const;
  std::optional<DistillReport> load_distilled(std::vector<QuantizedBlock>& blocks,
                                              const nlohmann::json& inputs) const;
  /// Where the state of a training goes that was made from these inputs.
  std::unique_ptr<TrainingStore> training_store(const nlohmann::json& inputs) const;
  void remove() const;

 private:
  /// Keeps other runs out of a directory. Throws Error(kExists) when one is there.
  class Lock {
   public:
    explicit Lock(const std::filesystem::path& directory);
    ~Lock();
    Lock(const Lock&) = delete;
    Lock& operator=(const Lock&) = delete;

   private:
    int descriptor_;
  };

  std::filesystem::path path_;
  std::optional<Lock> lock_;
};

}  // namespace stbllm
