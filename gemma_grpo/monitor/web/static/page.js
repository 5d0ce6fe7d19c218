// Which view the address names, and the two that are no run's: the list of runs, and several of them compared.

import { Charts } from "./curves.js";
import { ask, badge, el, failure, number, spark, table, when } from "./parts.js";
import { RunView } from "./run.js";

const main = document.getElementById("main"), connection = document.getElementById("connection");
const MOST_COMPARED = 4, OVERVIEW_EVERY = 5000;
let open = null;

const say = (text) => { if (connection.textContent !== text) connection.textContent = text; };

/** Every run in a line, brought up to date now and then. */
class Overview {
  constructor() {
    this.chosen = new Set();
    this.node = el("div", {});
    this.timer = setInterval(() => document.hidden || this.load(), OVERVIEW_EVERY);
    this.load();
  }

  close() {
    this.closed = true;
    clearInterval(this.timer);
  }

  async load() {
    let found;
    try {
      found = await ask("/api/runs");
      if (this.closed) return; // what stands above is another view's by now
    } catch (error) {
      if (this.closed) return;
      say("");
      this.node.replaceChildren(el("h1", {}, "Runs"), failure(error));
      return;
    }
    say("");
    const text = JSON.stringify(found);
    if (text === this.shown) return;
    this.shown = text;
    this.draw(found);
  }

  draw({ folder, runs }) {
    const compare = el("button", { type: "button", click: () => { location.hash = `#/compare/${[...this.chosen].map(encodeURIComponent).join("/")}`; } }, "compare");
    const ready = () => {
      compare.disabled = this.chosen.size < 2 || this.chosen.size > MOST_COMPARED;
      compare.textContent = this.chosen.size > MOST_COMPARED ? `compare (at most ${MOST_COMPARED})` : `compare ${this.chosen.size || ""}`;
    };
    const rows = runs.map((run) => {
      const tick = el("input", { type: "checkbox", "aria-label": `compare ${run.name}`, change: (event) => { this.chosen[event.target.checked ? "add" : "delete"](run.name); ready(); } });
      tick.checked = this.chosen.has(run.name);
      return [el("span", {}, tick, " ", el("a", { href: `#/run/${encodeURIComponent(run.name)}/curves` }, run.name)),
        el("td", { class: "left" }, badge(run)), `${number(run.step)}${run.total_steps ? ` / ${number(run.total_steps)}` : ""}`,
        number(run.reward), run.rewards.length > 1 ? spark(run.rewards, "reward over the steps") : "",
        el("td", { class: "words" }, run.verdict ? el("span", { class: run.verdict.tone }, run.verdict.headline) : "not evaluated"), when(run.written)];
    });
    ready();
    const focused = this.node.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") || document.activeElement.getAttribute("href") : null;
    const empty = [el("p", {}, `There is no run in ${folder}.`), el("p", { class: "soft" }, "`gemma-grpo demo` makes one in a few minutes; `gemma-grpo train RECIPE` starts a real one. It appears here by itself.")];
    this.node.replaceChildren(el("h1", {}, "Runs"),
      ...(runs.length ? [table(["run", "status", "step", "reward", "its course", "evaluation", "last written"], rows), el("div", { class: "controls" }, compare, el("span", { class: "soft" }, "Tick two to four runs to overlay their curves and see in which settings they differ."))] : empty));
    if (focused) this.node.querySelector(`[aria-label="${CSS.escape(focused)}"], [href="${CSS.escape(focused)}"]`)?.focus();
  }
}

/** Several runs: what each came to, in which settings they differ, their curves overlaid. */
class Compare {
  constructor(runs) {
    this.runs = runs;
    this.node = el("div", {}, el("h1", {}, runs.join(" · ")));
    this.charts = new Charts(runs, () => this.version);
    this.version = "";
    this.timer = setInterval(() => this.look(), OVERVIEW_EVERY);
    this.load().catch((error) => this.node.append(failure(error)));
  }

  close() {
    clearInterval(this.timer);
    this.charts.close();
  }

  async look() {
    const found = await ask("/api/runs").catch(() => null);
    const sizes = new Map((found?.runs || []).map((run) => [run.name, run.sizes]));
    if (found) this.version = this.runs.map((run) => `${sizes.get(run)?.["metrics.jsonl"] || 0}.${sizes.get(run)?.["witnesses.jsonl"] || 0}`).join("-");
  }

  async load() {
    const found = await ask(`/api/compare?${this.runs.map((run) => `run=${encodeURIComponent(run)}`).join("&")}`);
    const cell = (one) => (one ? `${one[0]} ${one[1]}` : "–");
    const text = (value) => (value === null ? "null" : typeof value === "object" ? JSON.stringify(value) : value);
    this.node.append(el("h2", {}, "Settings that differ"), found.problem ? el("p", { class: "notice bad" }, found.problem)
      : found.settings.length ? table(["setting", ...found.names], found.settings.map((row) => [row.name, ...row.values.map(text)])) : el("p", {}, "The settings are the same."),
    el("h2", {}, "What they came to"), found.evaluation.length ? table(["after training (gain and its interval)", ...found.names], found.evaluation.map((row) => [row.title, ...row.cells.map(cell)]))
      : el("p", { class: "soft" }, "None of them is evaluated."), el("h2", {}, "Curves"), this.charts.node);
    await this.look();
    await this.charts.load();
  }
}

function route() {
  const [view, ...rest] = location.hash.replace(/^#\/?/, "").split("/").map((part) => { try { return decodeURIComponent(part); } catch { return part; } });
  if (view === "run" && rest[0]) {
    if (!(open instanceof RunView) || open.run !== rest[0]) show(new RunView(rest[0], say), rest[0]);
    open.show(rest[1] || "curves");
  } else if (view === "compare" && rest.length > 1) show(new Compare(rest), "compare");
  else show(new Overview(), "runs");
}

function show(view, title) {
  open?.close();
  open = view;
  say("");
  document.title = `${title} – gemma-grpo`;
  main.replaceChildren(view.node);
}

const address = new URL(location.href);
if (address.searchParams.has("token")) { // from here on a cookie says who this is: nobody shall read it off the address
  address.searchParams.delete("token");
  history.replaceState(null, "", address);
}
addEventListener("hashchange", route);
route();
