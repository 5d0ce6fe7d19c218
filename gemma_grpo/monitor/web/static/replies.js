// Groups side by side, and replies to look for: of a step, by a filter, or those that changed most since the start.

import { ask, conversation, el, failure, number, runPath, shaded } from "./parts.js";

const FILTERS = { all: "newest groups", "zero variance": "groups without a signal (all rewards equal)", "cut off": "groups with a reply that was cut off", "not scored": "groups with a reply that was not scored" };
const ORDERS = { "most improved": "most improved since the start", "most suspicious": "most suspicious: reward up, judge not", best: "best of the last look", worst: "worst of the last look" };
const ENOUGH = 12, MOST_ASKED = 16; // cards at a time, and requests for them: each looks through a part of a long log
const MEASURES = ["gold", "witness", "lexical", "fluency", "oddest"];

const fact = (name, value) => [`${name} `, el("b", {}, number(value)), " · "];

/** A group: its prompt, and every completion from best to worst. */
export function groupCard(group) {
  const flat = group.spread === 0 && group.completions.length > 1;
  const about = [group.step ? `step ${group.step}` : null, group.source, group.prompt_id].filter(Boolean).join(" · ");
  return el("article", { class: "group" },
    el("div", { class: "facts" }, about, group.completions.some(drift) ? " · shaded: what training made likelier; underlined: less likely" : "", flat ? el("b", { class: "bad" }, " · no signal: all rewards are equal") : ""),
    conversation(group.prompt),
    el("div", { class: "side" }, group.completions.map((one, place) => completion(one, !flat && place === 0 ? "best" : !flat && place === group.completions.length - 1 ? "worst" : ""))));
}

function completion(one, rank) {
  const parts = Object.entries(one.parts || {}).flatMap(([name, value]) => fact(name, value));
  return el("div", { class: `answer ${rank}` },
    el("div", { class: "facts" }, rank ? `${rank} · ` : "", fact("reward", one.reward), fact("advantage", one.advantage), parts,
      `${number(one.length)} tokens${one.finish === "length" ? ", cut off" : ""}`),
    drift(one) || el("div", { class: "text", tabindex: 0 }, one.text));
}

/** The tokens of a completion that was logged with its log-ratios; null of others, and of what no run has written. */
function drift(one) {
  const { tokens, log_ratios: ratios } = one;
  if (!Array.isArray(tokens) || !Array.isArray(ratios) || !ratios.length || ratios.length !== tokens.length || ratios.some((ratio) => typeof ratio !== "number")) return null;
  return shaded(tokens.map((token) => String(token).replaceAll("\u2581", " ")), ratios);
}

function pairCard(pair) {
  const side = (name, reply) => el("div", { class: "answer" },
    el("div", { class: "facts" }, `${name} · `, fact("reward", reply.proxy), MEASURES.filter((measure) => typeof reply[measure] === "number").flatMap((measure) => fact(measure, reply[measure])),
      `${number(reply.length)} tokens${reply.clipped ? ", cut off" : ""}`),
    el("div", { class: "text", tabindex: 0 }, reply.text));
  return el("article", { class: "group" }, el("div", { class: "facts" }, [pair.why, pair.after.kind, pair.after.source, pair.after.prompt_id].filter(Boolean).join(" · ")),
    conversation(pair.prompt), el("div", { class: "side" }, side("at the start", pair.before), side("now", pair.after)));
}

/** The groups of a step, which can be stepped through; of the newest step it follows the run. */
export function groupsView(run) {
  const shown = el("div", {}), place = el("input", { type: "number", min: 0, "aria-label": "step", change: () => show(place.value) });
  const button = (text, which) => el("button", { type: "button", click: () => show(which()) }, text);
  let known = { first: null, last: null, previous: null, next: null, step: null };
  const buttons = [button("first", () => known.first), button("earlier", () => known.previous), button("later", () => known.next), button("newest", () => null)];
  const said = el("span", { class: "soft", role: "status" });

  let turn = 0;

  async function show(step) {
    const mine = (turn += 1);
    try {
      const found = await ask(runPath(run, `/groups${step === null || step === "" ? "" : `?step=${encodeURIComponent(step)}`}`));
      if (mine !== turn) return; // another step was asked for meanwhile
      known = found;
    } catch (error) {
      shown.replaceChildren(failure(error));
      return;
    }
    buttons[1].disabled = known.previous === null;
    buttons[2].disabled = known.next === null;
    place.value = known.step ?? "";
    said.textContent = known.step === null ? "" : `step ${known.step} of ${known.first} to ${known.last}; ${known.groups.length} groups${known.more ? `, ${known.more} more are not shown` : ""}${known.damaged ? `; ${known.damaged} damaged lines are left out` : ""}`;
    shown.replaceChildren(...(known.groups.length ? known.groups.map(groupCard) : [el("p", { class: "soft" }, "No group has been scored yet. They come with the first step.")]));
  }

  show(null);
  return {
    node: el("div", {}, el("div", { class: "controls" }, buttons.slice(0, 2), place, buttons.slice(2), said), shown),
    /** The run has made a step: follow it where the newest was shown. */
    grown: () => (known.step === null || known.step === known.last ? show(null) : null),
  };
}

/** Replies by a filter or a ranking, a page at a time. */
export function samplesView(run) {
  const which = el("select", { "aria-label": "which replies", change: () => restart() },
    el("optgroup", { label: "Groups of training, newest first" }, Object.entries(FILTERS).map(([value, text]) => el("option", { value: `filter:${value}` }, text))),
    el("optgroup", { label: "Held-out prompts, at the start and now" }, Object.entries(ORDERS).map(([value, text]) => el("option", { value: `order:${value}` }, text))));
  const source = el("select", { "aria-label": "source", change: () => restart() }, el("option", { value: "" }, "all sources"));
  const shown = el("div", {}), said = el("p", { class: "soft", role: "status" });
  const more = el("button", { type: "button", click: () => page() }, "more");
  let next = null, turn = 0, looked = [];

  function restart() {
    next = null;
    looked = [];
    turn += 1;
    said.textContent = "looking…";
    shown.replaceChildren();
    page();
  }

  async function page() {
    const [kind, value] = which.value.split(":"), mine = turn;
    source.hidden = kind === "order";
    more.disabled = true;
    try {
      for (let asked = 0, enough = shown.childElementCount + ENOUGH; asked < MOST_ASKED && shown.childElementCount < enough && (asked === 0 || next !== null); asked += 1) {
        const found = await (kind === "filter" ? filtered(value) : ordered(value));
        if (mine !== turn) return; // another choice was made meanwhile
        shown.append(...found());
      }
    } catch (error) {
      if (mine === turn) shown.replaceChildren(failure(error));
    }
    more.disabled = false;
    more.hidden = next === null;
  }

  async function filtered(value) {
    const query = new URLSearchParams({ filter: value, source: source.value, ...(next === null ? {} : { before: next }) });
    const found = await ask(runPath(run, `/samples?${query}`));
    return () => {
      next = found.before;
      for (const name of found.sources) if (![...source.options].some((option) => option.value === name)) source.append(el("option", { value: name }, name));
      looked.push(...found.steps);
      const through = looked.length ? `looked through steps ${Math.min(...looked)} to ${Math.max(...looked)}` : "there are no groups yet";
      said.textContent = `${shown.childElementCount + found.groups.length} groups; ${through}${next === null ? ", which is all" : ""}.`;
      return found.groups.map(groupCard);
    };
  }

  async function ordered(value) {
    const found = await ask(runPath(run, `/changed?${new URLSearchParams({ order: value, start: next ?? 0 })}`));
    return () => {
      next = found.next;
      said.textContent = found.count ? `${found.count} replies of the look at step ${found.steps[1]}, beside those at step ${found.steps[0]}.`
        : "There are no two looks at held-out prompts to compare yet. They are made every witness.every steps.";
      return found.pairs.map(pairCard);
    };
  }

  page();
  return { node: el("div", {}, el("div", { class: "controls" }, which, source), said, shown, more), grown: () => null };
}
