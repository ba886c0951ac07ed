#pragma once
// What this machine can do at best, measured by the program that reports shares of it.

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace stbllm::bench {

struct Ceilings {
  std::vector<double> bandwidth;           ///< bytes per second, streaming reads with 1, 2, ... threads
  std::map<std::string, double> per_core;  ///< operations per second of one instruction, by its name
};

Ceilings measure_ceilings(int threads);

}  // namespace stbllm::bench
