#pragma once
// The stages of a run, over one state. Each stage is a file of its own, which says what the stage reads, what
// it leaves in the state and what it keeps in the work directory for --resume.

#include <memory>
#include <optional>
#include <vector>

#include "stbllm/calibrate/quantized_block.h"
#include "stbllm/model/decoder.h"
#include "stbllm/model/hidden_stream.h"
#include "stbllm/plan/plan.h"
#include "stbllm/run/quantize_model.h"
#include "stbllm/run/tables.h"
#include "stbllm/run/work_directory.h"

namespace stbllm {

/// The arguments of quantize_model().
struct Request {
  const Checkpoint& checkpoint;
  const Calibration& calibration;  ///< with the windows of all processes
  const Recipe& recipe;
  const QuantizeOptions& options;
  const ProcessGroup& group;
};

struct Run {
  const Request request;
  Decoder decoder;                      ///< yields dense blocks; its tables are those of the packed file
  StoredTables tables;                  ///< the same, as they are stored
  std::unique_ptr<WorkDirectory> work;  ///< of process 0
  std::optional<HiddenStream>
      dense;  ///< the dense model's, where something is compared with it or learns from it
  std::optional<HiddenStream> quantized;  ///< what enters the next block, behind quantized ones
  Plan plan;
  std::vector<QuantizedBlock> distilled;  ///< all quantized blocks, where the model was distilled
  QuantizeResult result;

  const ModelSpec& spec() const { return decoder.spec(); }
  const Recipe& recipe() const { return request.recipe; }
  int64_t blocks() const { return request.options.quantized_blocks(spec()); }
  /// A finished block as it is going to be packed.
  QuantizedBlock finished_block(int64_t index) const;
};

/// Checks the request, opens the work directory and puts the windows in front of block 0.
Run open_run(const Request& request);
/// Chooses the scheme of each linear.
void make_plan(Run& run);
/// Quantizes the blocks one after the other, tunes them where the recipe says so, and takes the streams
/// along.
void quantize_blocks(Run& run);
/// Trains the whole model, where the recipe says so.
void distill_blocks(Run& run);
/// Writes the result, verifies it and gives it its name.
void write_result(Run& run);

}  // namespace stbllm
