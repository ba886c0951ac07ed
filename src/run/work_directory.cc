#include "stbllm/run/work_directory.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "block_file.h"
#include "stbllm/base/checksum.h"
#include "stbllm/base/error.h"
#include "stbllm/base/parse_json.h"
#include "stbllm/base/safetensors.h"
#include "stbllm/base/text_file.h"
#include "stbllm/calibrate/pack_weight.h"
#include "stbllm/checkpoint/sources.h"
#include "stbllm/run/fingerprint.h"

namespace stbllm {
namespace {

namespace fs = std::filesystem;

/// No object when the file is missing or damaged.
nlohmann::json read_json(const fs::path& path) {
  const std::string text = fs::exists(path) ? read_text(path) : "";
  return try_parse_json(text);
}

constexpr const char* kFingerprint = "fingerprint.json";
constexpr const char* kPlan = "plan.json";
constexpr const char* kRemembered = "remembered.json";
constexpr const char* kDistilled = "distilled.json";

/// The tensors of a training in one file, which is written last: where it is, the blocks beside it are
/// complete.
class FileTrainingStore : public TrainingStore {
 public:
  FileTrainingStore(fs::path directory, nlohmann::json inputs)
      : directory_(std::move(directory)), inputs_(std::move(inputs)) {}

  void save(const nlohmann::json& progress, const std::vector<QuantizedBlock>& best,
            const VisitState& visit_state) override {
    save_blocks(directory_, best);
    SafetensorsWriter file(path(), /*force=*/true);
    visit_state([&](const std::string& name, at::Tensor& tensor) {
      const at::Tensor host = tensor.cpu();
      file.add(name, dtype_name(host), host.sizes().vec(), bytes_of(host));
    });
    file.set_metadata("inputs", inputs_.dump());
    file.set_metadata("progress", progress.dump());
    file.finish();
    file.commit();
  }

  std::optional<nlohmann::json> load(std::vector<QuantizedBlock>& best,
                                     const VisitState& visit_state) override {
    if (!fs::exists(path())) return std::nullopt;
    const auto file = open();
    const nlohmann::json inputs = metadata(*file, "inputs"), progress = metadata(*file, "progress"),
                         checksums = metadata(*file, "checksums");
    if (inputs != inputs_) return std::nullopt;
    visit_state([&](const std::string& name, at::Tensor& tensor) {
      const auto kept = file->tensors().find(name);
      if (kept == file->tensors().end() || kept->second.data.size() != tensor.nbytes() ||
          checksums.value(name, "") != checksum(kept->second.data))
        refuse("tensor " + name);
      const at::Tensor host = at::empty_like(tensor, at::TensorOptions().device(at::kCPU));
      std::memcpy(host.data_ptr(), kept->second.data.data(), host.nbytes());
      tensor.copy_(host);
    });
    auto blocks = load_blocks(directory_, best.size());
    if (!blocks) refuse("a block beside it");
    for (size_t i = 0; i < best.size(); ++i) {  // in place: what is trained refers to them
      for (auto& [name, weight] : blocks->at(i).linears) best[i].linears.at(name) = std::move(weight);
      best[i].tensors = std::move(blocks->at(i).tensors);
    }
    return progress;
  }

 private:
  fs::path path() const { return directory_ / "training.safetensors"; }
  std::shared_ptr<const SafetensorsFile> open() const {
    try {
      return SafetensorsFile::open(path());
    } catch (const Error&) {
      refuse("its header");
    }
  }
  [[noreturn]] void refuse(const std::string& what) const {
    fail(ErrorCode::kCorrupt,
         "{}: {} is damaged or missing; remove this file, and --resume trains again from the "
         "start",
         path().string(), what);
  }
  nlohmann::json metadata(const SafetensorsFile& file, const char* key) const {
    const auto found = file.metadata().find(key);
    const auto json = found == file.metadata().end() ? nlohmann::json(nlohmann::json::value_t::discarded)
                                                     : try_parse_json(found->second);
    if (json.is_discarded()) refuse(fmt::format("'{}' in its header", key));
    return json;
  }

  const fs::path directory_;
  const nlohmann::json inputs_;
};

}  // namespace

fs::path work_path(const fs::path& output) { return output.string() + ".work"; }

WorkDirectory::Lock::Lock(const fs::path& directory)
    : descriptor_(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
  if (descriptor_ < 0 || ::flock(descriptor_, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK)
    return;  // some file systems have no locks
  ::close(descriptor_);
  fail(ErrorCode::kExists, "{}: another run is at work there; wait for its end or choose another output",
       directory.string());
}

WorkDirectory::Lock::~Lock() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

void WorkDirectory::check(const fs::path& output, bool resume, bool force) {
  const fs::path path = work_path(output);
  // First, because a run that begins has written no fingerprint yet, and one that ends has none left.
  const Lock others(path);
  const bool unfinished = fs::exists(path / kFingerprint);
  if (resume) {
    if (!unfinished)
      fail(ErrorCode::kNotFound, "{}: there is no unfinished run to resume; leave out --resume",
           path.string());
  } else if (fs::exists(path)) {
    if (!unfinished)
      fail(ErrorCode::kExists,
           "{}: this is in the way and no work directory of an unfinished run; move it or choose another "
           "output",
           path.string());
    if (!force)
      fail(ErrorCode::kExists,
           "{}: an unfinished run is there; continue it with --resume or discard it with --force",
           path.string());
  }
}

WorkDirectory::WorkDirectory(const fs::path& output, const nlohmann::json& fingerprint, bool resume,
                             bool force)
    : path_(work_path(output)) {
  check(output, resume, force);
  const fs::path fingerprint_path = path_ / kFingerprint;
  if (resume) {
    lock_.emplace(path_);
    const nlohmann::json before = read_json(fingerprint_path);
    if (!before.is_object())
      fail(ErrorCode::kCorrupt,
           "{}: damaged, so that nothing says which inputs the finished blocks were made with; start again "
           "with --force",
           fingerprint_path.string());
    const std::string difference = first_difference(before, fingerprint);
    if (!difference.empty())
      fail(ErrorCode::kMismatch,
           "{}: the unfinished run was made with other inputs ({}); use the same, or --force to start again",
           path_.string(), difference);
    return;
  }
  if (fs::exists(path_)) {
    const Lock others(path_);
    fs::remove_all(path_);
  }
  std::error_code error;
  fs::create_directories(path_, error);
  if (error)
    fail(ErrorCode::kWriteFailed, "{}: cannot create the directory: {}; check the path and its permissions",
         path_.string(), error.message());
  lock_.emplace(path_);
  try {
    write_text(fingerprint_path, fingerprint.dump(1) + '\n');
  } catch (...) {
    remove();
    throw;
  }
}

WorkDirectory::~WorkDirectory() {
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(path_, ignored))
    if (entry.path().extension() == ".safetensors" || entry.path().filename() == kPlan) return;
  remove();
}

nlohmann::json WorkDirectory::remembered(const fs::path& output) {
  const nlohmann::json choice = read_json(work_path(output) / kRemembered);
  return choice.is_discarded() ? nlohmann::json() : choice;
}

void WorkDirectory::remember(const nlohmann::json& choice) const {
  write_text(path_ / kRemembered, choice.dump(1) + "\n");
}

nlohmann::json WorkDirectory::load_plan() const {
  if (!fs::exists(path_ / kPlan)) return nullptr;
  nlohmann::json plan = read_json(path_ / kPlan);
  if (!plan.is_object())
    fail(ErrorCode::kCorrupt, "{}: damaged; remove this file, and --resume makes the plan again",
         (path_ / kPlan).string());
  return plan;
}

void WorkDirectory::save_plan(const nlohmann::json& plan) const {
  write_text(path_ / kPlan, plan.dump(1) + '\n');
}

void WorkDirectory::save(int64_t block, const QuantizedBlock& quantized) const {
  save_block(path_ / block_file_name(block), quantized);
}

std::optional<QuantizedBlock> WorkDirectory::load(int64_t block) const {
  return load_block(path_ / block_file_name(block));
}

void WorkDirectory::save_distilled(const std::vector<QuantizedBlock>& blocks, const nlohmann::json& inputs,
                                   const DistillReport& report) const {
  const fs::path directory = path_ / "distilled";
  std::error_code ignored;
  fs::remove_all(directory, ignored);
  save_blocks(directory, blocks);
  write_text(directory / kDistilled, nlohmann::json{{"inputs", inputs}, {"report", report}}.dump(1) +
                                         '\n');  // last: where it is, all blocks are
}

std::optional<DistillReport> WorkDirectory::load_distilled(std::vector<QuantizedBlock>& blocks,
                                                           const nlohmann::json& inputs) const {
  const fs::path directory = path_ / "distilled";
  const nlohmann::json found = read_json(directory / kDistilled);
  if (!found.is_object() || found.value("inputs", nlohmann::json()) != inputs) return std::nullopt;
  auto loaded = load_blocks(directory, blocks.size());
  if (!loaded) return std::nullopt;
  blocks = std::move(*loaded);
  return found.at("report").get<DistillReport>();
}

std::unique_ptr<TrainingStore> WorkDirectory::training_store(const nlohmann::json& inputs) const {
  return std::make_unique<FileTrainingStore>(path_ / "training", inputs);
}

void WorkDirectory::remove() const {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

}  // namespace stbllm
