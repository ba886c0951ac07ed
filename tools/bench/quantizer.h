#pragma once
// The stages of the quantizer on the linears of real models, beside the ceilings of the machine.

#include <cstdint>
#include <string>
#include <vector>

namespace stbllm::bench {

struct QuantizerOptions {
  std::vector<std::string> models = {"smollm2", "llama2-7b"};
  std::vector<std::string> recipes = {"stbllm", "stbllm-paper"};
  int64_t tokens = 4096;
  int threads = 0;  ///< 0: all
  double min_seconds = 1;
  std::string json;
};

void measure_quantizer(const QuantizerOptions& options);

}  // namespace stbllm::bench
