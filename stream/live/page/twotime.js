// Two-time correlation of the chosen q: its map, and g2 at ages, which are cuts through the map.

import { field, figure, fitRange, source } from "./figure.js";
import { byId, say, short } from "./text.js";
import { colour, coloursOf, onTheme } from "./theme.js";

const SHOWN = 5; // ages, where none is chosen
const UNKNOWN = 65535;
const PALE = 0.35;

export class TwoTime {
  constructor(chooseAge) {
    this.chooseAge = chooseAge;
    this.ndarray = Bokeh.require("core/util/ndarray").ndarray;
    this.image = source("image", "at", "size");
    this.marks = source("xs", "ys", "colour", "width");
    this.halos = source("xs", "ys", "width");
    this.lines = source("xs", "ys", "colour", "width", "alpha", "age");
    this.points = source("x", "y", "colour", "alpha");
    this.makeMap();
    this.makeCuts();
  }

  makeMap() {
    this.mapper = new Bokeh.LinearColorMapper({ palette: Bokeh.Palettes.Inferno256, low: 1, high: 1.1 });
    this.ranges = [0, 1].map(() => new Bokeh.Range1d({ start: 0, end: 1 }));
    const { made, shown } = figure("two-time", ["t₁ (s)", "t₂ (s)"], { x_range: this.ranges[0], y_range: this.ranges[1] });
    this.figure = made;
    this.shown = shown;
    for (const each of made.center) each.visible = false;
    made.image({ x: field("at"), y: field("at"), dw: field("size"), dh: field("size"), image: field("image"), color_mapper: this.mapper, source: this.image });
    const lines = { xs: field("xs"), ys: field("ys"), line_width: field("width") };
    const halos = made.multi_line({ ...lines, line_alpha: 0.8, source: this.halos });
    made.multi_line({ ...lines, line_color: field("colour"), source: this.marks });
    const dress = () => { this.mapper.nan_color = colour("none"); halos.glyph.line_color = colour("panel"); };
    dress();
    onTheme(dress);
    made.on_event("rangesupdate", () => (this.touched = !this.setting));
    made.on_event("reset", () => { this.touched = false; this.again?.(); });
    made.on_event("mousemove", (event) => this.tell(event.x, event.y));
    made.on_event("tap", (event) => {
      if (!this.at(event.x, event.y)) return;
      const which = this.nearest((event.x + event.y - this.window.step) / 2);
      this.choose(which === this.chosen ? null : which);
      byId("two-time").focus({ preventScroll: true });
    });
    byId("two-time").addEventListener("keydown", (event) => this.onKey(event));
  }

  makeCuts() {
    const options = { x_axis_type: "log", x_range: new Bokeh.Range1d({ start: 1e-3, end: 1 }), y_range: new Bokeh.Range1d({ start: 0.98, end: 1.3 }) };
    const { made } = figure("ages", ["τ (s)", "g₂ at an age"], options);
    this.cuts = made;
    made.multi_line({ xs: field("xs"), ys: field("ys"), line_color: field("colour"), line_width: field("width"), line_alpha: field("alpha"), source: this.lines });
    made.scatter({ x: field("x"), y: field("y"), size: 6, fill_color: field("colour"), line_color: null, fill_alpha: field("alpha"), source: this.points });
    made.on_event("rangesupdate", () => (this.cutsTouched = !this.setting));
    made.on_event("reset", () => { this.cutsTouched = false; this.again?.(); });
  }

  /** Show what there is of the run; nothing of an earlier one. */
  draw(state) {
    this.again = () => { this.drawn = null; this.draw(state); };
    const two = state.twotime?.head.key === state.run.key ? state.twotime : null;
    const section = byId("two-time-card");
    if (section.hidden !== !two) {
      section.hidden = !two;
      document.querySelector("main").classList.toggle("with-two-time", Boolean(two));
    }
    if (!two) {
      this.drawn = this.window = null;
      return;
    }
    if (this.run !== two.head.key) this.touched = this.cutsTouched = false;
    this.run = two.head.key;
    const { bins, windows } = two.head;
    byId("windows").hidden = windows.length < 2;
    say("newest-name", `newest ${windows.at(-1).n} frames`);
    const at = state.window === "newest" ? windows.length - 1 : 0;
    const row = Math.max(0, bins.indexOf((state.selected ?? bins[0] - 1) + 1));
    this.bin = bins[row] - 1;
    this.window = windows[at];
    const of = (name) => two.arrays[`${name}_${at}`];
    [this.ages, this.taus] = [of("age"), of("tau")];
    this.cut = of("cut").subarray(row * this.ages.length * this.taus.length, (row + 1) * this.ages.length * this.taus.length);
    this.scale = of("scale").subarray(4 * row, 4 * row + 4);
    const key = [two.head.key, two.version, at, row].join();
    if (this.drawn !== key) {
      if (this.drawn?.split(",")[2] !== String(at)) this.touched = this.cutsTouched = false;
      this.drawn = key;
      this.drawMap(of("map"), row);
    }
    this.drawAges(state.age);
    const computed = state.selected === null || bins.includes(state.selected + 1);
    say("two-time-of", computed ? "" : "not computed of the chosen q", computed ? "" : "warn");
    return this.bin;
  }

  drawMap(maps, row) {
    const { first, step, n, block } = this.window;
    const size = Math.ceil(n / block);
    const half = (size * (size + 1)) / 2;
    const [zero, unit, low, high] = this.scale;
    this.values = new Float32Array(size * size);
    for (let i = 0, at = row * half; i < size; i++) {
      for (let j = i; j < size; j++, at++) {
        this.values[i * size + j] = this.values[j * size + i] = maps[at] === UNKNOWN ? NaN : zero + unit * maps[at];
      }
    }
    this.size = size;
    [this.mapper.low, this.mapper.high] = [low, high];
    say("two-time-lowest", short(low));
    say("two-time-highest", short(high));
    this.image.data = { image: [this.ndarray(this.values, { dtype: "float32", shape: [size, size] })], at: [first], size: [size * block * step] };
    if (this.touched) return;
    this.setting = true;
    for (const range of this.ranges) [range.start, range.end] = [first, first + n * step];
    this.setting = false;
  }

  /** Cuts at a few ages, or at the chosen one before them, and where they are in the map. */
  drawAges(age) {
    const n = this.ages.length;
    const few = [...new Set(Array.from({ length: Math.min(SHOWN, n) }, (_, i) => Math.round(((i + 0.5) * n) / Math.min(SHOWN, n) - 0.5)))];
    this.chosen = age === null ? null : this.nearest(age);
    const lines = { xs: [], ys: [], colour: [], width: [], alpha: [], age: [] };
    const points = { x: [], y: [], colour: [], alpha: [] };
    const marks = { xs: [], ys: [], colour: [], width: [] };
    const colours = coloursOf(few.length);
    let [low, high] = [Infinity, -Infinity];
    const add = (which, tint, width, alpha) => {
      const ys = [...this.cut.subarray(which * this.taus.length, (which + 1) * this.taus.length)];
      lines.xs.push([...this.taus]);
      lines.ys.push(ys);
      lines.colour.push(tint);
      lines.width.push(width);
      lines.alpha.push(alpha);
      lines.age.push(this.ages[which]);
      ys.forEach((y, i) => {
        if (!Number.isFinite(y)) return;
        [low, high] = [Math.min(low, y), Math.max(high, y)];
        points.x.push(this.taus[i]);
        points.y.push(y);
        points.colour.push(tint);
        points.alpha.push(alpha);
      });
      const [xs, line] = this.across(this.ages[which]);
      marks.xs.push(xs);
      marks.ys.push(line);
      marks.colour.push(tint);
      marks.width.push(width);
    };
    few.forEach((which, i) => which !== this.chosen && add(which, colours[i], 2, this.chosen === null ? 1 : PALE));
    if (this.chosen !== null) add(this.chosen, colour("ink"), 3.5, 1);
    this.lines.data = lines;
    this.points.data = points;
    this.marks.data = marks;
    this.halos.data = { xs: marks.xs, ys: marks.ys, width: marks.width.map((width) => width + 2.5) };
    if (!this.cutsTouched) {
      this.setting = true;
      fitRange(this.cuts.x_range, this.taus[0], this.taus[this.taus.length - 1], { log: true });
      // The longest delays have few pairs: what is far off single values of c2 is noise.
      fitRange(this.cuts.y_range, Math.max(Math.min(1, low), this.scale[2]), Math.min(high, this.scale[3]));
      this.setting = false;
    }
    this.drawChips(few, colours);
    this.sayAge();
  }

  drawChips(few, colours) {
    const chips = byId("age-chips");
    const key = [...few.map((which) => this.ages[which]), colours].join();
    if (chips.dataset.key !== key) {
      chips.dataset.key = key;
      chips.replaceChildren(...few.map((which, i) => {
        const button = Object.assign(document.createElement("button"), { type: "button" });
        const dot = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
        const context = dot.getContext("2d");
        context.fillStyle = colours[i];
        context.fillRect(0, 0, 1, 1);
        button.append(dot, this.called(which));
        button.dataset.age = which;
        button.onclick = () => this.choose(this.chosen === which ? null : which);
        return button;
      }));
    }
    for (const each of chips.children) each.setAttribute("aria-pressed", Number(each.dataset.age) === this.chosen);
  }

  sayAge() {
    const slider = byId("two-time");
    const text = this.chosen === null ? `${this.lines.data.xs.length} ages` : `age ${this.called(this.chosen)}`;
    slider.setAttribute("aria-valuetext", text);
    slider.setAttribute("aria-valuemax", this.ages.length - 1);
    slider.setAttribute("aria-valuenow", this.chosen ?? 0);
    say("age-says", this.chosen === null ? "a click into the map or arrow keys choose an age" : `${text} · once more or Esc: all ages`);
  }

  /** The antidiagonal of an age: t1 + t2 = 2 age; times are at the left of what is drawn of them. */
  across(age) {
    const { first, step, n } = this.window;
    const [low, high, sum] = [first, first + n * step, 2 * age + step];
    const xs = [Math.max(low, sum - high), Math.min(high, sum - low)];
    return [xs, xs.map((x) => sum - x)];
  }

  /** An age with as many digits as tell it from the next. */
  called(which) {
    const apart = this.ages.length > 1 ? this.ages[1] - this.ages[0] : this.ages[0];
    const [scale, unit] = this.ages[this.ages.length - 1] < 1 ? [1e3, "ms"] : [1, "s"];
    const digits = Math.min(6, Math.max(0, Math.ceil(-Math.log10(apart * scale || 1))));
    return `${(this.ages[which] * scale).toFixed(digits)} ${unit}`;
  }

  nearest(age) {
    let best = 0;
    this.ages.forEach((each, i) => { if (Math.abs(each - age) < Math.abs(this.ages[best] - age)) best = i; });
    return best;
  }

  choose(which) {
    this.chosen = which; // the next key may come before it is drawn
    this.chooseAge(which === null ? null : this.ages[which]);
  }

  onKey(event) {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (event.key === "Escape" && this.chosen !== null) this.choose(null);
    else if (step && this.window) {
      const last = this.ages.length - 1;
      this.choose(this.chosen === null ? (step > 0 ? 0 : last) : Math.min(last, Math.max(0, this.chosen + step)));
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }

  /** What is at a place of the map. */
  at(x, y) {
    if (!this.window) return undefined;
    const { first, step, n, block } = this.window;
    const [i, j] = [x, y].map((t) => Math.floor((t - first) / (block * step)));
    if (i < 0 || j < 0 || Math.max(x, y) >= first + n * step) return undefined;
    return { t1: first + i * block * step, t2: first + j * block * step, c2: this.values[j * this.size + i], block, isDiagonal: i === j };
  }

  tell(x, y) {
    const found = this.at(x, y);
    if (!found) return;
    const { t1, t2, c2, block, isDiagonal } = found;
    const size = block > 1 ? ` (mean of ${block}×${block})` : isDiagonal ? " (of its neighbours)" : "";
    say("two-time-says", `t₁ = ${short(t1, 4)} s · t₂ = ${short(t2, 4)} s · ${Number.isFinite(c2) ? `c₂ = ${short(c2, 4)}${size}` : "lost"}`);
  }
}
