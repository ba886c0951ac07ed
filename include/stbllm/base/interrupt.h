#pragma once
// Stopping a long run where nothing is lost.

namespace stbllm {

/// Asks the run that is going on to stop; safe to call from a signal handler.
void request_interrupt();

/// Throws Error(kInterrupted) when that was asked for. One request stops one run.
void check_interrupt();

}  // namespace stbllm
