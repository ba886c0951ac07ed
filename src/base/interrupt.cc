#include "stbllm/base/interrupt.h"

#include <atomic>

#include "stbllm/base/error.h"

namespace stbllm {
namespace {

std::atomic<bool> g_interrupt{false};

}  // namespace

void request_interrupt() { g_interrupt = true; }

void check_interrupt() {
  if (g_interrupt.exchange(false)) fail(ErrorCode::kInterrupted, "interrupted");
}

}  // namespace stbllm
