// A Bokeh figure in the colours of the page.

import { colour, onTheme, points } from "./theme.js";

export const field = (name) => ({ field: name });

/** A source with these columns, empty. */
export function source(...columns) {
  return new Bokeh.ColumnDataSource({ data: Object.fromEntries(columns.map((name) => [name, []])) });
}

/** Make a figure in the element; `labels` are of x and y. */
export function figure(id, labels, options = {}) {
  const made = Bokeh.Plotting.figure({
    sizing_mode: "stretch_both",
    tools: "pan,box_zoom,wheel_zoom,reset,save",
    active_scroll: null,
    toolbar_inner: true,
    min_border: 4,
    ...options,
  });
  made.toolbar.autohide = true;
  made.toolbar.logo = null;
  for (const axis of [...made.below, ...made.left]) axis.ticker.desired_num_ticks = 5;
  [made.below[0].axis_label, made.left[0].axis_label] = labels;
  dress(made);
  onTheme(() => dress(made));
  const shown = Bokeh.Plotting.show(made, document.getElementById(id));
  return { made, shown };
}

function dress(made) {
  const [ink, soft, line, grid] = ["ink", "soft", "line", "grid"].map(colour);
  made.background_fill_color = null;
  made.border_fill_color = null;
  made.outline_line_color = line;
  for (const axis of [...made.below, ...made.left]) {
    axis.axis_label_text_color = ink;
    axis.axis_label_text_font_style = "normal";
    axis.axis_label_text_font_size = points(14);
    axis.major_label_text_color = soft;
    axis.major_label_text_font_size = points(13);
    axis.axis_line_color = line;
    axis.major_tick_line_color = soft;
    axis.minor_tick_line_color = line;
  }
  for (const each of made.center) if (each.grid_line_color !== undefined) each.grid_line_color = grid;
}

/** Add points with error bars; columns x, y, low, high, colour, alpha. */
export function errorBars(made, data, size = 7) {
  made.segment({ x0: field("x"), y0: field("low"), x1: field("x"), y1: field("high"), line_color: field("colour"), line_alpha: field("alpha"), source: data });
  made.scatter({ x: field("x"), y: field("y"), size, fill_color: field("colour"), line_color: null, fill_alpha: field("alpha"), source: data });
}

/** Set a range a little wider than these values; leave it where there are none, and where it fits about: all is laid out
 *  anew when an axis changes. */
export function fitRange(range, low, high, { log = false } = {}) {
  if (!(Number.isFinite(low) && Number.isFinite(high)) || (log && low <= 0)) return;
  const [a, b] = log ? [Math.log10(low), Math.log10(high)] : [low, high];
  const [start, end] = log ? [Math.log10(range.start), Math.log10(range.end)] : [range.start, range.end];
  const room = 0.15 * (end - start);
  if (start <= a && b <= end && a - start < room && end - b < room) return;
  const margin = 0.07 * (b - a) || (log ? 0.3 : 0.05);
  [range.start, range.end] = log ? [10 ** (a - margin), 10 ** (b + margin)] : [a - margin, b + margin];
}
