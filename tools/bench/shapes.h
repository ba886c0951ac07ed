#pragma once
// The linears of real models.

#include <cstdint>
#include <string>
#include <vector>

namespace stbllm::bench {

struct Shape {
  std::string model, layer;
  int64_t rows, cols;
  int64_t linears;  ///< of this shape, in the whole model
  int64_t taps;     ///< inputs that these linears are the first to read: q, k, v share one, so do gate and up
};

inline const std::vector<Shape> kShapes = {
    {"smollm2", "q/o", 576, 576, 60, 60},           {"smollm2", "k/v", 192, 576, 60, 0},
    {"smollm2", "gate/up", 1536, 576, 60, 30},      {"smollm2", "down", 576, 1536, 30, 30},
    {"opt-1.3b", "attention", 2048, 2048, 96, 48},  {"opt-1.3b", "fc1", 8192, 2048, 24, 24},
    {"opt-1.3b", "fc2", 2048, 8192, 24, 24},        {"llama2-7b", "attention", 4096, 4096, 128, 64},
    {"llama2-7b", "gate/up", 11008, 4096, 64, 32},  {"llama2-7b", "down", 4096, 11008, 32, 32},
    {"llama3-8b", "q/o", 4096, 4096, 64, 64},       {"llama3-8b", "k/v", 1024, 4096, 64, 0},
    {"llama3-8b", "gate/up", 14336, 4096, 64, 32},  {"llama3-8b", "down", 4096, 14336, 32, 32},
    {"mistral-7b", "q/o", 4096, 4096, 64, 64},      {"mistral-7b", "k/v", 1024, 4096, 64, 0},
    {"mistral-7b", "gate/up", 14336, 4096, 64, 32}, {"mistral-7b", "down", 4096, 14336, 32, 32},
};

}  // namespace stbllm::bench
