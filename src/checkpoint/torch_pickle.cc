#include <ATen/ATen.h>
#include <caffe2/serialize/inline_container.h>

#include <algorithm>
#include <cstring>
#include <limits>
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

/// The directory at the end of a zip archive, as far as the sizes of its records need it (PKWARE's
/// APPNOTE.TXT, 4.3.12 to 4.3.16 and 4.5.3). It is read where libtorch's reader finds it.
class ZipDirectory {
 public:
  explicit ZipDirectory(const MappedFile& file) : file_(file) {}

  /// Bytes of all records after unpacking, as the archive claims them. Throws Error(kCorrupt).
  uint64_t unpacked_bytes() const {
    auto [records, at] = begin();
    uint64_t total = 0;
    for (; records > 0; --records) {
      if (read<uint32_t>(at) != kRecord) refuse();
      const size_t name = read<uint16_t>(at + 28), extra = read<uint16_t>(at + 30);
      const uint64_t bytes = unpacked_bytes(at, at + 46 + name, extra);
      total += std::min(bytes, std::numeric_limits<uint64_t>::max() - total);
      at += 46 + name + extra + read<uint16_t>(at + 32);
    }
    return total;
  }

 private:
  static constexpr uint32_t kEnd = 0x06054b50, kEnd64 = 0x06064b50, kLocator = 0x07064b50,
                            kRecord = 0x02014b50;
  static constexpr size_t kEndBytes = 22, kEnd64Bytes = 56, kLocatorBytes = 20;

  /// The number of records, and where the entry of the first one is.
  std::pair<uint64_t, uint64_t> begin() const {
    constexpr size_t kFarthest = 1 << 17;  // A comment after the directory has at most 2^16 bytes.
    size_t end = file_.bytes().size(), tried = 0;
    if (end < kEndBytes) refuse();
    for (end -= kEndBytes; read<uint32_t>(end) != kEnd; --end) {
      if (end == 0 || ++tried == kFarthest) refuse();
    }
    if (end >= kLocatorBytes + kEnd64Bytes && read<uint32_t>(end - kLocatorBytes) == kLocator) {
      const auto end64 = read<uint64_t>(end - kLocatorBytes + 8);
      if (read<uint32_t>(end64) == kEnd64) return {read<uint64_t>(end64 + 32), read<uint64_t>(end64 + 48)};
    }
    return {read<uint16_t>(end + 10), read<uint32_t>(end + 16)};
  }

  /// Of the record whose entry is `at`; its additional fields are the `size` bytes from `field` on.
  uint64_t unpacked_bytes(uint64_t at, uint64_t field, size_t size) const {
    constexpr uint16_t kSizesOf64Bits = 1;
    const auto bytes = read<uint32_t>(at + 24);
    if (bytes != std::numeric_limits<uint32_t>::max()) return bytes;
    const uint64_t end = field + size;
    while (field < end && read<uint16_t>(field) != kSizesOf64Bits) field += 4 + read<uint16_t>(field + 2);
    return field < end ? read<uint64_t>(field + 4) : bytes;
  }

  template <typename T>
  T read(uint64_t at) const {
    const auto bytes = file_.bytes();
    if (bytes.size() < sizeof(T) || at > bytes.size() - sizeof(T)) refuse();
    T value;
    std::memcpy(&value, bytes.data() + at, sizeof(T));
    return value;
  }

  [[noreturn]] void refuse() const {
    fail(ErrorCode::kCorrupt, "{}: damaged or truncated zip archive: no directory at its end",
         file_.path().string());
  }

  const MappedFile& file_;
};

class TorchPickleSource : public TensorSource {
 public:
  explicit TorchPickleSource(const std::filesystem::path& path) : file_(MappedFile::open(path)) {
    refuse_bare_pickle();
    refuse_impossible_sizes();
    try {
      Archive archive(std::make_shared<MappingAdapter>(file_));
      refuse_big_endian(archive);
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

  /// Deflate makes at most 1032 bytes of one: records that claim more would only take memory, which
  /// libtorch's reader gives to the record "version" as soon as it is made.
  void refuse_impossible_sizes() const {
    constexpr size_t kMostOfOneByte = 1032;
    const uint64_t claimed = ZipDirectory(*file_).unpacked_bytes();
    if (claimed / kMostOfOneByte > file_->bytes().size())
      fail(ErrorCode::kCorrupt, "{}: its records claim to hold {} bytes, which a file of {} cannot",
           path().string(), claimed, file_->bytes().size());
  }

  void refuse_big_endian(Archive& archive) const {
    if (!archive.hasRecord("byteorder")) return;
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
