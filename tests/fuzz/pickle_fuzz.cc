// The pickle of a pytorch_model.bin without the zip archive around it, whose checksum would keep changed
// bytes from being read.

#include "fuzz/fuzz_target.h"
#include "stbllm/checkpoint/pickle.h"

STBLLM_FUZZ_TARGET(pickle) {
  stbllm::fuzz::allow_error([&] { stbllm::read_state_dict(bytes, "pytorch_model.bin"); });
}
