// The fourth stage. It reads the finished blocks and the dense stream behind the last block, and leaves
// distilled blocks. The work directory keeps the state of the training, and then its result.

#include "stages.h"
#include "stbllm/base/profile.h"
#include "stbllm/train/distill.h"

namespace stbllm {

void distill_blocks(Run& run) {
  if (!run.recipe().training.distill || run.blocks() == 0) return;
  const StageTimer timer("distill");
  const nlohmann::json inputs = {{"recipe", run.recipe().to_json()},
                                 {"calibration", run.request.calibration.provenance}};
  run.distilled.resize(run.blocks());
  run.result.distill = run.work->load_distilled(run.distilled, inputs);
  if (run.result.distill) return;
  for (int64_t i = 0; i < run.blocks(); ++i) run.distilled[i] = run.work->load(i).value();
  const Decoder teacher = Decoder::from_checkpoint(run.request.checkpoint, {.device = run.decoder.device()});
  const std::unique_ptr<TrainingStore> store = run.work->training_store(inputs);
  run.result.distill = distill({.student = run.decoder,
                                .teacher = teacher,
                                .teacher_states = *run.dense,
                                .blocks = run.distilled,
                                .stage = *run.recipe().training.distill},
                               *store);
  run.work->save_distilled(run.distilled, inputs, *run.result.distill);
}

}  // namespace stbllm
