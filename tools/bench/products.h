#pragma once
// The packed product on real layer shapes, beside the dense one and the ceilings of the machine.

#include <cstdint>
#include <string>
#include <vector>

namespace stbllm::bench {

struct ProductOptions {
  std::vector<std::string> models = {"llama2-7b"};
  std::vector<std::string> layouts = {
      "1:8", "1:4", "2:8", "3:8", "2:4", "4:8", "8:8", "2:4x3", "4:8x3/fp16+salient"};
  std::vector<int64_t> tokens = {1, 4, 16, 512};
  std::vector<std::string> backends = {"cpu"};
  std::vector<int> threads = {1};
  std::string type = "bf16";
  double min_seconds = 0.3;
  int64_t cold_mib = 96;
  bool dense = true;
  std::string json;
};

void measure_products(const ProductOptions& options);

}  // namespace stbllm::bench
