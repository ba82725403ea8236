// The page: asks /v1/browse, shows what it says. No library; nothing is written into HTML as text.

const PAGE = 24, POLL = 2000, HISTORY = 60, STRIP = 400;
const $ = (id) => document.getElementById(id);
const TOKEN = `token ${location.pathname}`; // another service may be behind another path of the same origin
const state = { unit: 0, view: 0, first: 0, total: 0, units: [], chosen: null, last: null, rates: [], summary: null };
let listing = 0, looking = 0; // answers of an earlier choice are dropped

class Refused extends Error {}

async function ask(path, kind = "json") {
  const token = sessionStorage.getItem(TOKEN);
  const answer = await fetch(path, { headers: token ? { authorization: `Bearer ${token}` } : {}, cache: "no-store" });
  if (answer.ok) return kind === "json" ? answer.json() : answer.blob();
  const problem = await answer.json().catch(() => ({}));
  const text = problem.detail || `status ${answer.status}`;
  if (answer.status === 401 || answer.status === 403) throw new Refused(text);
  throw new Error(text);
}

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key in made && key !== "role") made[key] = value; else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

const whole = new Intl.NumberFormat("en");
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
function tail(key) { // keys differ at their end
  const letters = [...key];
  return letters.length > 9 ? `…${letters.slice(-8).join("")}` : key;
}
const percent = (part, of) => `${of ? Math.floor((1000 * part) / of) / 10 : 0} %`;
function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let at = 0;
  for (; bytes >= 1000 && at < units.length - 1; at++) bytes /= 1000;
  return `${bytes.toLocaleString("en", { maximumFractionDigits: at ? 1 : 0 })} ${units[at]}`;
}

function status(text, kind) { $("status").textContent = text; $("status").className = `pill ${kind}`; }

function failed(error) {
  if (error instanceof Refused) {
    const had = sessionStorage.getItem(TOKEN);
    sessionStorage.removeItem(TOKEN);
    $("token-form").hidden = false;
    $("main").hidden = true;
    $("token-note").textContent = had ? `Refused: ${error.message}` : "Kept in this tab until it is closed.";
    $("token-note").className = had ? "error" : "quiet";
    status("token needed", "bad");
    $("token").focus();
  } else status(error instanceof TypeError ? "out of reach" : error.message.slice(0, 60), "bad");
}

// Pictures come with the token, so not by their address alone.
const pictures = new Map();
async function picture(image, path) {
  try {
    if (!pictures.has(path)) pictures.set(path, ask(path, "blob").then((blob) => URL.createObjectURL(blob)));
    image.src = await pictures.get(path);
  } catch (error) {
    pictures.delete(path);
    image.alt = error.message;
    image.title = error.message;
  }
  for (const old of [...pictures.keys()].slice(0, Math.max(0, pictures.size - 300))) {
    pictures.get(old).then(URL.revokeObjectURL, () => {});
    pictures.delete(old);
  }
}

const rowPath = (row) => `v1/browse/units/${row.unit}/views/${row.view}/rows/${row.position}`;

function showSummary(summary) {
  state.summary = summary;
  $("teacher").textContent = summary.teacher;
  $("tile-computed").hidden = !summary.live;
  const facts = {
    "rows": `${whole.format(summary.rows)} of ${whole.format(summary.of_rows)}`,
    "samples": `${whole.format(summary.samples)} in ${whole.format(summary.units)} tars`,
    "size": `${size(summary.bytes)} in ${whole.format(summary.objects)} objects`,
    "views": summary.views,
    ...Object.fromEntries(Object.entries(summary.taps).map(([name, text]) => [`tap ${name}`, text])),
    "logits": summary.classes ? `${whole.format(summary.classes)} classes, ${summary.logits}` : "none",
    "teacher input": `${summary.input_size[0]} x ${summary.input_size[1]} pixels`,
    "quarantined": whole.format(summary.quarantined),
    "live teacher": summary.live ? "computes on request" : "not loaded",
    "licence": summary.licence || "not stated",
    "weights": summary.weights.slice(0, 16),
    "fingerprint": summary.fingerprint.slice(0, 16),
  };
  $("store").replaceChildren(...Object.entries(facts).map(([name, text]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, text))));
  const views = [...Array(summary.num_views).keys()];
  if ($("view").options.length !== views.length) {
    $("view").replaceChildren(...views.map((view) => element("option", { value: String(view) }, String(view))));
    state.view = Math.min(state.view, views.length - 1);
    $("view").value = String(state.view);
  }
}

async function allUnits() {
  const units = [];
  for (let total = 1; units.length < total;) {
    const answer = await ask(`v1/browse/units?first=${units.length}&count=500`);
    if (!answer.units.length) break;
    units.push(...answer.units);
    total = answer.total;
  }
  return units;
}

const shownViews = () => JSON.stringify([state.unit, state.units.find((unit) => unit.unit === state.unit)?.views]);

// Whether the samples shown are others by now.
function showUnits(units) {
  const before = shownViews(), each = Math.max(1, Math.ceil(units.length / STRIP)); // tars of a square
  state.units = units;
  const squares = Array.from({ length: Math.ceil(units.length / each) }, (_, at) => units.slice(at * each, (at + 1) * each));
  $("strip").replaceChildren(...squares.map((some) => element("i", {
    className: some.every((unit) => unit.views.length === state.summary.num_views) ? "all" : some.some((unit) => unit.views.length) ? "some" : "",
  })));
  const options = units.map((unit) => element("option", { value: String(unit.unit), disabled: !unit.views.length },
    unit.views.length ? unit.tar : `${unit.tar} (not yet)`));
  $("unit").replaceChildren(...options);
  if (!units.find((unit) => unit.unit === state.unit)?.views.length) {
    state.unit = units.find((unit) => unit.views.length)?.unit ?? 0;
    state.first = 0;
  }
  $("unit").value = String(state.unit);
  return shownViews() !== before;
}

function showActivity(now) {
  $("progress").max = Math.max(1, now.of_committed);
  $("progress").value = now.committed;
  $("progress-number").textContent = percent(now.committed, now.of_committed);
  const rate = commitRate(now);
  const left = now.of_committed - now.committed;
  $("progress-text").textContent = `${whole.format(now.committed)} of ${whole.format(now.of_committed)} tar views committed`
    + (left && rate > 0 ? `, about ${duration(left / rate)} left` : "");
  const last = state.last;
  state.last = now;
  if (!last || now.seconds <= last.seconds) return;
  const per = (name) => Math.max(0, now[name] - last[name]) / (now.seconds - last.seconds);
  $("rate-rows").textContent = short.format(per("rows"));
  $("rate-bytes").textContent = short.format(per("bytes") / 1e6);
  $("rate-requests").textContent = short.format(per("requests"));
  $("rate-computed").textContent = short.format(per("computed"));
  state.rates = [...state.rates, per("rows")].slice(-HISTORY);
  const top = Math.max(...state.rates, 1);
  const points = state.rates.map((rate, at) => `${(120 * (at + HISTORY - state.rates.length)) / (HISTORY - 1)},${27 - (25 * rate) / top}`);
  $("spark").firstElementChild.setAttribute("points", points.join(" "));
}

let begun = null;
function commitRate(now) {
  if (!begun || now.committed < begun.committed) begun = now;
  return (now.committed - begun.committed) / Math.max(1, now.seconds - begun.seconds);
}
function duration(seconds) {
  return seconds < 90 ? `${Math.ceil(seconds)} s` : seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function labelText(label) {
  return label < 0 ? "no label" : `label ${label}`;
}

function tile(row, key, note, choose) {
  const image = element("img", { className: "map", alt: "", loading: "lazy" });
  picture(image, `${rowPath(row)}/map.png`);
  const button = element("button", { type: "button", title: key, "aria-label": `${key}, ${note}`, "aria-pressed": "false" },
    image, element("span", { className: "name" }, tail(key)), element("span", { className: "quiet" }, note));
  button.addEventListener("click", choose);
  return element("li", {}, button);
}

async function showSamples() {
  const mine = ++listing;
  if (!state.units.some((unit) => unit.views.length)) {
    $("grid").replaceChildren(element("li", { className: "quiet" }, "Nothing is committed yet."));
    $("range").textContent = "";
    $("previous").disabled = $("next").disabled = true;
    return;
  }
  const answer = await ask(`v1/browse/units/${state.unit}/samples?first=${state.first}&count=${PAGE}`);
  if (mine !== listing) return;
  state.total = answer.total;
  const last = Math.min(state.first + PAGE, answer.total);
  $("range").textContent = `${whole.format(state.first + 1)}–${whole.format(last)} of ${whole.format(answer.total)}`;
  $("previous").disabled = state.first === 0;
  $("next").disabled = last >= answer.total;
  const committed = state.units.find((unit) => unit.unit === state.unit).views.includes(state.view);
  $("grid").replaceChildren(...answer.samples.map((sample) => {
    const row = { unit: state.unit, view: state.view, position: sample.position };
    if (!sample.quarantined && committed) return tile(row, sample.key, labelText(sample.label), () => choose(row));
    return element("li", {}, element("button", { type: "button", disabled: true, title: sample.key },
      element("span", { className: "blank" }, sample.quarantined ? "quarantined" : "not yet"),
      element("span", { className: "name" }, tail(sample.key)), element("span", { className: "quiet" }, labelText(sample.label))));
  }));
  mark();
}

function mark() {
  const chosen = state.chosen;
  for (const [at, button] of [...$("grid").querySelectorAll("button")].entries()) {
    const here = chosen && chosen.unit === state.unit && chosen.view === state.view && chosen.position === state.first + at;
    button.setAttribute("aria-pressed", String(Boolean(here)));
  }
}

async function choose(row) {
  const mine = ++looking;
  state.chosen = row;
  mark();
  const found = await ask(rowPath(row)).catch((error) => error);
  if (mine !== looking) return;
  if (found instanceof Error) {
    $("detail").replaceChildren(element("p", { className: "error" }, found.message));
    return found instanceof Refused ? failed(found) : undefined;
  }
  const figures = [];
  if (matchMedia("(max-width: 46rem)").matches) $("samples").scrollIntoView({ block: "start" });
  if (state.summary.pixels) figures.push(figure(`${rowPath(row)}/view.png`, "view", `View ${row.view} of ${found.key}`, ""));
  figures.push(figure(`${rowPath(row)}/map.png`, "features", `Feature colours of ${found.key}`, "map"));
  const classes = found.classes.map((each) => element("li", {},
    element("span", {}, `class ${each.label}${each.label === found.label ? " ✓" : ""}`),
    element("progress", { value: each.probability, max: 1, "aria-label": `probability of class ${each.label}` }),
    element("span", {}, `${(100 * each.probability).toFixed(1)} %`)));
  const near = element("ul", { className: "grid near", "aria-label": "Nearest neighbours" }, ...found.neighbours.map((each) =>
    tile(each, each.key, each.similarity.toFixed(3), () => choose({ unit: each.unit, view: each.view, position: each.position }))));
  $("detail").replaceChildren(
    element("p", {}, element("strong", {}, found.key)),
    element("p", { className: "quiet" }, `${found.tar}, position ${found.position}, view ${found.view}, label ${found.label}`),
    element("div", { className: "pictures" }, ...figures),
    ...(classes.length ? [element("h3", {}, "Predicted classes"), element("ul", { className: "classes" }, ...classes)] : []),
    ...(found.neighbours.length ? [element("h3", {}, "Nearest by pooled features, in a sample of rows"), near] : []));
}

function figure(path, caption, alt, className) {
  const image = element("img", { alt, className });
  picture(image, path);
  return element("figure", {}, image, element("figcaption", {}, caption));
}

async function showQuarantine() {
  const found = await ask("v1/browse/quarantine?count=200");
  if (!found.total) return $("quarantine").replaceChildren(element("p", { className: "quiet" }, "None: every sample could be used."));
  const columns = ["tar", "position", "key", "reason"];
  const head = element("tr", {}, ...columns.map((name) => element("th", { scope: "col" }, name)));
  const rows = found.samples.map((each) => element("tr", {}, ...columns.map((name) =>
    element("td", { "data-name": name }, String(each[name])))));
  const more = found.total > found.samples.length ? ` (the first ${found.samples.length} are shown)` : "";
  $("quarantine").replaceChildren(element("p", { className: "quiet" }, `${whole.format(found.total)} samples${more}`),
    element("div", { className: "scroll" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows))));
}

async function open() {
  showSummary(await ask("v1/browse/summary"));
  showUnits(await allUnits());
  $("token-form").hidden = true;
  $("main").hidden = false;
  await Promise.all([showSamples(), showQuarantine()]);
}

let opened = false, known = "";
async function tick() {
  try {
    if (!document.hidden) {
      const now = await ask("v1/browse/activity");
      const held = `${now.committed} of ${now.of_committed}`;
      if (!opened) { await open(); opened = true; } else if (held !== known) {
        showSummary(await ask("v1/browse/summary"));
        const others = showUnits(await allUnits());
        await Promise.all([showQuarantine(), others ? showSamples() : undefined]);
      }
      known = held;
      showActivity(now);
      status(now.committed === now.of_committed ? "complete" : commitRate(now) > 0 ? "growing" : "incomplete", "good");
    }
  } catch (error) {
    failed(error);
    if (error instanceof Refused) { opened = false; return; } // the form goes on
  }
  setTimeout(tick, POLL);
}

const reload = () => showSamples().catch(failed);
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, $("token").value.trim());
  $("token").value = "";
  tick();
});
$("unit").addEventListener("change", () => { state.unit = Number($("unit").value); state.first = 0; reload(); });
$("view").addEventListener("change", () => { state.view = Number($("view").value); reload(); });
$("previous").addEventListener("click", () => { state.first = Math.max(0, state.first - PAGE); reload(); });
$("next").addEventListener("click", () => { state.first += PAGE; reload(); });
$("grid").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columnsOf($("grid")), ArrowUp: -columnsOf($("grid")) }[event.key];
  if (!step) return;
  const buttons = [...$("grid").querySelectorAll("button:enabled")];
  const to = buttons[buttons.indexOf(document.activeElement) + step];
  if (to) { to.focus(); event.preventDefault(); }
});
const columnsOf = (grid) => getComputedStyle(grid).gridTemplateColumns.split(" ").length;
tick();
