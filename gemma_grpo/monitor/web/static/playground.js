// Base against tuned on one prompt, as they answer: on the same weights, with the same seed, by name or blind.

import { ask, conversation, el, failure, number, runPath, shaded } from "./parts.js";

const SIDES = { base: "base (adapter off)", tuned: "tuned (adapter on)", first: "first", second: "second" };

/** One side's answer, which grows and is then told about. */
class Answer {
  constructor(side) {
    this.facts = el("div", { class: "facts" }, SIDES[side]);
    this.text = el("div", { class: "text", tabindex: 0 });
    this.more = el("div", { class: "facts" });
    this.node = el("div", { class: "answer", "aria-busy": "true" }, this.facts, this.text, this.more);
    this.side = side;
  }

  add(piece) {
    this.text.append(el("span", {}, piece));
  }

  tell(reply, opinion) {
    this.node.setAttribute("aria-busy", "false");
    const ended = { stop: "", length: ", cut off", interrupted: ", called off" }[reply.finish];
    this.facts.textContent = `${SIDES[this.side]} · ${number(reply.length)} tokens${ended}`;
    if (!reply.pieces) return;
    const drift = reply.log_ratios.reduce((sum, ratio) => sum + ratio, 0);
    this.text.replaceWith(this.text = shaded(reply.pieces.map((piece, n) => piece || (n === reply.pieces.length - 1 ? "[end]" : "")), reply.log_ratios));
    this.facts.append(` · log tuned − log base ${drift >= 0 ? "+" : ""}${drift.toFixed(2)} nat`);
    if (opinion) this.more.replaceChildren(...opinionParts(opinion));
  }
}

function opinionParts(opinion) {
  const parts = opinion.parts.map((part) => (part.raw === null ? `${part.name}: none, ${part.why}` : `${part.name} ${number(part.raw)} (counts ${number(part.counted)})`));
  return [el("div", {}, "reward ", el("b", {}, number(opinion.total)), opinion.parts.length ? ` · ${parts.join(" · ")}` : ""), ...opinion.notes.map((note) => el("div", {}, note))];
}

/** The lines of an answer as they come. */
async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const whole = (rest + value).split("\n");
    rest = whole.pop();
    for (const line of whole) yield JSON.parse(line);
  }
}

export class Playground {
  constructor(run) {
    this.run = run;
    this.messages = null;
    this.question = el("textarea", { rows: 3, "aria-label": "question", placeholder: "Ask something, or choose a held-out prompt" });
    this.held = el("select", { "aria-label": "held-out prompt", change: () => this.choose() }, el("option", { value: "" }, "a question of your own"));
    this.checkpoint = el("select", { "aria-label": "adapter" });
    this.seed = el("input", { type: "number", min: 0, value: 0 });
    this.tokens = el("input", { type: "number", min: 1, max: 4096, placeholder: "the run's" });
    this.warmth = el("input", { type: "number", min: 0, max: 100, step: "any", placeholder: "the run's" });
    this.blind = el("input", { type: "checkbox" });
    this.beside = el("input", { type: "checkbox" });
    this.go = el("button", { type: "submit" }, "answer");
    this.stop = el("button", { type: "button", disabled: true, click: () => this.calling?.abort() }, "stop");
    this.said = el("p", { role: "status", class: "soft" });
    this.shown = el("div", { class: "two" });
    this.ballot = el("div", { class: "controls" });
    const label = (text, node) => el("label", {}, `${text} `, node);
    this.earlier = el("div", {});
    this.node = el("form", { submit: (event) => { event.preventDefault(); this.answer(); } },
      el("div", { class: "controls" }, label("prompt", this.held)), this.earlier, this.question,
      el("div", { class: "controls" }, label("adapter", this.checkpoint), label("seed", this.seed), label("tokens at most", this.tokens), label("temperature", this.warmth)),
      el("div", { class: "controls" }, label("blind: vote before you know which is which", this.blind), label("beside a training: a copy on the CPU", this.beside)),
      el("div", { class: "controls" }, this.go, this.stop), this.said, this.shown, this.ballot);
    this.load();
  }

  async load() {
    try {
      const found = await ask(runPath(this.run, "/playground"));
      this.token = found.token;
      this.prompts = found.prompts;
      this.held.append(...found.prompts.map((messages, n) => el("option", { value: n }, `${n + 1}: ${messages.at(-1)?.content.slice(0, 70) ?? ""}`)));
      this.checkpoint.append(...found.choices.map((one) => el("option", { value: one.name }, `${one.name} (${one.about})`)));
      this.go.disabled = !found.choices.length;
      if (!found.choices.length) this.said.textContent = "This run has no adapter yet: the first comes with its first checkpoint.";
    } catch (error) {
      this.node.replaceChildren(failure(error));
    }
  }

  choose() {
    this.messages = this.held.value === "" ? null : this.prompts[Number(this.held.value)];
    this.question.value = this.messages ? this.messages.at(-1).content : "";
    this.earlier.replaceChildren(...(this.messages?.length > 1 ? [conversation(this.messages.slice(0, -1))] : []));
  }

  asked() {
    const given = (input) => (input.value === "" ? null : Number(input.value));
    const earlier = this.messages ? this.messages.slice(0, -1) : [];
    return { messages: [...earlier, { role: "user", content: this.question.value }], checkpoint: this.checkpoint.value, seed: given(this.seed) ?? 0,
      max_tokens: given(this.tokens), temperature: given(this.warmth), blind: this.blind.checked, beside: this.beside.checked };
  }

  post(what, body, signal) {
    return fetch(runPath(this.run, `/${what}`), { method: "POST", headers: { "content-type": "application/json", "x-page-token": this.token }, body: JSON.stringify(body), signal });
  }

  async answer() {
    if (!this.question.value.trim()) {
      this.said.textContent = "Write a question first.";
      return;
    }
    this.calling = new AbortController();
    this.go.disabled = true;
    this.stop.disabled = false;
    this.said.textContent = "asking…";
    this.answers = {};
    this.shown.replaceChildren();
    this.ballot.replaceChildren();
    try {
      const response = await this.post("play", this.asked(), this.calling.signal);
      if (!response.ok) throw new Error((await response.text()).trim());
      for await (const told of lines(response)) this.hear(told);
    } catch (error) {
      this.said.textContent = error.name === "AbortError" ? "called off" : error.message;
    }
    this.go.disabled = false;
    this.stop.disabled = true;
  }

  hear(told) {
    if (told.error) throw new Error(told.error);
    if (told.state) this.said.textContent = `${told.state}…`;
    if (told.side) {
      if (!this.answers[told.side]) {
        this.answers[told.side] = new Answer(told.side);
        this.shown.append(this.answers[told.side].node);
        this.said.textContent = `${told.side} answers…`;
      }
      if (told.piece) this.answers[told.side].add(told.piece);
      if (told.reply) this.answers[told.side].tell(told.reply, told.opinion);
    }
    if (told.done) this.said.textContent = told.pair ? "Which is better?" : "Shaded: tokens that training made likelier; underlined: less likely. Point at one for its log-ratio.";
    if (told.pair) this.askVote(told.pair);
  }

  askVote(pair) {
    const button = (choice, text) => el("button", { type: "button", click: () => this.vote(pair, choice) }, text);
    this.ballot.replaceChildren(button("first", "the first"), button("tie", "neither"), button("second", "the second"));
  }

  async vote(pair, choice) {
    this.ballot.replaceChildren();
    const response = await this.post("votes", { pair, choice });
    if (!response.ok) {
      this.said.textContent = (await response.text()).trim();
      return;
    }
    const { sides, replies } = await response.json();
    for (const name of ["first", "second"]) {
      this.answers[name].side = sides[name];
      this.answers[name].tell(replies[sides[name]].reply, replies[sides[name]].opinion);
    }
    this.said.textContent = `Counted. The first was ${sides.first}, the second ${sides.second}; the report has the votes.`;
  }
}
