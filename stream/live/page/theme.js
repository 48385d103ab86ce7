// Dark and light, big and not, and the colours of q.

const ROOT = document.documentElement;
const listeners = [];

export const onTheme = (listener) => listeners.push(listener);
const changed = () => listeners.forEach((listener) => listener());

export const isDark = () => ROOT.dataset.theme === "dark";
export const isBig = () => ROOT.classList.contains("big");
export const colour = (name) => getComputedStyle(ROOT).getPropertyValue(`--${name}`).trim();
export const points = (n) => `${Math.round(n * (isBig() ? 1.6 : 1))}px`;

/** Of each of n bins; viridis (ordered, also for the colour-blind) without the end that the ground swallows. */
export function coloursOf(n) {
  const palette = Bokeh.Palettes.Viridis256;
  const [low, high] = isDark() ? [70, 255] : [0, 205];
  return Array.from({ length: n }, (_, i) => hex(palette[Math.round(low + (high - low) * (n > 1 ? i / (n - 1) : 0.4))]));
}

export const hex = (value) =>
  typeof value === "number" ? `#${(value >>> 8).toString(16).padStart(6, "0")}` : String(value).slice(0, 7);

function kept(name, value) {
  try {
    if (value !== undefined) localStorage.setItem(name, value);
    return localStorage.getItem(name);
  } catch {
    return null; // storage is switched off
  }
}

export function setUp(themeButton, bigButton) {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    ROOT.dataset.theme = kept("theme") ?? (dark.matches ? "dark" : "light");
    themeButton.textContent = isDark() ? "light" : "dark";
    changed();
  };
  dark.addEventListener("change", apply);
  themeButton.onclick = () => {
    kept("theme", isDark() ? "light" : "dark");
    apply();
  };
  const big = (on) => {
    ROOT.classList.toggle("big", on);
    bigButton.setAttribute("aria-pressed", on);
    changed();
  };
  bigButton.onclick = () => {
    kept("big", isBig() ? "" : "yes");
    big(!isBig());
  };
  apply();
  const asked = new URLSearchParams(location.search);
  big(asked.has("big") || kept("big") === "yes");
}
