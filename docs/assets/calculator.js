// The least that the loss can cost on a device, and what eager code needs: see calculator.md for what is counted.
const DEVICES = {
  // operations per second in bfloat16, float32 (tf32 on GPUs), float8; bytes per second. Makers' data sheets, dense.
  "H100 SXM": [989e12, 495e12, 1979e12, 3.35e12],
  "H200": [989e12, 495e12, 1979e12, 4.8e12],
  "A100 80 GB": [312e12, 156e12, 312e12, 2.0e12],
  "L4": [121e12, 60e12, 242e12, 0.3e12],
  "RTX 4090": [165e12, 83e12, 330e12, 1.0e12],
  "RTX 3090": [71e12, 36e12, 71e12, 0.94e12],
};
const COLUMN = { bfloat16: 0, float32: 1, float8: 2 };
const BYTES = { bfloat16: 2, float32: 4, float8: 1 };

function seconds(value) {
  if (value < 1e-3) return `${(value * 1e6).toPrecision(3)} µs`;
  return value < 1 ? `${(value * 1e3).toPrecision(3)} ms` : `${value.toPrecision(3)} s`;
}

function size(value) {
  for (const [unit, name] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"]]) {
    if (value >= unit) return `${(value / unit).toPrecision(3)} ${name}`;
  }
  return `${(value / 1024).toPrecision(3)} KiB`;
}

function calculate(form, out) {
  const [n, k, d] = ["n", "k", "d"].map((name) => Number(form[name].value));
  if (!(n >= 1 && k >= 1 && d >= 1)) {
    out.textContent = "N, K and D must be at least 1.";
    return;
  }
  const dtype = form.dtype.value, trains = Boolean(form.trains.value), device = DEVICES[form.device.value];
  const products = (trains ? 4 : 2) * 2 * n * k * d / device[COLUMN[dtype]];
  const queue = (trains ? 3 : 1) * k * d * BYTES[dtype] / device[3];
  const tables = 12 * n * k * 4 / device[3];
  const here = Math.max(products, queue), eager = Math.max(products, queue) + tables;
  const rows = [
    ["products", seconds(products), seconds(products)],
    ["reading the queue", seconds(queue), seconds(queue)],
    ["N × K tables", "none", seconds(tables)],
    ["at least, together", seconds(here), seconds(eager)],
    ["memory beyond inputs and gradients", size(4 * n * d * 8 + 32 * 2 ** 20), size(4 * n * k * 4)],
  ];
  const cells = rows.map(([name, ...values]) => `<tr><th>${name}</th>${values.map((v) => `<td>${v}</td>`).join("")}</tr>`);
  out.innerHTML = `<table><thead><tr><th></th><th>fused (bound)</th><th>eager (bound)</th></tr></thead>` +
    `<tbody>${cells.join("")}</tbody></table><p>Predicted.</p>`;
}

// The theme may load a page without a new document, and says so through document$.
function start() {
  const form = document.getElementById("sizes"), out = document.getElementById("calculated");
  if (!form) return;
  form.device.innerHTML = Object.keys(DEVICES).map((name) => `<option>${name}</option>`).join("");
  form.addEventListener("input", () => calculate(form, out));
  calculate(form, out);
}
if (typeof document$ === "undefined") document.addEventListener("DOMContentLoaded", start);
else document$.subscribe(start);
