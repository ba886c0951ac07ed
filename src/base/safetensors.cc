#include "stbllm/base/safetensors.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "stbllm/base/checksum.h"
#include "stbllm/base/durable_file.h"
#include "stbllm/base/error.h"

namespace stbllm {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

static_assert(std::endian::native == std::endian::little, "tensors are little-endian and used in place");

constexpr std::array<std::pair<std::string_view, int64_t>, 17> kDtypeBytes = {{
    {"BOOL", 1},
    {"U8", 1},
    {"I8", 1},
    {"F8_E5M2", 1},
    {"F8_E4M3", 1},
    {"F8_E8M0", 1},
    {"U16", 2},
    {"I16", 2},
    {"F16", 2},
    {"BF16", 2},
    {"U32", 4},
    {"I32", 4},
    {"F32", 4},
    {"U64", 8},
    {"I64", 8},
    {"F64", 8},
    {"C64", 8},
}};

constexpr int64_t kDataAlignment = 256;
constexpr std::string_view kMetadata = "__metadata__", kChecksums = "checksums",
                           kHeaderChecksum = "header_checksum";
constexpr std::string_view kNoChecksum = "0000000000000000";

// The checksum of all bytes before the data, in which its own digits are taken as '0'. The text that is
// searched for can only be a member's name and start of value, because quotes within strings are escaped.
std::string header_checksum(std::string header) {
  const std::string member = fmt::format("\"{}\":\"", kHeaderChecksum);
  const size_t at = header.find(member);
  if (at != std::string::npos) header.replace(at + member.size(), kNoChecksum.size(), kNoChecksum);
  return checksum(std::as_bytes(std::span(header)));
}

// The header as JSON. The parser alone would accept equal keys, of which it keeps the last, and any nesting.
json parse_header(std::string_view text, const std::string& path) {
  std::vector<std::set<std::string>> keys;  // of the objects that are open
  const auto check = [&](int depth, json::parse_event_t event, json& parsed) {
    using Event = json::parse_event_t;
    if ((event == Event::object_start || event == Event::array_start) && depth > 2)
      fail(ErrorCode::kCorrupt, "{}: header: nested too deeply", path);
    if (event == Event::object_start) keys.emplace_back();
    if (event == Event::object_end) keys.pop_back();
    if (event == Event::key && !keys.back().insert(parsed.get<std::string>()).second)
      fail(ErrorCode::kCorrupt, "{}: header: key '{}' appears twice", path, parsed.get<std::string>());
    return true;
  };
  try {
    json header = json::parse(text, check);
    if (header.is_object()) return header;
  } catch (const json::exception&) {
  }
  fail(ErrorCode::kCorrupt, "{}: the header is not a JSON object: damaged, or not a safetensors file", path);
}

// The member `key`, which must be an array of numbers in 0..2^63-1.
std::vector<int64_t> read_numbers(const json& tensor, const char* key, const std::string& path,
                                  const std::string& name) {
  const auto found = tensor.find(key);
  constexpr size_t kMostNumbers = 64;  // torch and numpy have no more dimensions either
  bool ok = found != tensor.end() && found->is_array() && found->size() <= kMostNumbers;
  std::vector<int64_t> numbers;
  for (size_t i = 0; ok && i < found->size(); ++i) {
    const json& number = (*found)[i];
    ok = number.is_number_unsigned() && number.get<uint64_t>() <= std::numeric_limits<int64_t>::max();
    if (ok) numbers.push_back(number.get<int64_t>());
  }
  if (!ok)
    fail(ErrorCode::kCorrupt, "{}: tensor '{}': expected '{}' to be an array of sizes", path, name, key);
  return numbers;
}

// The number of bytes of a tensor, or -1 when it does not fit in 63 bits. A tensor without elements is held
// to that as well, because its strides are products of its other sizes.
int64_t tensor_bytes(std::string_view dtype, const std::vector<int64_t>& shape) {
  int64_t bytes = dtype_bytes(dtype);
  for (const int64_t extent : shape)
    if (__builtin_mul_overflow(bytes, std::max<int64_t>(extent, 1), &bytes)) return -1;
  return std::ranges::find(shape, 0) != shape.end() ? 0 : bytes;
}

std::string list(const std::vector<int64_t>& numbers) {
  std::string text;
  for (const int64_t number : numbers) text += (text.empty() ? "" : ", ") + std::to_string(number);
  return "[" + text + "]";
}

}  // namespace

int64_t dtype_bytes(std::string_view dtype) {
  const auto found = std::ranges::find(kDtypeBytes, dtype, [](const auto& entry) { return entry.first; });
  return found == kDtypeBytes.end() ? 0 : found->second;
}

// --- reading ---------------------------------------------------------------------------------------

std::shared_ptr<const SafetensorsFile> SafetensorsFile::open(const fs::path& path) {
  auto result = std::make_shared<SafetensorsFile>();
  result->file_ = MappedFile::open(path);
  const std::span<const std::byte> bytes = result->file_->bytes();
  const std::string where = path.string();

  uint64_t header_bytes = 0;
  if (bytes.size() < sizeof header_bytes)
    fail(ErrorCode::kCorrupt, "{}: {} bytes are too few for a safetensors file", where, bytes.size());
  std::memcpy(&header_bytes, bytes.data(), sizeof header_bytes);
  if (bytes.size() >= 4 && std::memcmp(bytes.data(), "GGUF", 4) == 0)
    fail(ErrorCode::kUnsupported, "{}: this is a GGUF file, and safetensors are read", where);
  if (header_bytes > std::min<uint64_t>(bytes.size() - sizeof header_bytes, kMaxSafetensorsHeader))
    fail(ErrorCode::kCorrupt,
         "{}: a header of {} bytes in a file of {}: truncated, or not a safetensors file", where,
         header_bytes, bytes.size());
  const auto* text = reinterpret_cast<const char*>(bytes.data());
  const size_t data_start = sizeof header_bytes + header_bytes;
  const json header = parse_header({text + sizeof header_bytes, header_bytes}, where);
  const std::span<const std::byte> data = bytes.subspan(data_start);

  std::vector<std::pair<std::array<int64_t, 2>, std::string>> ranges;
  for (const auto& [name, value] : header.items()) {
    if (name == kMetadata) {
      if (!value.is_object()) fail(ErrorCode::kCorrupt, "{}: expected '{}' to be an object", where, name);
      for (const auto& [key, string] : value.items()) {
        if (!string.is_string())
          fail(ErrorCode::kCorrupt, "{}: metadata '{}': expected a string", where, key);
        result->metadata_[key] = string.get<std::string>();
      }
      continue;
    }
    if (std::ranges::any_of(name, [](char c) { return static_cast<unsigned char>(c) < ' ' || c == '\x7f'; }))
      fail(ErrorCode::kCorrupt, "{}: the name of tensor '{}' holds control characters", where, name);
    if (!value.is_object() || !value.contains("dtype") || !value["dtype"].is_string())
      fail(ErrorCode::kCorrupt, "{}: tensor '{}': expected an object with a dtype", where, name);
    TensorEntry tensor{
        .dtype = value["dtype"], .shape = read_numbers(value, "shape", where, name), .data = {}};
    const std::vector<int64_t> offsets = read_numbers(value, "data_offsets", where, name);
    if (dtype_bytes(tensor.dtype) == 0)
      fail(ErrorCode::kCorrupt, "{}: tensor '{}': unknown dtype '{}'", where, name, tensor.dtype);
    if (offsets.size() != 2 || offsets[0] > offsets[1] || offsets[1] > std::ssize(data))
      fail(ErrorCode::kCorrupt,
           "{}: tensor '{}': data_offsets {} are not a range within {} bytes of data: truncated?", where,
           name, list(offsets), data.size());
    if (tensor_bytes(tensor.dtype, tensor.shape) != offsets[1] - offsets[0])
      fail(ErrorCode::kCorrupt, "{}: tensor '{}': shape {} of {} does not fit {} bytes", where, name,
           list(tensor.shape), tensor.dtype, offsets[1] - offsets[0]);
    tensor.data = data.subspan(static_cast<size_t>(offsets[0]), static_cast<size_t>(offsets[1] - offsets[0]));
    ranges.push_back({{offsets[0], offsets[1]}, name});
    result->tensors_.emplace(name, std::move(tensor));
  }

  std::ranges::sort(ranges);
  int64_t end = 0;
  for (const auto& [range, name] : ranges) {
    if (range[0] != end)
      fail(ErrorCode::kCorrupt, "{}: tensor '{}' starts at byte {} of the data where {} was expected: {}",
           where, name, range[0], end, range[0] < end ? "tensors overlap" : "a hole");
    end = range[1];
  }
  if (end != std::ssize(data))
    fail(ErrorCode::kCorrupt, "{}: expected {} bytes of data, found {}", where, end, data.size());

  const auto expected = result->metadata_.find(std::string(kHeaderChecksum));
  if (expected != result->metadata_.end() && header_checksum({text, data_start}) != expected->second)
    fail(ErrorCode::kCorrupt, "{}: the header does not match its checksum: damaged or edited", where);
  return result;
}

// --- writing ---------------------------------------------------------------------------------------

namespace {

void refuse_existing(const fs::path& path) {
  // Where nothing can be looked up nothing can be created either, and that error will be clearer.
  std::error_code ignored;
  if (fs::exists(fs::symlink_status(path, ignored)))
    fail(ErrorCode::kExists, "{}: exists already; use --force to replace it", path.string());
}

}  // namespace

struct SafetensorsWriter::Impl {
  struct Tensor {
    std::string dtype;
    std::vector<int64_t> shape;
    int64_t spool_offset, bytes;
    std::string checksum;
  };

  fs::path path;
  bool force;
  fs::path stem;  // of temporary files
  TemporaryFile spool;
  int64_t spooled = 0;
  std::map<std::string, Tensor> tensors;
  std::map<std::string, std::string> metadata;
  std::unique_ptr<TemporaryFile> output;  // after finish()

  Impl(fs::path target, bool replace, const fs::path& scratch)
      : path(std::move(target)),
        force(replace),
        stem(scratch.empty() ? path : scratch / path.filename()),
        spool(stem) {}
};

SafetensorsWriter::SafetensorsWriter(fs::path path, bool force, const fs::path& scratch) {
  if (fs::is_directory(path))
    fail(ErrorCode::kWriteFailed, "{}: is a directory; expected a file name", path.string());
  if (!force) refuse_existing(path);
  impl_ = std::make_unique<Impl>(std::move(path), force, scratch);
  impl_->spool.remove_name();
}

SafetensorsWriter::~SafetensorsWriter() = default;

void SafetensorsWriter::add(const std::string& name, std::string_view dtype,
                            const std::vector<int64_t>& shape, std::span<const std::byte> data) {
  STBLLM_CHECK(dtype_bytes(dtype) > 0 && tensor_bytes(dtype, shape) == std::ssize(data),
               "tensor '{}': {} {} in {} bytes", name, dtype, list(shape), data.size());
  STBLLM_CHECK(name != kMetadata && !impl_->tensors.contains(name) && !impl_->output, "tensor '{}'", name);
  impl_->spool.write(data);
  impl_->tensors[name] = {std::string(dtype), shape, impl_->spooled, std::ssize(data), checksum(data)};
  impl_->spooled += std::ssize(data);
}

bool SafetensorsWriter::is_own_metadata(std::string_view key) {
  return key == kChecksums || key == kHeaderChecksum;
}

void SafetensorsWriter::set_metadata(const std::string& key, std::string value) {
  STBLLM_CHECK(!is_own_metadata(key) && !impl_->output, "metadata '{}'", key);
  try {
    json(value).dump();
  } catch (const json::exception&) {
    fail(ErrorCode::kUnsupported, "metadata '{}': expected UTF-8 text", key);
  }
  impl_->metadata[key] = std::move(value);
}

fs::path SafetensorsWriter::finish() {
  STBLLM_CHECK(!impl_->output, "{}: finished twice", impl_->path.string());

  std::vector<const std::pair<const std::string, Impl::Tensor>*> order;
  for (const auto& entry : impl_->tensors) order.push_back(&entry);
  std::ranges::stable_sort(order, std::greater{},
                           [](const auto* entry) { return dtype_bytes(entry->second.dtype); });

  json header = json::object(), checksums = json::object();
  int64_t offset = 0;
  for (const auto* entry : order) {
    const auto& [name, tensor] = *entry;
    header[name] = {
        {"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {offset, offset + tensor.bytes}}};
    checksums[name] = tensor.checksum;
    offset += tensor.bytes;
  }
  header[kMetadata] = impl_->metadata;
  header[kMetadata][kChecksums] = checksums.dump();
  header[kMetadata][kHeaderChecksum] = kNoChecksum;

  std::string text = header.dump();
  uint64_t header_bytes = text.size();
  header_bytes += (kDataAlignment - (sizeof header_bytes + header_bytes) % kDataAlignment) % kDataAlignment;
  if (header_bytes > kMaxSafetensorsHeader)
    fail(ErrorCode::kUnsupported, "{}: a header of {} bytes; the format allows {}", impl_->path.string(),
         header_bytes, kMaxSafetensorsHeader);
  text.resize(header_bytes, ' ');
  std::string start(sizeof header_bytes, '\0');
  std::memcpy(start.data(), &header_bytes, sizeof header_bytes);
  start += text;
  const std::string blank = fmt::format("\"{}\":\"{}\"", kHeaderChecksum, kNoChecksum);
  start.replace(start.find(blank), blank.size(),
                fmt::format("\"{}\":\"{}\"", kHeaderChecksum, header_checksum(start)));

  auto output = std::make_unique<TemporaryFile>(impl_->stem);
  output->write(std::as_bytes(std::span(start)));
  std::vector<std::byte> buffer(1 << 20);
  for (const auto* entry : order) {
    const Impl::Tensor& tensor = entry->second;
    for (int64_t done = 0; done < tensor.bytes;) {
      const auto chunk =
          std::span(buffer).first(std::min(buffer.size(), static_cast<size_t>(tensor.bytes - done)));
      impl_->spool.read(tensor.spool_offset + done, chunk);
      output->write(chunk);
      done += std::ssize(chunk);
    }
  }
  impl_->output = std::move(output);
  return impl_->output->path();
}

void SafetensorsWriter::commit() {
  STBLLM_CHECK(impl_->output, "{}: commit() before finish()", impl_->path.string());
  if (!impl_->force) refuse_existing(impl_->path);
  impl_->output->rename(impl_->path);
}

}  // namespace stbllm
