// Numbers as people read them, and text into elements.

export const byId = (id) => document.getElementById(id);

export function say(id, text, level = "") {
  const element = byId(id);
  if (element.textContent !== text) element.textContent = text;
  for (const each of ["warn", "bad"]) element.classList.toggle(each, each === level);
}

export const whole = (n) => Math.round(n).toLocaleString("en").replaceAll(",", " ");

/** Three digits that count, with a power of ten where it is shorter. */
export function short(value, digits = 3) {
  if (value === null || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) {
    const [mantissa, exponent] = value.toExponential(digits - 1).split("e");
    return `${mantissa}×10${superscript(Number(exponent))}`;
  }
  return String(Number(value.toPrecision(digits)));
}

export const superscript = (n) => String(n).replace(/[-\d]/g, (c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]));

/** A value with its error, as many digits as the error allows. */
export function withError(value, error) {
  if (!Number.isFinite(value)) return "unknown";
  if (!Number.isFinite(error) || error <= 0) return short(value);
  const exponent = value === 0 ? 0 : Math.floor(Math.log10(Math.abs(value)));
  const scale = exponent < -2 || exponent > 4 ? exponent : 0;
  const digits = Math.min(6, Math.max(0, scale - Math.floor(Math.log10(error)) + (error / 10 ** Math.floor(Math.log10(error)) < 2 ? 1 : 0)));
  const [v, e] = [value, error].map((x) => (x / 10 ** scale).toFixed(digits));
  return scale ? `(${v} ± ${e})×10${superscript(scale)}` : `${v} ± ${e}`;
}

export function seconds(value) {
  if (value === null || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size < 1e-3) return `${short(value * 1e6, 2)} µs`;
  if (size < 1) return `${short(value * 1e3, 2)} ms`;
  if (size < 100) return `${value.toFixed(1)} s`;
  if (size < 5400) return `${Math.round(value / 60)} min`;
  return `${(value / 3600).toFixed(1)} h`;
}
