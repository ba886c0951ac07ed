// stbllm-bench measures how fast this machine multiplies with packed weights and how fast it makes them.

#include <fmt/format.h>

#include <CLI/CLI.hpp>

#include "products.h"
#include "quantizer.h"
#include "stbllm/base/error.h"
#include "stbllm/base/heap.h"

int main(int argc, char** argv) {
  using namespace stbllm::bench;
  stbllm::keep_freed_memory();
  CLI::App app("Times the packed matrix product on real layer shapes, beside the dense product by libtorch");
  app.require_subcommand(0, 1);
  const CLI::IsMember known_model({"smollm2", "opt-1.3b", "llama2-7b", "llama3-8b", "mistral-7b"});
  ProductOptions products;
  app.add_option("--models", products.models, "whose layers")->delimiter(',')->check(known_model);
  app.add_option("--layouts", products.layouts, "N:M, with x2 or x3 levels, /fp16 scales, +salient columns")
      ->delimiter(',');
  app.add_option("--tokens", products.tokens, "tokens per product")->delimiter(',');
  app.add_option("--backends", products.backends, "backends by name")->delimiter(',');
  app.add_option("--threads", products.threads, "numbers of threads")->delimiter(',');
  app.add_option("--type", products.type, "activations")->check(CLI::IsMember({"fp32", "bf16"}));
  app.add_option("--min-seconds", products.min_seconds, "time per figure, of which the shortest call counts");
  app.add_option("--cold-mib", products.cold_mib,
                 "weights rotate through copies of this size; 0 keeps them in cache");
  app.add_flag("!--no-dense", products.dense, "leave out the dense products");
  app.add_option("--json", products.json, "also write the figures to this file");

  QuantizerOptions quantizer;
  CLI::App* command = app.add_subcommand("quantizer", "Time the stages of the quantizer instead");
  command->add_option("--models", quantizer.models, "whose layers")
      ->delimiter(',')
      ->check(known_model)
      ->capture_default_str();
  command->add_option("--recipes", quantizer.recipes, "presets or .json files")
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--tokens", quantizer.tokens, "calibration tokens behind the statistics")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--threads", quantizer.threads, "threads; 0: all")->check(CLI::NonNegativeNumber);
  command
      ->add_option("--min-seconds", quantizer.min_seconds,
                   "repeat each linear for this long; the shortest of each stage counts")
      ->capture_default_str();
  command->add_option("--json", quantizer.json, "also write the figures to this file");
  CLI11_PARSE(app, argc, argv);
  try {
    if (command->parsed())
      measure_quantizer(quantizer);
    else
      measure_products(products);
  } catch (const stbllm::Error& error) {
    fmt::print(stderr, "stbllm-bench: {}\n", error.what());
    return static_cast<int>(error.code());
  }
  return 0;
}
