#include "stbllm/pipeline/quantize_model.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <cmath>
#include <fstream>

#include "stbllm/backend/backend.h"
#include "stbllm/base/checksum.h"
#include "stbllm/base/clock.h"
#include "stbllm/base/error.h"
#include "stbllm/base/heap.h"
#include "stbllm/base/interrupt.h"
#include "stbllm/base/log.h"
#include "stbllm/base/mapped_file.h"
#include "stbllm/base/profile.h"
#include "stbllm/base/safetensors.h"
#include "stbllm/model/decoder.h"
#include "stbllm/model/torch_cuda.h"
#include "stbllm/pack/packed_file.h"
#include "stbllm/pipeline/assemble.h"
#include "stbllm/pipeline/distill.h"
#include "stbllm/pipeline/estimate.h"
#include "stbllm/pipeline/pack_weight.h"
#include "stbllm/pipeline/plan_model.h"
#include "stbllm/pipeline/quantize_block.h"
#include "stbllm/pipeline/spill.h"
#include "stbllm/pipeline/tune.h"
#include "stbllm/pipeline/work_directory.h"
#include "stbllm/text/corpus.h"
#include "stbllm/text/tokenizer.h"

namespace stbllm {
namespace {

namespace fs = std::filesystem;

/// What is compared after packing: the logits of so many windows' first tokens.
constexpr size_t kVerifiedWindows = 2, kVerifiedTokens = 512;

/// Throws Error(kMismatch) in a process that was not started as process 0 was.
void check_same_inputs(const nlohmann::json& fingerprint, const QuantizeOptions& options,
                       const ProcessGroup& group) {
  nlohmann::json own = fingerprint;
  own["report"] = options.compare_blocks;
  nlohmann::json first = own;
  group.broadcast(first, 0);
  const std::string difference = first_difference(first, own);
  if (!difference.empty())
    fail(ErrorCode::kMismatch,
         "process {} was started with other inputs than process 0 ({}); start all with the same command",
         group.rank(), difference);
}

/// Floating-point operations of one block's linears over `tokens` tokens.
double block_flops(const ModelSpec& spec, int64_t tokens) {
  return 2.0 * static_cast<double>(spec.linear_weights() / spec.layers) * static_cast<double>(tokens);
}

double nominal_bits(const std::vector<LinearResult>& linears) {
  double bits = 0, weights = 0;
  for (const LinearResult& linear : linears) {
    const double count = static_cast<double>(linear.rows) * static_cast<double>(linear.cols);
    bits += count * linear.code.nm.density() * (1 + linear.salient_share);
    weights += count;
  }
  return bits / weights;
}

/// Tells models of one shape apart: of rows of every linear's weight, and of all other tensors.
std::string digest(const Checkpoint& checkpoint, const ModelSpec& spec) {
  std::string sums;
  const auto add = [&](const TensorSpec& tensor, int64_t rows_apart) {
    sums += checksum(bytes_of(
        checkpoint.load(tensor.name, tensor.shape).slice(0, 0, std::nullopt, rows_apart).contiguous()));
    checkpoint.release(tensor.name);
  };
  for (int64_t i = 0; i < spec.layers; ++i)
    for (const LinearSpec& linear : spec.linears(i)) add(linear.weight(), 64);
  for (const TensorSpec& tensor : spec.other_tensors()) add(tensor, 1);
  return checksum(std::as_bytes(std::span(sums)));
}

/// Of the executable: another build may round otherwise.
std::string program_checksum() { return checksum(MappedFile::open("/proc/self/exe")->bytes()); }

/// Everything that decides the blocks. What follows the last block may change between runs.
nlohmann::json fingerprint_of(const Checkpoint& checkpoint, const ModelSpec& spec,
                              const nlohmann::json& provenance, const Recipe& recipe, const at::Tensor& ids,
                              const QuantizeOptions& options, const ProcessGroup& group) {
  nlohmann::json block_recipe = recipe.to_json(), block_calibration = provenance;
  for (const char* field : {"distill_epochs", "distill_lr", "distill_code_lr"}) block_recipe.erase(field);
  block_calibration.erase("distill_nsamples");
  return {{"version", STBLLM_VERSION},
          {"program", program_checksum()},
          {"config", checkpoint.config()},
          {"weights", digest(checkpoint, spec)},
          {"products", c10::toString(fast_product_dtype(calibration_device(options)))},
          {"calibration", block_calibration},
          {"tokens", checksum(bytes_of(ids))},
          {"recipe", block_recipe},
          {"blocks", options.quantized_blocks(spec)},
          {"device", options.device},
          {"processes", group.size()}};
}

}  // namespace

Calibration make_calibration(const Checkpoint& checkpoint, const std::string& data, int64_t samples,
                             int64_t distill_samples, int64_t seqlen, uint64_t seed) {
  const Corpus corpus = read_corpus(data);
  const auto tokenizer = Tokenizer::load(checkpoint.directory());
  const std::vector<int32_t> ids = tokenizer->encode(corpus.text);
  Calibration calibration;
  calibration.holdout = samples >= 8 ? samples / 8 : 0;
  calibration.windows = calibration_windows(ids, samples + distill_samples,
                                            {samples - calibration.holdout, calibration.holdout}, seqlen,
                                            seed, corpus.description);
  std::rotate(calibration.windows.begin(), calibration.windows.begin() + samples, calibration.windows.end());
  calibration.distill_only = distill_samples;
  calibration.provenance = {{"corpus", corpus.description},
                            {"sha256", corpus.sha256},
                            {"tokens", ids.size()},
                            {"nsamples", samples},
                            {"seqlen", seqlen},
                            {"seed", seed},
                            {"holdout", calibration.holdout},
                            {"distill_nsamples", distill_samples},
                            {"windows", "disjoint"}};
  return calibration;
}

Calibration share_of(const Calibration& calibration, const ProcessGroup& group) {
  if (group.size() == 1) return calibration;
  STBLLM_CHECK(calibration.distill_only == 0, "distillation works in one process");
  const int64_t training = static_cast<int64_t>(calibration.windows.size()) - calibration.holdout;
  if (training < group.size())
    fail(ErrorCode::kUsage,
         "{} calibration windows are too few for {} processes; pass a larger --nsamples or start fewer",
         training, group.size());
  const Share seen = share_of(training, group), held_out = share_of(calibration.holdout, group);
  const auto first = calibration.windows.begin();
  Calibration share{
      {first + seen.first, first + seen.first + seen.count}, 0, held_out.count, calibration.provenance};
  share.windows.insert(share.windows.end(), first + training + held_out.first,
                       first + training + held_out.first + held_out.count);
  return share;
}

at::Device calibration_device(const QuantizeOptions& options) {
  if (options.device == "cpu") return at::kCPU;
  if (options.device != "cuda") fail(ErrorCode::kUsage, "device '{}': expected cpu or cuda", options.device);
  if (const std::string fault = torch_cuda_fault(); !fault.empty())
    fail(ErrorCode::kUnsupported, "device 'cuda' cannot calibrate here: {}; or use 'cpu'", fault);
  const int index = local_rank(), count = static_cast<int>(at::getNumGPUs());
  if (index >= count)
    fail(ErrorCode::kUsage, "LOCAL_RANK={}: this machine has {} CUDA devices; start one process for each",
         index, count);
  return {at::kCUDA, static_cast<c10::DeviceIndex>(index)};
}

void check_request(const fs::path& checkpoint, const Recipe& recipe, const QuantizeOptions& options,
                   const ProcessGroup& group) {
  recipe.validate();
  if (!recipe.packable() && !options.dense_output)
    fail(ErrorCode::kUnsupported,
         "recipe '{}' does not give N:M sparse weights and has no packed form; write a dense checkpoint with "
         "--dense",
         recipe.name);
  if (group.size() > 1 && (recipe.tune_epochs > 0 || recipe.distill_epochs > 0))
    fail(ErrorCode::kUnsupported,
         "recipe '{}' tunes or distils, which works in one process only, and WORLD_SIZE is {}; start one, or "
         "set "
         "tune_epochs and distill_epochs to 0",
         recipe.name, group.size());
  if (calibration_device(options).is_cuda() && (recipe.tune_epochs > 0 || recipe.distill_epochs > 0))
    fail(ErrorCode::kUnsupported,
         "recipe '{}' tunes or distils, which works on the CPU only; leave out --device cuda, or set "
         "tune_epochs and "
         "distill_epochs to 0",
         recipe.name);
  if (!options.output.has_filename())
    fail(ErrorCode::kUsage, "{}: the output is a file; write its name behind the directory",
         options.output.string());
  std::error_code ignored;
  if (group.rank() > 0 || !fs::exists(fs::symlink_status(options.output, ignored))) return;
  const fs::path directory =
      options.dense_output ? options.output : fs::absolute(options.output).parent_path();
  if (fs::equivalent(directory, checkpoint, ignored))
    fail(ErrorCode::kUsage, "{}: this would overwrite a part of the checkpoint itself; choose another path",
         options.output.string());
  if (fs::is_directory(options.output) != options.dense_output)
    fail(ErrorCode::kUsage, "{}: a {} is there, and {}; choose another path", options.output.string(),
         options.dense_output ? "file" : "directory",
         options.dense_output ? "--dense writes a directory" : "the packed model is one file");
  if (!options.force)
    fail(ErrorCode::kExists, "{}: the output is there already; choose another path or pass --force",
         options.output.string());
}

namespace {

/// The packed file with what a reader of it may want to know; it appears once its logits are those of the
/// assembled blocks. Returns their distance.
double write_verified(const Assembly& assembly, const std::vector<LinearResult>& linears,
                      const Calibration& calibration, const QuantizeOptions& options,
                      const WorkDirectory& work) {
  PackedWriter file(options.output, options.force, work.path());
  write_packed(file, assembly);
  nlohmann::json results = nlohmann::json::array();
  for (const LinearResult& linear : linears) results.push_back(to_json(linear, /*with_seconds=*/false));
  file.set_metadata("config", assembly.checkpoint.config().dump());
  file.set_metadata("tokenizer", Tokenizer::load(assembly.checkpoint.directory())->serialize());
  file.set_metadata("recipe", assembly.recipe.to_json().dump());
  file.set_metadata("calibration", calibration.provenance.dump());
  file.set_metadata("results", results.dump());
  file.set_metadata("version", STBLLM_VERSION);
  const fs::path finished = file.finish();
  const StageTimer timer("verify");
  Windows verified(calibration.windows.begin(),
                   calibration.windows.begin() + std::min(kVerifiedWindows, calibration.windows.size()));
  for (auto& window : verified) window.resize(std::min(window.size(), kVerifiedTokens));
  const double distance = verify_packed(finished, assembly, verified);
  file.commit();
  return distance;
}

/// quantize_model but for the advice that an interruption comes with.
QuantizeResult quantize_blocks(const Checkpoint& checkpoint, const Calibration& calibration,
                               const Recipe& recipe, const QuantizeOptions& options,
                               const ProcessGroup& group) {
  const double started = seconds_now();
  const at::NoGradGuard no_grad;
  check_request(checkpoint.directory(), recipe, options, group);
  const Calibration share = share_of(calibration, group);
  const at::Device device = calibration_device(options);
  const bool spill = plan_memory(ModelSpec::from_checkpoint(checkpoint), share, recipe, options).spill;
  Decoder decoder =
      Decoder::from_checkpoint(checkpoint, {.product_dtype = fast_product_dtype(device), .device = device});
  const ModelSpec& spec = decoder.spec();
  check_windows(decoder, calibration.windows);
  const auto& [windows, distill_only, holdout, provenance] = share;
  const int64_t block_count = options.quantized_blocks(spec);
  check_budget(spec, recipe, block_count);

  const at::Tensor calibrating_ids =
      ids_of(std::span(calibration.windows).subspan(calibration.distill_only));  // of all processes
  const nlohmann::json fingerprint =
      fingerprint_of(checkpoint, spec, provenance, recipe, calibrating_ids, options, group);
  std::optional<WorkDirectory> work;  // of process 0
  if (group.rank() == 0) work.emplace(options.output, fingerprint, options.resume, options.force);
  check_same_inputs(fingerprint, options, group);

  // Where blocks are tuned, their targets are the dense model's own hidden states: each block also mends what
  // came before it.
  const bool tuning = recipe.tune_epochs > 0, distilling = recipe.distill_epochs > 0;
  const at::Tensor ids = ids_of(windows);
  const int64_t calibrating = ids.size(0) - distill_only;
  const auto embed_windows = [&](const at::Tensor& out) {  // the last windows, as many as `out` has
    const int64_t first = ids.size(0) - out.size(0);
    for (int64_t w = 0; w < out.size(0); ++w) {
      out[w].copy_(decoder.embed(ids.narrow(0, first + w, 1))[0]);
      release_spilled(out[w]);
    }
  };
  const auto hidden_states = [&](int64_t count) {
    const std::vector<int64_t> sizes = {count, ids.size(1), spec.hidden};
    return spill ? spilled_tensor(sizes, kHiddenDtype, fs::absolute(options.output).parent_path())
                 : at::empty(sizes, at::TensorOptions().dtype(kHiddenDtype).device(device));
  };
  at::Tensor hidden = hidden_states(calibrating), all_dense,
             dense_hidden;  // all_dense ends with the windows of the other two
  const bool with_dense = needs_dense_stream(recipe, options);
  if (with_dense) {
    embed_windows(all_dense = hidden_states(distilling ? ids.size(0) : calibrating));
    dense_hidden = all_dense.narrow(0, all_dense.size(0) - calibrating, calibrating);
  }
  // From here on the tables at both ends are what the packed file will hold.
  store_tables(decoder, recipe);
  embed_windows(hidden);
  const Plan plan = [&] {
    const StageTimer timer("plan");
    nlohmann::json kept = work ? work->load_plan() : nullptr;
    if (group.all_reduce(kept.is_null() ? 0.0 : 1.0) == 0) {
      kept = to_json(plan_model(checkpoint, decoder, calibration, hidden, block_count, recipe, group));
      if (work && recipe.allocation == Allocation::kBudget) work->save_plan(kept);
    }
    group.broadcast(kept, 0);
    return plan_from_json(kept);
  }();
  if (recipe.allocation == Allocation::kOutlier) embed_windows(hidden);  // the plan took the first ones along
  log::info("plan: {} ({})", describe(plan, spec, block_count),
            recipe.to_json()["allocation"].get<std::string>());

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
        const StageTimer timer("dense pass", block_flops(spec, all_dense.size(0) * all_dense.size(1)));
        at::Tensor more = all_dense.narrow(0, 0, all_dense.size(0) - calibrating);
        advance(*block, spec, more);  // apart, so that the others do not depend on how many these are
        advance(*block, spec, dense_hidden);
      }
      std::optional<QuantizedBlock> quantized;
      if (i < block_count) {
        if (work) quantized = work->load(i);
        if (group.all_reduce(quantized ? 1.0 : 0.0) > 0) {  // process 0 knows
          if (!quantized) quantized.emplace();
          exchange(*quantized, block->linears(), std::vector<int>(block->linears().size(), 0), group);
          install(*quantized, *block, spec);
        } else {
          quantized = quantize_block(
              *block, spec, hidden, holdout, recipe, plan,
              [&](const LinearResult& linear) {
                result.linears.push_back(linear);
                progress.update(static_cast<int64_t>(result.linears.size()),
                                fmt::format("block {}  error {:.4f}", i, linear.report.output_error));
                check_interrupt();
                log::debug(
                    "{}: {} error {:.5f} held out {:.5f} shrink {:.2f} damping {:g} ({} retries) {:.2f} s",
                    linear.name, linear.code.str(), linear.report.output_error, linear.report.holdout_error,
                    linear.report.shrink, linear.report.damping, linear.report.damping_retries,
                    linear.report.seconds);
              },
              group);
          result.linears.resize(result.linears.size() - quantized->results.size());
          if (tuning) {
            const auto dense_block = decoder.block(i);
            const StageTimer timer("tune");
            quantized->tune =
                tune_block(*dense_block, spec, *quantized, hidden, dense_hidden, holdout, recipe);
            install(*quantized, *block, spec);
            log::info(
                "block {}: reconstruction loss {:.5f} -> {:.5f} in {} epochs, {:.1f} % of symbols changed", i,
                quantized->tune->loss_before, quantized->tune->loss_after, quantized->tune->epochs,
                100 * quantized->tune->changed);
          }
          if (work) work->save(i, *quantized);
        }
        result.linears.insert(result.linears.end(), quantized->results.begin(), quantized->results.end());
        progress.update(static_cast<int64_t>(result.linears.size()));
      }
      if (i + 1 < block_count || (with_dense && quantized)) {
        const StageTimer timer("outputs", pass_flops);
        advance(*block, spec, hidden);
      }
      if (with_dense && quantized) {
        const StageTimer timer("compare");
        result.blocks.push_back(compare_hidden(hidden, dense_hidden, group));
        result.blocks.back().tune = quantized->tune;
      }
    }
  }
  result.nominal_bits = nominal_bits(result.linears);
  group.all_reduce(0.0);  // nobody leaves while another one still waits for a block
  if (!work) return result;

  hidden.reset();
  std::vector<QuantizedBlock> distilled;
  if (recipe.distill_epochs > 0 && block_count > 0) {
    const StageTimer timer("distill");
    distilled.resize(block_count);
    const nlohmann::json inputs = {{"recipe", recipe.to_json()}, {"calibration", provenance}};
    result.distill = work->load_distilled(distilled, inputs);
    if (!result.distill) {
      for (int64_t i = 0; i < block_count; ++i) distilled[i] = work->load(i).value();
      result.distill = distill(decoder, Decoder::from_checkpoint(checkpoint), distilled, ids, all_dense,
                               holdout, recipe, *work, inputs);
      work->save_distilled(distilled, inputs, *result.distill);
    }
  }
  const auto finished_block = [&](int64_t i) {
    return distilled.empty() ? work->load(i).value() : distilled[i];
  };
  dense_hidden.reset();
  all_dense.reset();
  release_freed_memory();  // verification wants blocks of other sizes

  const Assembly assembly{checkpoint, spec, recipe, block_count, finished_block};
  if (options.dense_output)
    export_dense(options.output, work->path() / "dense", assembly);
  else
    result.verified_logits = write_verified(assembly, result.linears, calibration, options, *work);
  work->remove();
  result.seconds = seconds_now() - started;
  return result;
}

}  // namespace

QuantizeResult quantize_model(const Checkpoint& checkpoint, const Calibration& calibration,
                              const Recipe& recipe, const QuantizeOptions& options,
                              const ProcessGroup& group) {
  try {
    return quantize_blocks(checkpoint, calibration, recipe, options, group);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kInterrupted) throw;
    const fs::path work = work_path(options.output);
    fail(ErrorCode::kInterrupted, "{}; {}", error.what(),
         fs::exists(work) ? work.string() + " holds what is finished, continue with --resume"
                          : "no block was finished, nothing is left");
  }
}

}  // namespace stbllm
