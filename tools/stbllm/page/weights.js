// --- the weights of a linear, by what became of them ---

// Counts of classes on top of each other, a bar for each step of weights.
function drawHistogram({first, step, classes}, width) {
  const height = width < 500 ? 300 : 360;
  const frame = {left: 52, right: width - 12, top: 26, bottom: height - 42};
  const bins = classes[0].counts.length,
        totals = classes[0].counts.map((_, bin) => sum(classes.map(({counts}) => counts[bin])));
  const x = (value) => frame.left + ((frame.right - frame.left) * (value - first)) / (bins * step);
  const gap = gridStep(Math.max(...totals), 5), most = gap * Math.ceil(Math.max(...totals) / gap);
  const y = (count) => frame.bottom - ((frame.bottom - frame.top) * count) / most;
  const ticks = (low, high, distance) => {
    const all = [];
    for (let i = Math.ceil(low / distance); i * distance <= high; ++i) all.push(i * distance);
    return all;
  };
  const content = drawAxes(
      frame,
      {at: x, ticks: ticks(first, first + bins * step, gridStep(bins * step, Math.max(3, width / 110)))},
      {at: y, ticks: ticks(0, most, gap)}, "weight in the checkpoint", "weights per bar");
  const wide = Math.max(0.5, x(first + step) - x(first) - (width < 500 ? 0 : 0.6));
  for (let bin = 0; bin < bins; ++bin) {
    let below = 0;
    classes.forEach(({name, counts}, i) => {
      if (counts[bin] === 0) return;
      const top = y(below + counts[bin]);
      content.push(
          svg("rect", {
            class: "weights",
            x: x(first + bin * step),
            y: top,
            width: wide,
            height: y(below) - top,
            fill: classColour(i)
          },
              svg("title", {},
                  `${name}: ${counts[bin]} weights from ${significant(first + bin * step, 4)} to ${
                      significant(first + (bin + 1) * step, 4)}`)));
      below += counts[bin];
    });
  }
  return {height, content};
}

// What is not kept recedes.
const classColour = (index) => (index === 0 ? "var(--line)" : seriesColour(index - 1));

function weightsPage(weights) {
  const {linear, code, packed, checkpoint, rows, cols, classes, outside} = weights;
  document.title = linear;
  root.append(
      html("h1", {}, linear),
      html("p", {}, `${rows} × ${cols} weights, ${code}: ${checkpoint} against ${packed}`));
  section(
      "Weights of the checkpoint, by what the packed file makes of them",
      outside ?
          `${significant(100 * outside / (rows * cols), 2)} % of the weights lie outside of the chart.` :
          "",
      chart("histogram of weights", (width) => drawHistogram(weights, width)),
      html(
          "div", {class: "legend"},
          ...classes.map(
              ({name}, i) => html("span", {}, html("i", {style: `background: ${classColour(i)}`}), name))));
  const cells = ({name, weights: count, mean, packed_mean: packedMean}) =>
      [name, `${(100 * count / (rows * cols)).toFixed(2)} %`, significant(mean, 4),
       significant(packedMean, 4)];
  section(
      "Classes", "Means are of magnitudes.",
      html(
          "table", {},
          html(
              "thead", {},
              html(
                  "tr", {},
                  ...["class", "share", "checkpoint", "packed"].map((head) => html("th", {}, head)))),
          html(
              "tbody", {},
              ...classes.map((each) => html("tr", {}, ...cells(each).map((cell) => html("td", {}, cell)))))));
}
