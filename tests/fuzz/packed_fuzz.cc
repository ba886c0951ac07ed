// A packed file: its planes, what inspect says of them, and its tokenizer.

#include <algorithm>
#include <nlohmann/json.hpp>
#include <vector>

#include "fuzz/fuzz_target.h"
#include "stbllm/pack/ledger.h"
#include "stbllm/pack/packed_file.h"
#include "stbllm/text/tokenizer.h"

namespace {

using stbllm::fuzz::allow_error;

void decode_some(const stbllm::PackedReader& reader) {
  std::vector<float> row;
  for (const auto& [name, matrix] : reader.linears()) {
    const auto& layout = matrix.layout();
    row.resize(static_cast<size_t>(layout.cols));
    matrix.decode_row(layout.rows - 1, row.data());
    for (int64_t col = 0; col < std::min<int64_t>(layout.cols, 300); ++col) matrix.at(0, col);
  }
  for (const auto& [name, rows] : reader.quantized_rows()) {
    row.resize(static_cast<size_t>(rows.layout().cols));
    rows.decode_row(rows.layout().rows - 1, row.data());
  }
}

void read(stbllm::fuzz::Bytes bytes) {
  allow_error([&] {
    const auto reader = stbllm::PackedReader::open(stbllm::fuzz::file_of(bytes, "packed.safetensors"));
    allow_error([&] { reader.verify_checksums(); });
    decode_some(reader);
    stbllm::to_json(stbllm::make_ledger(reader));
    allow_error([&] { stbllm::Tokenizer::from_serialized(reader.metadata("tokenizer")); });
  });
}

}  // namespace

STBLLM_FUZZ_TARGET(packed) {
  if (stbllm::fuzz::is_one_of_eight(bytes)) return read(bytes);
  const std::string repaired = stbllm::fuzz::repaired_safetensors(bytes);
  read(std::as_bytes(std::span(repaired)));
}
