// The regions of the detector, who correlates them, and when they were heard of.

import { byId, say, seconds, whole } from "./text.js";

/** Return the regions as they are now: they grow older without a word from the server. */
export function regionsNow({ regions, run }) {
  if (!regions) return [];
  const since = performance.now() / 1000 - regions.at;
  return regions.head.regions.map((region) => {
    const age = region.age === null ? null : region.age + since;
    const silent = run.state === "running" && region.state === "well" && age > regions.head.silent_after;
    return { ...region, age, state: silent ? "silent" : region.state };
  });
}

export function drawRegions(state) {
  const { regions, run } = state;
  const now = regionsNow(state);
  say("regions", ...summary(regions?.head, now, run));
  byId("region-card").hidden = !now.length;
  const body = byId("region-rows");
  while (body.rows.length > now.length) body.lastChild.remove();
  while (body.rows.length < now.length) body.append(row());
  now.forEach((region, i) => fill(body.rows[i], region, run));
  const more = (regions?.head.n ?? 0) - now.length;
  say("more-regions", more > 0 ? `and ${whole(more)} more that are no worse` : "");
}

function summary(known, now, run) {
  const missing = run.missing_regions;
  const silent = now.filter((region) => region.state === "silent").map((region) => region.region);
  const said = [];
  if (known?.n) said.push(`${known.n} on ${known.n_nodes === 1 ? "one worker" : `${known.n_nodes} workers`}`);
  if (missing.length) said.push(`missing: ${missing.join(", ")}`);
  if (silent.length) said.push(`silent: ${silent.join(", ")}`);
  if (!missing.length && !silent.length) said.push(known?.n ? "all are there" : known?.node ? `none: one process, ${known.node}` : "none is missing");
  if (known?.node && known.checkpoint !== null) said.push(`checkpoint at frame ${whole(known.checkpoint)}`);
  if (run.repaired_regions.length) said.push(`repaired from the file: ${run.repaired_regions.join(", ")}`);
  return [said.join("; "), missing.length ? "bad" : silent.length ? "warn" : ""];
}

function row() {
  const made = document.createElement("tr");
  const head = Object.assign(document.createElement("th"), { scope: "row" });
  head.append(document.createElement("span"), " ", document.createElement("small"));
  made.append(head, ...Array.from({ length: 6 }, () => document.createElement("td")));
  return made;
}

function fill(made, region, run) {
  const [begin, end] = region.rows;
  const unsaved = region.checkpoint === null ? "none" : whole(Math.max(0, region.frames - region.checkpoint));
  const ago = region.age === null ? "" : `${region.age < 100 ? `${Math.max(0, region.age).toFixed(0)} s` : seconds(region.age)} ago`;
  const heard = { missing: ["missing", ago], ended: ["ended"], silent: ["silent", ago] }[region.state] ?? [ago];
  const texts = [
    region.node || "–",
    whole(region.behind),
    whole(region.lost),
    run.state === "running" ? seconds(region.lag) : "–",
    unsaved,
    heard.filter(Boolean).join(" · "),
  ];
  write(made.cells[0].firstChild, String(region.region));
  write(made.cells[0].lastChild, end > begin ? `rows ${begin}–${end - 1}` : "");
  texts.forEach((text, i) => write(made.cells[i + 1], text));
  made.dataset.state = region.state;
}

function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
