#pragma once
// Stops a long run at a place where nothing is lost.

namespace stbllm {

/// Asks the run that is going on to stop. A signal handler may call it.
void request_interrupt();

/// Throws Error(kInterrupted) when a stop was asked for since the last call; one request stops one run.
void check_interrupt();

}  // namespace stbllm
