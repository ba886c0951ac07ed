#pragma once
// What all fuzz targets share. A target is a file here that defines one function of bytes: it gives them to a
// reader as a stranger's file would. The reader may take them or throw Error; any other exception, a report
// of a sanitizer, more than ten seconds or more memory than scripts/fuzz.sh allows is a defect.
//
// The same function runs in two programs: libFuzzer calls it with bytes that it makes up (scripts/fuzz.sh),
// and fuzz_regressions_test calls it with every file of corpus/ and regressions/.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <span>
#include <string>

namespace stbllm::fuzz {

using Bytes = std::span<const std::byte>;
using Target = void (*)(Bytes);

/// All targets of this program, by the name of their folder in corpus/.
std::map<std::string, Target>& targets();

/// Calls `action`, which may throw Error; what else it throws passes through.
void allow_error(const std::function<void()>& action);

/// Writes `bytes` to the file `name` in a directory of this process, in memory where the system has
/// /dev/shm, and returns its path. The file of that name from before is replaced; all go at the end.
std::filesystem::path file_of(Bytes bytes, const std::string& name);

inline std::string text_of(Bytes bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

/// A safetensors file whose header length is where its JSON ends, and whose "header_checksum", where it has
/// one, is right. Most changes of a header then reach what lies behind these two checks.
std::string repaired_safetensors(Bytes bytes);

/// True for about one in eight inputs, always the same ones.
bool is_one_of_eight(Bytes bytes);

struct Registration {
  Registration(const char* name, Target target) { targets()[name] = target; }
};

}  // namespace stbllm::fuzz

// STBLLM_FUZZ_TARGET(name) { statements about `bytes` }
#ifdef STBLLM_LIBFUZZER
#define STBLLM_FUZZ_ENTRY()                                                        \
  extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {        \
    stbllm::fuzz::targets().begin()->second(std::as_bytes(std::span(data, size))); \
    return 0;                                                                      \
  }
#else
#define STBLLM_FUZZ_ENTRY()
#endif
#define STBLLM_FUZZ_TARGET(name)                                                      \
  static void fuzz_##name(stbllm::fuzz::Bytes bytes);                                 \
  static const stbllm::fuzz::Registration registration_of_##name(#name, fuzz_##name); \
  STBLLM_FUZZ_ENTRY()                                                                 \
  static void fuzz_##name(stbllm::fuzz::Bytes bytes)
