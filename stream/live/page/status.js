// What is said in words: the run, its losses, earlier runs.

import { regionsNow } from "./regions.js";
import { byId, say, seconds, short, whole, withError } from "./text.js";

const CAUSES = [
  ["lost", "never came"],
  ["late", "came after a later one"],
  ["duplicate", "came again"],
  ["undecodable", "messages not readable"],
  ["stray", "messages of other runs"],
];
const STALE = 5; // s without a result while a run is on

export function drawRun(run, spans) {
  const state = byId("state");
  state.dataset.state = run.state;
  say("state", run.state);
  say("run", run.run ?? "no run yet");
  byId("run").title = run.run ?? "";
  say("sample", run.sample ?? "");
  say("frames", run.planned ? `${whole(run.n_frames)} of ${whole(run.planned)}` : whole(run.n_frames));
  byId("progress").value = run.planned ? run.n_frames / run.planned : 0;
  const rate = run.frames_per_s;
  say("rate", rate === null || run.state !== "running" ? "–" : `${whole(rate)}/s · ${short((rate * run.frame_bytes) / 1e6)} MB/s`);
  say("lag", run.state === "running" ? seconds(run.lag) : "–", run.lag > 2 && run.state === "running" ? "warn" : "");
  say("lost", run.lost ? `${whole(run.lost)} (${short((100 * run.lost) / Math.max(1, run.n_frames), 2)} %)` : "0", run.lost ? "warn" : "");
  say("plane", run.plane ?? "–", run.plane && run.plane !== "stream" ? "warn" : "");
  const rows = CAUSES.map(([name, means]) => {
    const row = document.createElement("tr");
    for (const text of [`${name}: ${means}`, whole(run[name])]) row.append(Object.assign(document.createElement("td"), { textContent: text }));
    row.lastChild.classList.toggle("some", run[name] > 0);
    return row;
  });
  byId("losses").tBodies[0].replaceChildren(...rows);
  say("spans", where(spans));
}

function where(spans) {
  if (!spans?.length) return "";
  const all = [];
  for (let i = 0; i < spans.length; i += 2) all.push(spans[i + 1] - spans[i] > 1 ? `${spans[i]}–${spans[i + 1] - 1}` : `${spans[i]}`);
  return `frames ${all.slice(-6).join(", ")}${all.length > 6 ? `, and ${all.length - 6} places before` : ""}`;
}

/** Say what is wrong, worst first; also whether what is shown is old. */
export function drawAlerts({ run, regions, here, age, drifts }) {
  const said = [];
  const silent = regionsNow({ run, regions }).filter((region) => region.state === "silent");
  const stale = here && run.state === "running" && age > STALE;
  if (!here) said.push(["the server is not there; trying again", "bad"]);
  if (stale) said.push([`no result for ${seconds(age)}: what is shown is old`, "bad"]);
  if (run.missing_regions?.length) said.push([`degraded: region ${run.missing_regions.join(", ")} of the detector is missing`, "bad"]);
  if (here && silent.length) said.push([`no word from the worker of region ${silent.map((region) => `${region.region}${region.node && ` (${region.node})`}`).join(", ")}`, ""]);
  if (run.plane && run.plane !== "stream") said.push([`degraded: frames come over the ${run.plane === "file" ? "file plane" : "stream and the file plane"}`, ""]);
  if (drifts) said.push(["the scattering drifts beyond noise", ""]);
  const paragraphs = said.map(([text, level]) => Object.assign(document.createElement("p"), { textContent: text, className: level }));
  const alerts = byId("alerts");
  if (alerts.textContent !== said.map(([text]) => text).join("")) alerts.replaceChildren(...paragraphs);
  document.documentElement.classList.toggle("stale", stale);
  document.documentElement.classList.toggle("away", !here);
  if (!here) {
    byId("state").dataset.state = "away";
    say("state", "reconnecting");
  }
  say("fresh", age === null ? "–" : `${age < 100 ? `${Math.max(0, age).toFixed(1)} s` : seconds(age)} ago`);
}

/** List earlier runs; `toggle` is called with the number of one. */
export function drawHistory(runs, overlays, toggle) {
  const rows = runs.map((run) => {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.number = run.number;
    button.setAttribute("aria-pressed", overlays.has(run.number));
    const time = new Date(run.ended).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
    const told = [time, run.sample, `${whole(run.n_frames)} frames`, run.state];
    if (Number.isFinite(run.diffusion) && run.diffusion !== null && run.diffusion !== undefined) told.push(`D = ${withError(run.diffusion, run.diffusion_err)} Å²/s`);
    for (const text of [run.run, told.filter(Boolean).join(" · ")]) button.append(Object.assign(document.createElement("span"), { textContent: text }));
    button.onclick = () => toggle(run.number);
    const row = document.createElement("li");
    row.append(button);
    return row;
  });
  if (!rows.length) rows.push(Object.assign(document.createElement("li"), { textContent: "none yet", className: "says" }));
  const focused = document.activeElement?.dataset?.number;
  byId("history").replaceChildren(...rows);
  if (focused) byId("history").querySelector(`[data-number="${focused}"]`)?.focus();
}
