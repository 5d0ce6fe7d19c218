// Charts that the server draws, brought up to date one after the other, with their numbers under the pointer or the arrow keys.

import { ask, el, number } from "./parts.js";

const EVERY = 1000;

/** Fetches a drawing as a document of its own, which no security policy needs to trust, and what it is a drawing of. */
function fetchDrawing(path) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("GET", path);
    request.responseType = "document";
    request.overrideMimeType("image/svg+xml");
    request.onload = () => (request.status === 200 && request.responseXML
      ? resolve([document.adoptNode(request.responseXML.documentElement), request.getResponseHeader("etag")])
      : reject(new Error("This chart could not be drawn.")));
    request.onerror = () => reject(new Error("The server does not answer."));
    request.send();
  });
}

/** The charts of some runs together. `version()` says what the newest drawing would be a drawing of. */
export class Charts {
  constructor(runs, version) {
    this.query = runs.map((run) => `run=${encodeURIComponent(run)}`).join("&");
    this.version = version;
    this.node = el("div", { class: "charts" });
    this.cards = new Map();
    this.seen = new IntersectionObserver((entries) => entries.forEach((entry) => { entry.target.inView = entry.isIntersecting; }));
    this.timer = setInterval(() => this.refresh(), EVERY);
  }

  close() {
    clearInterval(this.timer);
    this.seen.disconnect();
  }

  /** Make cards for panels that were not there before. */
  async load() {
    const { panels } = await ask(`/api/panels?${this.query}`);
    for (const panel of panels) if (!this.cards.has(panel.key)) this.add(panel);
    if (!panels.length && !this.cards.size) this.node.replaceChildren(el("p", { class: "soft" }, "No step has been made yet; the curves come with the first."));
    else if (panels.length) [...this.node.children].filter((child) => child.tagName === "P").forEach((child) => child.remove());
    return this.refresh();
  }

  add(panel) {
    const drawing = el("div", { class: "drawing" });
    const readout = el("div", { class: "readout", "aria-live": "polite" });
    const figure = el("figure", { tabindex: 0, "aria-label": `${panel.title}; arrow keys read its values` }, el("h3", {}, panel.title), drawing, readout, el("figcaption", {}, panel.caption));
    const card = { panel, figure, drawing, readout, version: null, place: null };
    figure.addEventListener("keydown", (event) => this.step(card, event));
    figure.inView = true;
    this.cards.set(panel.key, card);
    this.node.append(figure);
    this.seen.observe(figure);
  }

  /** Draw those in view that are behind: all that were never drawn, and then the one that has waited longest. */
  async refresh() {
    if (this.busy || document.hidden) return;
    this.busy = true;
    try {
      const behind = [...this.cards.values()].filter((card) => card.figure.inView && card.version !== this.version());
      const owed = behind.filter((card) => card.version === null);
      for (const card of owed.length ? owed : behind.sort((a, b) => (a.at || 0) - (b.at || 0)).slice(0, 1)) await this.draw(card);
    } finally {
      this.busy = false;
    }
  }

  async draw(card) {
    card.at = Date.now();
    try {
      const [svg, etag] = await fetchDrawing(`/api/chart?${this.query}&key=${encodeURIComponent(card.panel.key)}`);
      card.version = etag ? etag.replaceAll('"', "") : "";
      card.told = JSON.parse(svg.getAttribute("data-hover") || "null");
      svg.removeAttribute("data-hover");
      for (const kind of ["pointermove", "pointerdown"]) svg.addEventListener(kind, (event) => this.point(card, event));
      svg.addEventListener("pointerleave", (event) => (event.pointerType === "touch" ? null : this.leave(card))); // a finger's value stays
      card.drawing.replaceChildren(svg);
      if (card.place !== null) this.read(card, card.place);
    } catch (error) {
      card.readout.textContent = error.message;
    }
  }

  point(card, event) {
    const svg = card.drawing.firstChild, frame = svg.getBoundingClientRect(), width = svg.viewBox.baseVal.width;
    const [left, , right] = card.told.box, [low, high] = card.told.limits;
    this.read(card, low + ((((event.clientX - frame.left) / frame.width) * width - left) / (right - left)) * (high - low));
  }

  step(card, event) {
    const way = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (!way || !card.told) return;
    event.preventDefault();
    const all = [...new Set(card.told.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    const now = card.place === null ? all.length - 1 : Math.max(0, all.findIndex((x) => x >= card.place));
    const next = card.place === null && Number.isFinite(way) ? now : Math.min(all.length - 1, Math.max(0, now + way));
    this.read(card, all[next]);
  }

  /** Show every line's number nearest to a place on the x axis. */
  read(card, place) {
    const told = [];
    let nearest = null;
    for (const line of card.told.lines) {
      const known = line.x.map((x, n) => n).filter((n) => line.y[n] !== null);
      if (!known.length) continue;
      const at = known.reduce((best, n) => (Math.abs(line.x[n] - place) < Math.abs(line.x[best] - place) ? n : best));
      if (nearest === null || Math.abs(line.x[at] - place) < Math.abs(nearest - place)) nearest = line.x[at];
      told.push(`${card.told.lines.length > 1 ? `${line.label}, ` : ""}step ${number(Math.round(line.x[at]))}: ${number(line.y[at], 4)}`);
    }
    if (nearest === null) return;
    card.place = nearest;
    card.readout.textContent = `${told.join("; ")} ${card.panel.unit}`;
    this.cross(card, nearest);
  }

  cross(card, x) {
    const [left, top, right, bottom] = card.told.box, [low, high] = card.told.limits, at = left + ((x - low) / (high - low)) * (right - left);
    const line = card.drawing.querySelector(".cross") || document.createElementNS("http://www.w3.org/2000/svg", "line");
    for (const [name, value] of Object.entries({ class: "cross", x1: at, x2: at, y1: top, y2: bottom })) line.setAttribute(name, value);
    card.drawing.firstChild.append(line);
  }

  leave(card) {
    card.place = null;
    card.readout.textContent = "";
    card.drawing.querySelector(".cross")?.remove();
  }
}
