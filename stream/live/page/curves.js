// g2 against tau: points with error bars, fits, and earlier runs.

import { errorBars, field, figure, fitRange, source } from "./figure.js";
import { bySegments, partsOf } from "./segments.js";
import { colour } from "./theme.js";

const STEPS = 120; // points of a line that is calculated
const PALE = 0.25; // few pairs
const BEHIND = 0.12; // bins that are not chosen

export class Curves {
  constructor() {
    this.points = source("x", "y", "low", "high", "colour", "alpha", "bin");
    this.lines = source("xs", "ys", "colour", "width", "alpha");
    this.earlier = source("xs", "ys", "colour", "alpha");
    const y = new Bokeh.Range1d({ start: 0.98, end: 1.3 });
    const { made, shown } = figure("g2", ["τ (s)", "g₂"], { x_axis_type: "log", y_range: y, x_range: new Bokeh.Range1d({ start: 1e-4, end: 10 }) });
    this.figure = made;
    this.shown = shown;
    this.touched = false;
    made.on_event("rangesupdate", () => (this.touched = !this.setting));
    made.on_event("reset", () => { this.touched = false; this.again?.(); });
    made.multi_line({ xs: field("xs"), ys: field("ys"), line_color: field("colour"), line_alpha: field("alpha"), line_dash: { value: [6, 4] }, line_width: 1.5, source: this.earlier });
    made.multi_line({ xs: field("xs"), ys: field("ys"), line_color: field("colour"), line_width: field("width"), line_alpha: field("alpha"), source: this.lines });
    errorBars(made, this.points, 7);
  }

  draw(state) {
    this.again = () => this.draw(state);
    const { g2 } = state;
    const { points, lines } = g2 && bySegments(state) ? partsOf(state, PALE) : { points: binsOf(state), lines: fitted(state) };
    if (g2 && !this.touched) {
      const { tau } = g2.arrays;
      let [low, high] = [Infinity, -Infinity];
      points.y.forEach((value, i) => {
        if (points.alpha[i] < 1) return; // behind, or of few pairs
        const bar = Math.min(points.high[i] - value, 0.1);
        low = Math.min(low, value - bar);
        high = Math.max(high, value + bar);
      });
      this.setting = true;
      fitRange(this.figure.x_range, tau[0], tau[tau.length - 1], { log: true });
      fitRange(this.figure.y_range, Math.min(1, low), high);
      this.setting = false;
    }
    this.key = g2?.head.key; // which run is drawn
    this.points.data = points;
    this.lines.data = lines;
    this.earlier.data = earlier(state);
  }
}

/** Points of all bins. */
function binsOf({ g2, colours, selected, run }) {
  const columns = { x: [], y: [], low: [], high: [], colour: [], alpha: [], bin: [] };
  if (!g2) return columns;
  const { tau, n_pairs } = g2.arrays;
  const n = g2.arrays.g2.shape[1];
  for (const bin of inOrder(n, selected)) {
    for (let i = 0; i < tau.length; i++) {
      const [value, error] = [g2.arrays.g2[i * n + bin], g2.arrays.g2_err[i * n + bin]];
      if (!Number.isFinite(value)) continue;
      const bar = Number.isFinite(error) ? error : 0;
      columns.x.push(tau[i]);
      columns.y.push(value);
      columns.low.push(value - bar);
      columns.high.push(value + bar);
      columns.colour.push(colours[bin]);
      columns.alpha.push((n_pairs[i] >= run.few_pairs ? 1 : PALE) * (selected === null || selected === bin ? 1 : BEHIND));
      columns.bin.push(bin);
    }
  }
  return columns;
}

/** All bins, the chosen one last, so that it lies on top. */
const inOrder = (n, selected) => [...Array(n).keys()].sort((a, b) => (a === selected) - (b === selected));

function fitted({ g2, fit, model, colours, selected }) {
  const lines = { xs: [], ys: [], colour: [], width: [], alpha: [] };
  if (!g2 || !fit || model === "none") return lines;
  const of = (name) => fit.arrays[`${model}_${name}`];
  const { tau } = g2.arrays;
  const ratio = (tau[tau.length - 1] / tau[0]) ** (1 / (STEPS - 1));
  const xs = Array.from({ length: STEPS }, (_, i) => tau[0] * ratio ** i);
  for (let bin = 0; bin < of("rate").length; bin++) {
    if (!of("converged")[bin]) continue;
    const [contrast, rate, baseline, stretch] = ["contrast", "rate", "baseline", "stretch"].map((name) => of(name)[bin]);
    lines.xs.push(xs);
    lines.ys.push(xs.map((t) => baseline + contrast * Math.exp(-2 * (rate * t) ** stretch)));
    lines.colour.push(colours[bin]);
    lines.width.push(selected === bin ? 3 : 1.8);
    lines.alpha.push(selected === null || selected === bin ? 0.9 : BEHIND);
  }
  return lines;
}

function earlier({ overlays, selected }) {
  const lines = { xs: [], ys: [], colour: [], alpha: [] };
  for (const { arrays } of overlays.values()) {
    const n = arrays.g2.shape[1];
    for (let bin = 0; bin < n; bin++) {
      if (selected !== null && selected !== bin) continue;
      lines.xs.push([...arrays.tau]);
      lines.ys.push([...arrays.tau].map((_, i) => arrays.g2[i * n + bin]));
      lines.colour.push(colour("soft"));
      lines.alpha.push(0.8);
    }
  }
  return lines;
}
