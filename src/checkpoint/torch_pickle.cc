#include <ATen/ATen.h>
#include <caffe2/serialize/inline_container.h>

#include <cstring>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "mapped_tensor.h"
#include "stbllm/base/error.h"
#include "stbllm/base/mapped_file.h"
#include "stbllm/checkpoint/pickle.h"
#include "stbllm/checkpoint/sources.h"

namespace stbllm {
namespace {

using Archive = caffe2::serialize::PyTorchStreamReader;

/// Lets libtorch's zip reader read the mapping. Bounds are checked here, because the reader trusts what the
/// archive says.
class MappingAdapter : public caffe2::serialize::ReadAdapterInterface {
 public:
  explicit MappingAdapter(std::shared_ptr<const MappedFile> file) : file_(std::move(file)) {}
  size_t size() const override { return file_->bytes().size(); }
  size_t read(uint64_t position, void* buffer, size_t count, const char*) const override {
    if (position > size() || count > size() - position) {
      fail(ErrorCode::kCorrupt, "{}: the zip archive refers to bytes beyond its end", file_->path().string());
    }
    std::memcpy(buffer, file_->bytes().data() + position, count);
    return count;
  }

 private:
  std::shared_ptr<const MappedFile> file_;
};

class TorchPickleSource : public TensorSource {
 public:
  explicit TorchPickleSource(const std::filesystem::path& path) : file_(MappedFile::open(path)) {
    refuse_bare_pickle();
    try {
      Archive archive(std::make_shared<MappingAdapter>(file_));
      refuse_big_endian(archive);
      check_size(archive, "data.pkl");
      const auto [pickle, size] = archive.getRecord("data.pkl");
      tensors_ = read_state_dict({static_cast<const std::byte*>(pickle.get()), size}, path.string());
      for (const auto& [name, tensor] : tensors_) open_storage(archive, name, tensor);
    } catch (const c10::Error& error) {
      fail(ErrorCode::kCorrupt, "{}: damaged or truncated zip archive: {}", path.string(),
           error.what_without_backtrace());
    }
    if (tensors_.empty()) {
      fail(ErrorCode::kUnsupported,
           "{}: expected a dictionary of tensors (a state_dict), found none at its top level", path.string());
    }
  }

  const std::filesystem::path& path() const override { return file_->path(); }

  std::vector<std::string> names() const override {
    std::vector<std::string> names;
    for (const auto& [name, tensor] : tensors_) names.push_back(name);
    return names;
  }

  std::vector<int64_t> shape(const std::string& name) const override { return tensors_.at(name).shape; }

  at::Tensor load(const std::string& name) const override {
    const PickledTensor& tensor = tensors_.at(name);
    if (tensor.dtype != at::kFloat && tensor.dtype != at::kHalf && tensor.dtype != at::kBFloat16) {
      refuse_dtype(path(), name, c10::toString(tensor.dtype));
    }
    if (c10::multiply_integers(tensor.shape) > tensor.storage_numel)
      fail(ErrorCode::kUnsupported,
           "{}: tensor {} repeats the {} elements of its storage; save it again with .contiguous()",
           path().string(), name, tensor.storage_numel);
    const auto& [owner, bytes] = storages_.at(tensor.storage);
    const auto first = bytes.subspan(tensor.offset * c10::elementSize(tensor.dtype));
    return mapped_tensor(owner, first, tensor.shape, tensor.strides, tensor.dtype).contiguous();
  }

  void release(const std::string& name) const override {
    const auto& [owner, bytes] = storages_.at(tensors_.at(name).storage);
    if (owner == file_) file_->release(bytes);
  }

 private:
  struct Storage {
    std::shared_ptr<const void> owner;  // the mapping, or the inflated record
    std::span<const std::byte> bytes;
  };

  void refuse_bare_pickle() const {
    if (file_->bytes()[0] != std::byte{0x80}) return;
    fail(
        ErrorCode::kUnsupported,
        "{0}: written in the format before PyTorch 1.6; save it again: python3 -c \"import torch; p = '{0}'; "
        "torch.save(torch.load(p, map_location='cpu'), p)\"",
        path().string());
  }

  void refuse_big_endian(Archive& archive) const {
    if (!archive.hasRecord("byteorder")) return;
    check_size(archive, "byteorder");
    const auto [text, size] = archive.getRecord("byteorder");
    const std::string_view order(static_cast<const char*>(text.get()), size);
    if (order != "little") {
      fail(ErrorCode::kUnsupported, "{}: expected byte order little, found {}", path().string(), order);
    }
  }

  void open_storage(Archive& archive, const std::string& name, const PickledTensor& tensor) {
    const std::string record = "data/" + tensor.storage;
    auto found = storages_.find(tensor.storage);
    if (found == storages_.end()) {
      if (!archive.hasRecord(record)) {
        fail(ErrorCode::kCorrupt, "{}: tensor {} is in record {}, which is missing", path().string(), name,
             record);
      }
      found = storages_.emplace(tensor.storage, read_record(archive, record)).first;
    }
    const auto elements = static_cast<int64_t>(found->second.bytes.size() / c10::elementSize(tensor.dtype));
    if (tensor.storage_numel > elements) {
      fail(ErrorCode::kCorrupt, "{}: tensor {}: record {} should hold {} elements, it holds {}",
           path().string(), name, record, tensor.storage_numel, elements);
    }
  }

  /// Deflate makes at most 1032 bytes of one: a record that claims more would only take memory.
  void check_size(Archive& archive, const std::string& record) const {
    constexpr size_t kMostOfOneByte = 1032;
    if (archive.getRecordSize(record) / kMostOfOneByte > file_->bytes().size())
      fail(ErrorCode::kCorrupt, "{}: record {} claims to hold {} bytes, which a file of {} cannot",
           path().string(), record, archive.getRecordSize(record), file_->bytes().size());
  }

  Storage read_record(Archive& archive, const std::string& record) const {
    const auto file = file_->bytes();
    const size_t begin = archive.getRecordOffset(record), size = archive.getRecordSize(record);
    uint16_t compression;  // It is a field of the local header, whose bounds getRecordOffset() has checked.
    std::memcpy(&compression, file.data() + archive.getRecordHeaderOffset(record) + 8, sizeof(compression));
    if (compression == 0) {
      if (begin > file.size() || size > file.size() - begin) {
        fail(ErrorCode::kCorrupt, "{}: record {} goes beyond the end of the file", path().string(), record);
      }
      return {file_, file.subspan(begin, size)};
    }
    check_size(archive, record);
    auto inflated = std::make_shared<at::DataPtr>(std::get<0>(archive.getRecord(record)));
    return {inflated, {static_cast<const std::byte*>(inflated->get()), size}};
  }

  std::shared_ptr<const MappedFile> file_;
  std::map<std::string, PickledTensor> tensors_;
  std::map<std::string, Storage> storages_;  // by key
};

}  // namespace

std::shared_ptr<const TensorSource> open_torch_pickle(const std::filesystem::path& path) {
  return std::make_shared<TorchPickleSource>(path);
}

}  // namespace stbllm
