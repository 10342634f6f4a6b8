// Lines over time as SVG. The legend has name, current and peak value of each, also for screen readers.

import { Keyed, h, say, set, svg } from "./dom.js";
import { figure } from "./words.js";

const HEIGHT = 84;
const GAP_MS = 5000; // a longer gap between samples is not bridged
const TOP = 6;
const BOTTOM = 2;

export class Chart {
  constructor() {
    this.title = h("h3", {});
    this.scale = h("span", { class: "scale" });
    this.lines = svg("g", {});
    this.rule = svg("line", { class: "rule", y1: 0, y2: HEIGHT, hidden: true });
    this.drawing = svg("svg", { class: "chart", height: HEIGHT, "aria-hidden": "true" }, grid(), this.lines, this.rule);
    this.legend = h("dl", { class: "legend" });
    this.lineViews = new Keyed(this.lines, lineView);
    this.legendViews = new Keyed(this.legend, legendView);
    this.drawing.addEventListener("pointermove", (event) => this.point(event));
    this.drawing.addEventListener("pointerleave", () => this.point(null));
    const heading = h("div", { class: "heading" }, this.title, this.scale);
    this.element = h("section", {}, heading, this.drawing, this.legend);
    this.pointed = null;
    this.last = null;
  }

  // `window`: as Meter.window gives it. `lines`: [{name, values}], of which `values[index]` are drawn.
  update(title, window, spanMs, lines) {
    this.last = { title, window, spanMs, lines };
    const width = Math.max(50, this.drawing.clientWidth);
    const most = ceiling(highest(window, lines));
    say(this.title, title);
    say(this.scale, `last ${spanMs / 60000} min, to ${figure(most)}`);
    set(this.drawing, "viewBox", `0 0 ${width} ${HEIGHT}`);
    const end = window.at(-1)?.time ?? 0;
    const at = this.pointed === null ? window.at(-1) : nearest(window, end - spanMs * (1 - this.pointed / width));
    this.lineViews.update(
      lines.map((line, number) => [`${number}`, { d: pathOf(line, window, width, spanMs, end, most), number }]),
    );
    this.legendViews.update(lines.map((line, number) => [`${number}`, legendOf(line, number, window, at)]));
    set(this.rule, "hidden", this.pointed === null);
    if (this.pointed !== null) for (const end of ["x1", "x2"]) set(this.rule, end, this.pointed);
  }

  point(event) {
    this.pointed = event ? event.offsetX : null;
    if (this.last) this.update(this.last.title, this.last.window, this.last.spanMs, this.last.lines);
  }
}

function grid() {
  const line = (y) => svg("line", { x1: 0, x2: "100%", y1: y, y2: y });
  return svg("g", { class: "grid" }, line(TOP), line((TOP + HEIGHT - BOTTOM) / 2), line(HEIGHT - BOTTOM));
}

function highest(window, lines) {
  let most = 0;
  for (const { values } of lines) for (const { index } of window) most = Math.max(most, values[index]);
  return most;
}

// The next of 1, 2, 5, 10, ...
function ceiling(value) {
  if (value <= 1) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}

function pathOf({ values }, window, width, spanMs, end, most) {
  let path = "";
  let before = -Infinity;
  for (const { time, index } of window) {
    const x = width * (1 - (end - time) / spanMs);
    const y = HEIGHT - BOTTOM - ((HEIGHT - TOP - BOTTOM) * values[index]) / most;
    path += `${time - before > GAP_MS ? "M" : "L"}${x.toFixed(1)} ${y.toFixed(1)}`;
    before = time;
  }
  return path;
}

function nearest(window, time) {
  const distance = (each) => Math.abs(each.time - time);
  return window.reduce((best, each) => (distance(each) < distance(best) ? each : best), window[0]);
}

function lineView() {
  const element = svg("path", { fill: "none" });
  return {
    element,
    update({ d, number }) {
      set(element, "class", `line line-${number}`);
      set(element, "d", d);
    },
  };
}

function legendOf({ name, values }, number, window, at) {
  const peak = window.reduce((most, { index }) => Math.max(most, values[index]), 0);
  return { name, number, now: at ? figure(values[at.index]) : "-", peak: at ? figure(peak) : "-" };
}

function legendView() {
  const name = h("span", {});
  const now = h("b", {});
  const peak = h("span", { class: "peak" });
  const term = h("dt", {}, h("i", { "aria-hidden": "true" }), name);
  const element = h("div", {}, term, h("dd", {}, now, " ", peak));
  return {
    element,
    update(line) {
      set(element, "class", `line-${line.number}`);
      say(name, line.name);
      say(now, line.now);
      say(peak, `peak ${line.peak}`);
    },
  };
}
