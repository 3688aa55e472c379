// The results explorer: quality of a method's start against its cost, as a picture and as a table.
// The page holds the data (#explorer-data, by .ci/explorer.py); nothing is fetched. Without modules, so that the page
// also works when it is opened from a folder.
(function () {
  "use strict";

  const SVG = "http://www.w3.org/2000/svg";
  const TICKS = [1, 2, 5]; // of each power of 10
  const MORE_TICKS = [1, 1.5, 2, 3, 4, 5, 6, 8]; // where the picture spans less than one
  const COLUMNS = [
    { name: "method", title: "Method", of: (row) => row.method },
    { name: "kind", title: "Kind", of: (row) => row.kind },
    { name: "error", title: "Error", of: (row) => row.error, digits: 3 },
    { name: "published", title: "as published", of: (row) => row.published, digits: 3 },
    { name: "fitted", title: "fitted", of: (row) => row.fitted, digits: 3 },
    { name: "time_over_sdpa", title: "Time / SDPA's", of: (row) => row.time, digits: 2 },
    { name: "milliseconds", title: "ms", of: (row) => row.milliseconds, digits: 1 },
    { name: "megabytes", title: "MB", of: (row) => row.megabytes, digits: 1 },
    { name: "pareto", title: "On the line", of: (row) => (row.front ? "yes" : "") },
    { name: "note", title: "Note", of: (row) => row.note },
  ];
  const SHAPES = [
    (r) => `M${-r},0A${r},${r} 0 1 0 ${r},0A${r},${r} 0 1 0 ${-r},0Z`,
    (r) => `M${-r * 0.88},${-r * 0.88}H${r * 0.88}V${r * 0.88}H${-r * 0.88}Z`,
    (r) => `M0,${-r * 1.15}L${r * 1.1},${r * 0.8}H${-r * 1.1}Z`,
    (r) => `M0,${-r * 1.25}L${r * 1.25},0L0,${r * 1.25}L${-r * 1.25},0Z`,
    (r) => `M0,${r * 1.15}L${r * 1.1},${-r * 0.8}H${-r * 1.1}Z`,
    (r) => `M${-r * 0.4},${-r * 1.15}H${r * 0.4}V${-r * 0.4}H${r * 1.15}V${r * 0.4}H${r * 0.4}V${r * 1.15}H${-r * 0.4}V${r * 0.4}H${-r * 1.15}V${-r * 0.4}H${-r * 0.4}Z`,
    (r) => `M0,${-r * 1.4}L${r * 0.4},${-r * 0.4}L${r * 1.4},0L${r * 0.4},${r * 0.4}L0,${r * 1.4}L${-r * 0.4},${r * 0.4}L${-r * 1.4},0L${-r * 0.4},${-r * 0.4}Z`,
  ];

  function byId(name) {
    return document.getElementById("explorer-" + name);
  }

  function element(name, attributes, parent, text) {
    const made = document.createElement(name);
    return filled(made, attributes, parent, text);
  }

  function drawn(name, attributes, parent, text) {
    return filled(document.createElementNS(SVG, name), attributes, parent, text);
  }

  function filled(made, attributes, parent, text) {
    for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.appendChild(made);
    return made;
  }

  function spelled(value, digits) {
    return value === undefined || value === null ? "–" : value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  }

  function tokens(length) {
    return length.toLocaleString("en-US");
  }

  // ---------------------------------------------------------------------------------------------------------------
  // Rows: what the choices select
  // ---------------------------------------------------------------------------------------------------------------

  // The length whose errors stand beside costs at `length`: the same, or the longest measured one below it.
  function lengthOfErrors(checkpoint, length) {
    const below = checkpoint.lengths.filter((each) => each <= length);
    return below.length ? Math.max(...below) : Math.min(...checkpoint.lengths);
  }

  function selectedRows(data, choice) {
    const { checkpoint, measurement, mode, length } = choice;
    const measured = measurement.rows.filter((row) => row.mode === mode && row.length === length);
    const at = lengthOfErrors(checkpoint, length);
    const rows = measured.map((cost) => withError(data, checkpoint, cost, at));
    const sdpa = measured.find((row) => row.sdpa_seconds !== undefined);
    if (sdpa) {
      const base = { method: "softmax", key: null, kind: "softmax", error: 0, time: 1, note: "scaled_dot_product_attention" };
      rows.push({ ...base, milliseconds: 1000 * sdpa.sdpa_seconds, megabytes: sdpa.sdpa_peak_mb });
    }
    return rows;
  }

  function withError(data, checkpoint, cost, at) {
    const method = data.methods[cost.key];
    const start = cost.start === null ? undefined : checkpoint.starts[cost.start];
    const errors = start && start.errors[at];
    const notes = [];
    if (cost.why) notes.push("cost: " + cost.why);
    else if (cost.ratio === undefined) notes.push("softmax was not run at this length");
    if (!cost.why && !errors) notes.push(cost.start === null ? "start: not measured with these options" : `start: not measured at ${tokens(at)} tokens`);
    const row = { method: cost.method, key: cost.key, kind: method.kind, title: method.title, note: notes.join("; ") };
    if (errors) {
      row.error = errors.calibrated === undefined ? errors.published : errors.calibrated;
      row.published = errors.published;
      row.fitted = errors.regressed;
      row.spread = errors.spread;
    }
    if (cost.ratio !== undefined) row.time = 1 / cost.ratio;
    if (cost.seconds !== undefined) {
      row.milliseconds = 1000 * cost.seconds;
      row.megabytes = cost.megabytes;
    }
    return row;
  }

  // Marks the rows that no other one beats in error and time, and returns them from fast to slow.
  function paretoFront(rows) {
    const points = rows.filter((row) => row.error !== undefined && row.time !== undefined);
    points.sort((a, b) => a.time - b.time || a.error - b.error);
    let least = Infinity;
    const front = [];
    for (const row of points) {
      row.front = row.error < least;
      if (row.front) {
        least = row.error;
        front.push(row);
      }
    }
    return { points, front };
  }

  // ---------------------------------------------------------------------------------------------------------------
  // Choices
  // ---------------------------------------------------------------------------------------------------------------

  // Fills a select and keeps what was chosen where it is still there; returns the chosen value.
  function offer(name, options, preferred) {
    const select = byId(name);
    const before = select.value;
    select.replaceChildren(...options.map(({ value, text, disabled }) => {
      const option = element("option", { value }, null, text);
      option.disabled = Boolean(disabled);
      return option;
    }));
    const allowed = options.filter((option) => !option.disabled).map((option) => String(option.value));
    select.value = [before, String(preferred), allowed[0]].find((value) => allowed.includes(value));
    return select.value;
  }

  function distinct(values) {
    return [...new Set(values)];
  }

  function readChoice(data) {
    const names = data.checkpoints.map(({ name, side }) => ({ value: name, text: `${name} (${side})` }));
    const chosen = offer("checkpoint", names);
    const checkpoint = data.checkpoints.find(({ name }) => name === chosen);
    const fits = data.measurements.filter((each) => each.side === checkpoint.side && [null, chosen].includes(each.checkpoint));
    const measuredOn = distinct(fits.map((each) => each.device));
    const devices = [["cpu", "CPU"], ["cuda", "GPU"]].map(([value, text]) => {
      const there = measuredOn.includes(value);
      return { value, text: there ? text : `${text} (not measured yet)`, disabled: !there };
    });
    const device = offer("device", devices);
    const here = fits.filter((each) => each.device === device);
    const measurement = here[Number(offer("measurement", here.map((each, value) => ({ value, text: each.name }))))];
    const modes = distinct(measurement.rows.map((row) => row.mode));
    const mode = offer("mode", modes.map((value) => ({ value, text: data.modes[value] })));
    const lengths = distinct(measurement.rows.filter((row) => row.mode === mode).map((row) => row.length)).sort((a, b) => a - b);
    const length = Number(offer("length", lengths.map((value) => ({ value, text: tokens(value) })), 2048));
    return { checkpoint, device, measurement, mode, length };
  }

  function offerKinds(data, kinds, redraw) {
    kinds.forEach((kind, index) => {
      const label = element("label", { title: data.kinds[kind] ? `A token reads ${data.kinds[kind]}.` : "" }, byId("kinds"));
      element("input", { type: "checkbox", checked: "", value: kind }, label).addEventListener("change", redraw);
      const icon = drawn("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true" }, label);
      drawn("path", { d: SHAPES[index % SHAPES.length](5), style: `fill:var(--kind-${index})` }, icon);
      label.append(kind);
    });
  }

  function shownKinds() {
    return [...byId("kinds").querySelectorAll("input:checked")].map((input) => input.value);
  }

  // ---------------------------------------------------------------------------------------------------------------
  // Picture
  // ---------------------------------------------------------------------------------------------------------------

  function draw(view, kinds) {
    const { points, front, uniform, errorLength } = view;
    const plot = byId("plot");
    if (!points.length) {
      plot.replaceChildren();
      element("p", { class: "explorer-empty" }, plot, "Nothing to draw: softmax attention was not run at this length. Times and memory are in the table.");
      return;
    }
    const width = Math.max(280, plot.clientWidth);
    const height = Math.min(460, Math.max(300, 0.6 * width));
    const box = { left: 44, right: width - 12, top: 14, bottom: height - 42 };
    const times = points.map((row) => row.time);
    const low = Math.log(Math.min(1, ...times) / 1.15);
    const high = Math.log(Math.max(1, ...times) * 1.15);
    const tallest = 1.06 * Math.max(0.5, uniform || 0, ...points.map((row) => row.error));
    const x = (time) => box.left + ((Math.log(time) - low) / (high - low)) * (box.right - box.left);
    const y = (error) => box.bottom - (error / tallest) * (box.bottom - box.top);
    plot.replaceChildren();
    const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "group", "aria-label": "Error against time, one point a method" }, plot);

    for (let error = 0; error <= tallest; error += 0.2) {
      drawn("line", { class: "grid", x1: box.left, x2: box.right, y1: y(error), y2: y(error) }, svg);
      drawn("text", { class: "quiet", x: box.left - 6, y: y(error) + 4, "text-anchor": "end" }, svg, error.toFixed(1));
    }
    for (const time of ticks(low, high)) {
      drawn("line", { class: time === 1 ? "axis" : "grid", x1: x(time), x2: x(time), y1: box.top, y2: box.bottom }, svg);
      drawn("text", { class: "quiet", x: x(time), y: box.bottom + 16, "text-anchor": "middle" }, svg, String(time));
    }
    drawn("text", { class: "quiet", x: (box.left + box.right) / 2, y: height - 8, "text-anchor": "middle" }, svg, "← faster · time over SDPA's · slower →");
    const middle = (box.top + box.bottom) / 2;
    const upright = { class: "quiet", x: 11, y: middle, "text-anchor": "middle", transform: `rotate(-90 11 ${middle})` };
    drawn("text", upright, svg, `error at ${tokens(errorLength)} tokens`);
    if (uniform !== undefined) {
      drawn("line", { class: "uniform", x1: box.left, x2: box.right, y1: y(uniform), y2: y(uniform) }, svg);
      drawn("text", { class: "quiet", x: box.right, y: y(uniform) - 4, "text-anchor": "end" }, svg, "uniform attention");
    }
    const steps = front.map((row) => [x(row.time), y(row.error)]);
    if (steps.length > 1) drawn("path", { class: "front", d: "M" + steps.map((place) => place.join(",")).join("L") }, svg);

    const note = element("div", { class: "explorer-note", hidden: "" }, plot);
    const anchors = points.map((row) => {
      const place = [x(row.time), y(row.error)];
      const index = kinds.indexOf(row.kind);
      const attributes = { transform: `translate(${place})`, tabindex: -1, "aria-label": sentence(row) };
      const anchor = drawn("a", row.key === null ? { ...attributes, class: "softmax" } : { ...attributes, href: page(row) }, svg);
      if (row.key === null) anchor.setAttribute("role", "img");
      drawn("circle", { class: "ring", r: 10, "pointer-events": "all" }, anchor);
      drawn("path", { class: "mark", d: SHAPES[index < 0 ? 6 : index % SHAPES.length](row.front ? 6.5 : 5), style: index < 0 ? "" : `fill:var(--kind-${index})` }, anchor);
      anchor.row = row;
      anchor.place = place;
      return anchor;
    });
    label(svg, front, x, y, box, points);
    listen(anchors, note, width);
  }

  // Times between two logarithms at which the axis has a number.
  function ticks(low, high) {
    const steps = high - low < Math.log(10) ? MORE_TICKS : TICKS;
    const powers = [-3, -2, -1, 0, 1, 2, 3];
    const times = powers.flatMap((power) => steps.map((step) => Number((step * 10 ** power).toPrecision(2))));
    return times.filter((time) => Math.log(time) >= low && Math.log(time) <= high);
  }

  function page(row) {
    return `methods/${row.key}.html`;
  }

  function sentence(row) {
    const line = row.front ? "; on the line" : "";
    return `${row.method}: error ${spelled(row.error, 3)}, ${spelled(row.time, 2)} of SDPA's time${line}`;
  }

  // Names beside the points of the line, where they cover neither a point nor one another.
  function label(svg, front, x, y, box, points) {
    const taken = points.map((row) => ({ left: x(row.time) - 7, right: x(row.time) + 7, top: y(row.error) - 7, bottom: y(row.error) + 7 }));
    for (const row of front) {
      const text = row.key === null ? "softmax" : row.key;
      const [px, py, wide] = [x(row.time), y(row.error), 6.2 * text.length];
      for (const [dx, dy, anchor] of [[10, 4, "start"], [-10, 4, "end"], [0, -11, "middle"], [0, 19, "middle"], [9, -9, "start"], [-9, 17, "end"]]) {
        const left = px + dx - (anchor === "end" ? wide : anchor === "middle" ? wide / 2 : 0);
        const space = { left, right: left + wide, top: py + dy - 9, bottom: py + dy + 3 };
        const covers = (other) => space.left < other.right && other.left < space.right && space.top < other.bottom && other.top < space.bottom;
        if (space.left < box.left || space.right > box.right + 8 || taken.some(covers)) continue;
        taken.push(space);
        drawn("text", { class: "label", x: px + dx, y: py + dy, "text-anchor": anchor, "aria-hidden": "true" }, svg, text);
        break;
      }
    }
  }

  // Notes by pointer and by keyboard: one point at a time is a stop of Tab, arrows go on from there.
  function listen(anchors, note, width) {
    let current = null;
    const show = (anchor) => {
      if (current) current.classList.remove("current");
      current = anchor;
      note.hidden = !anchor;
      if (!anchor) return;
      anchor.classList.add("current");
      describe(note, anchor.row);
      const [px, py] = anchor.place;
      note.style.left = Math.min(Math.max(0, px - note.offsetWidth / 2), width - note.offsetWidth) + "px";
      const above = py - note.offsetHeight - 14;
      note.style.top = (above < -60 ? py + 14 : above) + "px";
    };
    const go = (index) => {
      const target = anchors[Math.min(Math.max(0, index), anchors.length - 1)];
      anchors.forEach((anchor) => anchor.setAttribute("tabindex", anchor === target ? 0 : -1));
      target.focus();
    };
    anchors[0].setAttribute("tabindex", 0);
    anchors.forEach((anchor, index) => {
      let touched = false;
      anchor.addEventListener("pointerdown", (event) => { touched = event.pointerType === "touch" && current !== anchor; });
      anchor.addEventListener("click", (event) => { if (touched) event.preventDefault(); show(anchor); });
      anchor.addEventListener("pointerenter", (event) => { if (event.pointerType !== "touch") show(anchor); });
      anchor.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") show(null); });
      anchor.addEventListener("focus", () => { if (!touched) show(anchor); });
      anchor.addEventListener("blur", () => show(null));
      anchor.addEventListener("keydown", (event) => {
        const target = { ArrowRight: index + 1, ArrowDown: index + 1, ArrowLeft: index - 1, ArrowUp: index - 1, Home: 0, End: anchors.length - 1 }[event.key];
        if (event.key === "Escape") show(null);
        if (target === undefined) return;
        event.preventDefault();
        go(target);
      });
    });
  }

  function describe(note, row) {
    note.replaceChildren();
    element("b", {}, note, row.method);
    const spread = row.spread ? ` ± ${spelled(row.spread, 3)}` : "";
    const lines = [row.title, row.kind === "softmax" ? row.note : row.kind, `error ${spelled(row.error, 3)}${spread}` + (row.published > row.error ? `, as published ${spelled(row.published, 3)}` : "")];
    if (row.fitted !== undefined) lines.push(`fitted ${spelled(row.fitted, 3)}`);
    lines.push(`${spelled(row.time, 2)} of SDPA's time: ${spelled(1 / row.time, 2)}x as fast`);
    lines.push(`${spelled(row.milliseconds, 1)} ms` + (row.megabytes === undefined ? "" : `, ${spelled(row.megabytes, 1)} MB`));
    lines.filter(Boolean).forEach((line) => element("div", {}, note, line));
  }

  // ---------------------------------------------------------------------------------------------------------------
  // Table
  // ---------------------------------------------------------------------------------------------------------------

  // Sorted by a column; what has no value there comes last, in either direction.
  function sorted(rows, sort) {
    const { of } = COLUMNS.find((column) => column.name === sort.column);
    const empty = (value) => value === undefined || value === null || value === "";
    return [...rows].sort((a, b) => {
      const [p, q] = [of(a), of(b)];
      if (empty(p) || empty(q)) return empty(p) - empty(q);
      const order = typeof p === "number" ? p - q : p.localeCompare(q);
      return sort.descending ? -order : order;
    });
  }

  function tabulate(rows, sort, redraw) {
    const table = byId("table");
    const columns = COLUMNS.filter(({ of }) => rows.some((row) => ![undefined, null, ""].includes(of(row))));
    const focused = document.activeElement && document.activeElement.dataset.column;
    table.replaceChildren();
    const head = element("tr", {}, element("thead", {}, table));
    for (const { name, title, digits } of columns) {
      const direction = sort.column !== name ? "none" : sort.descending ? "descending" : "ascending";
      const cell = element("th", { scope: "col", "aria-sort": direction, class: digits === undefined ? "" : "number" }, head);
      const button = element("button", { type: "button", "data-column": name }, cell, title);
      button.addEventListener("click", () => {
        sort.descending = sort.column === name && !sort.descending;
        sort.column = name;
        redraw();
      });
      if (focused === name) button.focus();
    }
    const body = element("tbody", {}, table);
    for (const row of sorted(rows, sort)) {
      const line = element("tr", row.front ? { class: "front" } : {}, body);
      for (const { name, of, digits } of columns) {
        const value = of(row);
        const cell = element("td", digits === undefined ? {} : { class: "number" }, line);
        if (name === "method" && row.key !== null) element("a", { href: page(row) }, cell, value);
        else cell.textContent = digits === undefined ? value || "" : spelled(value, digits);
      }
    }
  }

  function csv(rows, sort, choice) {
    const { checkpoint, device, measurement, mode, length } = choice;
    const context = { checkpoint: checkpoint.name, device, cost_of: measurement.name, pass: mode, tokens: length, error_at: lengthOfErrors(checkpoint, length) };
    const quoted = (value) => (/[",\n]/.test(value) ? `"${value.replace(/"/g, '""')}"` : value);
    const line = (values) => values.map((value) => quoted(value === undefined || value === null ? "" : String(value))).join(",");
    const lines = sorted(rows, sort).map((row) => line([...Object.values(context), ...COLUMNS.map(({ of }) => of(row))]));
    return [line([...Object.keys(context), ...COLUMNS.map(({ name }) => name)]), ...lines].join("\r\n") + "\r\n";
  }

  function download(text, name) {
    const address = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    element("a", { href: address, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  }

  // ---------------------------------------------------------------------------------------------------------------

  function start() {
    const data = JSON.parse(document.getElementById("explorer-data").textContent);
    const kinds = distinct([...Object.keys(data.kinds), ...Object.values(data.methods).map((method) => method.kind)]);
    const sort = { column: "error", descending: false };
    let rows = [];
    let choice = null;

    function redraw() {
      choice = readChoice(data);
      const shown = shownKinds();
      rows = selectedRows(data, choice).filter((row) => row.key === null || shown.includes(row.kind));
      const errorLength = lengthOfErrors(choice.checkpoint, choice.length);
      const uniform = choice.checkpoint.starts["uniform attention"];
      const yardstick = uniform && uniform.errors[errorLength] && uniform.errors[errorLength].published;
      const { points, front } = paretoFront(rows);
      draw({ points, front, uniform: yardstick, errorLength }, kinds);
      tabulate(rows, sort, redraw);
      const [inPicture, inTable] = [points, rows].map((each) => each.filter((row) => row.key !== null).length);
      byId("count").textContent = `${inPicture} methods in the picture, ${inTable} in the table`;
      byId("about").textContent = `Cost: ${choice.measurement.about}. Made by ${choice.measurement.command}. Errors: ${choice.checkpoint.name}, at ${tokens(errorLength)} tokens.`;
    }

    offerKinds(data, kinds, redraw);
    ["checkpoint", "device", "measurement", "mode", "length"].forEach((name) => byId(name).addEventListener("change", redraw));
    byId("csv").addEventListener("click", () => {
      const name = [choice.checkpoint.name, choice.mode, choice.length].join("_");
      download(csv(rows, sort, choice), `hf_linear_attn_${name}.csv`);
    });
    let width = 0;
    new ResizeObserver(([entry]) => {
      if (Math.abs(entry.contentRect.width - width) < 1) return;
      width = entry.contentRect.width;
      redraw();
    }).observe(byId("plot"));
    redraw();
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
