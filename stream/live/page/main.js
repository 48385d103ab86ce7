// What is known of the run, and who draws it.

import { connect } from "./connection.js";
import { Curves } from "./curves.js";
import { Picture } from "./picture.js";
import { Rates } from "./rates.js";
import { drawRegions } from "./regions.js";
import { unpack } from "./section.js";
import { bySegments, drawSegmentsScale, shownBin } from "./segments.js";
import { Intensity, Profile } from "./series.js";
import { drawAlerts, drawHistory, drawRun } from "./status.js";
import { byId, say, withError } from "./text.js";
import { coloursOf, onTheme, setUp } from "./theme.js";
import { TwoTime } from "./twotime.js";

const OF_A_RUN = ["g2", "fit", "segments", "scattering", "intensity", "image", "twotime", "regions"];

const state = {
  run: { state: "connecting", missing_regions: [], repaired_regions: [], few_pairs: 0, drift: {} },
  map: null, g2: null, fit: null, segments: null, bySegments: false, scattering: null, intensity: null, image: null, regions: null, twotime: null, age: null, window: "whole",
  history: [], overlays: new Map(), colours: [], selected: null, model: "single", quantity: "tau",
  here: false, drifts: false, spans: null, heard: null,
};

setUp(byId("theme"), byId("big"));
Bokeh.set_log_level("error"); // it warns of every plot that is still empty
const curves = new Curves();
const rates = new Rates();
const profile = new Profile();
const intensity = new Intensity();
const picture = new Picture((bin) => choose(bin));
const twoTime = new TwoTime((age) => { state.age = age; draw("twotime"); });

// Drawn once per frame of the screen, however much came: newest wins here, too.
const drawers = {
  run: () => { drawRun(state.run, state.spans); drawRegions(state); },
  regions: () => drawRegions(state),
  bins: drawBins,
  g2: () => { drawSegmentsScale(state); curves.draw(state); sayChosen(); },
  rates: () => rates.draw(state),
  profile: () => (state.drifts = profile.draw(state)),
  intensity: () => intensity.draw(state),
  image: () => picture.draw(state),
  twotime: () => { const bin = twoTime.draw(state); if (bin !== undefined) say("two-time-name", `q = ${called(bin)} Å⁻¹`); },
  history: () => drawHistory(state.history, state.overlays, overlay),
};
const due = new Set();
function draw(...names) {
  if (!due.size) requestAnimationFrame(drawDue);
  names.forEach((name) => due.add(name));
}
function drawDue() {
  const now = Object.keys(drawers).filter((name) => due.has(name)); // colours before curves
  due.clear();
  now.forEach((name) => drawers[name]());
  // The next frame of the screen begins once this one is there.
  if (now.includes("g2") && state.g2) requestAnimationFrame(() => state.g2 && note(page.drawn, state.g2.head));
}

const PARTS = {
  run: ["run"], map: ["bins", "g2", "rates", "profile", "image", "twotime"], g2: ["bins", "g2"], fit: ["g2", "rates"], segments: ["g2"],
  scattering: ["profile"], image: ["image"], intensity: ["intensity"], history: ["history"],
  twotime: ["twotime"], regions: ["regions", "image"],
};

function take(head, arrays) {
  const name = head.section;
  if (name === "run") {
    if (head.key !== state.run.key) {
      for (const each of OF_A_RUN) if (state[each]?.head.key !== head.key) state[each] = null;
      state.age = null;
      if (head.server !== state.run.server) state.overlays.clear();
      draw(...Object.keys(drawers));
    }
    if (head.drift.p_value !== state.run.drift.p_value) draw("profile");
    if (head.lost !== state.run.lost) draw("intensity");
    state.run = head;
    state.spans = arrays.lost_spans;
    state.heard = head.age === null ? null : performance.now() / 1000 - head.age;
  } else if (name === "history") {
    state.history = head.runs;
  } else {
    // The first result of a run may come before its state: it is kept.
    state[name] = { head, arrays, version: (state[name]?.version ?? 0) + 1, at: performance.now() / 1000 };
  }
  if (name === "g2") note(page.arrived, head);
  draw(...PARTS[name]);
}

/** Remember when the newest results came and were drawn (ms since 1970). */
function note(list, head) {
  list.push([head.n_frames, performance.timeOrigin + performance.now()]);
  if (list.length > 1000) list.splice(0, 500);
}

function drawBins() {
  const n = state.g2?.arrays.g2.shape[1] ?? state.map?.head.n_dynamic ?? 0;
  state.colours = coloursOf(n);
  if (state.selected !== null && state.selected >= n) state.selected = null;
  const key = [n, state.map?.version, state.colours[0], state.colours[n - 1]].join();
  const chips = byId("bins");
  if (chips.dataset.key !== key) {
    chips.dataset.key = key;
    chips.replaceChildren(...["all", ...Array(n).keys()].map(chip));
  }
  for (const each of chips.children) {
    const is = each.dataset.bin === String(state.selected ?? "all");
    each.setAttribute("aria-checked", is);
    each.tabIndex = is ? 0 : -1;
  }
}

function chip(bin) {
  const button = document.createElement("button");
  button.type = "button";
  button.setAttribute("role", "radio");
  button.dataset.bin = bin;
  if (bin !== "all") {
    const dot = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
    const context = dot.getContext("2d");
    context.fillStyle = state.colours[bin];
    context.fillRect(0, 0, 1, 1);
    button.append(dot);
  }
  button.append(bin === "all" ? "all q" : called(bin));
  button.onclick = () => choose(bin === "all" ? null : bin);
  return button;
}

function called(bin) {
  const [q, phi] = [state.map?.arrays.q[bin], state.map?.arrays.phi[bin]];
  if (!Number.isFinite(q)) return `bin ${bin + 1}`;
  const several = state.map.arrays.q.indexOf(q) !== state.map.arrays.q.lastIndexOf(q);
  return `${q.toPrecision(3)}${several && Number.isFinite(phi) ? ` @ ${Math.round(phi)}°` : ""}`;
}

function choose(bin) {
  state.selected = bin;
  drawBins();
  byId("bins").querySelector('[aria-checked="true"]')?.scrollIntoView({ block: "nearest" });
  draw("g2", "rates", "image", "twotime");
}

function sayChosen() {
  const { fit, model } = state;
  const selected = shownBin(state);
  if (bySegments(state)) {
    say("g2-says", `q = ${called(selected)} Å⁻¹: whole run (thick) and parts of it, early to late`);
    return;
  }
  if (selected === null || !fit || model === "none") {
    say("g2-says", selected === null ? "" : `q = ${called(selected)} Å⁻¹`);
    return;
  }
  const of = (name) => fit.arrays[`${model}_${name}`][selected];
  if (!of("converged")) {
    say("g2-says", `q = ${called(selected)} Å⁻¹: the fit has not converged`, "warn");
    return;
  }
  const stretch = model === "stretched" ? ` · exponent ${withError(of("stretch"), of("stretch_err"))}` : "";
  const tau = withError(1 / of("rate"), of("rate_err") / of("rate") ** 2);
  say("g2-says", `q = ${called(selected)} Å⁻¹ · τ = ${tau} s · contrast ${withError(of("contrast"), of("contrast_err"))} · baseline ${withError(of("baseline"), of("baseline_err"))}${stretch}`);
}

async function overlay(number) {
  if (state.overlays.delete(number)) {
    draw("history", "g2");
    return;
  }
  const answer = await fetch(`runs/${number}/g2`);
  if (answer.ok) state.overlays.set(number, unpack(await answer.arrayBuffer()));
  draw("history", "g2");
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const inBins = byId("bins").contains(event.target);
  if (step && (event.target === document.body || inBins) && (inBins || event.key.endsWith("t"))) {
    const n = state.colours.length + 1;
    const at = state.selected === null ? 0 : state.selected + 1;
    const next = (at + step + n) % n;
    choose(next === 0 ? null : next - 1);
    if (inBins) byId("bins").querySelector('[aria-checked="true"]').focus();
    event.preventDefault();
  } else if (event.key === "Escape") choose(null);
  else if (event.key === "b") byId("big").click();
  else if (event.key === "t") byId("theme").click();
});

for (const input of document.querySelectorAll('input[name="fit"]')) {
  input.onchange = () => { state.model = input.value; draw("g2", "rates"); };
}
byId("segments").onchange = (event) => { state.bySegments = event.target.checked; draw("g2"); };
for (const input of document.querySelectorAll('input[name="rates"]')) {
  input.onchange = () => { state.quantity = input.value; draw("rates"); };
}
for (const input of document.querySelectorAll('input[name="window"]')) {
  input.onchange = () => { state.window = input.value; state.age = null; draw("twotime"); };
}

onTheme(() => { state.colours = []; draw(...Object.keys(drawers)); });
setInterval(() => {
  const age = state.heard === null ? null : performance.now() / 1000 - state.heard;
  drawAlerts({ ...state, age });
  drawRegions(state);
}, 200);

/** For tests: what the plots hold. */
const page = { state, curves, rates, profile, intensity, picture, twoTime, arrived: [], drawn: [] };
window.xpcs = page;

draw(...Object.keys(drawers));
connect(take, (here) => {
  if (here !== state.here) { state.here = here; draw("run"); }
});
