#include "stbllm/pipeline/quantize_model.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <fstream>

#include "stbllm/backend/backend.h"
#include "stbllm/base/error.h"
#include "stbllm/base/log.h"
#include "stbllm/base/profile.h"
#include "stbllm/model/decoder.h"
#include "stbllm/pack/packed_file.h"
#include "stbllm/pipeline/assemble.h"
#include "stbllm/pipeline/distill.h"
#include "stbllm/pipeline/quantize_block.h"
#include "stbllm/pipeline/tune.h"
#include "stbllm/pipeline/work_directory.h"
#include "stbllm/plan/allocate.h"
#include "stbllm/quantize/nm_select.h"
#include "stbllm/text/corpus.h"
#include "stbllm/text/tokenizer.h"

namespace stbllm {
namespace {

namespace fs = std::filesystem;

std::atomic<bool> g_interrupt{false};

/// Windows whose logits are compared after packing.
constexpr size_t kVerifiedWindows = 2;

at::Tensor ids_of(const Windows& windows, size_t count) {
  at::Tensor ids = at::empty({static_cast<int64_t>(count), static_cast<int64_t>(windows[0].size())}, at::kInt);
  for (size_t i = 0; i < count; ++i)
    std::copy(windows[i].begin(), windows[i].end(), ids.data_ptr<int32_t>() + i * windows[0].size());
  return ids;
}

/// L2 norm of the weights of each block.
std::vector<double> block_norms(const Checkpoint& checkpoint, const ModelSpec& spec) {
  std::vector<double> norms;
  for (int64_t i = 0; i < spec.layers; ++i) {
    double sum = 0;
    for (const LinearSpec& linear : spec.linears(i)) {
      const TensorSpec weight = linear.weight();
      sum += checkpoint.load(weight.name, weight.shape).to(at::kFloat).square().sum(1, false, at::kDouble).sum().item<double>();
      checkpoint.release(weight.name);
    }
    norms.push_back(std::sqrt(sum));
  }
  return norms;
}

/// Percent of scores |W_ij| S_j above 6x the mean score of their block, from a dense pass over the calibration windows.
std::vector<double> block_outlier_shares(const Decoder& decoder, at::Tensor hidden) {
  const ModelSpec& spec = decoder.spec();
  std::vector<double> shares;
  log::Progress progress("scores for the outlier allocation: block", spec.layers);
  for (int64_t i = 0; i < spec.layers; ++i) {
    const auto block = decoder.block(i);
    std::array<at::Tensor, kTapCount> norm_sq;
    hidden = run_block(*block, spec, hidden, -1, [&](Tap tap, const at::Tensor& inputs, bool) {
      at::Tensor& sum = norm_sq[static_cast<size_t>(tap)];
      const at::Tensor squares = inputs.reshape({-1, inputs.size(-1)}).square().sum(0);
      sum = sum.defined() ? sum + squares : squares;
    });
    double total = 0, above = 0;
    int64_t count = 0;
    std::vector<at::Tensor> scores;
    for (const LinearSpec& linear : block->linears()) {
      const at::Tensor weight = dynamic_cast<const DenseLinear&>(block->linear(linear.role)).weight();
      scores.push_back(importance(weight.t().contiguous(), norm_sq[static_cast<size_t>(linear.tap)], {}, Importance::kWanda));
      total += scores.back().sum(1, false, at::kDouble).sum().item<double>();
      count += scores.back().numel();
    }
    const float threshold = static_cast<float>(6 * total / static_cast<double>(count));
    for (const at::Tensor& score : scores) above += score.gt(threshold).sum().item<double>();
    shares.push_back(100 * above / static_cast<double>(count));
    progress.update(i + 1);
  }
  return shares;
}

std::vector<NmPattern> plan_blocks(const Checkpoint& checkpoint, const Decoder& decoder, const at::Tensor& hidden, const Recipe& recipe) {
  const StageTimer timer("plan");
  switch (recipe.allocation) {
    case Allocation::kNorm:
      return allocate_by_norm(recipe.nm, block_norms(checkpoint, decoder.spec()));
    case Allocation::kOutlier:
      return allocate_by_outliers(recipe.nm, block_outlier_shares(decoder, hidden));
    case Allocation::kUniform:
      break;
  }
  return std::vector<NmPattern>(decoder.spec().layers, recipe.nm);
}

/// What BlockResult holds of two streams of hidden states (windows, seqlen, hidden), a window at a time.
BlockResult compare_hidden(const at::Tensor& hidden, const at::Tensor& dense) {
  double cosine = 0, error = 0;
  for (int64_t w = 0; w < hidden.size(0); ++w) {
    const at::Tensor norm_sq = dense[w].square().sum(1).clamp_min(1e-30);  // (seqlen)
    const at::Tensor product = (hidden[w] * dense[w]).sum(1), own_sq = hidden[w].square().sum(1).clamp_min(1e-30);
    cosine += (product / (norm_sq * own_sq).sqrt()).sum(0, false, at::kDouble).item<double>();
    error += ((hidden[w] - dense[w]).square().sum(1) / norm_sq).sum(0, false, at::kDouble).item<double>();
  }
  const double tokens = static_cast<double>(hidden.size(0) * hidden.size(1));
  return {cosine / tokens, error / tokens, {}};
}

/// Floating-point operations of one block's linears over `tokens` tokens.
double block_flops(const ModelSpec& spec, int64_t tokens) {
  return 2.0 * static_cast<double>(spec.linear_weights() / spec.layers) * static_cast<double>(tokens);
}

double nominal_bits(const std::vector<LinearResult>& linears) {
  double bits = 0, weights = 0;
  for (const LinearResult& linear : linears) {
    const double count = static_cast<double>(linear.rows) * static_cast<double>(linear.cols);
    bits += count * linear.nm.density() * (1 + linear.salient_share);
    weights += count;
  }
  return bits / weights;
}

}  // namespace

void request_interrupt() { g_interrupt = true; }

Calibration make_calibration(const Checkpoint& checkpoint, const std::string& data, int64_t samples, int64_t seqlen, uint64_t seed) {
  const Corpus corpus = read_corpus(data);
  const auto tokenizer = Tokenizer::load(checkpoint.directory());
  const std::vector<int32_t> ids = tokenizer->encode(corpus.text);
  Calibration calibration;
  calibration.windows = calibration_windows(ids, samples, seqlen, seed, corpus.description);
  calibration.holdout = samples >= 8 ? samples / 8 : 0;
  calibration.provenance = {{"corpus", corpus.description}, {"sha256", corpus.sha256}, {"tokens", ids.size()}, {"nsamples", samples},
                            {"seqlen", seqlen},             {"seed", seed},            {"holdout", calibration.holdout}};
  return calibration;
}

QuantizeResult quantize_model(const Checkpoint& checkpoint, const Calibration& calibration, const Recipe& recipe,
                              const QuantizeOptions& options) {
  const auto started = std::chrono::steady_clock::now();
  const at::NoGradGuard no_grad;
  recipe.validate();
  if (!recipe.packable() && !options.dense_output)
    fail(ErrorCode::kUnsupported, "recipe '{}' does not give N:M sparse weights and has no packed form; write a dense checkpoint with --dense",
         recipe.name);
  if (fs::exists(options.output) && !options.force)
    fail(ErrorCode::kExists, "{}: the output is there already; choose another path or pass --force", options.output.string());
  const auto tokenizer = Tokenizer::load(checkpoint.directory());
  Decoder decoder = Decoder::from_checkpoint(checkpoint, {.product_dtype = fast_product_dtype()});
  const ModelSpec& spec = decoder.spec();
  check_windows(decoder, calibration.windows);
  const int64_t block_count = options.blocks < 0 ? spec.layers : std::min(options.blocks, spec.layers);

  nlohmann::json block_recipe = recipe.to_json();  // what follows the last block may change between runs
  for (const char* field : {"distill_epochs", "distill_lr", "distill_code_lr"}) block_recipe.erase(field);
  const nlohmann::json fingerprint = {{"version", STBLLM_VERSION},
                                      {"config", checkpoint.config()},
                                      {"checkpoint_bytes", checkpoint.file_bytes()},
                                      {"calibration", calibration.provenance},
                                      {"recipe", block_recipe},
                                      {"blocks", block_count}};
  const WorkDirectory work(options.output, fingerprint, options.resume, options.force);

  at::Tensor hidden = at::empty({static_cast<int64_t>(calibration.windows.size()), static_cast<int64_t>(calibration.windows[0].size()), spec.hidden}, at::kFloat);
  const at::Tensor ids = ids_of(calibration.windows, calibration.windows.size());
  const auto embed_windows = [&](at::Tensor& out) {
    for (int64_t w = 0; w < out.size(0); ++w) out[w].copy_(decoder.embed(ids.narrow(0, w, 1))[0]);
  };
  // Where blocks are tuned, their targets are the dense model's own hidden states: each block also mends what came before it.
  const bool tuning = recipe.tune_epochs > 0, distilling = recipe.distill_epochs > 0;
  at::Tensor dense_hidden;
  const bool with_dense = tuning || distilling || options.compare_blocks;
  if (with_dense) embed_windows(dense_hidden = at::empty_like(hidden));
  // From here on the tables at both ends are what the packed file will hold.
  const at::Tensor embedding = stored_table(decoder.embedding(), recipe.embedding, spec.embedding().name);
  decoder.set_tables(embedding, spec.tied_head ? embedding : stored_table(decoder.head(), recipe.head, spec.head().name));
  embed_windows(hidden);
  const std::vector<NmPattern> plan = plan_blocks(checkpoint, decoder, hidden, recipe);
  log::info("plan: {} ({}), mean kept {:.4f}", describe(plan), nlohmann::json(recipe.to_json())["allocation"].get<std::string>(),
            mean_density(plan));

  QuantizeResult result;
  {
    const double pass_flops = block_flops(spec, hidden.size(0) * hidden.size(1));
    const int64_t linears_per_block = static_cast<int64_t>(spec.linears(0).size());
    log::Progress progress("quantize: linear", block_count * linears_per_block);
    for (int64_t i = 0; i < (distilling ? spec.layers : block_count); ++i) {
      const auto block = [&] {
        const StageTimer timer("load");
        return decoder.block(i);
      }();
      if (with_dense) {
        const StageTimer timer("dense pass", pass_flops);
        dense_hidden = run_block(*block, spec, dense_hidden);
      }
      std::optional<QuantizedBlock> quantized;
      if (i < block_count) {
        quantized = work.load(i);
        if (quantized) {
          install(*quantized, *block, spec);
        } else {
          quantized = quantize_block(*block, spec, hidden, calibration.holdout, recipe, [&](const LinearSpec&) { return plan[i]; },
                                     [&](const LinearResult& linear) {
                                       result.linears.push_back(linear);
                                       progress.update(static_cast<int64_t>(result.linears.size()),
                                                       fmt::format("block {}  error {:.4f}", i, linear.report.output_error));
                                       if (g_interrupt.exchange(false))  // one request stops one run
                                         fail(ErrorCode::kInterrupted, "interrupted in block {} of {}; {}", i, block_count,
                                              i == 0 ? "nothing is finished yet" : work.path().string() + " holds what is finished, continue with --resume");
                                       log::debug("{}: {} error {:.5f} held out {:.5f} shrink {:.2f} damping {:g} ({} retries) {:.2f} s", linear.name,
                                                  linear.nm.str(), linear.report.output_error, linear.report.holdout_error, linear.report.shrink,
                                                  linear.report.damping, linear.report.damping_retries, linear.report.seconds);
                                     });
          result.linears.resize(result.linears.size() - quantized->results.size());
          if (tuning) {
            const auto dense_block = decoder.block(i);
            const StageTimer timer("tune");
            quantized->tune = tune_block(*dense_block, spec, *quantized, hidden, dense_hidden, calibration.holdout, recipe);
            install(*quantized, *block, spec);
            log::info("block {}: reconstruction loss {:.5f} -> {:.5f} in {} epochs, {:.1f} % of symbols changed", i,
                      quantized->tune->loss_before, quantized->tune->loss_after, quantized->tune->epochs, 100 * quantized->tune->changed);
          }
          work.save(i, *quantized);
        }
        result.linears.insert(result.linears.end(), quantized->results.begin(), quantized->results.end());
        progress.update(static_cast<int64_t>(result.linears.size()));
      }
      for (const LinearSpec& linear : spec.linears(i)) checkpoint.release(linear.weight().name);
      if (i + 1 < block_count || (with_dense && quantized)) {
        const StageTimer timer("outputs", pass_flops);
        hidden = run_block(*block, spec, hidden);
      }
      if (with_dense && quantized) {
        const StageTimer timer("compare");
        result.blocks.push_back(compare_hidden(hidden, dense_hidden));
        result.blocks.back().tune = quantized->tune;
      }
    }
  }
  result.nominal_bits = nominal_bits(result.linears);

  std::vector<QuantizedBlock> distilled;
  if (recipe.distill_epochs > 0 && block_count > 0) {
    const StageTimer timer("distill");
    hidden.reset();
    distilled.resize(block_count);
    result.distill = work.load_distilled(distilled, recipe.to_json());
    if (!result.distill) {
      for (int64_t i = 0; i < block_count; ++i) distilled[i] = work.load(i).value();
      result.distill = distill(decoder, Decoder::from_checkpoint(checkpoint), distilled, ids, dense_hidden, calibration.holdout, recipe);
      work.save_distilled(distilled, recipe.to_json(), *result.distill);
    }
  }
  const auto finished_block = [&](int64_t i) { return distilled.empty() ? work.load(i).value() : distilled[i]; };
  dense_hidden.reset();

  const Assembly assembly{checkpoint, spec, recipe, block_count, finished_block};
  if (options.dense_output) {
    export_dense(options.output, work.path() / "dense", assembly);
  } else {
    PackedWriter file(options.output, options.force);
    write_packed(file, assembly);
    nlohmann::json results = nlohmann::json::array();
    for (const LinearResult& linear : result.linears) results.push_back(to_json(linear, /*with_seconds=*/false));
    file.set_metadata("config", checkpoint.config().dump());
    file.set_metadata("tokenizer", tokenizer->serialize());
    file.set_metadata("recipe", recipe.to_json().dump());
    file.set_metadata("calibration", calibration.provenance.dump());
    file.set_metadata("results", results.dump());
    file.set_metadata("version", STBLLM_VERSION);
    const fs::path finished = file.finish();
    const StageTimer timer("verify");
    result.verified_logits = verify_packed(finished, assembly, std::span(calibration.windows).first(std::min(kVerifiedWindows, calibration.windows.size())));
    file.commit();
  }
  work.remove();
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  return result;
}

}  // namespace stbllm
