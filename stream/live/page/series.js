// Scattering against q in its segments of time, and intensity against time.

import { field, figure, source } from "./figure.js";
import { say, short } from "./text.js";
import { colour, coloursOf, onTheme } from "./theme.js";

const SURE = 0.01; // probability below which a drift is told

export class Profile {
  constructor() {
    this.lines = source("xs", "ys", "colour");
    this.mean = source("x", "y");
    const { made } = figure("profile", ["q (Å⁻¹)", "counts / pixel / frame"], { x_axis_type: "log", y_axis_type: "log" });
    this.figure = made;
    made.multi_line({ xs: field("xs"), ys: field("ys"), line_color: field("colour"), line_width: 1.4, line_alpha: 0.8, source: this.lines });
    const mean = made.line({ x: field("x"), y: field("y"), line_color: colour("ink"), line_width: 2.2, source: this.mean });
    onTheme(() => (mean.glyph.line_color = colour("ink")));
  }

  draw({ scattering, map, run }) {
    const lines = { xs: [], ys: [], colour: [] };
    const mean = { x: [], y: [] };
    if (scattering) {
      const { scattering_1d: whole, scattering_1d_segments: segments } = scattering.arrays;
      const q = map && [...map.arrays.static_q].some((each) => each > 0) ? map.arrays.static_q : null;
      const known = [...whole.keys()].filter((i) => whole[i] > 0 && (q === null || q[i] > 0));
      const at = (i) => (q === null ? i + 1 : q[i]);
      known.sort((a, b) => at(a) - at(b));
      const n = segments.shape[0];
      const colours = coloursOf(n);
      for (let s = 0; s < n; s++) {
        lines.xs.push(known.map(at));
        lines.ys.push(known.map((i) => segments[s * whole.length + i] || NaN));
        lines.colour.push(colours[s]);
      }
      mean.x = known.map(at);
      mean.y = known.map((i) => whole[i]);
      this.figure.below[0].axis_label = q === null ? "static bin" : "q (Å⁻¹)";
    }
    this.lines.data = lines;
    this.mean.data = mean;
    const drift = run.drift ?? {};
    const drifts = drift.p_value !== undefined && drift.p_value < SURE;
    say("profile-says", drifts ? `the scattering drifts: ${short(100 * drift.change, 2)} % in one bin (p = ${short(drift.p_value, 2)}) – radiation damage?` : drift.p_value === undefined || !scattering ? "" : "no drift beyond noise", drifts ? "warn" : "");
    return drifts;
  }
}

export class Intensity {
  constructor() {
    this.data = source("time", "intensity", "lowest", "highest");
    this.lost = source("left", "right");
    const { made } = figure("intensity", ["time (s)", "counts / pixel / frame"]);
    this.band = made.varea({ x: field("time"), y1: field("lowest"), y2: field("highest"), fill_alpha: 0.25, fill_color: colour("accent"), source: this.data });
    this.line = made.line({ x: field("time"), y: field("intensity"), line_color: colour("accent"), line_width: 1.8, source: this.data });
    this.shade = made.vstrip({ x0: field("left"), x1: field("right"), fill_color: colour("bad"), line_color: colour("bad"), fill_alpha: 0.25, line_alpha: 0.25, source: this.lost });
    onTheme(() => this.dress());
  }

  dress() {
    this.band.glyph.fill_color = this.line.glyph.line_color = colour("accent");
    this.shade.glyph.fill_color = this.shade.glyph.line_color = colour("bad");
  }

  draw({ intensity, run, spans }) {
    const columns = { time: [], intensity: [], lowest: [], highest: [] };
    if (intensity) for (const name of Object.keys(columns)) columns[name] = [...intensity.arrays[name]];
    this.data.data = columns;
    const [left, right] = [[], []];
    for (let i = 0; i < (spans?.length ?? 0); i += 2) {
      left.push(spans[i] * run.frame_time);
      right.push(spans[i + 1] * run.frame_time);
    }
    this.lost.data = { left, right };
  }
}
