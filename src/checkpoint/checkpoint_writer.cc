#include "stbllm/checkpoint/checkpoint_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <nlohmann/json.hpp>

#include "stbllm/base/durable_file.h"
#include "stbllm/base/error.h"
#include "stbllm/base/safetensors.h"
#include "stbllm/base/text_file.h"

namespace stbllm {
namespace {

namespace fs = std::filesystem;

constexpr const char* kWeights = "model.safetensors";

/// What a reader of a checkpoint may look for: these files of another model would be mixed with this one's.
bool belongs_to_checkpoint(const std::string& name) {
  constexpr std::string_view kFiles[] = {"config.json",
                                         "generation_config.json",
                                         kWeights,
                                         "pytorch_model.bin",
                                         "tokenizer.json",
                                         "tokenizer_config.json",
                                         "tokenizer.model",
                                         "special_tokens_map.json",
                                         "added_tokens.json",
                                         "vocab.json",
                                         "merges.txt",
                                         "model.safetensors.index.json",
                                         "chat_template.jinja",
                                         "pytorch_model.bin.index.json"};
  const bool shard = (name.starts_with("model-") && name.ends_with(".safetensors")) ||
                     (name.starts_with("pytorch_model-") && name.ends_with(".bin"));
  return shard || std::ranges::find(kFiles, name) != std::end(kFiles);
}

/// Puts what `from` holds beside a checkpoint into `to` too.
void keep_others(const fs::path& from, const fs::path& to) {
  for (const auto& entry : fs::directory_iterator(from)) {
    const std::string name = entry.path().filename().string();
    std::error_code error;
    if (belongs_to_checkpoint(name)) {
      if (entry.is_directory())
        fail(ErrorCode::kWriteFailed,
             "{}: Is a directory, where a file is to be written; move it or choose another path",
             entry.path().string());
      continue;
    }
    if (fs::exists(to / name)) continue;
    if (entry.is_regular_file()) fs::create_hard_link(entry.path(), to / name, error);
    if (error || !entry.is_regular_file())
      fs::copy(entry.path(), to / name, fs::copy_options::recursive | fs::copy_options::copy_symlinks, error);
    if (error)
      fail(ErrorCode::kWriteFailed, "{}: {}; check the path and the disk", (to / name).string(),
           error.message());
  }
}

/// A directory that goes when the scope is left, unless it was renamed.
class ScratchDirectory {
 public:
  explicit ScratchDirectory(fs::path path) : path_(std::move(path)) {
    std::error_code error;
    fs::remove_all(path_, error);  // of a run that was killed
    fs::create_directories(path_, error);
    if (error)
      fail(ErrorCode::kWriteFailed, "{}: {}; check the path and the disk", path_.string(), error.message());
  }
  ~ScratchDirectory() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  ScratchDirectory(const ScratchDirectory&) = delete;
  ScratchDirectory& operator=(const ScratchDirectory&) = delete;
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

/// Gives a directory the name of another one, which is then under the first name: at every moment one of them
/// is there as a whole.
void exchange(const fs::path& fresh, const fs::path& target) {
  if (::renameat2(AT_FDCWD, fresh.c_str(), AT_FDCWD, target.c_str(), RENAME_EXCHANGE) == 0) return;
  if (errno != EINVAL && errno != ENOSYS)
    fail(ErrorCode::kWriteFailed, "{}: cannot put the new directory in its place: {}; choose another path",
         target.string(), std::strerror(errno));
  // A file system that cannot exchange names. A crash between the two renames leaves both directories whole.
  const fs::path old = target.string() + ".old";
  rename_durably(target, old);
  rename_durably(fresh, target);
  std::error_code ignored;
  fs::remove_all(old, ignored);
}

}  // namespace

struct CheckpointWriter::Impl {
  explicit Impl(const fs::path& directory)
      : target(fs::weakly_canonical(directory)),
        scratch(target.string() + ".part"),
        weights(scratch.path() / kWeights, /*force=*/true) {}

  fs::path target;  // where a symbolic link leads to
  ScratchDirectory scratch;
  SafetensorsWriter weights;
};

CheckpointWriter::CheckpointWriter(const fs::path& directory) : impl_(std::make_unique<Impl>(directory)) {}
CheckpointWriter::~CheckpointWriter() = default;

void CheckpointWriter::add(const std::string& name, std::string_view dtype, const std::vector<int64_t>& shape,
                           std::span<const std::byte> data) {
  impl_->weights.add(name, dtype, shape, data);
}

void CheckpointWriter::add_file(const std::string& name, std::string_view text) {
  write_text(impl_->scratch.path() / name, text);
}

void CheckpointWriter::add_config(const nlohmann::json& config, std::string_view dtype) {
  nlohmann::json written = config;
  // Files of older versions of transformers have the first key, those of newer ones the second.
  if (written.contains("torch_dtype") || !written.contains("dtype")) written["torch_dtype"] = dtype;
  if (written.contains("dtype")) written["dtype"] = dtype;
  add_file("config.json", written.dump(2) + "\n");
}

void CheckpointWriter::commit() {
  auto& [target, scratch, weights] = *impl_;
  weights.set_metadata("format", "pt");
  weights.finish();
  weights.commit();
  if (fs::exists(target)) {
    keep_others(target, scratch.path());
    exchange(scratch.path(), target);
  } else {
    rename_durably(scratch.path(), target);
  }
}

}  // namespace stbllm
