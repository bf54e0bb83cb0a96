"use strict";

// Elements are made here and filled by textContent alone: nothing from the data is ever parsed as markup.
function make(name, attributes, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// Tables: a heading sorts by its column; numbers by data-v, absent ones last.
for (const table of document.querySelectorAll("[data-sortable]")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    if ("plain" in head.dataset) return;
    const button = make("button", { type: "button" }, ...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
      const absent = (value) => value === "" || value === "–";
      const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (absent(x) || absent(y)) return absent(x) - absent(y);
        return up ? compare(x, y) : compare(y, x);
      });
      table.tBodies[0].classList.add("sorted");
      table.tBodies[0].append(...rows);
    });
  });
}

// Charts: point at a step and read the values in the caption.
for (const chart of document.querySelectorAll(".chart")) {
  const [left, right, x0, x1, top, bottom, y0, y1, log] = chart.dataset.frame.split(" ").map(Number);
  const lines = [...chart.querySelectorAll("polyline")].map((line) => ({
    name: line.dataset.name,
    points: line.getAttribute("points").split(" ").map((p) => p.split(",").map(Number)),
  }));
  const output = chart.parentElement.querySelector("output");
  const atRest = output.textContent;
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y1", top);
  cursor.setAttribute("y2", bottom);
  chart.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse());
    const x = Math.min(right, Math.max(left, at.x));
    const step = x0 + ((x1 - x0) * (x - left)) / (right - left);
    const near = new Map();
    for (const { name, points } of lines) {
      for (const [px, py] of points) {
        const away = Math.abs(px - x);
        if (!near.has(name) || away < near.get(name).away) near.set(name, { away, py });
      }
    }
    const said = [...near].map(([name, { py }]) => {
      const value = y1 + ((y0 - y1) * (py - top)) / (bottom - top);
      return `${name} ${Number((log ? 10 ** value : value).toPrecision(3))}`.trim();
    });
    output.textContent = `step ${Math.round(step).toLocaleString("en")}: ${said.join(", ")}`;
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    chart.append(cursor);
  });
  chart.addEventListener("pointerleave", () => {
    output.textContent = atRest;
    cursor.remove();
  });
}

// Examples: the address after # holds the filters, so that a view can be shared.
function browse(data, root) {
  const PAGE = 12;
  const KINDS = ["", "fixed", "broken", "missed"];
  const SAID = ["", "better", "worse", "still wrong"];
  const text = (pieces) => pieces.map((piece) => (typeof piece === "string" ? piece : piece[0])).join("");
  data.forEach((one, index) => {
    one.number = index + 1;
    one.texts = one.lines.map(text);
    one.outcome = one.after < one.before ? "fixed" : one.after > one.before ? "broken" : "untouched";
    one.changed = one.texts[0] !== one.texts[1];
    one.search = [...one.texts, ...one.others].join("\n").toLowerCase();
  });
  const SHOWS = {
    all: () => true,
    changed: (one) => one.changed,
    fixed: (one) => one.outcome === "fixed",
    broken: (one) => one.outcome === "broken",
    untouched: (one) => one.outcome === "untouched",
    kept: (one) => one.kept,
  };
  const usual = data.some(SHOWS.changed) ? "changed" : "all";
  const form = root.querySelector("form");
  const chips = root.querySelector(".chips");
  const list = root.querySelector(".list");
  const [back, on] = root.querySelectorAll(".pager button");
  let state;

  function read() {
    const hash = new URLSearchParams(location.hash.slice(1));
    const show = hash.get("show");
    state = {
      show: Object.hasOwn(SHOWS, show) ? show : usual,
      task: hash.get("task") ?? "",
      set: hash.get("set") ?? "",
      q: hash.get("q") ?? "",
      page: Math.max(1, parseInt(hash.get("page"), 10) || 1),
    };
    return ["show", "task", "set", "q", "page"].some((key) => hash.has(key));
  }

  function options(name, values, all) {
    const select = form.elements[name];
    const known = values.includes(state[name]) || !state[name] ? values : [...values, state[name]];
    select.replaceChildren(make("option", { value: "" }, all), ...known.map((v) => make("option", { value: v }, v)));
    select.value = state[name];
  }

  function marked(pieces) {
    return pieces.map((piece) => {
      if (typeof piece === "string") return piece;
      const said = make("span", { class: "hidden" }, ` (${SAID[piece[1]]}) `);
      return make("mark", { class: KINDS[piece[1]], title: SAID[piece[1]] }, piece[0], said);
    });
  }

  function example(one) {
    const same = !one.changed;
    const said = one.outcome === "untouched" && one.changed ? "changed, as many errors" : one.outcome;
    const errors = `${one.before} → ${one.after} ${one.before === 1 && one.after === 1 ? "error" : "errors"}`;
    const header = make("header", {}, make("b", { class: one.outcome }, said), errors, one.task, one.set, `#${one.number}`);
    [...header.childNodes].forEach((node) => node.nodeType === 3 && node.replaceWith(make("span", {}, node.textContent)));
    if (one.kept) header.append(make("span", {}, "guard kept the first pass"));
    const body = make("dl", {});
    const line = (label, kind, ...content) =>
      body.append(make("dt", {}, label), make("dd", { dir: "auto", class: kind }, ...content));
    if (!same) line("First pass", "first", ...marked(one.lines[0]));
    line(same ? "Unchanged" : "Correction", "correction", ...marked(one.lines[1]));
    line("Reference", "reference", ...marked(one.lines[2]));
    if (one.others.length) {
      line("Other readings", "others", ...one.others.map((other) => make("div", { dir: "auto" }, other)));
    }
    return make("article", { class: "example" }, header, body);
  }

  function draw() {
    const tasks = [...new Set(data.map((one) => one.task))].sort();
    const ofTask = data.filter((one) => !state.task || one.task === state.task);
    options("task", tasks, "all tasks");
    options("set", [...new Set(ofTask.map((one) => one.set))].sort(), "all sets");
    if (form.elements.q.value !== state.q) form.elements.q.value = state.q;
    const query = state.q.toLowerCase();
    const pool = ofTask.filter((one) => (!state.set || one.set === state.set) && one.search.includes(query));
    chips.replaceChildren(...Object.entries(SHOWS).map(([name, test]) => {
      const count = make("span", {}, pool.filter(test).length.toLocaleString("en"));
      return make("button", { type: "button", value: name, "aria-pressed": name === state.show }, name, " ", count);
    }));
    const found = pool.filter(SHOWS[state.show]);
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    state.page = Math.min(state.page, pages);
    const from = (state.page - 1) * PAGE;
    list.replaceChildren(...found.slice(from, from + PAGE).map(example));
    root.querySelector(".status").textContent = found.length
      ? `${(from + 1).toLocaleString("en")}–${Math.min(from + PAGE, found.length).toLocaleString("en")} of ${found.length.toLocaleString("en")} examples`
      : "No example matches. Widen the filters.";
    root.querySelector(".pager").hidden = pages === 1;
    root.querySelector(".pager span").textContent = `page ${state.page} of ${pages}`;
    back.disabled = state.page === 1;
    on.disabled = state.page === pages;
  }

  function go(change) {
    state = { ...state, page: 1, ...change };
    const kept = Object.entries(state).filter(([key, v]) => v && !(key === "page" && v === 1) && !(key === "show" && v === usual));
    const hash = new URLSearchParams(kept).toString();
    history.replaceState(null, "", `#${hash || "examples"}`);
    const focus = document.activeElement.closest?.(".chips") && state.show;
    draw();
    if (focus) chips.querySelector(`[value="${focus}"]`).focus();
  }

  function arrive() {
    const asked = read();
    draw();
    if (asked) document.getElementById("examples").scrollIntoView();
  }

  chips.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) go({ show: button.value });
  });
  form.elements.task.addEventListener("change", (event) => go({ task: event.target.value, set: "" }));
  form.elements.set.addEventListener("change", (event) => go({ set: event.target.value }));
  form.elements.q.addEventListener("input", (event) => go({ q: event.target.value }));
  form.addEventListener("submit", (event) => event.preventDefault());
  root.querySelector(".pager").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    go({ page: state.page + Number(button.dataset.go) });
    document.getElementById("examples").scrollIntoView();
  });
  window.addEventListener("hashchange", arrive);
  root.hidden = false;
  arrive();
}

const embedded = document.getElementById("data");
if (embedded) browse(JSON.parse(embedded.textContent), document.getElementById("browser"));
