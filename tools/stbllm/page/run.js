// --- a run: what its report says ---

// "model.layers.3.self_attn.q_proj": the first number is the block (-1 where there is none), the last part
// the role.
function parseLinear(entry) {
  const parts = entry.name.split("."), number = parts.find((part) => /^[0-9]{1,5}$/.test(part));
  const levels = entry.levels ?? 1;
  return {
    entry,
    name: entry.name,
    role: parts[parts.length - 1],
    block: number === undefined ? -1 : Number(number),
    code: levels === 1 ? entry.nm : `${entry.nm}x${levels}`
  };
}

function facts(run) {
  const fact = (value, what) => html("div", {}, html("b", {}, value), html("span", {}, what));
  const rows = [fact(decimals(run.nominal_bits, 3), "nominal bits per weight")];
  const {ledger, distill} = run;
  if (ledger)
    rows.push(
        fact(decimals(ledger.stored_bits, 3), "stored bits per weight of linears"),
        fact(decimals(ledger.file_bits, 3), "bits per parameter, whole file"),
        fact(bytes(ledger.file_bytes), "file"));
  if (distill)
    rows.push(fact(
        `${decimals(distill.divergence_before, 3)} → ${decimals(distill.divergence_after, 3)}`,
        "nats per token from the dense logits, by distillation"));
  rows.push(fact(decimals(run.seconds, 1) + " s", "time"), fact(bytes(run.peak_memory_bytes), "peak memory"));
  root.append(html("section", {class: "facts"}, ...rows));
}

function blocks(run) {
  const line = (name, value) => ({name, points: run.blocks.map((each, block) => [block, value(each)])});
  const distances =
      [line("relative error", (each) => each.relative_error), line("1 − cosine", (each) => 1 - each.cosine)];
  section(
      "Hidden states after each block",
      "Against the dense model's on the calibration windows, mean over tokens: squared error relative to the " +
          "dense norm, and the distance of the cosine from one.",
      lineChart(distances, "distance of the hidden states over depth"),
      legend(distances.map((each) => each.name)));
  if (!run.blocks.some((each) => each.tune)) return;
  const losses = [
    line("before tuning", (each) => each.tune?.loss_before),
    line("after tuning", (each) => each.tune?.loss_after)
  ];
  section(
      "Reconstruction loss of each block", "What tuning minimises, on the held-out windows.",
      lineChart(losses, "loss of each block before and after tuning"),
      legend(losses.map((each) => each.name)));
}

function bitLedger(run) {
  const ledger = run.ledger, weights = Math.max(1, ledger.linear_weights);
  const bar = (name, value, extra) =>
      ({name, value, label: `${bytes(value)}  ${((100 * value) / ledger.file_bytes).toFixed(1)} %${extra}`});
  const bars =
      Object.entries(ledger.plane_bytes)
          .map(([plane, value]) => bar(plane, value, `  ${((8 * value) / weights).toFixed(3)} bits/weight`));
  bars.push(
      bar("embedding, head, norms, biases", ledger.dense_bytes, ""),
      bar("header, tokenizer, padding", ledger.file_bytes - ledger.linear_bytes - ledger.dense_bytes, ""));
  section(
      "Bit ledger",
      "Where the bytes of the file are; bits per weight count the weights of the quantized linears.",
      barChart(bars, "bytes per kind of plane"));
}

function stages(run) {
  const bars = run.stages.map(({name, seconds, flops}) => ({
                                name,
                                value: seconds,
                                label: seconds.toFixed(2) + " s" +
                                    (flops > 0 ? `  ${(flops / seconds / 1e9).toFixed(1)} GFLOP/s` : "")
                              }));
  section(
      "Time by stage", "Seconds of this run; a stage after a slash is part of the one before it.",
      barChart(bars, "seconds per stage"));
}

function linearTable(run, linears) {
  const stored = new Map((run.ledger?.linears ?? []).map((entry) => [entry.name, entry.stored_bits]));
  const heads = [
    "linear", "shape", "code", "stored bits", "salient", "threshold", "error", "held out", "shrink",
    "damping", "seconds"
  ];
  const rows = linears.map(({entry, name, code}) => {
    const thresholds = entry.threshold ?? [];
    const cells = [
      name, `${entry.rows} × ${entry.cols}`, code, decimals(stored.get(name), 3),
      String(sum(entry.salient_count ?? [])),
      thresholds.length ? significant(sum(thresholds) / thresholds.length, 4) : "–",
      decimals(entry.output_error, 4), decimals(entry.holdout_error, 4), decimals(entry.shrink, 2),
      significant(entry.damping ?? 0, 6), decimals(entry.seconds, 2)
    ];
    return html("tr", {}, ...cells.map((cell) => html("td", {}, cell)));
  });
  section(
      "Linears",
      "Salient: columns with a residual. Threshold: mean of p1 over column blocks. Damping: of the mean diagonal " +
          "of H, after retries.",
      html(
          "table", {}, html("thead", {}, html("tr", {}, ...heads.map((head) => html("th", {}, head)))),
          html("tbody", {}, ...rows)));
}

function runPage(run) {
  const {corpus = "", nsamples = 0, seqlen = 0} = run.calibration ?? {};
  document.title = run.output;
  root.append(
      html("h1", {}, run.output),
      html(
          "p", {},
          `recipe ${run.recipe.name}, calibrated on ${nsamples} windows of ${seqlen} tokens from ${corpus}`));
  facts(run);

  const linears = run.linears.map(parseLinear);
  const roles = unique(linears.map((linear) => linear.role)),
        codes = unique(linears.map((linear) => linear.code));
  const errors = roles.map((role) => ({
                             name: role,
                             points: linears.filter((linear) => linear.role === role)
                                         .map(({block, entry}) => [Math.max(block, 0), entry.output_error])
                           }));
  section(
      "Error of each linear",
      "Relative squared error of the outputs on the calibration inputs, tr(D H Dᵀ) / tr(W H Wᵀ).",
      lineChart(errors, "error of each linear over depth"), legend(roles));
  section(
      "Code of each linear", "N:M: how many weights of each group are kept; xL: at how many levels.",
      codeGrid(linears, roles, codes, "code of each linear"), legend(codes));
  if (run.blocks?.length) blocks(run);
  if (run.ledger) bitLedger(run);
  if (run.stages?.length) stages(run);
  linearTable(run, linears);
}
