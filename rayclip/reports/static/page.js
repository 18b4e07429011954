"use strict";
// Sorting: a button in each column's head; rows without a value stay last.
function sortBy(table, head) {
  const column = head.cellIndex, body = table.tBodies[0], rows = Array.from(body.rows);
  const key = (row) => {
    const cell = row.cells[column];
    return "value" in cell.dataset ? (cell.dataset.value === "" ? null : Number(cell.dataset.value)) : cell.textContent.trim();
  };
  const numeric = rows.some((row) => typeof key(row) === "number");
  const first = numeric ? "descending" : "ascending";
  const second = numeric ? "ascending" : "descending";
  const order = head.getAttribute("aria-sort") === first ? second : first;
  for (const other of head.parentElement.cells) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const collator = new Intl.Collator("en", { numeric: true });
  rows.sort((a, b) => {
    const x = key(a), y = key(b);
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (numeric ? x - y : collator.compare(x, y));
  });
  body.append(...rows);
  renumber(table);
}
function renumber(table) {
  let rank = 0;
  for (const row of table.tBodies[0].rows) {
    const cell = row.querySelector("[data-rank]");
    if (cell && !row.hidden) cell.textContent = String(++rank);
  }
}
// Filters of which one value is always chosen: after one of them has changed, those that no row agrees with follow it.
function settle(changed) {
  let rows = Array.from(document.querySelectorAll("table[data-rows] tbody tr"));
  const others = Array.from(document.querySelectorAll("[data-one]")).filter((control) => control !== changed);
  for (const control of changed ? [changed, ...others] : []) {
    const has = (row) => row.dataset[control.dataset.filter] === control.value;
    if (!rows.some(has) && rows.length) control.value = rows[0].dataset[control.dataset.filter];
    rows = rows.filter(has);
  }
}
// What all rows share is said once, above the table, and its columns are hidden.
function sayShared(table) {
  const heads = Array.from(table.tHead.rows[0].cells), rows = Array.from(table.tBodies[0].rows).filter((row) => !row.hidden);
  const said = [];
  for (const head of heads) {
    const column = head.cellIndex, texts = new Set(rows.map((row) => row.cells[column].textContent.trim()));
    const same = column > 3 && rows.length > 1 && texts.size === 1;
    for (const row of table.rows) row.cells[column].hidden = same;
    if (same && ![...texts].includes("")) said.push(`${head.textContent.trim()} ${[...texts][0]}`);
  }
  document.getElementById("shared").textContent = said.length ? `All rows: ${said.join("; ")}.` : "";
}
// A hint where a table is wider than the page.
function hint() {
  for (const region of document.querySelectorAll(".scroll")) region.toggleAttribute("data-cut", region.scrollWidth > region.clientWidth + 1);
}
// Filtering: a row stays if it has every chosen value and holds the words that were typed.
function filterRows() {
  const chosen = Array.from(document.querySelectorAll("[data-filter]"), (control) => [control.dataset.filter, control.value]);
  const words = (document.getElementById("search")?.value ?? "").toLowerCase().split(/\s+/).filter(Boolean);
  let shown = new Set(), all = new Set();
  for (const table of document.querySelectorAll("table[data-rows]")) {
    for (const row of table.tBodies[0].rows) {
      const text = (row.dataset.text ?? row.cells[0].textContent).toLowerCase();
      row.hidden = !(chosen.every(([name, value]) => value === "" || row.dataset[name] === value) && words.every((w) => text.includes(w)));
      all.add(row.dataset.id);
      if (!row.hidden) shown.add(row.dataset.id);
    }
    renumber(table);
    if (table.classList.contains("ranked")) sayShared(table);
  }
  const status = document.getElementById("count");
  hint();
  if (status) status.textContent = `${shown.size} of ${all.size} ${status.dataset.of} shown`;
}
for (const button of document.querySelectorAll("th[aria-sort] button")) {
  button.addEventListener("click", () => sortBy(button.closest("table"), button.closest("th")));
}
for (const control of document.querySelectorAll("[data-one]")) control.addEventListener("input", () => settle(control));
for (const control of document.querySelectorAll("[data-filter], #search")) control.addEventListener("input", filterRows);
settle(document.querySelector("[data-one]"));
if (document.getElementById("count")) filterRows();
window.addEventListener("resize", hint);
for (const folded of document.querySelectorAll("details")) folded.addEventListener("toggle", hint);
for (const form of document.forms) form.addEventListener("submit", (event) => event.preventDefault());
// Comparing two models: McNemar's exact test of the samples that only one of them gets right.
function mcnemar(b, c) {
  const n = b + c, small = Math.min(b, c);
  let log = -n * Math.LN2, total = 0;
  for (let k = 0; k <= small; k++) {
    total += Math.exp(log);
    log += Math.log(n - k) - Math.log(k + 1);
  }
  return Math.min(1, 2 * total);
}
for (const form of document.querySelectorAll("form[data-compare]")) {
  const data = JSON.parse(document.getElementById(form.dataset.compare).textContent);
  const [first, second] = form.querySelectorAll("select"), body = form.parentElement.querySelector("tbody");
  const status = form.querySelector("[role=status]");
  const update = () => {
    const a = Number(first.value), b = Number(second.value);
    const found = data.counts.filter(([x, y]) => (x === a && y === b) || (x === b && y === a));
    body.replaceChildren(...found.map(([x, , column, one, two, n]) => {
      if (x !== a) [one, two] = [two, one];
      const p = mcnemar(one, two), gap = (100 * (one - two)) / n, row = document.createElement("tr");
      const cells = [...data.columns[column], (gap > 0 ? "+" : gap < 0 ? "−" : "") + Math.abs(gap).toFixed(1), one, two, n, p < 0.001 ? "< 0.001" : p.toFixed(3)];
      cells.forEach((text, i) => {
        const cell = document.createElement(i ? "td" : "th");
        if (!i) cell.scope = "row";
        if (i === 1) cell.className = "text";
        cell.textContent = text;
        row.append(cell);
      });
      return row;
    }));
    status.textContent = a === b ? "Choose two different models." :
      found.length ? `${data.models[a]} compared with ${data.models[b]}: ${found.length} comparisons` : "These two share no samples, or are not embedded in this page.";
  };
  form.addEventListener("input", update);
  update();
}
