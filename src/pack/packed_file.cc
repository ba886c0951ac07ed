#include "stbllm/pack/packed_file.h"

#include <cstring>

#include "stbllm/base/checksum.h"
#include "stbllm/base/error.h"
#include "stbllm/base/json_fields.h"
#include "stbllm/base/parse_json.h"

namespace stbllm {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr std::string_view kFormat = "stbllm-packed";

json to_json(const Layout& layout) {
  return {{"rows", layout.rows},
          {"cols", layout.cols},
          {"nm", layout.nm.str()},
          {"levels", layout.levels},
          {"column_block", layout.column_block},
          {"scale_bits", layout.scale_bits},
          {"salient", layout.salient},
          {"outliers", layout.outliers}};
}

json to_json(const QuantizedRows::Layout& layout) {
  return {{"rows", layout.rows}, {"cols", layout.cols}, {"bits", layout.bits}};
}

NmPattern read_nm(const JsonFields& fields, const std::string& what) {
  try {
    return NmPattern::parse(fields.text("nm", ""));
  } catch (const Error& error) {
    fail(ErrorCode::kCorrupt, "{}: {}", what, error.what());
  }
}

Layout read_layout(const json& object, const std::string& what) {
  const JsonFields fields(object, what + ": ");
  const Layout layout{.rows = fields.integer<int64_t>("rows"),
                      .cols = fields.integer<int64_t>("cols"),
                      .nm = read_nm(fields, what),
                      .levels = fields.integer<int>("levels"),
                      .column_block = fields.integer<int>("column_block"),
                      .scale_bits = fields.integer<int>("scale_bits"),
                      .salient = fields.integer<int64_t>("salient"),
                      .outliers = fields.integer<int64_t>("outliers")};
  fields.expect_size(8);
  layout.validate(what);
  return layout;
}

QuantizedRows::Layout read_rows_layout(const json& object, const std::string& what) {
  const JsonFields fields(object, what + ": ");
  const QuantizedRows::Layout layout{.rows = fields.integer<int64_t>("rows"),
                                     .cols = fields.integer<int64_t>("cols"),
                                     .bits = fields.integer<int>("bits")};
  fields.expect_size(3);
  layout.validate(what);
  return layout;
}

json parse_object(const std::string& text, std::string_view key, const fs::path& path) {
  json object = try_parse_json(text);
  if (!object.is_object())
    fail(ErrorCode::kCorrupt, "{}: metadata '{}': expected a JSON object", path.string(), key);
  return object;
}

std::string plane_tensor(const std::string& name, Plane plane) {
  return fmt::format("{}.{}", name, plane_name(plane));
}

std::string rows_tensor(const std::string& name, int bits) { return fmt::format("{}.q{}", name, bits); }

std::string_view rows_dtype(int bits) { return bits == 8 ? "I8" : "U8"; }

std::string row_scales_tensor(const std::string& name) { return name + ".row_scales"; }

}  // namespace

// --- writing ---------------------------------------------------------------------------------------

PackedWriter::PackedWriter(fs::path path, bool force, const fs::path& scratch)
    : file_(std::move(path), force, scratch) {}

void PackedWriter::add_linear(const std::string& name, const StructuredBinaryMatrix& matrix) {
  const Layout& layout = matrix.layout();
  for (int i = 0; i < kPlaneCount; ++i) {
    const auto plane = static_cast<Plane>(i);
    if (plane_bytes(layout, plane) == 0) continue;
    file_.add(plane_tensor(name, plane), plane_dtype(plane), plane_shape(layout, plane), matrix.plane(plane));
  }
  linears_[name] = to_json(layout);
}

void PackedWriter::add_quantized_rows(const std::string& name, const QuantizedRows& rows) {
  const QuantizedRows::Layout& layout = rows.layout();
  file_.add(rows_tensor(name, layout.bits), rows_dtype(layout.bits), {layout.rows, layout.code_row_bytes()},
            rows.codes());
  file_.add(row_scales_tensor(name), "F16", {layout.rows, layout.column_blocks()}, rows.scales());
  quantized_rows_[name] = to_json(layout);
}

void PackedWriter::add_dense(const std::string& name, std::string_view dtype,
                             const std::vector<int64_t>& shape, std::span<const std::byte> data) {
  file_.add(name, dtype, shape, data);
}

bool PackedWriter::is_own_metadata(std::string_view key) {
  return key == "format" || key == "format_version" || key == "linears" || key == "quantized_rows" ||
         SafetensorsWriter::is_own_metadata(key);
}

void PackedWriter::set_metadata(const std::string& key, std::string value) {
  STBLLM_CHECK(!is_own_metadata(key), "metadata '{}'", key);
  file_.set_metadata(key, std::move(value));
}

fs::path PackedWriter::finish() {
  file_.set_metadata("format", std::string(kFormat));
  file_.set_metadata("format_version", std::to_string(kPackedFormatVersion));
  file_.set_metadata("linears", linears_.dump());
  file_.set_metadata("quantized_rows", quantized_rows_.dump());
  return file_.finish();
}

void PackedWriter::commit() { file_.commit(); }

// --- reading ---------------------------------------------------------------------------------------

PackedReader PackedReader::open(const fs::path& path) {
  PackedReader reader;
  reader.file_ = SafetensorsFile::open(path);
  const auto& metadata = reader.file_->metadata();
  if (const auto format = metadata.find("format"); format == metadata.end() || format->second != kFormat)
    fail(ErrorCode::kUnsupported, "{}: not a packed model; `stbllm quantize` makes one from a checkpoint",
         path.string());
  if (const std::string& version = reader.metadata("format_version");
      version != std::to_string(kPackedFormatVersion))
    fail(ErrorCode::kUnsupported,
         "{}: expected format version {}, found {}: written by another version of stbllm", path.string(),
         kPackedFormatVersion, version);
  reader.metadata("header_checksum");  // compared by SafetensorsFile when there

  // What is left in the end are the dense tensors, which are used in place.
  auto& tensors = reader.dense_ = reader.file_->tensors();
  for (const auto& [name, tensor] : tensors)
    if (reinterpret_cast<uintptr_t>(tensor.data.data()) % static_cast<uintptr_t>(dtype_bytes(tensor.dtype)) !=
        0)
      fail(ErrorCode::kCorrupt, "{}: tensor '{}' of {} does not start at a multiple of its element size",
           path.string(), name, tensor.dtype);
  const auto take = [&](const std::string& name, std::string_view dtype, const std::vector<int64_t>& shape) {
    const auto found = tensors.find(name);
    if (found == tensors.end()) fail(ErrorCode::kCorrupt, "{}: tensor '{}' is missing", path.string(), name);
    if (found->second.dtype != dtype || found->second.shape != shape)
      fail(ErrorCode::kCorrupt, "{}: tensor '{}': expected {} {}, found {} {}", path.string(), name, dtype,
           json(shape).dump(), found->second.dtype, json(found->second.shape).dump());
    const auto data = found->second.data;
    tensors.erase(found);
    return data;
  };

  const json linears = parse_object(reader.metadata("linears"), "linears", path);
  for (const auto& [name, object] : linears.items()) {
    const std::string what = fmt::format("{}: '{}'", path.string(), name);
    const Layout layout = read_layout(object, what);
    StructuredBinaryMatrix::Planes planes;
    for (int i = 0; i < kPlaneCount; ++i) {
      const auto plane = static_cast<Plane>(i);
      if (plane_bytes(layout, plane) == 0) continue;
      planes[i] = take(plane_tensor(name, plane), plane_dtype(plane), plane_shape(layout, plane));
    }
    reader.linears_.emplace(name, StructuredBinaryMatrix(layout, planes, reader.file_, what));
  }
  const json quantized_rows = parse_object(reader.metadata("quantized_rows"), "quantized_rows", path);
  for (const auto& [name, object] : quantized_rows.items()) {
    const std::string what = fmt::format("{}: '{}'", path.string(), name);
    if (reader.linears_.contains(name))
      fail(ErrorCode::kCorrupt, "{}: both a linear and quantized rows", what);
    const QuantizedRows::Layout layout = read_rows_layout(object, what);
    const auto codes =
        take(rows_tensor(name, layout.bits), rows_dtype(layout.bits), {layout.rows, layout.code_row_bytes()});
    const auto scales = take(row_scales_tensor(name), "F16", {layout.rows, layout.column_blocks()});
    reader.quantized_rows_.emplace(name, QuantizedRows(layout, codes, scales, reader.file_, what));
  }
  return reader;
}

const TensorEntry& PackedReader::dense(const std::string& name) const {
  const auto found = dense_.find(name);
  if (found == dense_.end())
    fail(ErrorCode::kMismatch, "{}: tensor '{}' is missing", file_->file()->path().string(), name);
  return found->second;
}

const std::string& PackedReader::metadata(const std::string& key) const {
  const auto found = file_->metadata().find(key);
  if (found == file_->metadata().end())
    fail(ErrorCode::kCorrupt, "{}: metadata '{}' is missing", file_->file()->path().string(), key);
  return found->second;
}

json PackedReader::config() const {
  json value = try_parse_json(metadata("config"));
  if (value.is_discarded())
    fail(ErrorCode::kCorrupt, "{}: its metadata \"config\" is not valid JSON",
         file_->file()->path().string());
  return value;
}

json PackedReader::remark(const std::string& key) const {
  const auto found = file_->metadata().find(key);
  if (found == file_->metadata().end()) return nullptr;
  json value = try_parse_json(found->second);
  return value.is_discarded() ? json(found->second) : value;
}

int64_t PackedReader::file_bytes() const { return std::ssize(file_->file()->bytes()); }

void PackedReader::verify_checksums() const {
  const fs::path& path = file_->file()->path();
  const json checksums = parse_object(metadata("checksums"), "checksums", path);
  for (const auto& [name, tensor] : file_->tensors()) {
    const std::string found = checksum(tensor.data);
    const auto expected = checksums.find(name);
    if (expected == checksums.end() || *expected != found)
      fail(ErrorCode::kCorrupt,
           "{}: tensor '{}': expected checksum {}, found {}: damaged; copy or make the file anew",
           path.string(), name, expected == checksums.end() ? "none" : expected->dump(), found);
  }
}

}  // namespace stbllm
