// The mean image with the outlines of the bins.

import { field, figure, source } from "./figure.js";
import { regionsNow } from "./regions.js";
import { byId, say, short } from "./text.js";
import { colour, onTheme } from "./theme.js";

const FINE = 1024; // pixels of the outlines, at least, so that they are thin; at least two of them, so that none is lost
const EDGES = { silent: 0xc000a5ff, missing: 0xff281fb8 }; // ABGR
const HC = 12.398419843320026; // keV angstrom

export class Picture {
  constructor(choose) {
    const { ndarray } = Bokeh.require("core/util/ndarray");
    this.ndarray = ndarray;
    this.image = source("image", "rows", "columns");
    this.outline = source("image", "rows", "columns");
    this.mapper = new Bokeh.LogColorMapper({ palette: Bokeh.Palettes.Viridis256, low: 1e-3, high: 1 });
    const { made, shown } = figure("picture", ["", ""], {
      match_aspect: true,
      x_range: new Bokeh.DataRange1d({ range_padding: 0 }),
      y_range: new Bokeh.DataRange1d({ range_padding: 0, flipped: true }),
    });
    this.figure = made;
    this.shown = shown;
    for (const axis of [...made.below, ...made.left]) axis.visible = false;
    for (const each of made.center) each.visible = false;
    const place = { x: 0, y: 0, dw: field("columns"), dh: field("rows") };
    made.image({ ...place, image: field("image"), color_mapper: this.mapper, source: this.image });
    made.image_rgba({ ...place, image: field("image"), source: this.outline });
    const dress = () => (this.mapper.nan_color = colour("none"));
    dress();
    onTheme(dress);
    made.on_event("mousemove", (event) => this.tell(event.x, event.y));
    made.on_event("tap", (event) => {
      const bin = this.at(event.x, event.y)?.bin;
      if (bin !== undefined) choose(bin > 0 ? bin - 1 : null);
    });
  }

  draw(state) {
    const { image, map, selected } = state;
    this.state = state;
    if (!image) {
      this.image.data = { image: [], rows: [], columns: [] };
      this.outline.data = { image: [], rows: [], columns: [] };
      this.drawn = this.lit = undefined;
      return;
    }
    const [rows, columns] = image.arrays.image.shape;
    const block = image.head.block;
    const place = { rows: [rows * block], columns: [columns * block] };
    if (this.lit !== image) {
      this.lit = image;
      this.image.data = { image: [this.light(image.arrays.image)], ...place };
    }
    const bands = bandsOf(state);
    const key = [bands.map(({ end, state: how }) => `${end}${how}`).join(), map?.version, selected, rows, columns, image.arrays.no_data.reduce((sum, each, i) => sum + each * (i % 9973), 0), colour("bad")].join();
    if (this.drawn !== key) {
      this.drawn = key;
      this.outline.data = { image: [this.outlines(state, rows, columns, bands)], ...place };
    }
  }

  /** Choose what is dark and what is bright. */
  light(counts) {
    const [low, high] = limits(counts);
    [this.mapper.low, this.mapper.high] = [low, high];
    say("lowest", short(low, 2));
    say("highest", short(high, 2));
    // Dark pixels are the lowest colour, not a hole.
    const lit = Float32Array.from(counts, (value) => (value < low ? low : value));
    return this.ndarray(lit, { dtype: "float32", shape: counts.shape });
  }

  /** Edges between bins, the chosen bin marked, stripes where counts are missing, and at the sides where regions end. */
  outlines({ map, image, selected }, rows, columns, bands) {
    const fine = Math.max(1, Math.ceil(FINE / Math.max(rows, columns)));
    const [height, width] = [rows * fine, columns * fine];
    const rgba = new Uint32Array(height * width);
    const thick = Math.max(2, Math.ceil(0.5 * fine));
    const bins = map && map.arrays.bins.shape[0] === rows && map.arrays.bins.shape[1] === columns ? map.arrays.bins : null;
    const { no_data: noData } = image.arrays;
    for (let y = 0; y < height; y++) {
      const row = Math.floor(y / fine) * columns;
      const above = y % fine < thick && y >= fine;
      for (let x = 0; x < width; x++) {
        const i = row + Math.floor(x / fine);
        let value = 0;
        if (noData[i] && ((x + y) / fine) % 8 < 4) value = 0xc0281fb8; // ABGR
        if (bins) {
          const bin = bins[i];
          if (bin - 1 === selected && bin > 0) value ||= 0x30ffffff;
          const edge = (above && bins[i - columns] !== bin) || (x % fine < thick && x >= fine && bins[i - 1] !== bin);
          const other = above && bins[i - columns] !== bin ? bins[i - columns] : bins[i - 1];
          if (edge) value = selected !== null && (bin - 1 === selected || other - 1 === selected) ? 0xffffffff : 0x66ffffff;
        }
        rgba[y * width + x] = value;
      }
    }
    const side = Math.max(thick, Math.round(0.025 * width));
    for (const { begin, end, state: how } of bands) {
      const [from, to] = [begin, end].map((row) => Math.min(height, Math.round((row / image.head.block) * fine)));
      for (let y = from; y < to; y++) {
        const edge = y < from + thick && from > 0;
        const value = EDGES[how] ?? (edge ? 0xffffffff : 0);
        for (let x = 0; value && x < side; x++) rgba[y * width + x] = rgba[(y + 1) * width - 1 - x] = edge ? 0xffffffff : value;
      }
    }
    return this.ndarray(rgba, { dtype: "uint32", shape: [height, width] });
  }

  /** What is at a pixel of the detector. */
  at(x, y) {
    const { image, map } = this.state ?? {};
    if (!image) return undefined;
    const [rows, columns] = image.arrays.image.shape;
    const block = image.head.block;
    const [column, row] = [Math.floor(x), Math.floor(y)];
    const i = Math.floor(row / block) * columns + Math.floor(column / block);
    if (row < 0 || column < 0 || row >= image.head.shape[0] || column >= image.head.shape[1] || i >= rows * columns) return undefined;
    const bins = map?.arrays.bins;
    const bin = bins && bins.length === rows * columns ? bins[i] : undefined;
    return { row, column, counts: image.arrays.image[i], missing: image.arrays.no_data[i] === 1, bin, q: wavevector(map, x, y), block };
  }

  tell(x, y) {
    const found = this.at(x, y);
    if (!found) return;
    const { row, column, counts, missing, bin, q, block } = found;
    const parts = [`row ${row}, column ${column}`];
    parts.push(Number.isFinite(counts) ? `${short(counts)} counts${block > 1 ? ` (mean of ${block}×${block})` : ""}` : missing ? "no data" : "masked");
    if (q !== null) parts.push(`q = ${q.toFixed(5)} Å⁻¹`);
    const region = this.state.regions?.head.n > 1 ? bandsOf(this.state).findIndex(({ begin, end }) => begin <= row && row < end) : -1;
    if (region >= 0) parts.push(`region ${region}`);
    if (bin !== undefined) parts.push(bin > 0 ? `bin ${bin}` : "in no bin");
    say("picture-says", parts.join(" · "));
    byId("picture-says").dataset.bin = bin ?? "";
  }
}

/** Where regions lie, in rows of the detector, and how they are. */
function bandsOf(state) {
  const { regions } = state;
  if (!regions || regions.head.n < 2) return [];
  const told = new Map(regionsNow(state).map((region) => [region.region, region.state]));
  const rows = regions.arrays.rows;
  return Array.from({ length: rows.length / 2 }, (_, i) => ({ begin: rows[2 * i], end: rows[2 * i + 1], state: told.get(i) }));
}

/** From the thousandth part of what is brightest, or the darkest pixel, to the brightest but for a few. */
function limits(counts) {
  const known = counts.filter((value) => value > 0).sort();
  if (!known.length) return [1e-3, 1];
  const high = known[Math.floor(0.9995 * (known.length - 1))];
  const low = Math.max(known[Math.floor(0.01 * (known.length - 1))], high / 1000);
  return high > low ? [low, high] : [high / 10, high];
}

function wavevector(map, x, y) {
  const { beam_center_x: cx, beam_center_y: cy, detector_distance: distance, pixel_size: pixel, energy } = map?.head.geometry ?? {};
  if (![cx, cy, distance, pixel, energy].every((value) => Number.isFinite(value) && value !== null)) return null;
  // Pixel i reaches from i to i + 1 here; its centre is at i in the map.
  const away = pixel * Math.hypot(x - 0.5 - cx, y - 0.5 - cy);
  return ((4 * Math.PI * energy) / HC) * Math.sin(Math.atan2(away, distance) / 2);
}
