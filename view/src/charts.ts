// Charts as SVG, each with a text of what it shows.
import { h, svg, unique } from "./dom";
import { tone } from "./colours";

export interface Series { name: string; xs: number[]; ys: (number | null)[]; colour: string; dashed?: boolean; band?: [(number | null)[], (number | null)[]] }
export interface Axis { label?: string; format?: (value: number) => string; low?: number; high?: number; log?: boolean; whole?: boolean }

const WIDE = 1240, NARROW = 560, H = 250, LEFT = 54, RIGHT = 14, TOP = 12, BOTTOM = 40;

function ticks(low: number, high: number, count: number, whole = false): number[] {
  if (!(high > low)) return [low];
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  let stride = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough * 0.999) ?? power * 10;
  if (whole) stride = Math.max(1, Math.round(stride));
  const made: number[] = [];
  for (let value = Math.ceil(low / stride - 1e-9) * stride; value <= high + stride * 1e-9; value += stride) made.push(Number(value.toPrecision(12)));
  return made;
}

function logTicks(low: number, high: number): number[] {
  const made: number[] = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const one of [1, 2, 5]) { const value = one * 10 ** power; if (value >= low * 0.999 && value <= high * 1.001) made.push(value); }
  return made.length > 7 ? made.filter((value) => Math.abs(Math.log10(value) % 1) < 1e-9 || made.length < 10) : made;
}

export const plainNumber = (value: number): string => {
  const size = Math.abs(value);
  if (size >= 1e9) return `${+(value / 1e9).toFixed(2)}G`;
  if (size >= 1e6) return `${+(value / 1e6).toFixed(2)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toFixed(1)}k`;
  return String(+value.toPrecision(4));
};
export const shareNumber = (value: number): string => `${+(100 * value).toPrecision(4)}%`;

export const wide = WIDE;

export class Frame {
  readonly element: SVGElement;
  readonly inner: SVGElement;
  readonly x: (value: number) => number;
  readonly y: (value: number) => number;

  constructor(about: string, xs: [number, number], ys: [number, number], xAxis: Axis = {}, yAxis: Axis = {}, height = H, readonly width = NARROW) {
    const W = width;
    const id = unique("chart");
    this.x = (value) => LEFT + ((value - xs[0]) / (xs[1] - xs[0] || 1)) * (W - LEFT - RIGHT);
    const to = (value: number): number => (yAxis.log ? Math.log10(Math.max(value, 1e-12)) : value);
    const [low, high] = [to(ys[0]), to(ys[1])];
    this.y = (value) => height - BOTTOM - ((to(value) - low) / (high - low || 1)) * (height - TOP - BOTTOM);
    this.inner = svg("g");
    const format = yAxis.format ?? plainNumber, xFormat = xAxis.format ?? plainNumber;
    this.element = svg("svg", { class: "chart", viewBox: `0 0 ${W} ${height}`, role: "img", "aria-labelledby": id },
      svg("title", { id }, about),
      svg("g", { class: "grid" }, (yAxis.log ? logTicks(ys[0], ys[1]) : ticks(ys[0], ys[1], 5)).map((value) => svg("g", null,
        svg("line", { x1: LEFT, x2: W - RIGHT, y1: this.y(value), y2: this.y(value) }),
        svg("text", { x: LEFT - 8, y: this.y(value) + 4, "text-anchor": "end" }, format(value))))),
      svg("g", { class: "axis" }, ticks(xs[0], xs[1], width / 75, xAxis.whole).map((value) => svg("text", { x: this.x(value), y: height - BOTTOM + 17, "text-anchor": "middle" }, xFormat(value)))),
      xAxis.label && svg("text", { class: "axis-label", x: (LEFT + W - RIGHT) / 2, y: height - 6, "text-anchor": "middle" }, xAxis.label),
      this.inner);
  }
  add(...shapes: SVGElement[]): this { this.inner.append(...shapes); return this; }
}

export function legendFor(series: { name: string; colour: string; dashed?: boolean }[]): HTMLElement {
  return h("ul", { class: "chart-legend" }, series.map((one) => h("li", null, h("i", { class: one.dashed ? "swatch line dashed" : "swatch line", style: { "--c": one.colour } }), h("bdi", null, one.name))));
}

function range(values: (number | null | undefined)[]): [number, number] {
  let low = Infinity, high = -Infinity;
  for (const value of values) if (value !== null && value !== undefined && Number.isFinite(value)) { if (value < low) low = value; if (value > high) high = value; }
  return low <= high ? [low, high] : [0, 1];
}

export function lines(about: string, series: Series[], xAxis: Axis = {}, yAxis: Axis = {}, marks: { y: number; text: string }[] = []): HTMLElement {
  const [x0, x1] = range(series.flatMap((one) => one.xs));
  let [y0, y1] = range([...series.flatMap((one) => [...one.ys, ...(one.band?.[0] ?? []), ...(one.band?.[1] ?? [])]), ...marks.map((one) => one.y)]);
  if (!yAxis.log) { const pad = 0.06 * (y1 - y0 || Math.abs(y1) || 1); y1 += pad; y0 = yAxis.low ?? (y0 >= 0 && y0 < 0.5 * y1 ? 0 : y0 - pad); }
  if (yAxis.high !== undefined) y1 = yAxis.high;
  const frame = new Frame(about, x0 === x1 ? [x0 - 0.5, x1 + 0.5] : [x0, x1], [y0, y1], xAxis, yAxis);
  for (const mark of marks) frame.add(svg("line", { class: "mark", x1: LEFT, x2: frame.width - RIGHT, y1: frame.y(mark.y), y2: frame.y(mark.y) }), svg("text", { class: "mark-text", x: frame.width - RIGHT, y: frame.y(mark.y) - 5, "text-anchor": "end" }, mark.text));
  for (const one of series) {
    if (one.band) {
      const at = one.xs.map((_, i) => i).filter((i) => one.band![0][i] !== null && one.band![1][i] !== null);
      const top = at.map((i) => `${frame.x(one.xs[i])},${frame.y(one.band![1][i]!)}`), bottom = at.map((i) => `${frame.x(one.xs[i])},${frame.y(one.band![0][i]!)}`).reverse();
      frame.add(svg("polygon", { points: [...top, ...bottom].join(" "), fill: one.colour, opacity: 0.16 }));
    }
    let path = "";
    let pen = false;
    one.xs.forEach((x, i) => { const y = one.ys[i]; if (y === null || y === undefined) { pen = false; return; } path += `${pen ? "L" : "M"}${frame.x(x).toFixed(1)} ${frame.y(y).toFixed(1)}`; pen = true; });
    frame.add(svg("path", { d: path, fill: "none", stroke: one.colour, "stroke-width": 2, "stroke-dasharray": one.dashed ? "5 4" : null, "stroke-linejoin": "round" }));
    if (one.xs.length <= 60) for (const [i, x] of one.xs.entries()) { const y = one.ys[i]; if (y !== null && y !== undefined) frame.add(svg("circle", { cx: frame.x(x), cy: frame.y(y), r: 3, fill: one.colour }, svg("title", null, `${one.name}, ${(xAxis.format ?? plainNumber)(x)}: ${(yAxis.format ?? plainNumber)(y)}`))); }
  }
  return h("figure", null, h("figcaption", null, about), frame.element, series.length > 1 || series[0]?.dashed ? legendFor(series) : null);
}

export function stacked(about: string, edges: number[], kept: number[], dropped: number[], cut: number | null, label: string, onRange?: (low: number, high: number) => void, width = NARROW, names = ["kept", "dropped"]): HTMLElement {
  const most = Math.max(1, ...kept.map((one, i) => one + dropped[i]));
  const frame = new Frame(about, [edges[0], edges[edges.length - 1]], [0, most * 1.04], { label }, {}, 230, width);
  kept.forEach((one, i) => {
    const x = frame.x(edges[i]), width = Math.max(0.5, frame.x(edges[i + 1]) - x - 0.6), a = frame.y(dropped[i]), b = frame.y(one + dropped[i]), base = frame.y(0);
    const text = `${plainNumber(edges[i])} to ${plainNumber(edges[i + 1])}: ${one.toLocaleString("en-US")} ${names[0]}, ${dropped[i].toLocaleString("en-US")} ${names[1]}`;
    const bar = svg("g", { class: onRange ? "bar can" : "bar" }, svg("title", null, text),
      svg("rect", { x, y: TOP, width: width + 0.6, height: base - TOP, fill: "transparent" }),
      svg("rect", { x, y: a, width, height: Math.max(0, base - a), class: "dropped" }), svg("rect", { x, y: b, width, height: Math.max(0, a - b), class: "kept" }));
    if (onRange) bar.addEventListener("click", () => onRange(edges[i], edges[i + 1]));
    frame.add(bar);
  });
  if (cut !== null && cut >= edges[0] && cut <= edges[edges.length - 1]) frame.add(svg("line", { class: "cut-line", x1: frame.x(cut), x2: frame.x(cut), y1: TOP, y2: frame.y(0) }), svg("text", { class: "mark-text", x: frame.x(cut) + 5, y: TOP + 12 }, `cut ${plainNumber(cut)}`));
  return h("figure", null, h("figcaption", null, about), frame.element, h("ul", { class: "chart-legend" }, h("li", null, h("i", { class: "swatch kept-fill" }), names[0]), h("li", null, h("i", { class: "swatch dropped-fill" }), names[1])));
}

export function bars(about: string, xs: number[], series: Series[]): HTMLElement {
  const most = Math.max(1, ...series.flatMap((one) => one.ys.map((y) => y ?? 0)));
  const frame = new Frame(about, [xs[0] - 0.5, xs[xs.length - 1] + 0.5], [0, most * 1.06], { label: "epoch", whole: true }, {});
  const base = frame.y(0), wide = (0.7 * (frame.x(1) - frame.x(0))) / series.length;
  series.forEach((one, i) => xs.forEach((x, e) => {
    const y = one.ys[e];
    if (y) frame.add(svg("rect", { x: frame.x(x) + (i - series.length / 2) * wide, y: frame.y(y), width: Math.max(1, wide - 1), height: base - frame.y(y), fill: one.colour, rx: 2 }, svg("title", null, `${one.name}, epoch ${x}: ${y.toLocaleString("en-US")} rows`)));
  }));
  return h("figure", null, h("figcaption", null, about), frame.element, series.length > 1 ? legendFor(series) : null);
}

export function heat(about: string, xs: number[], edges: number[], counts: number[][]): HTMLElement {
  const low = edges[0] > 0 ? edges[0] : edges[1] / 1.25, all = [low, ...edges.slice(1)];
  const frame = new Frame(about, [xs[0] - 0.5, xs[xs.length - 1] + 0.5], [low, edges[edges.length - 1]], { label: "epoch", whole: true }, { log: true });
  const most = Math.max(...counts.map((line) => { const total = line.reduce((a, b) => a + b, 0) || 1; return Math.max(...line) / total; }), 1e-9);
  counts.forEach((line, e) => {
    const total = line.reduce((a, b) => a + b, 0) || 1, x = frame.x(xs[e] - 0.5), width = frame.x(xs[e] + 0.5) - x;
    line.forEach((count, b) => { if (!count) return; const top = frame.y(all[b + 1]), bottom = frame.y(all[b]); frame.add(svg("rect", { x, y: top, width: width + 0.3, height: bottom - top + 0.3, fill: tone().kept, opacity: Math.sqrt(count / total / most).toFixed(3) }, svg("title", null, `epoch ${xs[e]}, loss ${plainNumber(all[b])} to ${plainNumber(all[b + 1])}: ${count.toLocaleString("en-US")} rows`))); });
  });
  return h("figure", null, h("figcaption", null, about), frame.element);
}

export function meter(part: number, whole: number, label: string): HTMLElement {
  const share = whole ? part / whole : 0;
  return h("span", { class: "meter", ...(label ? { role: "img", "aria-label": label } : { "aria-hidden": "true" }) }, h("i", { style: { width: `${(100 * share).toFixed(2)}%` } }));
}
