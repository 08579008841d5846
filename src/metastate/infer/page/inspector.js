// Pictures of a state: heat maps by layer and head, norms over tokens, tokens by what they wrote.

import { bytes, count, make } from "./api.js";

const LEVELS = 127; // a cell's value at the scale's end
const NUMBER = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const number = (x) => NUMBER.format(x);
const together = (values) => Math.hypot(...values);
const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "▯";

const MEMORY = "memory";
const MATRICES = { S: ["S", "S, the WKV state"], M: ["M", "M, the meta state"],
  [MEMORY]: ["M of the surprise memory", "M of the surprise memory, which corrects what a block or the head reads"] };

/** What an answer tells of each matrix: a record for every layer, or the surprise memory's alone. */
function byMatrix({ layers, memory }) {
  const found = Object.keys(layers[0] ?? {}).map((name) => [name, layers.map((layer) => layer[name])]);
  return Object.fromEntries(memory ? [...found, [MEMORY, [memory.M]]] : found);
}

const inside = document.getElementById("inside");
let shown = []; // redraw functions of what stands in `inside`

/** Show an answer of the inspector; `answer` has tokens and layers if a text was read. */
export function showInside(answer, heading) {
  const state = answer.state ?? answer;
  shown = [];
  const parts = [make("h3", {}, heading), sizes(state)];
  if (!state.layers.length) {
    parts.push(make("p", {}, "This model keeps keys and values of every token, no matrix of constant size."));
  }
  if (answer.tokens) parts.push(tokensPanel(answer));
  if (state.layers.length || state.memory) parts.push(mapsPanel(state));
  inside.replaceChildren(...parts);
  redraw();
}

function redraw() {
  shown.forEach((draw) => draw());
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
new ResizeObserver(redraw).observe(inside);

/** The state's bytes beside what a Transformer's cache of as many tokens takes. */
function sizes(state) {
  const most = Math.max(state.state_bytes, state.cache_bytes, 1);
  const bar = (name, size, kind) => {
    const fill = make("span", { className: `fill ${kind}` });
    fill.style.width = `${(100 * size) / most}%`;
    return make("div", { className: "size" }, make("span", {}, name), make("span", { className: "bar" }, fill),
      make("span", { className: "figure" }, bytes(size)));
  };
  const perToken = state.tokens_seen ? state.cache_bytes / state.tokens_seen : 0;
  const even = perToken && state.layers.length
    ? ` This state keeps its size; the two are level after ${count(Math.ceil(state.state_bytes / perToken))} tokens.`
    : "";
  return make("div", { className: "panel sizes" },
    bar("This state", state.state_bytes, "own"),
    bar("A Transformer's cache", state.cache_bytes, "cache"),
    make("p", { className: "note" },
      `By now, after ${count(state.tokens_seen)} tokens. The cache is that of keys and values at the same width, depth and number format.${even}`));
}

function select(label, options, onChange) {
  const menu = make("select", {}, ...options.map(([value, text]) => make("option", { value }, text)));
  menu.addEventListener("change", onChange);
  return [make("label", { className: "field" }, label, menu), menu];
}

function tokensPanel(answer) {
  const { tokens } = answer, records = byMatrix(answer);
  const [matrixField, matrix] = select("Matrix", Object.keys(records).map((n) => [n, MATRICES[n][0]]), update);
  const [layerField, layer] = select("Layer",
    [["", "all"], ...answer.layers.map((_, i) => [i, `${i + 1}`])], update);
  const [measureField, measure] = select("Colour",
    [["changes", "how much a token wrote"], ["nats", "how unexpected it was"]], update);
  const spans = tokens.map((token, i) =>
    make("span", { className: "token", onclick: () => point(i) }, token.text || "▯"));
  if (!tokens[0].text) spans[0].textContent = "▮"; // the end of document that every text begins with
  const text = make("div", { className: "tokens", tabIndex: 0, role: "group",
    "aria-label": "The text's tokens, coloured. The arrow keys go from token to token.",
    onkeydown: move }, ...spans);
  const detail = make("p", { className: "note detail", role: "status" });
  const most = make("p", { className: "note" });
  const chart = make("canvas", { className: "chart", role: "img" });
  const legend = make("p", { className: "legend note" });
  const title = make("h4");
  let values = [], lines = [], at = null;

  function update() {
    const all = records[matrix.value], [name] = MATRICES[matrix.value];
    layer.disabled = matrix.value === MEMORY; // it belongs to no layer
    const one = !layer.disabled && layer.value !== "";
    const chosen = one ? [all[layer.value]] : all;
    const over = (key, i) => together(chosen.flatMap((record) => record[key][i]));
    values = measure.value === "nats" ? tokens.map((t) => t.nats ?? 0) : tokens.map((_, i) => over("changes", i));
    const [least, peak] = [Math.min(...values), Math.max(...values)];
    spans.forEach((span, i) => span.style.setProperty("--wrote", (100 * (values[i] - least)) / (peak - least || 1)));
    const order = values.map((_, i) => i).sort((a, b) => values[b] - values[a]).slice(0, 6);
    const unit = measure.value === "nats" ? "Least expected" : `Wrote most to ${name}`;
    most.textContent = `${unit}: ` + order.map((i) => `${visible(tokens[i].text)} (token ${i + 1}, ${number(values[i])})`).join(", ");
    lines = one || layer.disabled
      ? chosen[0].norms[0].map((_, h) => ({ name: `head ${h + 1}`, values: chosen[0].norms.map((heads) => heads[h]) }))
      : all.map((record, i) => ({ name: `layer ${i + 1}`, values: record.norms.map(together) }));
    title.textContent = `Norm of ${name} over the tokens${one ? `, layer ${Number(layer.value) + 1}` : ""}`;
    chart.setAttribute("aria-label", `${title.textContent}. ` + lines.map((line) =>
      `${line.name}: from ${number(line.values[0])} to ${number(line.values.at(-1))}, at most ${number(Math.max(...line.values))}`).join("; "));
    legend.replaceChildren(...lines.map((line, i) => {
      const mark = make("i");
      mark.style.setProperty("--share", share(i, lines.length));
      return make("span", {}, mark, line.name);
    }));
    point(at);
  }

  function point(i) {
    if (at !== null) spans[at].classList.remove("here");
    at = i;
    if (i !== null) {
      spans[i].classList.add("here");
      const { text, id, nats } = tokens[i];
      const wrote = together(records[matrix.value].flatMap((record) => record.changes[i]));
      const name = i === 0 && !text ? "end of document, where every text begins" : visible(text);
      detail.textContent = `Token ${i + 1} of ${tokens.length}, id ${id}: ${name}. ` +
        `It changed ${MATRICES[matrix.value][0]} by ${number(wrote)}${layer.disabled ? "" : " over all layers"}` +
        (nats === null ? "." : `; it cost ${number(nats)} nats.`);
    } else {
      detail.textContent = "Choose a token, or go through them with the arrow keys.";
    }
    drawChart(chart, lines, at);
  }

  function move(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity }[event.key];
    if (!step) return;
    event.preventDefault();
    point(Math.min(tokens.length - 1, Math.max(0, (at ?? -1) + step)));
    spans[at].scrollIntoView({ block: "nearest" });
  }

  update();
  shown.push(() => drawChart(chart, lines, at));
  return make("div", { className: "panel" },
    make("div", { className: "row controls" }, measureField, matrixField, layerField),
    text, detail, most, title, chart, legend);
}

const share = (i, n) => (n === 1 ? 0 : (100 * i) / (n - 1));

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function channels(name) {
  const hex = colour(name);
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

const mix = (a, b, t) => a.map((x, i) => Math.round(x + (b[i] - x) * t));

/** Fit a canvas to its box in device pixels; return its context in CSS pixels. */
function prepare(canvas) {
  const { clientWidth: width, clientHeight: height } = canvas;
  const ratio = devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return [context, width, height];
}

function drawChart(canvas, lines, at) {
  const [context, width, height] = prepare(canvas);
  if (!width || !lines.length) return;
  const [left, right, top, bottom] = [44, 10, 8, 22];
  const length = lines[0].values.length;
  const peak = Math.max(...lines.flatMap((line) => line.values)) || 1;
  const x = (i) => left + ((width - left - right) * i) / Math.max(length - 1, 1);
  const y = (value) => height - bottom - ((height - top - bottom) * value) / peak;
  context.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  context.lineWidth = 1;
  for (const value of [0, peak / 2, peak]) {
    context.strokeStyle = colour("--line");
    context.beginPath();
    context.moveTo(left, y(value));
    context.lineTo(width - right, y(value));
    context.stroke();
    context.fillStyle = colour("--quiet");
    context.textAlign = "right";
    context.textBaseline = "middle";
    context.fillText(number(value), left - 6, y(value));
  }
  context.textBaseline = "bottom";
  context.textAlign = "left";
  context.fillText("token 1", left, height - 2);
  context.textAlign = "right";
  context.fillText(count(length), width - right, height - 2);
  const [from, to] = [channels("--first"), channels("--last")];
  context.lineWidth = 1.6;
  context.lineJoin = "round";
  lines.forEach((line, i) => {
    context.strokeStyle = `rgb(${mix(from, to, share(i, lines.length) / 100).join(" ")})`;
    context.beginPath();
    line.values.forEach((value, t) => context.lineTo(x(t), y(value)));
    context.stroke();
  });
  if (at !== null) {
    context.strokeStyle = colour("--text");
    context.lineWidth = 1;
    context.setLineDash([3, 3]);
    context.beginPath();
    context.moveTo(x(at), top);
    context.lineTo(x(at), height - bottom);
    context.stroke();
  }
}

function mapsPanel(state) {
  const who = Object.entries(state.reads).map(([name, by]) => `${MATRICES[name][0]} is read by ${by.join(" and ")}`).join("; ");
  const twice = !state.reads.M && state.reads.S?.length > 1
    ? ". The layers of this model keep no meta state M: the Meta-State layer asks S a second time"
    : "";
  const groups = Object.entries(byMatrix(state)).map(([name, records]) =>
    make("section", { className: "matrix" }, make("h4", {}, MATRICES[name][1]),
      ...records.map((heads, l) => make("div", { className: "layer" },
        ...(name === MEMORY ? [] : [make("p", { className: "note" }, `Layer ${l + 1}`)]),
        make("div", { className: "heads" }, ...heads.map((head, h) => picture(head, place(name, l), h)))))));
  return make("div", { className: "panel" },
    make("p", { className: "note" }, `${who}${twice}. Rows are value channels, columns key channels. A cell shows the ` +
      "largest entry of its block; colour grows with the square root of its share of the map's own largest entry."),
    make("p", { className: "scale note" }, "negative ", make("span", { className: "ramp" }), " positive"),
    make("div", { className: "matrices" }, ...groups),
    numbers(state));
}

const place = (name, l) => (name === MEMORY ? MATRICES[name][0] : `${name} of layer ${l + 1}`);

function picture(head, where, h) {
  const canvas = make("canvas", { className: "map", role: "img",
    "aria-label": `${where}, head ${h + 1}: norm ${number(head.norm)}, effective rank ` +
      `${number(head.effective_rank)} of ${head.size}, largest entry ${number(head.scale)}` });
  shown.push(() => drawMap(canvas, head.cells));
  return make("figure", {}, canvas, make("figcaption", { className: "note" },
    make("span", {}, `head ${h + 1}`), make("span", {}, `norm ${number(head.norm)}`),
    make("span", {}, `rank ${number(head.effective_rank)}`)));
}

function drawMap(canvas, cells) {
  canvas.width = cells[0].length;
  canvas.height = cells.length;
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  const [zero, low, high] = [channels("--zero"), channels("--negative"), channels("--positive")];
  cells.flat().forEach((cell, i) => {
    const rgb = mix(zero, cell < 0 ? low : high, Math.sqrt(Math.abs(cell) / LEVELS));
    image.data.set([...rgb, 255], 4 * i);
  });
  context.putImageData(image, 0, 0);
}

/** The same figures as a table, for who cannot see the pictures. */
function numbers(state) {
  const rows = Object.entries(byMatrix(state)).flatMap(([name, records]) => records.flatMap((heads, l) =>
    heads.map((head, h) => make("tr", {}, ...[MATRICES[name][0], name === MEMORY ? "" : l + 1, h + 1,
      number(head.norm), number(head.effective_rank), number(head.scale)]
      .map((text) => make("td", {}, `${text}`))))));
  const head = ["Matrix", "Layer", "Head", "Norm", "Effective rank", "Largest entry"];
  return make("details", {}, make("summary", {}, "As numbers"),
    make("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "The figures as a table" },
      make("table", {}, make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col" }, text)))),
        make("tbody", {}, ...rows))));
}
