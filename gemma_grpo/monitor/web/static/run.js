// One run: where it stands, and its curves, groups, replies, evaluation, settings and report, while it goes on.

import { Charts } from "./curves.js";
import { ask, badge, duration, el, failure, number, runPath, spark, table, verdict, visible, when } from "./parts.js";
import { Playground } from "./playground.js";
import { groupsView, samplesView } from "./replies.js";

const TABS = { curves: "Curves", groups: "Groups", replies: "Replies", playground: "Playground", evaluation: "Evaluation", settings: "Settings", report: "Report" };
const STANDING = ["curves", "evaluation"]; // tabs that say how the run stands: alarms and verdict
const POLL = 3000;
const STREAM_FAILURES = 3;

/** Hears of a run's progress: by a stream of events, and where none can be held open by asking now and then. */
class Line {
  constructor(run, heard, said) {
    Object.assign(this, { run, heard, said, offset: 0, failures: 0 });
    this.open();
  }

  open() {
    this.stream = new EventSource(runPath(this.run, `/events?after=${this.offset}`));
    this.stream.addEventListener("open", () => { this.failures = 0; this.said("live"); });
    this.stream.addEventListener("progress", (event) => this.take(JSON.parse(event.data)));
    this.stream.addEventListener("error", () => {
      this.failures += 1;
      this.said("connecting again…");
      if (this.failures >= STREAM_FAILURES || this.stream.readyState === EventSource.CLOSED) this.poll();
    });
  }

  poll() {
    this.stream.close();
    clearTimeout(this.timer);
    this.timer = setTimeout(async () => {
      try {
        this.take(await ask(runPath(this.run, `/progress?after=${this.offset}`)));
        this.said(`asking every ${POLL / 1000} s`);
      } catch (error) {
        this.said(error.message);
      }
      this.poll();
    }, POLL);
  }

  take(told) {
    this.offset = told.sizes["metrics.jsonl"];
    this.heard(told);
  }

  close() {
    this.stream.close();
    clearTimeout(this.timer);
  }
}

export class RunView {
  constructor(run, said) {
    this.run = run;
    this.sizes = {};
    this.head = el("div", {});
    this.standing = el("div", {});
    this.body = el("div", {});
    this.tabs = el("nav", { class: "tabs", "aria-label": "views of this run" },
      Object.entries(TABS).map(([key, title]) => el("a", { href: `#/run/${encodeURIComponent(run)}/${key}`, id: `tab-${key}` }, title)));
    this.node = el("div", {}, this.head, this.tabs, this.standing, this.body);
    this.line = new Line(run, (told) => this.heard(told), said);
  }

  /** Show a tab; the rest stays. */
  async show(tab) {
    this.leave();
    for (const link of this.tabs.children) link.toggleAttribute("aria-current", link.id === `tab-${tab}`);
    this.tabs.querySelector("[aria-current]")?.setAttribute("aria-current", "page");
    this.standing.hidden = tab in TABS && !STANDING.includes(tab);
    await this.readHead();
    if (!this.summary) return;
    const views = { curves: () => this.curves(), groups: () => this.replies(groupsView), replies: () => this.replies(samplesView),
      playground: () => this.body.replaceChildren(new Playground(this.run).node), evaluation: () => this.evaluation(), settings: () => this.settings(), report: () => this.report() };
    (views[tab] || views.curves)();
  }

  leave() {
    this.charts?.close();
    this.charts = this.grown = null;
    this.body.replaceChildren();
  }

  close() {
    this.leave();
    this.line.close();
  }

  async readHead() {
    try {
      this.summary = await ask(runPath(this.run));
      this.sizes = this.summary.sizes;
    } catch (error) {
      this.summary = null;
      this.head.replaceChildren(el("h1", {}, this.run), failure(error));
      return;
    }
    const open = this.standing.querySelector("details")?.open, run = this.summary, alarms = run.alarms.filter((alarm) => alarm.level !== "note");
    this.head.replaceChildren(...this.headParts(run, alarms));
    this.standing.replaceChildren(...[alarms.length ? alarmBox(alarms, run.parting) : null, verdict(run.verdict)].filter(Boolean));
    this.standing.querySelector("details")?.toggleAttribute("open", open);
  }

  headParts(run, alarms) {
    const pace = Object.entries(run.pace), perStep = pace.reduce((sum, [, seconds]) => sum + seconds, 0);
    const left = run.total_steps ? run.total_steps - run.step : null;
    const eta = run.status === "running" && left && perStep ? `, about ${duration(left * perStep)} left of training` : "";
    const split = pace.map(([name, seconds]) => `${name} ${duration(seconds)} (${Math.round((100 * seconds) / perStep)} %)`).join(", ");
    return [
      el("h1", {}, run.name, " ", badge(run), alarms.length ? el("a", { class: "badge failed", href: `#/run/${encodeURIComponent(run.name)}/curves` }, counted(alarms)) : null),
      el("p", { class: "soft" }, `${run.model || "model not recorded"} on ${run.dataset || "data not recorded"} · started ${when(run.started)}`),
      run.status_text ? el("p", { class: "notice bad" }, run.status_text) : null,
      el("p", {}, `step ${number(run.step)}${run.total_steps ? ` of ${number(run.total_steps)}` : ""}${eta} · reward `, el("b", {}, number(run.reward)), " ", rewardSpark(run.rewards)),
      run.total_steps ? el("progress", { max: run.total_steps, value: run.step, "aria-label": "steps made" }) : null,
      pace.length ? el("p", { class: "soft" }, `A step takes ${duration(perStep)}: ${split}`) : null,
    ].filter(Boolean);
  }

  heard(told) {
    const changed = told.reset || Object.entries(told.sizes).some(([name, size]) => this.sizes[name] !== size) || told.status !== this.summary?.status;
    this.sizes = { ...this.sizes, ...told.sizes };
    if (!changed || this.waiting) return;
    this.waiting = setTimeout(async () => {
      this.waiting = null;
      await this.readHead();
      this.charts?.load().catch(() => null);
      this.grown?.();
    }, 500);
  }

  version() {
    return `${this.sizes["metrics.jsonl"] || 0}.${this.sizes["witnesses.jsonl"] || 0}`;
  }

  curves() {
    this.charts = new Charts([this.run], () => this.version());
    this.body.replaceChildren(this.charts.node);
    this.charts.load().catch((error) => this.body.replaceChildren(failure(error)));
  }

  replies(view) {
    const made = view(this.run);
    this.grown = made.grown;
    this.body.replaceChildren(made.node);
  }

  evaluation() {
    this.grown = () => this.evaluation();
    const rows = this.summary.evaluation.map((row) => [row.title, row.cell[0], row.cell[1]]);
    this.body.replaceChildren(...(rows.length ? [table(["metric", "after training", "gain and its 95 % interval"], rows)]
      : [el("p", { class: "soft" }, "Not evaluated yet. That happens at the end of training, or by `gemma-grpo evaluate`.")]),
    ...eventList(this.summary.told));
  }

  settings() {
    const flat = (value, prefix = "") => Object.entries(value || {}).flatMap(([key, item]) =>
      (item && typeof item === "object" && !Array.isArray(item) ? flat(item, `${prefix}${key} / `) : [[prefix + key, Array.isArray(item) ? item.join(", ") : typeof item === "number" ? number(item) : visible(item)]]));
    this.body.replaceChildren(el("h2", {}, "Recipe"), el("p", { class: "soft" }, "Training on this file repeats the run."), el("pre", { tabindex: 0 }, this.summary.recipe),
      el("h2", {}, "Data"), table(["", "count"], flat(this.summary.data)), el("h2", {}, "Made with"), table(["", "version"], flat({ ...this.summary.versions, ...this.summary.precision })));
  }

  report() {
    const path = `/report/${encodeURIComponent(this.run)}`;
    this.body.replaceChildren(el("p", {}, el("a", { href: path, target: "_blank", rel: "noopener" }, "Open it alone"), " to print or to save it. It is made anew from the run's files."),
      el("iframe", { src: path, sandbox: "", title: `Report of ${this.run}` }));
  }
}

function rewardSpark(values) {
  return values.length > 1 ? spark(values, "reward over the steps") : "";
}

const counted = (alarms) => (alarms.length === 1 ? "One alarm" : `${alarms.length} alarms`);

function alarmBox(alarms, parting) {
  const lines = alarms.map((alarm) => el("li", {}, el("b", { class: "bad" }, `step ${alarm.step}, ${alarm.level}: `), alarm.text));
  return el("section", { class: "notice alarm", "aria-label": "alarms" }, el("h2", { class: "bad" }, counted(alarms)),
    parting.map((line) => el("p", {}, line)), el("details", {}, el("summary", {}, "What they said"), el("ul", {}, lines)));
}

function eventList(told) {
  if (!told.length) return [];
  const rows = [...told].reverse().map((event) => [when(event.time), el("td", { class: "left" }, event.kind), el("td", { class: "words" }, event.text || event.reason || "")]);
  return [el("h2", {}, "What happened"), table(["time", "kind", "what"], rows)];
}
