// The model of a packed file, whose config.json a stranger wrote too: three tokens go through it.

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>

#include "fuzz/fuzz_target.h"
#include "stbllm/backend/backend.h"
#include "stbllm/model/decoder.h"
#include "stbllm/pack/packed_file.h"

STBLLM_FUZZ_TARGET(packed_model) {
  const std::string file = stbllm::fuzz::repaired_safetensors(bytes);
  stbllm::fuzz::allow_error([&] {
    const auto reader = stbllm::PackedReader::open(
        stbllm::fuzz::file_of(std::as_bytes(std::span(file)), "packed.safetensors"));
    const c10::InferenceMode inference;
    const auto decoder =
        stbllm::Decoder::from_packed(reader, stbllm::find_backend("cpu-generic"), at::kFloat);
    const int64_t tokens = std::min<int64_t>(3, decoder.spec().max_positions);
    decoder.logits(decoder.forward(at::zeros({1, tokens}, at::kInt)));
  });
}
