// What every view is built of. Text reaches the page as text nodes alone: nothing that a model said is ever read as markup.

const HIDDEN = /[^\P{C}\n\t]|[\u2028\u2029]/gu;

/** Text with what a screen would hide or obey (controls, direction marks, lone halves of characters) written out. */
export function visible(value) {
  const text = value === null || value === undefined ? "" : String(value);
  return text.replace(HIDDEN, (one) => "\\u{" + one.codePointAt(0).toString(16) + "}");
}

/** An element. `attributes` that are functions listen to the event of that name; children that are no nodes become text. */
export function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(key, value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined)
    .map((child) => (child instanceof Node ? child : visible(child))));
  return node;
}

/** Answers of the server as objects. Throws an Error whose message is for people. */
export async function ask(path) {
  let answer;
  try {
    answer = await fetch(path);
  } catch {
    throw new Error("The server does not answer. Is `gemma-grpo watch` still running?");
  }
  if (answer.status === 403) throw new Error("The server was started anew with another token. Open the link that it printed.");
  if (!answer.ok) throw new Error((await answer.text()).trim() || `The server answered ${answer.status}.`);
  return answer.json();
}

export const runPath = (run, rest = "") => `/api/runs/${encodeURIComponent(run)}${rest}`;

export function number(value, digits = 3) {
  if (typeof value !== "number" || !Number.isFinite(value)) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en").replaceAll(",", "\u202f");
  const size = Math.abs(value);
  return size >= 1e-3 && size < 1e5 ? value.toFixed(digits) : value.toPrecision(3);
}

/** Seconds as 42 s, 12 min, 3.4 h, 2.1 d. */
export function duration(seconds) {
  if (typeof seconds !== "number" || !Number.isFinite(seconds)) return "–";
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 3600) return `${(seconds / 60).toFixed(0)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / 86400).toFixed(1)} d`;
}

/** A time since 1970 as this place's date and time, with its distance from now. */
export function when(seconds) {
  if (typeof seconds !== "number" || !seconds) return "–";
  const away = Date.now() / 1000 - seconds;
  return `${new Date(seconds * 1000).toLocaleString()} (${away < 5 ? "now" : `${duration(away)} ago`})`;
}

export function table(titles, rows) {
  const words = (cell) => cell instanceof HTMLTableCellElement && /left|words/.test(cell.className); // a title stands where its cells do
  const head = el("tr", {}, titles.map((title, place) => el("th", { scope: "col", class: place && !words(rows[0]?.[place]) ? null : "left" }, title)));
  const body = rows.map(([first, ...cells]) => el("tr", {}, el("th", { scope: "row" }, first),
    cells.map((cell) => (cell instanceof HTMLTableCellElement ? cell : el("td", {}, cell)))));
  return el("div", { class: "wide", tabindex: 0 }, el("table", {}, el("thead", {}, head), el("tbody", {}, body)));
}

const SVG = "http://www.w3.org/2000/svg";

/** A small line of numbers, without axes. */
export function spark(values, title) {
  const svg = document.createElementNS(SVG, "svg"), low = Math.min(...values), span = Math.max(...values) - low || 1;
  svg.setAttribute("viewBox", "0 0 100 24");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("class", "spark");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", title);
  const path = document.createElementNS(SVG, "path");
  const places = values.map((value, n) => `${values.length > 1 ? (100 * n) / (values.length - 1) : 50} ${22 - (20 * (value - low)) / span}`);
  path.setAttribute("d", places.length ? `M${places.join("L")}` : "");
  svg.append(path);
  return svg;
}

export function badge(run) {
  return el("span", { class: `badge ${run.status}`, title: run.status_text || null }, run.status);
}

export function verdict(found) {
  if (!found) return null;
  return el("section", { class: `verdict ${found.tone}` }, el("h2", { class: found.tone }, found.headline), el("p", {}, found.sentence),
    (found.further || []).map((line) => el("p", {}, line)), (found.warnings || []).map((line) => el("p", { class: "warning" }, line)));
}

/** The messages of a conversation; all but the last folded away. */
export function conversation(messages) {
  const turn = (message) => el("div", { class: "turn" }, el("b", {}, message.role), el("div", { class: "text" }, message.content));
  const earlier = messages.slice(0, -1);
  const folded = earlier.length ? el("details", {}, el("summary", {}, `${earlier.length} earlier turns`), earlier.map(turn)) : null;
  return el("div", {}, folded, messages.slice(-1).map(turn));
}

const STRONG = [0.1, 0.5, 1.5];

/** A reply's tokens, shaded by how much likelier training made each, in nats. */
export function shaded(tokens, ratios) {
  const spans = tokens.map((token, n) => {
    const level = STRONG.filter((bound) => Math.abs(ratios[n]) >= bound).length;
    return el("span", { class: level ? `${ratios[n] > 0 ? "up" : "down"}${level}` : null, title: `${ratios[n] >= 0 ? "+" : ""}${ratios[n].toFixed(2)} nat` }, token);
  });
  return el("div", { class: "text", tabindex: 0 }, spans);
}

export function failure(error) {
  return el("div", { class: "notice bad", role: "alert" }, error.message);
}
