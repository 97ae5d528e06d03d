"use strict";
// Zoom, pan and hover over the panels of a page. Panels are as `page.py` writes them; a mask is counted anew where it is
// magnified, from its bands in closed form, as `raster.py` does.

const panels = JSON.parse(document.getElementById("panels").textContent);
const said = document.getElementById("said");
const NS = "http://www.w3.org/2000/svg";
const CELLS = 256;

// -- numbers, as numbers.py writes them

const exact = (n) => Math.round(n).toLocaleString("en-US");

function tokens(n) {
  if (n && n % 1048576 === 0) return exact(n / 1048576) + "M";
  return n && n % 1024 === 0 ? exact(n / 1024) + "K" : exact(n);
}

function amount(n, unit) {
  const power = n ? Math.max(Math.floor(Math.log10(Math.abs(n)) / 3), 0) : 0;
  return `${Number((n / 1000 ** power).toPrecision(3))} ${["", "k", "M", "G", "T", "P", "E"][power]}${unit}`.trim();
}

function seconds(n) {
  if (n >= 1000) return `${exact(n)} s`;
  for (const [size, name] of [[1, "s"], [1e-3, "ms"], [1e-6, "us"]]) {
    if (n >= size) return `${Number((n / size).toPrecision(3))} ${name}`;
  }
  return "0 s";
}

function written(n, unit) {
  if (unit === "tokens") return tokens(n);
  if (unit === "rank" || unit === "turn") return exact(n);
  return unit === "s" ? seconds(n) : amount(n, unit === "B" ? "B" : "");
}

function told(n, unit) {
  if (unit === "%") return `${Number(n.toPrecision(3))} %`;
  if (unit === "s") return seconds(n);
  return exact(n) + ({ B: " bytes", tokens: " tokens" }[unit] || "");
}

function ticks(start, stop, unit, binary) {
  if (unit === "names") return [];
  const rough = (stop - start) / 6;
  let step;
  if (binary && rough >= 1) step = 2 ** Math.ceil(Math.log2(rough));
  else {
    const ten = 10 ** Math.floor(Math.log10(rough));
    step = [1, 2, 5, 10].map((f) => f * ten).find((s) => s >= rough * (1 - 1e-9));
    if (["tokens", "rank", "turn"].includes(unit)) step = Math.max(Math.round(step), 1);
  }
  const found = [];
  for (let n = Math.ceil(start / step - 1e-9); n * step <= stop + 1e-9 * step; n++) found.push(n * step);
  return found;
}

// -- a grid as it was drawn

function layer(cells, l) {
  if (!l.flat) {
    l.flat = new Float64Array((cells.rows.length - 1) * (cells.cols.length - 1));
    for (let at = 0, i = 0; i < l.runs.length; i += 2) { l.flat.fill(l.runs[i], at, at + l.runs[i + 1]); at += l.runs[i + 1]; }
  }
  return l.flat;
}

function cellAt(edges, value) {
  let low = 0, high = edges.length - 1;
  if (value < edges[0] || value >= edges[high]) return -1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (edges[middle] <= value) low = middle; else high = middle; }
  return low;
}

function ofCells(cells, x, y) {
  const i = cellAt(cells.rows, y), j = cellAt(cells.cols, x);
  if (i < 0 || j < 0) return "";
  const lines = [cells.rowWords[i], cells.colWords[j]];
  for (const l of cells.layers) {
    const value = layer(cells, l)[i * (cells.cols.length - 1) + j];
    if (value >= 0) lines.push(`${l.name}: ${told(value, l.unit)}`);
    if (cells.tokens) lines.push(`of all pairs here: ${told((100 * value) / ((cells.rows[i + 1] - cells.rows[i]) * (cells.cols[j + 1] - cells.cols[j])), "%")}`);
  }
  return lines.join("\n");
}

// -- pairs counted anew: bands are rows (q0, qn, qs, k0, kn, ks, lo, hi, set of queries, set of keys)

function members(runs, value) { // how many lie below a value
  let low = 0, high = runs.length;
  while (low < high) { const middle = (low + high) >> 1; if (runs[middle][0] < value) low = middle + 1; else high = middle; }
  return low ? runs.before[low - 1] + Math.min(value, runs[low - 1][1]) - runs[low - 1][0] : 0;
}

function withCounts(sets) {
  for (const runs of sets) {
    runs.before = [];
    let total = 0;
    for (const [first, end] of runs) { runs.before.push(total); total += end - first; }
  }
}

function below(start, length, step, set, value) {
  if (set) {
    const end = start + (length - 1) * step + 1;
    return members(set, Math.min(Math.max(value, start), end)) - members(set, start);
  }
  return Math.min(Math.max(Math.ceil((value - start) / step), 0), length);
}

function staircase(nq, nk, c) { // pairs (i, j) with j - i <= c
  const start = Math.min(Math.max(-c, 0), nq), full = Math.min(Math.max(nk - 1 - c, start), nq), ramp = full - start;
  return ramp * (start + c + 1) + (ramp * (ramp - 1)) / 2 + (nq - full) * nk;
}

function pairs(field, b, q0, q1, k0, k1) { // of one band in one rectangle
  const [bq, nq, qs, bk, nk, ks, lo, hi, qset, kset] = b;
  const Q = qset ? field.sets[qset - 1] : null, K = kset ? field.sets[kset - 1] : null;
  const i0 = below(bq, nq, qs, Q, q0), i1 = below(bq, nq, qs, Q, q1);
  const j0 = below(bk, nk, ks, K, k0), j1 = below(bk, nk, ks, K, k1);
  const m = i1 - i0, n = j1 - j0;
  if (m <= 0 || n <= 0) return 0;
  if (lo === null && hi === null) return m * n;
  const gap = bk + j0 * ks - (bq + i0 * qs);
  const up = hi === null ? m * n : staircase(m, n, Math.floor((hi - gap) / qs));
  return lo === null ? up : up - staircase(m, n, Math.floor((lo - gap) / qs) - 1);
}

function count(field, rows, cols) { // Float64Array of all cells
  const height = rows.length - 1, width = cols.length - 1, found = new Float64Array(height * width);
  for (const b of field.bands) {
    const [bq, nq, qs, bk, nk, ks, lo, hi] = b;
    const qEnd = bq + (nq - 1) * qs + 1, kEnd = bk + (nk - 1) * ks + 1;
    if (qEnd <= rows[0] || bq >= rows[height] || kEnd <= cols[0] || bk >= cols[width]) continue;
    const first = bq <= rows[0] ? 0 : cellAt(rows, bq), last = qEnd >= rows[height] ? height - 1 : cellAt(rows, qEnd - 1);
    for (let i = first; i <= last; i++) {
      const a = Math.max(rows[i], bq), z = Math.min(rows[i + 1], qEnd) - 1;
      const left = Math.max(bk, lo === null ? bk : a + lo), right = Math.min(kEnd, hi === null ? kEnd : z + hi + 1);
      if (right <= cols[0] || left >= cols[width] || right <= left) continue;
      const from = left <= cols[0] ? 0 : cellAt(cols, left), to = right >= cols[width] ? width - 1 : cellAt(cols, right - 1);
      for (let j = from; j <= to; j++) found[i * width + j] += pairs(field, b, rows[i], rows[i + 1], cols[j], cols[j + 1]);
    }
  }
  return found;
}

function edges(start, stop) {
  const n = Math.min(CELLS, stop - start), found = [];
  for (let i = 0; i <= n; i++) found.push(start + Math.floor((i * (stop - start)) / n));
  return found;
}

// -- who holds a position

function owner(layout, position) {
  if (layout.even === undefined) layout.even = layout.spans.every((s) => s[3] === 1);
  if (layout.even) {
    let low = 0, high = layout.spans.length;
    while (high - low > 1) { const middle = (low + high) >> 1; if (layout.spans[middle][1] <= position) low = middle; else high = middle; }
    return layout.spans[low][0];
  }
  const span = layout.spans.find((s) => position >= s[1] && (position - s[1]) % s[3] === 0 && (position - s[1]) / s[3] < s[2]);
  return span ? span[0] : -1;
}

function tint(layout, first, end) { // the mean of up to eight positions of a cell
  const sum = [0, 0, 0], n = Math.min(8, end - first);
  for (let i = 0; i < n; i++) {
    const colour = layout.colours[owner(layout, first + Math.floor((i * (end - first)) / n))] || [255, 255, 255];
    for (let c = 0; c < 3; c++) sum[c] += colour[c] / n;
  }
  return sum;
}

function who(layout, first, end) {
  const ranks = new Set();
  for (let p = first; p < end && p < first + 64; p++) ranks.add(owner(layout, p));
  if (end - first > 64) ranks.add(owner(layout, end - 1));
  const found = [...ranks];
  return found.length === 1 ? `rank ${found[0]}` : `ranks ${found.slice(0, 4).join(", ")}${found.length > 4 ? " ..." : ""}`;
}

// -- drawing what is magnified

const AMOUNTS = ["ffffff", "a8cfe6", "3d94c8", "0072b2", "003f63", "00263c"].map((h) => [0, 2, 4].map((i) => parseInt(h.substr(i, 2), 16)));
const ink = (share) => (share > 0 ? 0.25 + 0.75 * Math.sqrt(share) : 0);

function blue(strength) {
  const at = Math.min(strength * (AMOUNTS.length - 1), AMOUNTS.length - 1.000001), i = Math.floor(at), f = at - i;
  return [0, 1, 2].map((c) => AMOUNTS[i][c] * (1 - f) + AMOUNTS[i + 1][c] * f);
}

function painted(width, height, colour) { // an image of cells, as an address
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let i = 0; i < height; i++) for (let j = 0; j < width; j++) image.data.set([...colour(i, j), 255], 4 * (i * width + j));
  context.putImageData(image, 0, 0);
  return canvas.toDataURL();
}

function recount(panel) {
  const { field, view } = panel, [x0, x1, y0, y1] = view;
  const rows = edges(Math.floor(y0), Math.ceil(y1)), cols = edges(Math.floor(x0), Math.ceil(x1));
  const found = count(field, rows, cols), width = cols.length - 1, height = rows.length - 1;
  panel.fine = { rows, cols, found };
  const tints = field.layouts ? rows.slice(0, -1).map((r, i) => tint(field.layouts[0], r, rows[i + 1])) : null;
  const colour = (i, j) => {
    const strength = ink(found[i * width + j] / ((rows[i + 1] - rows[i]) * (cols[j + 1] - cols[j])));
    return tints ? tints[i].map((c) => 255 - (255 - c) * strength) : blue(strength);
  };
  show(panel, panel.plot, "fine", [cols[0], cols[width], rows[0], rows[height]], painted(width, height, colour));
  if (tints) {
    show(panel, panel.rows, "fine", [null, null, rows[0], rows[height]], painted(1, height, (i) => tints[i]));
    const above = cols.slice(0, -1).map((c, j) => tint(field.layouts[1], c, cols[j + 1]));
    show(panel, panel.cols, "fine", [cols[0], cols[width], null, null], painted(width, 1, (i, j) => above[j]));
  }
}

function show(panel, into, name, [x0, x1, y0, y1], href) { // an image over what was drawn, at a place of the axes
  const old = into.querySelector("." + name), image = document.createElementNS(NS, "image"), size = into.size;
  const [left, right] = x0 === null ? [0, size[0]] : [toX(panel, x0), toX(panel, x1)];
  const [top, low] = y0 === null ? [0, size[1]] : [toY(panel, y0), toY(panel, y1)];
  const given = { class: name, x: left, y: top, width: right - left, height: low - top, preserveAspectRatio: "none", href };
  for (const [key, value] of Object.entries(given)) image.setAttribute(key, value);
  image.style.imageRendering = "pixelated";
  // white first, so that nothing coarse shows through
  into.appendChild(image);
  if (old) old.remove();
}

// -- axes and views

const toX = (p, v) => (p.box[2] * (v - p.x.start)) / (p.x.stop - p.x.start);
const toY = (p, v) => { const d = (p.box[3] * (v - p.y.start)) / (p.y.stop - p.y.start); return p.y.down ? d : p.box[3] - d; };

function ofPixel(panel, px, py) { // sheet pixels inside a plot to the units of the axes
  const [x0, x1, y0, y1] = panel.view, [left, top, width, height] = panel.box;
  const down = (py - top) / height;
  return [x0 + ((x1 - x0) * (px - left)) / width, panel.y.down ? y0 + (y1 - y0) * down : y1 - (y1 - y0) * down];
}

function setView(panel, view) {
  if (panel.y.unit === "names") return; // there is no more to see
  const whole = [panel.x.start, panel.x.stop, panel.y.start, panel.y.stop];
  const least = [panel.x, panel.y].map((axis) => (axis.unit === "tokens" ? Math.min(8, axis.stop - axis.start) : (axis.stop - axis.start) / 1e4));
  for (const [at, small] of [[0, least[0]], [2, least[1]]]) {
    const size = Math.min(Math.max(view[at + 1] - view[at], small), whole[at + 1] - whole[at]);
    view[at] = Math.min(Math.max(view[at], whole[at]), whole[at + 1] - size);
    view[at + 1] = view[at] + size;
  }
  panel.view = view;
  const [x0, x1, y0, y1] = view, magnified = whole.some((value, i) => value !== view[i]);
  const left = toX(panel, x0), right = toX(panel, x1), [top, low] = [toY(panel, y0), toY(panel, y1)].sort((a, b) => a - b);
  panel.plot.setAttribute("viewBox", `${left} ${top} ${right - left} ${low - top}`);
  if (panel.rows) panel.rows.setAttribute("viewBox", `0 ${top} ${panel.rows.size[0]} ${low - top}`);
  if (panel.cols) panel.cols.setAttribute("viewBox", `${left} 0 ${right - left} ${panel.cols.size[1]}`);
  for (const part of [panel.plot, panel.rows, panel.cols]) if (part) part.querySelectorAll(".fine").forEach((e) => e.remove());
  panel.fine = null;
  if (magnified) { drawTicks(panel); if (panel.field) recount(panel); } else panel.ticks.innerHTML = panel.first;
  nameView(panel, magnified);
}

function range(axis, from, to, words = 9) { // a view's part of an axis, with some words of its name
  const whole = ["tokens", "rank", "turn"].includes(axis.unit), last = Math.max(Math.ceil(to) - 1, Math.floor(from));
  const [a, b] = whole ? [exact(Math.floor(from)), exact(last)] : [written(from, axis.unit), written(to, axis.unit)];
  return `${axis.label.split(" ").slice(0, words).join(" ")} ${a === b ? a : `${a} to ${b}`}`.trim();
}

function scale(panel) { // what a cell of tokens stands for
  if (!panel.cells || !panel.cells.tokens) return "";
  const { rows, cols } = panel.fine || panel.cells;
  const [high, wide] = [rows, cols].map((at) => Math.max(...at.slice(1).map((edge, i) => edge - at[i])));
  return high * wide > 1 ? `; a cell is ${exact(high)} x ${exact(wide)} tokens` : "; a cell is one pair";
}

function nameView(panel, magnified) { // what of the panel is seen, above it and in the title of the page
  const [x0, x1, y0, y1] = panel.view, seen = (words) => `${range(panel.y, y0, y1, words)}, ${range(panel.x, x0, x1, words)}`;
  const said = [`${panel.title}: ${seen()}${scale(panel)}`, seen() + scale(panel), seen(), seen(1)];
  const fits = (text) => { panel.name.textContent = text; return panel.name.getComputedTextLength() <= panel.room; };
  panel.name.setAttribute("font-size", panel.nameSize);
  if (!magnified) panel.name.textContent = panel.firstName;
  else if (!said.some(fits)) panel.name.setAttribute("font-size", Math.max((panel.nameSize * panel.room) / panel.name.getComputedTextLength(), 6));
  panel.seen = magnified ? `${panel.title}: ${seen()}` : "";
  document.title = [firstTitle, ...panels.map((p) => p.seen).filter(Boolean)].join("; ");
}

function drawTicks(panel) {
  const [x0, x1, y0, y1] = panel.view, [left, top, width, height] = panel.box, strip = panel.rows ? 14 : 0, parts = [];
  const word = (x, y, anchor, text) => parts.push(`<text x="${x}" y="${y}" font-size="10.5" fill="#666" text-anchor="${anchor}">${text}</text>`);
  const line = (a, b, c, d) => parts.push(`<line x1="${a}" y1="${b}" x2="${c}" y2="${d}" stroke="#666"/>`);
  for (const [axis, from, to, across] of [[panel.x, x0, x1, true], [panel.y, y0, y1, false]]) {
    const middle = axis.unit === "rank" || axis.unit === "turn" ? 0.5 : 0, whole = axis.stop - axis.start;
    const binary = (axis.unit === "tokens" && whole % 1024 === 0 && whole >= 2048) || (axis.unit === "rank" && whole % 64 === 0);
    for (const at of ticks(from, to, axis.unit, binary)) {
      const part = (at + middle - from) / (to - from);
      if (part < 0 || part > 1) continue;
      if (across) { const x = left + part * width; line(x, top + height, x, top + height + 4); word(x, top + height + 16, "middle", written(at, axis.unit)); }
      else { const y = top + (axis.down ? part : 1 - part) * height; line(left - strip - 4, y, left - strip, y); word(left - strip - 7, y + 3.5, "end", written(at, axis.unit)); }
    }
  }
  panel.ticks.innerHTML = parts.join("");
}

// -- what is said

function ofPlace(panel, x, y) {
  const { field, fine } = panel;
  if (!field || !fine) return panel.cells ? ofCells(panel.cells, x, y) : "";
  const i = cellAt(fine.rows, y), j = cellAt(fine.cols, x);
  if (i < 0 || j < 0) return "";
  const [q0, q1, k0, k1] = [fine.rows[i], fine.rows[i + 1], fine.cols[j], fine.cols[j + 1]];
  const run = (a, b) => (b === a + 1 ? exact(a) : `${exact(a)} to ${exact(b - 1)}`);
  const of = field.layouts ? [`, of ${who(field.layouts[0], q0, q1)}`, `, held by ${who(field.layouts[1], k0, k1)}`] : ["", ""];
  const n = fine.found[i * (fine.cols.length - 1) + j], whole = (q1 - q0) * (k1 - k0);
  const share = whole === 1 ? (n ? "attends" : "does not attend") : `pairs: ${exact(n)}\nof all pairs here: ${told((100 * n) / whole, "%")}`;
  return `${q1 === q0 + 1 ? "query" : "queries"} ${run(q0, q1)}${of[0]}\n${k1 === k0 + 1 ? "key" : "keys"} ${run(k0, k1)}${of[1]}\n${share}`;
}

function say(text, x, y) {
  said.hidden = !text;
  said.textContent = text;
  const wide = said.offsetWidth, tall = said.offsetHeight;
  said.style.left = `${x + 14 + wide > innerWidth ? Math.max(x - wide - 8, 0) : x + 14}px`;
  said.style.top = `${y + 14 + tall > innerHeight ? Math.max(y - tall - 8, 0) : y + 14}px`;
}

function noteOf(element) {
  const marked = element && element.closest ? element.closest("[data-note]") : null;
  return marked ? marked.dataset.note : "";
}

// -- the page comes alive

const sheet = document.querySelector("svg"), firstTitle = document.title;

function onSheet(event) {
  const box = sheet.getBoundingClientRect();
  return [((event.clientX - box.left) * sheet.viewBox.baseVal.width) / box.width, ((event.clientY - box.top) * sheet.viewBox.baseVal.height) / box.height];
}

function zoom(panel, [x, y], factor) {
  const [x0, x1, y0, y1] = panel.view;
  setView(panel, [x + (x0 - x) * factor, x + (x1 - x) * factor, y + (y0 - y) * factor, y + (y1 - y) * factor]);
}

panels.forEach((panel, number) => {
  const group = document.querySelector(`.panel[data-panel="${number}"]`);
  for (const part of ["plot", "rows", "cols", "ticks"]) {
    panel[part] = group.querySelector("." + part);
    if (panel[part] && part !== "ticks") panel[part].size = [panel[part].viewBox.baseVal.width, panel[part].viewBox.baseVal.height];
  }
  panel.first = panel.ticks.innerHTML;
  panel.name = group.querySelector(".name text");
  panel.firstName = panel.name.textContent;
  panel.nameSize = Number(panel.name.getAttribute("font-size"));
  panel.view = [panel.x.start, panel.x.stop, panel.y.start, panel.y.stop];
  if (panel.field) withCounts(panel.field.sets);
  const frame = group.querySelector(".frame");
  frame.setAttribute("pointer-events", "none");
  panel.plot.querySelectorAll("title").forEach((title) => { title.parentElement.dataset.note = title.textContent; title.remove(); });
  const back = document.createElementNS(NS, "rect"); // so that empty places are hit, too
  for (const [key, value] of Object.entries({ x: 0, y: 0, width: panel.box[2], height: panel.box[3], fill: "transparent" })) back.setAttribute(key, value);
  panel.plot.prepend(back);
  let held = null;
  panel.plot.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(panel, ofPixel(panel, ...onSheet(event)), event.deltaY < 0 ? 0.7 : 1 / 0.7);
  }, { passive: false });
  panel.plot.addEventListener("pointerdown", (event) => { held = { at: onSheet(event), view: [...panel.view] }; panel.plot.setPointerCapture(event.pointerId); });
  panel.plot.addEventListener("pointerup", () => { held = null; });
  panel.plot.addEventListener("dblclick", () => setView(panel, [panel.x.start, panel.x.stop, panel.y.start, panel.y.stop]));
  panel.plot.addEventListener("pointerleave", () => say("", 0, 0));
  panel.plot.addEventListener("pointermove", (event) => {
    const [px, py] = onSheet(event);
    if (held) {
      const [x0, x1, y0, y1] = held.view, dx = ((held.at[0] - px) * (x1 - x0)) / panel.box[2];
      const dy = (((held.at[1] - py) * (y1 - y0)) / panel.box[3]) * (panel.y.down ? 1 : -1);
      setView(panel, [x0 + dx, x1 + dx, y0 + dy, y1 + dy]);
      return;
    }
    say(noteOf(event.target) || ofPlace(panel, ...ofPixel(panel, px, py)), event.clientX, event.clientY);
  });
});

function ofAddress() { // #view=panel,x0,x1,y0,y1 and #at=panel,x,y, joined by &
  for (const part of location.hash.slice(1).split("&")) {
    const [name, values] = part.split("="), [number, ...rest] = (values || "").split(",").map(Number), panel = panels[number];
    if (!panel) continue;
    if (name === "view") setView(panel, rest);
    if (name === "at") {
      const [x0, x1, y0, y1] = panel.view, box = sheet.getBoundingClientRect(), scale = box.width / sheet.viewBox.baseVal.width;
      const across = (rest[0] - x0) / (x1 - x0), down = (rest[1] - y0) / (y1 - y0);
      const px = panel.box[0] + across * panel.box[2], py = panel.box[1] + (panel.y.down ? down : 1 - down) * panel.box[3];
      const [cx, cy] = [box.left + px * scale, box.top + py * scale];
      say(noteOf(document.elementFromPoint(cx, cy)) || ofPlace(panel, ...rest), cx, cy);
    }
  }
}
ofAddress();
addEventListener("hashchange", ofAddress);
