#include "stbllm/model/hidden_stream.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <array>

#include "spill.h"
#include "stbllm/base/error.h"
#include "stbllm/base/interrupt.h"

namespace stbllm {

int64_t windows_per_pass(int64_t seqlen) { return std::max<int64_t>(1, kTokensPerPass / seqlen); }

at::Tensor ids_of(std::span<const std::vector<int32_t>> windows) {
  const auto seqlen = static_cast<int64_t>(windows.front().size());
  at::Tensor ids = at::empty({std::ssize(windows), seqlen}, at::kInt);
  for (size_t i = 0; i < windows.size(); ++i)
    std::ranges::copy(windows[i], ids.data_ptr<int32_t>() + static_cast<int64_t>(i) * seqlen);
  return ids;
}

void check_windows(const ModelSpec& spec, const Windows& windows) {
  if (windows.empty()) fail(ErrorCode::kUsage, "at least one window of tokens is needed");
  const size_t seqlen = windows.front().size();
  if (seqlen < 2 || static_cast<int64_t>(seqlen) > spec.max_positions)
    fail(ErrorCode::kUsage, "windows of {} tokens cannot be evaluated; this model takes 2 to {}", seqlen,
         spec.max_positions);
  for (const std::vector<int32_t>& window : windows) {
    if (window.size() != seqlen)
      fail(ErrorCode::kUsage, "windows have {} and {} tokens; they must be equally long", seqlen,
           window.size());
    check_ids(spec, window);
  }
}

void check_ids(const ModelSpec& spec, std::span<const int32_t> ids) {
  for (const int32_t id : ids)
    if (id < 0 || id >= spec.vocab)
      fail(ErrorCode::kMismatch, "token id {} is not in the model's vocabulary of {}; is this its tokenizer?",
           id, spec.vocab);
}

HiddenStream::HiddenStream(const Decoder& decoder, at::Tensor ids, const StreamOptions& options)
    : ids_(std::move(ids)),
      options_(options),
      positions_(decoder.positions(0, ids_.size(1))),
      compute_dtype_(decoder.dtype()),
      device_(decoder.device()) {
  states_ = make_states(windows(), decoder.spec().hidden);
  embed(decoder);
}

at::Tensor HiddenStream::make_states(int64_t windows, int64_t width) const {
  const std::array<int64_t, 3> sizes = {windows, seqlen(), width};
  return options_.spill_directory.empty()
             ? at::empty(sizes, at::TensorOptions().dtype(options_.dtype).device(device_))
             : spilled_tensor(sizes, options_.dtype, options_.spill_directory);
}

HiddenStream::HiddenStream(const HiddenStream& from, int64_t last)
    : ids_(from.ids_.narrow(0, from.windows() - last, last)),
      options_{.dtype = from.options_.dtype, .holdout = std::min(last, from.holdout())},
      positions_(from.positions_),
      compute_dtype_(from.compute_dtype_),
      device_(from.device_),
      states_(from.states_.narrow(0, from.windows() - last, last)
                  .to(device_, /*non_blocking=*/false,
                      /*copy=*/true)) {}

HiddenStream HiddenStream::last(int64_t count) const { return {*this, count}; }

HiddenStream HiddenStream::copy() const {
  HiddenStream result = *this;
  result.states_ = make_states(windows(), states_.size(-1));
  for (int64_t w = 0; w < windows(); ++w) {
    check_interrupt();
    write(result.states_, w, states_.narrow(0, w, 1));
    release_spilled(states_.narrow(0, w, 1));
  }
  return result;
}

template <typename Visit>
void HiddenStream::for_each_pass(int64_t first, const Visit& visit) const {
  const int64_t step = windows_per_pass(seqlen());
  // Extra, training and held-out windows go apart, so that none depends on how many the others are.
  for (const int64_t end : {extra(), windows() - holdout(), windows()})
    while (first < end) {
      check_interrupt();
      const int64_t count = std::min(step, end - first);
      visit(first, count, /*held_out=*/first >= windows() - holdout());
      first += count;
    }
}

void HiddenStream::embed(const Decoder& decoder) {
  const at::NoGradGuard no_grad;
  for_each_pass(0, [&](int64_t first, int64_t count, bool) {
    write(states_, first, decoder.embed(ids_.narrow(0, first, count)));
  });
}

void HiddenStream::advance(const DecoderBlock& block, const Observer& observer) {
  const at::NoGradGuard no_grad;
  for_each_pass(0, [&](int64_t first, int64_t count, bool held_out) {
    TapObserver watch;
    if (observer && first >= extra())
      watch = [&](Tap tap, const at::Tensor& inputs) { observer(tap, inputs, held_out); };
    write(states_, first, block.forward(read(first, count), positions_, watch));
  });
}

void HiddenStream::advance_to_next_tap(const DecoderBlock& block, const TapWindows& observer) {
  const at::NoGradGuard no_grad;
  STBLLM_CHECK(taps_reached_ < kTapCount, "all taps of block {} were reached", block.index());
  at::Tensor reached;
  for_each_pass(extra(), [&](int64_t first, int64_t count, bool held_out) {
    BlockPass pass;
    if (taps_reached_ == 0) {
      pass = block.begin(read(first, count), positions_);
    } else {
      pass = {.hidden = read(first, count), .input = read_inputs(first - extra(), count)};
      block.proceed(pass, kTaps[taps_reached_ - 1], positions_);
      if (kTaps[taps_reached_] == Tap::kMlpIn) write(states_, first, pass.hidden);
    }
    if (observer) observer(first - extra(), pass.input, held_out);
    if (!reached.defined()) reached = make_states(windows() - extra(), pass.input.size(-1));
    write(reached, first - extra(), pass.input);
  });
  inputs_ = reached;
  ++taps_reached_;
}

void HiddenStream::finish_block(const DecoderBlock& block) {
  const at::NoGradGuard no_grad;
  STBLLM_CHECK(taps_reached_ == kTapCount, "{} taps of block {} were reached", taps_reached_, block.index());
  for_each_pass(0, [&](int64_t first, int64_t count, bool) {
    if (first < extra()) {
      write(states_, first, block.forward(read(first, count), positions_));
      return;
    }
    BlockPass pass{.hidden = read(first, count), .input = read_inputs(first - extra(), count)};
    block.proceed(pass, Tap::kMlpMid, positions_);
    write(states_, first, pass.hidden);
  });
  inputs_.reset();
  taps_reached_ = 0;
}

void HiddenStream::observe(const DecoderBlock& block, const Observer& observer) const {
  const at::NoGradGuard no_grad;
  for_each_pass(extra(), [&](int64_t first, int64_t count, bool held_out) {
    block.forward(read(first, count), positions_,
                  [&](Tap tap, const at::Tensor& inputs) { observer(tap, inputs, held_out); });
  });
}

at::Tensor HiddenStream::outputs(const DecoderBlock& block) const {
  const at::NoGradGuard no_grad;
  at::Tensor result = at::empty(states_.sizes(), at::TensorOptions().dtype(at::kFloat).device(device_));
  for_each_pass(0, [&](int64_t first, int64_t count, bool) {
    result.narrow(0, first, count).copy_(block.forward(read(first, count), positions_));
  });
  return result;
}

at::Tensor HiddenStream::read(int64_t first, int64_t count) const { return read(states_, first, count); }

at::Tensor HiddenStream::read_inputs(int64_t first, int64_t count) const {
  return read(inputs_, first, count);
}

at::Tensor HiddenStream::read(const at::Tensor& from, int64_t first, int64_t count) const {
  const at::Tensor part = from.narrow(0, first, count);
  at::Tensor copy = part.to(device_, compute_dtype_);
  if (!copy.is_alias_of(part)) release_spilled(part);
  return copy;
}

void HiddenStream::write(const at::Tensor& to, int64_t first, const at::Tensor& values) {
  const at::Tensor part = to.narrow(0, first, values.size(0));
  part.copy_(values);
  release_spilled(part);
}

}  // namespace stbllm
