#pragma once
// Hidden states of token windows on their way through the decoder blocks. Evaluation, calibration, planning,
// training and verification all push windows through blocks by means of this class.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>

#include "stbllm/model/decoder.h"
#include "stbllm/text/windows.h"

namespace stbllm {

/// Tokens that go through a block in one call: enough for full-speed products, few enough for small
/// intermediates. Shorter windows are batched. The number is fixed because the shape of a product decides how
/// it is rounded.
inline constexpr int64_t kTokensPerPass = 2048;
/// Windows that go through a block in one call.
int64_t windows_per_pass(int64_t seqlen);

/// Token ids (windows, seqlen), int32.
at::Tensor ids_of(std::span<const std::vector<int32_t>> windows);

/// Throws Error(kUsage) when windows are empty, unequal, shorter than two tokens or longer than the model's
/// positions, and Error(kMismatch) for an id beyond the vocabulary.
void check_windows(const ModelSpec& spec, const Windows& windows);
/// Throws Error(kMismatch) for an id that is not in the model's vocabulary.
void check_ids(const ModelSpec& spec, std::span<const int32_t> ids);

struct StreamOptions {
  at::ScalarType dtype = at::kFloat;  ///< of the states between blocks; blocks compute in the decoder's dtype
  int64_t extra = 0;                  ///< the first so many windows go along without being observed
  int64_t holdout = 0;                ///< the last so many are held out
  /// Where the states live in a file without a name, so that they take memory only while they are in use;
  /// empty: they live in memory, on the decoder's device.
  std::filesystem::path spill_directory = {};
};

/// Every pass of windows through a block asks check_interrupt() first; a stream that was interrupted is of no
/// use any more.
class HiddenStream {
 public:
  /// Sees the input (windows, seqlen, cols) of a tap for windows that go through a block together, all of
  /// them held out or none.
  using Observer = std::function<void(Tap, const at::Tensor& inputs, bool held_out)>;

  /// ids (windows, seqlen), whose hidden states enter block 0: those of `decoder`'s embedding. Throws
  /// Error(kWriteFailed) when the disk has no room for a file.
  HiddenStream(const Decoder& decoder, at::Tensor ids, const StreamOptions& options);

  /// Back to block 0, with the embedding that `decoder` has now.
  void embed(const Decoder& decoder);
  /// Puts the outputs of `block` in place of the states; there is never a second copy.
  void advance(const DecoderBlock& block, const Observer& observer = {});
  /// Shows what the taps of `block` see of the windows that are not extra; the states stay.
  void observe(const DecoderBlock& block, const Observer& observer) const;
  /// Goes through `block` from tap to tap, so that its linears can be replaced in between: the first call
  /// stops at the first tap, each further one at the next, and finish_block() puts the outputs in place of
  /// the states. The observer sees the inputs of the tap that is reached; between the calls they live where
  /// the states live. Extra windows go through the block as a whole when it is finished.
  using TapWindows = std::function<void(int64_t first, const at::Tensor& inputs, bool held_out)>;
  void advance_to_next_tap(const DecoderBlock& block, const TapWindows& observer = {});
  void finish_block(const DecoderBlock& block);
  /// The inputs (count, seqlen, cols) of the tap where the stream stands, of windows from `first` on that are
  /// not extra, in the dtype that blocks compute in.
  at::Tensor read_inputs(int64_t first, int64_t count) const;
  /// The hidden states (count, seqlen, hidden) of the same windows that the branch of this tap is added to.
  at::Tensor read_hidden(int64_t first, int64_t count) const { return read(extra() + first, count); }

  /// What `block` makes of all windows, float32 (windows, seqlen, hidden); the states stay.
  at::Tensor outputs(const DecoderBlock& block) const;
  /// A copy of all windows, in memory or in a file as these are.
  HiddenStream copy() const;
  /// A copy of the last `count` windows as a stream of its own, in memory.
  HiddenStream last(int64_t count) const;

  int64_t windows() const { return ids_.size(0); }
  int64_t seqlen() const { return ids_.size(1); }
  int64_t tokens() const { return ids_.numel(); }
  int64_t extra() const { return options_.extra; }
  int64_t holdout() const { return options_.holdout; }
  const at::Tensor& ids() const { return ids_; }
  const Positions& positions() const { return positions_; }
  /// Where windows are read to, wherever the states live.
  at::Device device() const { return device_; }
  /// (windows, seqlen, hidden) as they are.
  const at::Tensor& states() const { return states_; }
  /// A copy (count, seqlen, hidden) of some windows in the dtype that blocks compute in. What lives in a file
  /// leaves memory again.
  at::Tensor read(int64_t first, int64_t count) const;

 private:
  HiddenStream(const HiddenStream& from, int64_t last);
  /// Calls visit(first, count, held_out) for windows that go through a block together, from window `first`
  /// on.
  template <typename Visit>
  void for_each_pass(int64_t first, const Visit& visit) const;
  at::Tensor make_states(int64_t windows, int64_t width) const;
  at::Tensor read(const at::Tensor& from, int64_t first, int64_t count) const;
  static void write(const at::Tensor& to, int64_t first, const at::Tensor& values);

  at::Tensor ids_;
  StreamOptions options_;
  Positions positions_;
  at::ScalarType compute_dtype_;
  at::Device device_;
  at::Tensor states_;
  // Inside a block: the number of taps that were reached, and the inputs of the last one, of windows that are
  // not extra.
  int taps_reached_ = 0;
  at::Tensor inputs_;
};

}  // namespace stbllm
