#pragma once
// A text to calibrate and evaluate tiny models on.

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>

namespace stbllm::test {

/// `words` words of a small vocabulary in an order that does not repeat.
inline std::string calibration_text(int words, uint64_t seed) {
  static constexpr const char* kWords[] = {"the", "and",   "a",     "cat", "sat",  "on",     "mat",
                                           "in",  "rain",  "while", "it",  "read", "better", "of",
                                           "7",   "times", "\n",    "he",  "went", "out."};
  std::string text;
  for (int i = 0; i < words; ++i) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;  // Knuth's MMIX generator
    text += kWords[(seed >> 33) % std::size(kWords)];
    text += ' ';
  }
  return text;
}

/// The same in a file of `directory`; returns its path.
inline std::string write_calibration_text(const std::filesystem::path& directory, int words = 4000,
                                          uint64_t seed = 1) {
  const std::filesystem::path path = directory / ("text-" + std::to_string(seed) + ".txt");
  std::ofstream(path, std::ios::binary) << calibration_text(words, seed);
  return path.string();
}

}  // namespace stbllm::test
