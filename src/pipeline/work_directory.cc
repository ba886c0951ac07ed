#include "stbllm/pipeline/work_directory.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "stbllm/base/error.h"
#include "stbllm/base/text_file.h"
#include "stbllm/pack/packed_file.h"
#include "stbllm/pipeline/pack_weight.h"

namespace stbllm {
namespace {

namespace fs = std::filesystem;

/// No object when the file is missing or damaged.
nlohmann::json read_json(const fs::path& path) {
  const std::string text = fs::exists(path) ? read_text(path) : "";
  return nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
}

constexpr const char* kPlan = "plan.json";
constexpr const char* kDistilled = "distilled.json";
constexpr const char* kTraining = "training.safetensors";

std::string block_file(int64_t block) { return fmt::format("block_{:03}.safetensors", block); }

}  // namespace

std::string first_difference(const nlohmann::json& before, const nlohmann::json& now) {
  const nlohmann::json was = before.flatten(), is = now.flatten();
  for (const auto& [key, value] : is.items())
    if (!was.contains(key) || was[key] != value)
      return fmt::format("{}: {} there, {} here", key.substr(1),
                         was.contains(key) ? was[key].dump() : "nothing", value.dump());
  for (const auto& [key, value] : was.items())
    if (!is.contains(key)) return fmt::format("{}: {} there, nothing here", key.substr(1), value.dump());
  return "";
}

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

WorkDirectory::WorkDirectory(const fs::path& output, const nlohmann::json& fingerprint, bool resume,
                             bool force)
    : path_(work_path(output)) {
  const fs::path fingerprint_path = path_ / "fingerprint.json";
  if (resume) {
    if (!fs::exists(fingerprint_path))
      fail(ErrorCode::kNotFound, "{}: there is no unfinished run to resume; leave out --resume",
           path_.string());
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
    if (!fs::exists(fingerprint_path))
      fail(ErrorCode::kExists,
           "{}: this is in the way and no work directory of an unfinished run; move it or choose another "
           "output",
           path_.string());
    const Lock others(path_);
    if (!force)
      fail(ErrorCode::kExists,
           "{}: an unfinished run is there; continue it with --resume or discard it with --force",
           path_.string());
    fs::remove_all(path_);
  }
  std::error_code error;
  fs::create_directories(path_, error);
  if (!error) lock_.emplace(path_);
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
  save(path_ / block_file(block), quantized);
}

std::optional<QuantizedBlock> WorkDirectory::load(int64_t block) const {
  return load(path_ / block_file(block));
}

void WorkDirectory::save_distilled(const std::vector<QuantizedBlock>& blocks, const nlohmann::json& inputs,
                                   const DistillReport& report) const {
  const fs::path directory = path_ / "distilled";
  std::error_code ignored;
  fs::remove_all(directory, ignored);
  save_all(directory, blocks);
  write_text(directory / kDistilled, nlohmann::json{{"inputs", inputs}, {"report", report}}.dump(1) +
                                         '\n');  // last: where it is, all blocks are
}

std::optional<DistillReport> WorkDirectory::load_distilled(std::vector<QuantizedBlock>& blocks,
                                                           const nlohmann::json& inputs) const {
  const fs::path directory = path_ / "distilled";
  const nlohmann::json found = read_json(directory / kDistilled);
  if (!found.is_object() || found.value("inputs", nlohmann::json()) != inputs) return std::nullopt;
  for (size_t i = 0; i < blocks.size(); ++i) {
    auto block = load(directory / block_file(static_cast<int64_t>(i)));
    if (!block) return std::nullopt;
    blocks[i] = std::move(*block);
  }
  return found.at("report").get<DistillReport>();
}

void WorkDirectory::save_training(const nlohmann::json& inputs, const nlohmann::json& progress,
                                  const std::vector<QuantizedBlock>& best,
                                  const VisitState& visit_state) const {
  const fs::path directory = path_ / "training";
  save_all(directory, best);
  SafetensorsWriter file(directory / kTraining, /*force=*/true);
  visit_state([&](const std::string& name, at::Tensor& tensor) {
    file.add(name, "F32", tensor.sizes().vec(), bytes_of(tensor));
  });
  file.set_metadata("inputs", inputs.dump());
  file.set_metadata("progress", progress.dump());
  file.finish();
  file.commit();  // last: where it is, the blocks are
}

std::optional<nlohmann::json> WorkDirectory::load_training(const nlohmann::json& inputs,
                                                           std::vector<QuantizedBlock>& best,
                                                           const VisitState& visit_state) const {
  const fs::path directory = path_ / "training";
  if (!fs::exists(directory / kTraining)) return std::nullopt;
  const auto file = SafetensorsFile::open(directory / kTraining);
  if (nlohmann::json::parse(file->metadata().at("inputs")) != inputs) return std::nullopt;
  visit_state([&](const std::string& name, at::Tensor& tensor) {
    const std::span<const std::byte> kept = file->tensors().at(name).data;
    STBLLM_CHECK(kept.size() == tensor.nbytes(), "{}: {} bytes were kept, {} are needed", name, kept.size(),
                 tensor.nbytes());
    std::memcpy(tensor.data_ptr(), kept.data(), kept.size());
  });
  for (size_t i = 0; i < best.size(); ++i) {  // in place: what is trained refers to them
    auto block = load(directory / block_file(static_cast<int64_t>(i)));
    if (!block)
      fail(ErrorCode::kCorrupt, "{}: a block is missing; start again with --force", directory.string());
    for (auto& [name, weight] : block->linears) best[i].linears.at(name) = std::move(weight);
    best[i].tensors = std::move(block->tensors);
  }
  return nlohmann::json::parse(file->metadata().at("progress"));
}

void WorkDirectory::save(const fs::path& path, const QuantizedBlock& quantized) const {
  PackedWriter writer(path, /*force=*/true);
  nlohmann::json results = nlohmann::json::array();
  for (const LinearResult& result : quantized.results) results.push_back(to_json(result, true));
  // Results without a packed form (the released arithmetic) are kept dense.
  for (const auto& [name, weight] : quantized.linears) {
    if (weight.unpackable.defined())
      writer.add_dense(name + ".weight", "F32", weight.unpackable.sizes().vec(),
                       bytes_of(weight.unpackable.contiguous()));
    else
      writer.add_linear(name, pack_weight(weight, name));
  }
  for (const auto& [name, tensor] : quantized.tensors)
    writer.add_dense(name, "F32", tensor.sizes().vec(), bytes_of(tensor.contiguous()));
  writer.set_metadata("results", results.dump());
  writer.set_metadata("tune", quantized.tune ? nlohmann::json(*quantized.tune).dump() : "null");
  writer.finish();
  writer.commit();
}

void WorkDirectory::save_all(const fs::path& directory, const std::vector<QuantizedBlock>& blocks) const {
  std::error_code ignored;  // a directory that is not there shows when the first file is written
  fs::create_directories(directory, ignored);
  for (size_t i = 0; i < blocks.size(); ++i) save(directory / block_file(static_cast<int64_t>(i)), blocks[i]);
}

std::optional<QuantizedBlock> WorkDirectory::load(const fs::path& path) const {
  if (!fs::exists(path)) return std::nullopt;
  const PackedReader reader = [&] {
    try {
      PackedReader opened = PackedReader::open(path);
      opened.verify_checksums();
      return opened;
    } catch (const Error& error) {
      fail(error.code(), "{}; remove this file, and --resume makes it again", error.what());
    }
  }();
  QuantizedBlock quantized;
  for (const auto& json : nlohmann::json::parse(reader.metadata("results")))
    quantized.results.push_back(linear_result_from_json(json));
  if (const auto tune = nlohmann::json::parse(reader.metadata("tune")); !tune.is_null())
    quantized.tune = tune.get<TuneReport>();
  for (const auto& [name, matrix] : reader.linears()) quantized.linears.emplace(name, unpack_weight(matrix));
  for (const auto& [name, entry] : reader.dense_tensors()) {
    const at::Tensor tensor =
        at::from_blob(const_cast<std::byte*>(entry.data.data()), entry.shape, at::kFloat).clone();
    const std::string linear = name.ends_with(".weight") ? name.substr(0, name.size() - 7) : "";
    const bool unpackable = std::any_of(quantized.results.begin(), quantized.results.end(),
                                        [&](const LinearResult& result) { return result.name == linear; });
    if (unpackable)
      quantized.linears[linear].unpackable = tensor;
    else
      quantized.tensors.emplace(name, tensor);
  }
  return quantized;
}

void WorkDirectory::remove() const {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

}  // namespace stbllm
