"use strict";

// --- elements: text always becomes a text node, so that no name of the report is taken for HTML ---

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// Where a page is drawn; what it held before leaves.
const root = document.body.appendChild(html("main"));
function section(title, text, ...content) {
  root.append(html("section", {}, html("h2", {}, title), html("p", {}, text), ...content));
}

const kColours = ["#2a78d6", "#d9662a", "#1a9e8c", "#b8860b", "#b0509a", "#4a8f3b", "#7561c9", "#c94444"];
const colour = (index) => kColours[index % kColours.length];

// --- numbers ---

const isNumber = (value) => typeof value === "number";
// What was not measured is missing, null or negative in a report, and a dash here.
const decimals = (value, digits) => (isNumber(value) && value >= 0 ? value.toFixed(digits) : "–");
const significant = (value, digits) => String(Number(value.toPrecision(digits)));
function bytes(value) {
  if (value >= 1e9) return (value / 1e9).toFixed(2) + " GB";
  if (value >= 1e6) return (value / 1e6).toFixed(1) + " MB";
  return (value / 1e3).toFixed(1) + " kB";
}
// 1200000 as 1.2M: a number beside an axis.
function compact(value) {
  if (Math.abs(value) >= 1e6) return significant(value / 1e6, 3) + "M";
  if (Math.abs(value) >= 1e5) return significant(value / 1e3, 3) + "k";
  return significant(value, 6);
}
const unique = (values) => [...new Set(values)];
const sum = (values) => values.reduce((total, value) => total + value, 0);

// 1, 2 or 5 times a power of ten: the distance of grid lines so that about `count` fit into `span`.
function gridStep(span, count) {
  const rough = span / count, power = 10 ** Math.floor(Math.log10(rough));
  return power * ([1, 2, 5].find((factor) => factor * power >= rough) ?? 10);
}

// --- charts ---

// A chart that is drawn again whenever its width changes, so that its text is readable on narrow screens too.
function chart(label, draw) {
  const box = html("div");
  let drawn = 0;
  const redraw = () => {
    const width = Math.max(260, Math.floor(box.clientWidth));
    if (width === drawn) return;
    drawn = width;
    const {height, content, role = "img"} = draw(width);
    box.replaceChildren(svg("svg", {width, height, role, "aria-label": label}, ...content));
  };
  queueMicrotask(redraw);  // once the box has its place in the page
  // In the next frame: an observer that resizes what it observes is an error of the page.
  new ResizeObserver(() => requestAnimationFrame(redraw)).observe(box);
  return box;
}

const legend = (names) => html(
    "div", {class: "legend"},
    ...names.map((name, i) => html("span", {}, html("i", {style: `background: ${colour(i)}`}), name)));

// Marks of blocks below a chart: `x` gives the place of a block.
function blockMarks(count, width, x, y) {
  const step = Math.max(1, Math.floor(gridStep(count, Math.max(2, width / 80))));
  const marks = [];
  for (let block = 0; block < count; block += step)
    marks.push(svg("text", {x: x(block), y, "text-anchor": "middle"}, String(block)));
  return marks;
}

// Lines over the blocks, from zero up. A series is a name and points [block, value].
function lineChart(series, label) {
  return chart(label, (width) => {
    const height = 280, left = 56, right = 14, top = 12, bottom = 38;
    const points = series.flatMap((each) => each.points).filter(([, value]) => isNumber(value));
    const last = Math.max(1, ...points.map(([block]) => block));
    const largest = Math.max(0, ...points.map(([, value]) => value)) || 1;
    const step = gridStep(largest, 5), most = step * Math.ceil(largest / step - 1e-9);
    const x = (block) => left + ((width - left - right) * block) / last;
    const y = (value) => height - bottom - ((height - top - bottom) * value) / most;
    const content = [];
    for (let i = 0; i * step <= most * 1.0001; ++i) {
      const at = y(i * step);
      content.push(
          svg("line", {class: "grid", x1: left, x2: width - right, y1: at, y2: at}),
          svg("text", {x: left - 8, y: at + 4, "text-anchor": "end"}, significant(i * step, 4)));
    }
    content.push(
        ...blockMarks(last + 1, width, x, height - 20),
        svg("text", {x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle"}, "block"));
    series.forEach(({name, points}, i) => {
      const measured = points.filter(([, value]) => isNumber(value));
      const path = measured.map(
          ([block, value], p) => `${p ? "L" : "M"}${x(block).toFixed(1)} ${y(value).toFixed(1)}`);
      content.push(svg("path", {
        d: path.join(""),
        fill: "none",
        stroke: colour(i),
        "stroke-width": 2,
        "stroke-linejoin": "round"
      }));
      for (const [block, value] of measured)
        content.push(
            svg("circle", {cx: x(block), cy: y(value), r: 3, fill: colour(i)},
                svg("title", {}, `${name}, block ${block}: ${significant(value, 5)}`)));
    });
    return {height, content};
  });
}

// A bar is a name, a value and a label. Names stand beside the bars, on narrow screens above them.
function barChart(bars, label) {
  return chart(label, (width) => {
    const narrow = width < 640, row = narrow ? 40 : 24, left = narrow ? 0 : 210;
    const space = width - left - 210, largest = Math.max(1e-30, ...bars.map((bar) => bar.value));
    const content = [];
    bars.forEach((bar, i) => {
      const y = row * i + (narrow ? 18 : 4), length = Math.max(1, (space * bar.value) / largest);
      content.push(
          svg("text", narrow ? {x: 0, y: y - 4} : {x: left - 10, y: y + 12, "text-anchor": "end"}, bar.name),
          svg("rect", {x: left, y, width: length, height: 16, rx: 3, fill: colour(0)}),
          svg("text", {class: "value", x: left + length + 8, y: y + 12}, bar.label));
    });
    return {height: row * bars.length + 4, content};
  });
}

// Roles down, blocks across; the colour of a cell is its code.
function codeGrid(linears, roles, codes, label) {
  return chart(label, (width) => {
    const left = 90, row = 22, count = 1 + Math.max(0, ...linears.map((linear) => linear.block));
    const cell = Math.min(40, (width - left) / count), height = row * roles.length + 22;
    const content =
        roles.map((role, r) => svg("text", {x: left - 10, y: row * r + 15, "text-anchor": "end"}, role));
    for (const {name, block, role, code} of linears) {
      if (block < 0) continue;
      content.push(
          svg("rect", {
            x: left + cell * block,
            y: row * roles.indexOf(role),
            width: Math.max(1, cell - 2),
            height: row - 2,
            rx: 2,
            fill: colour(codes.indexOf(code))
          },
              svg("title", {}, `${name}: ${code}`)));
    }
    content.push(...blockMarks(count, width, (block) => left + cell * (block + 0.5) - 1, height - 6));
    return {height, content};
  });
}

// The width of a text in a chart, in pixels.
const kPen = document.createElement("canvas").getContext("2d");
function textWidth(text, isBold = false) {
  kPen.font = (isBold ? "600 " : "") + "12px system-ui, sans-serif";
  return kPen.measureText(text).width;
}

// The numbers beside a logarithmic axis from `low` to `high`, at most `count`: the closest steps that are so
// few.
function logarithmicTicks(low, high, count) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  const ticks = (mantissas, stride) => {
    const all = [];
    for (let power = first; power <= last; power += stride)
      all.push(...mantissas.map((mantissa) => mantissa * 10 ** power));
    return all.filter((tick) => tick >= low && tick <= high);
  };
  for (const mantissas of [[1, 1.5, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]]) {
    const all = ticks(mantissas, 1);
    if (all.length <= count) return all;
  }
  return ticks([1], Math.ceil((last - first) / count));
}

// An axis that holds `values` between the pixels `from` and `to`, with about `count` numbers. It is
// logarithmic where values above zero spread over more than a factor of four: on a linear one most points
// would lie on the lowest line.
function makeAxis(values, from, to, count) {
  const least = Math.min(...values), most = Math.max(...values);
  const isLogarithmic = least > 0 && most > 4 * least;
  const forward = isLogarithmic ? Math.log : (value) => value;
  const margin = 0.08 * (forward(most) - forward(least)) || 0.1 * Math.abs(forward(most)) || 1;
  const low = forward(least) - margin, high = forward(most) + margin;
  let ticks = [];
  if (isLogarithmic) {
    ticks = logarithmicTicks(Math.exp(low), Math.exp(high), count);
  } else {
    const step = gridStep(high - low, count);
    for (let i = Math.ceil(low / step); i * step <= high; ++i) ticks.push(i * step);
  }
  return {isLogarithmic, ticks, at: (value) => from + ((to - from) * (forward(value) - low)) / (high - low)};
}
