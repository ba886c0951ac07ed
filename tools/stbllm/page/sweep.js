// --- a sweep: a point for each run and text ---

// Colours that colour-blind readers tell apart (after Okabe and Ito), light ones on dark; where there are
// more series than colours, shapes differ.
const kSeriesColours = 4;
const kShapes = [
  "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0Z", "M-4 -4H4V4H-4Z", "M0 -5L5 4H-5Z",
  "M0 -5.5L5.5 0L0 5.5L-5.5 0Z", "M0 5L5 -4H-5Z"
];
const seriesColour = (index) => `var(--series-${index % kSeriesColours})`;

function withError({perplexity, standard_error: error}) {
  const digits = perplexity < 100 ? 2 : perplexity < 1000 ? 1 : 0;
  return perplexity.toFixed(digits) + (isNumber(error) ? ` ± ${error.toFixed(digits)}` : "");
}

// What a chart is drawn of: `x` gives the place of a point, null where it has none.
const kCharts = [
  {
    title: "Perplexity against stored bits",
    x: (point) => (point.flipped_signs === null ? point.bits : null),
    axis: "stored bits per weight of the linears"
  },
  {
    title: "Perplexity against the size of the file",
    x: (point) =>
        (point.flipped_signs === null && isNumber(point.file_bytes) ? point.file_bytes / 1e6 : null),
    axis: "file, MB"
  },
  {
    title: "Perplexity against flipped signs",
    x: (point) => (point.flipped_signs === null ? null : 100 * point.flipped_signs),
    axis: "flipped signs of kept weights, %",
    joinAll: true
  }
];

// Whose a point is: another tool's, a model's, or where there is one model only, this program's.
function sourcesOf({points}) {
  const severalModels = unique(points.filter((point) => !point.tool).map((point) => point.model)).length > 1;
  return (point) => point.tool || (severalModels ? point.model : "stbllm");
}

// The series of a sweep: marks {point, result}, what they look like, and a name, empty where there is only
// one series.
function seriesOf(sweep) {
  const {points, texts} = sweep, source = sourcesOf(sweep);
  const sources = unique(points.map(source)), series = [];
  for (const of of sources)
    texts.forEach((text, t) => {
      const own = points.filter((point) => source(point) === of);
      const marks = own.flatMap(
          (point) => point.results.filter((result) => result.text === t).map((result) => ({point, result})));
      const name =
          [sources.length > 1 ? of : "", texts.length > 1 ? text.name : ""].filter(Boolean).join(", ");
      if (!marks.length) return;
      const colour = seriesColour(series.length);
      const shape = kShapes[series.length % kShapes.length];
      series.push({name, marks, colour, shape, isOurs: own.every((point) => !point.tool)});
    });
  return series;
}

// Marks that no other one of their series beats in both directions, of marks by rising x.
function frontOf(marks) {
  let best = Infinity;
  return marks.filter(({result: {perplexity}}) => {
    const better = perplexity < best;
    best = Math.min(best, perplexity);
    return better;
  });
}

// What the texts of a chart may not lie on: boxes of points and of other texts, and, where there is room,
// lines.
class Space {
  constructor(bounds) {
    this.bounds = bounds;
    this.taken = [];
    this.lines = [];
  }
  take(left, top, right, bottom) {
    this.taken.push({left, top, right, bottom});
  }
  // The line through `marks`, as small boxes.
  takeLine(marks) {
    for (let i = 1; i < marks.length; ++i) {
      const {x, y} = marks[i - 1], dx = marks[i].x - x, dy = marks[i].y - y;
      const steps = Math.max(1, Math.ceil(Math.hypot(dx, dy) / 4));
      for (let step = 0; step <= steps; ++step) {
        const at = {x: x + (dx * step) / steps, y: y + (dy * step) / steps};
        this.lines.push({left: at.x - 1, top: at.y - 1, right: at.x + 1, bottom: at.y + 1});
      }
    }
  }
  isFree(left, top, right, bottom, others = this.taken) {
    const {bounds} = this;
    return left >= bounds.left && top >= bounds.top && right <= bounds.right && bottom <= bounds.bottom &&
        !others.some((box) => left < box.right && right > box.left && top < box.bottom && bottom > box.top);
  }
  // A place for `text` beside one of `marks`, which it then takes: attributes of an element, or null.
  // Bold ones are names of series, which would be taken for those of lines that they lie on.
  placeBeside(marks, text, isBold = false) {
    const width = textWidth(text, isBold), gap = 10, clear = [...this.taken, ...this.lines];
    const places = marks.flatMap(
        ({x, y}) => [
            [x + gap, y + 4], [x - gap - width, y + 4], [x + 5, y - gap], [x + 5, y + gap + 9],
            [x - 5 - width, y + gap + 9], [x - 5 - width, y - gap], [x - width / 2, y - gap],
            [x - width / 2, y + gap + 9]]);
    for (const others of isBold ? [clear] : [clear, this.taken])
      for (const [left, base] of places) {
        const box = [left - 2, base - 11, left + width + 2, base + 3];
        if (!this.isFree(...box, others)) continue;
        this.take(...box);
        return {x: left, y: base};
      }
    return null;
  }
}

const runLink = (sweep, point) => `#run-${sweep.points.indexOf(point)}`;

function pointTitle(sweep, {point, result}) {
  const facts = [sourcesOf(sweep)(point), point.label, sweep.texts[result.text].name];
  if (point.flipped_signs !== null)
    facts.push(`${significant(100 * point.flipped_signs, 4)} % of signs flipped`);
  if (isNumber(point.bits)) facts.push(`${point.bits.toFixed(3)} bits per weight`);
  if (isNumber(point.file_bytes)) facts.push(bytes(point.file_bytes));
  facts.push(`perplexity ${withError(result)}`);
  return facts.filter(Boolean).join("\n");
}

// The ends of an error bar. One that reaches zero has no lower end on a logarithmic axis and is cut at half.
function barOf({perplexity, standard_error: error}) {
  const half = error ?? 0;
  return [perplexity > half ? perplexity - half : perplexity / 2, perplexity + half];
}

// A mark with its error bar; a link to its run where the page holds that.
function drawMark(sweep, series, mark) {
  const {point, result, x, y, top, bottom} = mark, title = pointTitle(sweep, mark);
  const body = [svg("title", {}, title), svg("circle", {class: "target", cx: x, cy: y, r: 10})];
  if (isNumber(result.standard_error))
    body.push(svg("path", {
      class: "bar",
      stroke: series.colour,
      d: `M${x - 3} ${top}h6M${x} ${top}V${bottom}M${x - 3} ${bottom}h6`
    }));
  body.push(shapeOf(series, x, y));
  if (!point.run) return svg("g", {class: "point"}, ...body);
  return svg("a", {class: "point", href: runLink(sweep, point), "aria-label": title}, ...body);
}

const pathThrough = (marks) =>
    marks.map(({x, y}, i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

// Grid, ticks and names of the axes within `frame`.
function drawAxes(frame, xs, ys, xName, yName) {
  const {left, right, top, bottom} = frame, content = [];
  const scaled = (name, axis) => name + (axis.isLogarithmic ? " (log scale)" : "");
  for (const tick of ys.ticks)
    content.push(
        svg("line", {class: "grid", x1: left, x2: right, y1: ys.at(tick), y2: ys.at(tick)}),
        svg("text", {x: left - 8, y: ys.at(tick) + 4, "text-anchor": "end"}, compact(tick)));
  for (const tick of xs.ticks)
    content.push(
        svg("line", {class: "grid", x1: xs.at(tick), x2: xs.at(tick), y1: bottom, y2: bottom + 5}),
        svg("text", {x: xs.at(tick), y: bottom + 18, "text-anchor": "middle"}, compact(tick)));
  content.push(
      svg("text", {x: 0, y: top - 14}, scaled(yName, ys)),
      svg("text", {x: (left + right) / 2, y: bottom + 38, "text-anchor": "middle"}, scaled(xName, xs)));
  return content;
}

// Perplexities to compare with, as lines across the chart; names that find no place go to `unplaced`.
function drawLevels({levels, texts}, frame, ys, space, unplaced) {
  return levels.flatMap((level) => {
    const of = texts.length > 1 ? `, ${texts[level.text].name}` : "";
    const y = ys.at(level.perplexity), name = `${level.label} ${withError(level)}${of}`,
          width = textWidth(name);
    const line =
        svg("line", {class: "level", x1: frame.left, x2: frame.right, y1: y, y2: y}, svg("title", {}, name));
    space.takeLine([{x: frame.left, y}, {x: frame.right, y}]);
    const from =
        [frame.right - width - 2, frame.left + 6].find((at) => space.isFree(at, y - 16, at + width, y - 1));
    if (from === undefined) {
      unplaced.push({name, sign: svg("line", {class: "level", x1: 2, x2: 14, y1: 0, y2: 0})});
      return [line];
    }
    space.take(from, y - 16, from + width, y);
    return [line, svg("text", {x: from, y: y - 5}, name)];
  });
}

const shapeOf = ({shape, colour, isOurs}, x, y) =>
    svg("path",
        {d: shape, transform: `translate(${x} ${y})`, stroke: colour, fill: isOurs ? colour : "var(--card)"});

// The names of series beside their points.
function drawNames(series, space, unplaced) {
  if (series.length === 1) return [];
  return series.flatMap((each) => {
    const {name, marks, colour} = each;
    const place = space.placeBeside([marks[marks.length - 1], ...marks], name, /*isBold=*/ true);
    if (place) return [svg("text", {...place, class: "name", style: `fill: ${colour}`}, name)];
    unplaced.push({name, sign: shapeOf(each, 8, 0)});
    return [];
  });
}

// A run is named once, where the first text has it; what finds no place is in the table and behind the point.
function drawLabels(series, space) {
  const labels = new Map();
  for (const mark of series.flatMap((each) => each.marks)) {
    if (labels.has(mark.point)) continue;
    const place = space.placeBeside([mark], mark.point.label);
    labels.set(mark.point, place && svg("text", {...place, class: "label"}, mark.point.label));
  }
  return [...labels.values()].filter(Boolean);
}

// The series with those of their marks that have a place, in pixels and by rising x.
function placeMarks(all, placeOf, frame, levels) {
  const shown =
      all.map((each) => ({...each, marks: each.marks.filter(({point}) => isNumber(placeOf(point)))}))
          .filter((each) => each.marks.length);
  const marks = shown.flatMap((each) => each.marks);
  const xs = makeAxis(
      marks.map(({point}) => placeOf(point)), frame.left, frame.right, (frame.right - frame.left) / 80);
  const ys = makeAxis(
      [...marks.flatMap(({result}) => barOf(result)), ...levels.map((level) => level.perplexity)],
      frame.bottom, frame.top, 7);
  for (const each of shown) {
    each.marks = each.marks.map(({point, result}) => {
      const [low, high] = barOf(result);
      return {
        point,
        result,
        x: xs.at(placeOf(point)),
        y: ys.at(result.perplexity),
        top: ys.at(high),
        bottom: ys.at(low)
      };
    });
    each.marks.sort((a, b) => a.x - b.x || b.y - a.y);
  }
  return {shown, xs, ys};
}

function drawSweep(sweep, series, {x: placeOf, axis, joinAll}, width) {
  const height = width < 500 ? 320 : 380;
  const frame = {left: 52, right: width - 12, top: 26, bottom: height - 42};
  const {shown, xs, ys} = placeMarks(series, placeOf, frame, sweep.levels);
  const space = new Space({left: frame.left + 2, right: width - 2, top: frame.top, bottom: frame.bottom - 2});
  for (const {x, y, top, bottom} of shown.flatMap((each) => each.marks)) {
    space.take(x - 6, y - 6, x + 6, y + 6);
    space.take(x - 3, top, x + 3, bottom);
  }
  const content = drawAxes(frame, xs, ys, axis, "perplexity"), unplaced = [];
  for (const {marks, colour} of shown) {
    const line = joinAll ? marks : frontOf(marks);
    space.takeLine(line);
    content.push(svg("path", {class: "front", stroke: colour, d: pathThrough(line)}));
  }
  content.push(...drawLevels(sweep, frame, ys, space, unplaced));
  for (const each of shown) content.push(...each.marks.map((mark) => drawMark(sweep, each, mark)));
  content.push(...drawNames(shown, space, unplaced), ...drawLabels(shown, space));
  // Names for which there is no room stand below the chart.
  unplaced.forEach(({name, sign}, i) => {
    const y = height + 14 + 20 * i;
    content.push(svg("g", {transform: `translate(0 ${y - 4})`}, sign), svg("text", {x: 20, y}, name));
  });
  return {height: height + 20 * unplaced.length, content, role: "group"};  // with links inside
}

// --- the table of a sweep ---

// A table that a click on a head sorts, the other way round at the next click. `columns`: name, value() of a
// row (what it is sorted by, null where it has none: such rows stay last) and cell() of a row (a text or an
// element).
function sortableTable(columns, rows) {
  const body = html("tbody");
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b, undefined, {numeric: true}) : a - b);
  const fill = () => body.replaceChildren(
      ...rows.map((row) => html("tr", {}, ...columns.map(({cell}) => html("td", {}, cell(row))))));
  const heads = columns.map(({name, value}) => {
    const button = html("button", {type: "button"}, name), head = html("th", {scope: "col"}, button);
    button.addEventListener("click", () => {
      const rising = head.getAttribute("aria-sort") !== "ascending";
      for (const each of heads) each.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const present = rows.filter((row) => value(row) !== null),
            absent = rows.filter((row) => value(row) === null);
      present.sort((a, b) => (rising ? 1 : -1) * compare(value(a), value(b)));
      rows = [...present, ...absent];
      fill();
    });
    return head;
  });
  fill();
  return html("table", {class: "sortable"}, html("thead", {}, html("tr", {}, ...heads)), body);
}

function sweepTable(sweep) {
  const {points, texts} = sweep;
  const number = (name, key, show) => ({
    name,
    value: (point) => (isNumber(point[key]) ? point[key] : null),
    cell: (point) => (isNumber(point[key]) ? show(point[key]) : "–")
  });
  const text = (name, value, cell = value) => ({name, value, cell});
  const resultOf = (point, t) => point.results.find((result) => result.text === t);
  const perText = (name, t, key, show) => ({
    name: texts.length > 1 ? `${name}, ${texts[t].name}` : name,
    value: (point) => resultOf(point, t)?.[key] ?? null,
    cell: (point) => (isNumber(resultOf(point, t)?.[key]) ? show(resultOf(point, t)) : "–")
  });
  const columns = [text(
      "run", (point) => point.label,
      (point) => (point.run ? html("a", {href: runLink(sweep, point)}, point.label) : point.label))];
  const source = sourcesOf(sweep);
  if (unique(points.map(source)).length > 1)
    columns.push(text(points.some((point) => point.tool) ? "by" : "model", source));
  columns.push(
      number("flipped signs", "flipped_signs", (value) => significant(100 * value, 4) + " %"),
      number("nominal bits", "nominal_bits", (value) => value.toFixed(3)),
      number("stored bits", "bits", (value) => value.toFixed(3)),
      number("file, MB", "file_bytes", (value) => (value / 1e6).toFixed(1)));
  texts.forEach((_, t) => {
    columns.push(perText("perplexity", t, "perplexity", withError));
    columns.push(perText("KL", t, "kl", (result) => result.kl.toFixed(3)));
  });
  columns.push(
      number("minutes", "seconds", (value) => (value / 60).toFixed(1)),
      number("peak GB", "peak_memory_bytes", (value) => (value / 1e9).toFixed(2)));
  return sortableTable(columns.filter(({value}) => points.some((point) => value(point) !== null)), points);
}

// --- the page of a sweep, and those of its runs behind #run-0, #run-1, ... ---

function overviewPage(sweep) {
  const {title, texts, points} = sweep, series = seriesOf(sweep);
  document.title = title;
  root.append(
      html("h1", {}, title), html("p", {}, texts.map((text) => text.about).join("; ")),
      html(
          "p", {},
          "Bars are standard errors over the windows of a text. Points of one text share its windows, so that " +
              "differences between them are more certain than the bars. " +
              (points.some((point) => point.run) ? "A point leads to the errors of its run." : "")));
  for (const each of kCharts) {
    if (!points.some((point) => isNumber(each.x(point)))) continue;
    section(
        each.title,
        each.joinAll ? "" : "A line joins the points of a series that no other of its points beats.",
        chart(each.title, (width) => drawSweep(sweep, series, each, width)));
  }
  section("All runs", "A click on a head sorts.", sweepTable(sweep));
}

function pageOfRun(sweep, point) {
  root.append(html("nav", {}, html("a", {href: "#"}, `← ${sweep.title}`), ` ${point.label}`));
  runPage(point.run);
}

function sweepPage(sweep) {
  const show = () => {
    root.replaceChildren();
    const [, number] = /^#run-([0-9]+)$/.exec(location.hash) ?? [];
    const point = number === undefined ? undefined : sweep.points[Number(number)];
    if (point?.run)
      pageOfRun(sweep, point);
    else
      overviewPage(sweep);
    scrollTo(0, 0);
  };
  addEventListener("hashchange", show);
  show();
}
