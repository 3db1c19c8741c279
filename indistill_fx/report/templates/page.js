(() => {
"use strict";
const root = document.documentElement, $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);

// Theme: follows the system until it is chosen.
const theme = $("theme"), system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
const tellTheme = () => { theme.textContent = isDark() ? "Light" : "Dark"; theme.setAttribute("aria-label", isDark() ? "Use light colours" : "Use dark colours"); theme.setAttribute("aria-pressed", String(root.dataset.theme !== undefined)); };
theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; tellTheme(); });
system.addEventListener("change", tellTheme);
tellTheme();

// On paper nothing can be opened: all is open but what can be had as a file.
const closed = () => [...document.querySelectorAll("details:not([open])")].filter((d) => !d.querySelector("pre"));
let opened = [];
addEventListener("beforeprint", () => { opened = closed(); for (const d of opened) d.open = true; });
addEventListener("afterprint", () => { for (const d of opened) d.open = false; opened = []; });

const figure = $("figure");
if (!figure) return;
const svg = (tag, attributes) => { const e = document.createElementNS("http://www.w3.org/2000/svg", tag); for (const k in attributes) e.setAttribute(k, attributes[k]); return e; };
const node = (tag, text, name) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text; if (name) e.className = name; return e; };
const columns = [...figure.querySelectorAll(".column")], panel = $("details"), details = panel.querySelector(".inner");
const hint = details.firstElementChild;
const arcs = [...document.querySelectorAll(".arc")];
const short = (n) => { for (const [unit, scale] of [["G", 1e9], ["M", 1e6], ["k", 1e3]]) if (n >= scale) return `${Number((n / scale).toPrecision(3))} ${unit}`; return String(n); };
const rowsOf = (pair) => columns.map((column) => column.querySelector(`.row[data-pair="${pair}"]`));

// Arcs: across the gap in hundredths of its width, down in pixels, so that they fit any width.
function draw() {
  const gap = $("gap").getBoundingClientRect(), height = Math.max(gap.height, 1);
  $("lines").setAttribute("viewBox", `0 0 100 ${height}`);
  $("lines").setAttribute("height", height);
  const middles = [];
  for (const arc of arcs) {
    const ends = rowsOf(arc.dataset.pair).map((row) => { const box = row.firstElementChild.getBoundingClientRect(); return box.top + box.height / 2 - gap.top; });
    const path = `M2 ${ends[0]}C50 ${ends[0]} 50 ${ends[1]} 98 ${ends[1]}`;
    for (const line of arc.children) line.setAttribute("d", path);
    const score = document.querySelector(`.score[data-pair="${arc.dataset.pair}"]`), middle = (ends[0] + ends[1]) / 2;
    if (score) {
      score.firstElementChild.setAttribute("y", middle + 4);
      const tight = middles.some((other) => Math.abs(other - middle) < 15);
      score.classList.toggle("tight", tight);
      if (!tight) middles.push(middle);
    }
  }
}
new ResizeObserver(draw).observe(figure);
matchMedia("print").addEventListener("change", draw);
draw();

// Details of what is pointed at or focused.
let lit = [];
function light(...elements) { for (const e of lit) e.classList.remove("on"); lit = elements.filter(Boolean); for (const e of lit) e.classList.add("on"); }
function card(pair) {
  const copy = $(`pair-${pair}`).cloneNode(true);
  copy.removeAttribute("id");
  return copy;
}
function facts(key) {
  const [tap, op, shape, stage, depth, macs, parameters] = data.rows[key];
  const list = node("dl");
  const add = (name, value) => { const line = node("div"); line.append(node("dt", name), node("dd", value)); list.append(line); };
  const title = node("h3"); title.append(node("code", tap));
  add("Shape", shape || "–");
  if (stage) add("Stage", stage);
  if (op) { add("Operation", op); add("MACs", `${short(macs)} in this layer; up to here ${(100 * depth).toFixed(1)}% of the model's`); add("Parameters", short(parameters)); }
  const box = node("div"); box.append(title, list);
  return box;
}
const pairParts = (pair) => [...rowsOf(pair), ...document.querySelectorAll(`.arc[data-pair="${pair}"], .score[data-pair="${pair}"]`)];
function rest() { panel.classList.remove("busy"); light(); details.replaceChildren(hint); shown = null; }
function show(target) {
  panel.classList.add("busy");
  const arc = target.closest(".arc"), button = target.closest(".layer");
  if (arc) { light(...pairParts(arc.dataset.pair)); details.replaceChildren(card(arc.dataset.pair)); return; }
  if (!button) return;
  const row = button.parentElement, pair = row.dataset.pair;
  light(row, ...(pair ? pairParts(pair) : []));
  if (button.dataset.row) details.replaceChildren(facts(button.dataset.row), ...(pair ? [card(pair)] : []));
  else details.replaceChildren(node("p", button.title), hint);
}
let shown = null;
panel.querySelector(".close").addEventListener("click", rest);
const showOnce = (event) => { const target = event.target.closest(".arc, .layer"); if (target && target !== shown) { shown = target; show(target); } };
figure.addEventListener("pointerover", showOnce);
figure.addEventListener("focusin", showOnce);

// Unfolding.
function operations(key) {
  const side = key[0] === "t" ? "teacher" : "student", all = data.operations[side];
  const [first, last] = data.rows[key].slice(7), list = node("ol", undefined, "operations");
  const step = 22, places = (k) => (k - first + 0.5) * step, lines = svg("svg", { height: (last - first) * step, "aria-hidden": "true" });
  for (let k = first; k < last; k++) {
    for (const source of all[k][5]) {
      const from = source < first ? 0 : places(source), to = places(k), bulge = Math.min(6 + (to - from) / 8, 24);
      lines.append(svg("path", { d: source === k - 1 ? `M26 ${from}V${to}` : `M26 ${from}C${26 - bulge} ${from} ${26 - bulge} ${to} 26 ${to}` }));
    }
  }
  const home = all[first][0].split(".").slice(0, -1).join(".");
  for (let k = first; k < last; k++) {
    const [name, op, shape, macs] = all[k], item = node("li");
    item.dataset.operation = k;
    item.title = `${name}: ${op} ${shape}`;
    const label = node("b"), inner = home && name.startsWith(home) && name.length > home.length;
    label.append(node("i", inner ? home : ""), inner ? name.slice(home.length) : name);
    item.append(label, node("span", op), node("span", shape), node("span", macs ? `${short(macs)} MACs` : ""));
    lines.append(svg("circle", { cx: 26, cy: places(k), r: 3 }));
    list.append(item);
  }
  list.append(lines);
  return list;
}
function toggle(button, open = button.getAttribute("aria-expanded") !== "true") {
  if (!button.hasAttribute("aria-expanded")) return;
  const row = button.parentElement;
  let inner = row.querySelector(":scope > ol");
  if (!inner) { inner = operations(button.dataset.row); row.append(inner); }
  inner.hidden = !open;
  button.setAttribute("aria-expanded", String(open));
  draw();
}
figure.addEventListener("click", (event) => { const button = event.target.closest(".layer"), arc = event.target.closest(".arc"); if (button) { toggle(button); focus(button); } else if (arc) arc.focus(); });

// Keyboard: one stop per column; arrows move in it and to the other one.
const visible = (column) => [...column.querySelectorAll(".layer")].filter((button) => button.offsetParent);
function focus(button) {
  const column = button.closest(".column");
  for (const other of column.querySelectorAll(".layer[tabindex='0']")) other.tabIndex = -1;
  button.tabIndex = 0;
  button.focus();
}
for (const column of columns) { const first = column.querySelector(".layer"); if (first) first.tabIndex = 0; }
figure.addEventListener("keydown", (event) => {
  const arc = event.target.closest(".arc"), button = event.target.closest(".layer");
  if (event.key === "Escape") rest();
  if (arc && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); focus(rowsOf(arc.dataset.pair)[0].firstElementChild); return; }
  if (!button) return;
  const column = button.closest(".column"), list = visible(column), at = list.indexOf(button);
  const moves = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: list.length - 1 };
  if (event.key in moves) { event.preventDefault(); const next = list[moves[event.key]]; if (next) focus(next); }
  if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
    event.preventDefault();
    const other = columns[event.key === "ArrowLeft" ? 0 : 1];
    if (other === column) return;
    const pair = button.parentElement.dataset.pair, rows = visible(other), y = button.getBoundingClientRect().top;
    const near = pair ? other.querySelector(`.row[data-pair="${pair}"] > .layer`) : rows.reduce((a, b) => Math.abs(a.getBoundingClientRect().top - y) <= Math.abs(b.getBoundingClientRect().top - y) ? a : b);
    if (near) focus(near);
  }
});

// Search: layers by name, and the operations inside them.
const find = $("find"), hits = $("hits"), places = [];
for (const key in data.rows) places.push([data.rows[key][0], key, null]);
for (const key in data.rows) {
  const all = data.operations[key[0] === "t" ? "teacher" : "student"] || [];
  for (let k = data.rows[key][7]; k < data.rows[key][8]; k++) if (all[k][0] !== data.rows[key][0]) places.push([all[k][0], key, k]);
}
function reveal(key, operation) {
  const row = $(key), fold = row.parentElement.closest(".folded");
  if (fold) toggle(fold.firstElementChild, true);
  if (operation !== null) toggle(row.firstElementChild, true);
  for (const e of figure.querySelectorAll(".found")) e.classList.remove("found");
  const target = operation === null ? row : row.querySelector(`[data-operation="${operation}"]`);
  target.classList.add("found");
  focus(row.firstElementChild);
  target.scrollIntoView({ block: "center" });
}
let found = [];
function search() {
  const text = find.value.trim().toLowerCase();
  hits.replaceChildren();
  for (const e of figure.querySelectorAll(".found")) e.classList.remove("found");
  found = [];
  if (!text) return;
  const rank = ([name]) => { const low = name.toLowerCase(); return low === text ? 0 : low.startsWith(text) ? 1 : low.includes(text) ? 2 : 3; };
  found = places.map((place) => [rank(place), place]).filter(([r]) => r < 3).sort((a, b) => a[0] - b[0]).map(([, place]) => place);
  hits.append(node("span", found.length ? `${found.length} found` : "No layer name contains this."));
  for (const [name, key, operation] of found.slice(0, 8)) {
    const button = node("button", `${key[0] === "t" ? "teacher" : "student"} ${name}`);
    button.type = "button";
    button.addEventListener("click", () => reveal(key, operation));
    hits.append(button);
  }
  if (found.length > 8) hits.append(node("span", `and ${found.length - 8} more`));
}
find.addEventListener("input", search);
find.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && found.length) { event.preventDefault(); reveal(found[0][1], found[0][2]); }
  if (event.key === "Escape") { find.value = ""; search(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "/" && !event.target.closest("input")) { event.preventDefault(); find.focus(); } });
})();
