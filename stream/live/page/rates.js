// How relaxation and contrast go with q.

import { errorBars, field, figure, source } from "./figure.js";
import { say, short, withError } from "./text.js";
import { colour, onTheme } from "./theme.js";

const POINTS = ["x", "y", "low", "high", "colour", "alpha", "bin"];

function ring(made, data) {
  const glyph = made.scatter({ x: field("x"), y: field("y"), size: 17, fill_color: null, line_color: colour("ink"), line_width: 2, source: data });
  onTheme(() => (glyph.glyph.line_color = colour("ink")));
}

export class Rates {
  constructor() {
    this.points = source(...POINTS);
    this.law = source("x", "y");
    this.chosen = source("x", "y");
    const { made } = figure("rates", ["q (Å⁻¹)", "τ (s)"], { x_axis_type: "log", y_axis_type: "log" });
    this.figure = made;
    made.line({ x: field("x"), y: field("y"), line_color: colour("soft"), line_width: 2, source: this.law });
    errorBars(made, this.points, 9);
    ring(made, this.chosen);
    this.contrast = source(...POINTS);
    this.chosenContrast = source("x", "y");
    const second = figure("contrast", ["q (Å⁻¹)", "contrast"]).made;
    second.below[0].ticker.desired_num_ticks = 3;
    this.contrastFigure = second;
    errorBars(second, this.contrast, 9);
    ring(second, this.chosenContrast);
  }

  draw(state) {
    const { fit, map, quantity, selected, colours } = state;
    const model = state.model === "none" ? "single" : state.model;
    const hasQ = map && [...map.arrays.q].some((q) => Number.isFinite(q) && q > 0);
    const points = Object.fromEntries(POINTS.map((name) => [name, []]));
    const contrast = Object.fromEntries(POINTS.map((name) => [name, []]));
    const n = fit ? fit.arrays.single_rate.length : 0;
    const of = (name) => fit.arrays[`${model}_${name}`];
    for (let bin = 0; bin < n; bin++) {
      const x = hasQ ? map.arrays.q[bin] : bin + 1;
      const [rate, error] = [of("rate")[bin], of("rate_err")[bin]];
      const put = (columns, y, low, high) => {
        if (!(Number.isFinite(y) && Number.isFinite(x))) return;
        const row = { x, y, low, high, colour: colours[bin], alpha: of("converged")[bin] ? 1 : 0.25, bin };
        for (const name of POINTS) columns[name].push(row[name]);
      };
      if (of("converged")[bin]) {
        const [y, low, high] = quantity === "tau" ? [1 / rate, 1 / (rate + error), 1 / (rate - error)] : [rate, rate - error, rate + error];
        put(points, y, low, high);
        const [height, uncertain] = [of("contrast")[bin], of("contrast_err")[bin]];
        put(contrast, height, height - uncertain, height + uncertain);
      }
    }
    this.points.data = points;
    this.contrast.data = contrast;
    this.chosen.data = only(points, selected);
    this.chosenContrast.data = only(contrast, selected);
    for (const each of [this.figure, this.contrastFigure]) each.below[0].axis_label = hasQ ? "q (Å⁻¹)" : "bin";
    this.figure.left[0].axis_label = quantity === "tau" ? "τ (s)" : "Γ (1/s)";
    say("rates-title", quantity === "tau" ? "τ(q)" : "Γ(q)");
    this.law.data = line(fit?.head[model], points.x, quantity);
    say("rates-says", fit ? words(fit, model, n) : "", unsure(fit, model, n) ? "warn" : "");
  }
}

function only(points, selected) {
  const at = points.bin.indexOf(selected);
  return at < 0 ? { x: [], y: [] } : { x: [points.x[at]], y: [points.y[at]] };
}

function line(law, x, quantity) {
  if (!law || law.exponent === null || x.length < 2) return { x: [], y: [] };
  const ends = [Math.min(...x), Math.max(...x)];
  return { x: ends, y: ends.map((q) => (law.coefficient * q ** law.exponent) ** (quantity === "tau" ? -1 : 1)) };
}

const unsure = (fit, model, n) => fit !== undefined && fit !== null && converged(fit, model) < n;
const converged = (fit, model) => fit.arrays[`${model}_converged`].reduce((sum, each) => sum + each, 0);

function words(fit, model, n) {
  const law = fit.head[model];
  const parts = [];
  if (law.diffusion !== null) parts.push(`D = ${withError(law.diffusion, law.diffusion_err)} Å²/s`);
  if (law.exponent !== null) parts.push(`Γ ∝ qⁿ, n = ${withError(law.exponent, law.exponent_err)}`);
  const missing = n - converged(fit, model);
  if (missing) parts.push(`${missing} of ${short(n)} bins not converged`);
  return parts.join(" · ");
}
