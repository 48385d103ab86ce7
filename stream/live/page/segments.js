// g2 of successive parts of the run, early to late by colour, over that of the whole run.

import { byId, say } from "./text.js";
import { colour as ink, coloursOf } from "./theme.js";

/** Whether parts are drawn instead of all bins. */
export const bySegments = ({ bySegments, segments, g2 }) => bySegments && segments !== null && g2 !== null;

/** The bin that is in front: parts are those of one bin, the first if none was chosen. */
export const shownBin = (state) => state.selected ?? (bySegments(state) ? 0 : null);

/** Say which colours are early and late, where there are parts. */
export function drawSegmentsScale(state) {
  byId("segments-tools").hidden = state.segments === null;
  byId("segments-scale").hidden = !bySegments(state);
  if (!bySegments(state)) return;
  const { start, stop } = state.segments.arrays;
  byId("segments-bar").style.background = `linear-gradient(90deg, ${coloursOf(start.length).join()})`;
  say("earliest", "0 s");
  say("latest", `${Number(stop[stop.length - 1].toPrecision(3))} s`);
  say("segments-length", `${start.length} parts of ${Number(start[1].toPrecision(3))} s`);
}

/** Points and lines of all parts, and the line of the whole run, in the columns of those of bins. */
export function partsOf(state, pale) {
  const points = { x: [], y: [], low: [], high: [], colour: [], alpha: [], bin: [] };
  const lines = { xs: [], ys: [], colour: [], width: [], alpha: [] };
  const { tau, g2, g2_err, n_pairs } = state.segments.arrays;
  const [n, n_delay, n_bin] = g2.shape;
  const bin = shownBin(state);
  coloursOf(n).forEach((colour, part) => {
    const [xs, ys] = [[], []];
    for (let i = 0; i < n_delay; i++) {
      const at = (part * n_delay + i) * n_bin + bin;
      if (!Number.isFinite(g2[at])) continue;
      const bar = Number.isFinite(g2_err[at]) ? g2_err[at] : 0;
      xs.push(tau[i]);
      ys.push(g2[at]);
      points.low.push(g2[at] - bar);
      points.high.push(g2[at] + bar);
      points.colour.push(colour);
      points.alpha.push(n_pairs[part * n_delay + i] >= state.run.few_pairs ? 1 : pale);
      points.bin.push(bin);
    }
    points.x.push(...xs);
    points.y.push(...ys);
    lines.xs.push(xs);
    lines.ys.push(ys);
    lines.colour.push(colour);
    lines.width.push(1.5);
    lines.alpha.push(0.8);
  });
  const whole = state.g2.arrays;
  lines.xs.push([...whole.tau]);
  lines.ys.push([...whole.tau].map((_, i) => whole.g2[i * n_bin + bin]));
  lines.colour.push(ink("ink"));
  lines.width.push(2.5);
  lines.alpha.push(0.9);
  return { points, lines };
}
