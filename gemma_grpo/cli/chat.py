"""`gemma-grpo chat RUN`: a conversation in the terminal, with the base, the tuned model or both, or line by line from a pipe.

Owns what is typed, what is shown, and what Ctrl+C does. What was said is conversation.py's, the answers are grpo/playing.py's.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_grpo.cli.allowing import AllowCode, CodeHash, allowed_code
from gemma_grpo.cli.conversation import BOTH, Conversation, Exchange, check_new, free_file, records
from gemma_grpo.cli.printing import ModelText, say, say_data
from gemma_grpo.cli.training import Run
from gemma_grpo.config import load_recipe
from gemma_grpo.escapes import printable
from gemma_grpo.monitor.choices import FINAL, choices, chosen
from gemma_grpo.types import Side

if TYPE_CHECKING:
    from gemma_grpo.grpo.opinion import Opinion
    from gemma_grpo.grpo.playing import Player, Reply

HELP = """\
  a question        is answered; one that begins with a slash is typed with two
  /tuned /base      who answers from here on, the last question at once: adapter on or off, same weights
  /both             both answer the same conversation with the same seed, one after the other
  /retry            the last question again, with the next seed
  /reward           what the run's reward makes of the last answers, part by part
  /prompt [N]       a new conversation with the next held-out prompt, or the Nth
  /checkpoint NAME  another adapter of the run; without a name: which there are
  /new              a new conversation
  /save [FILE]      all answers so far, as JSON lines; without a name in the run's chats/
  /quit             leave, as Ctrl+D does
Ctrl+C ends the answer that is being written, and keeps what there is of it; at the prompt it leaves."""
PROMPT = "you> "
SHOWN_TOKENS, LEAST_SHOWN = 3, 0.005
"""How many tokens are named under /both, and from how many nats on."""


def chat(
    run: Run,
    checkpoint: Annotated[str, typer.Option("--checkpoint", metavar="NAME", help="adapter, best, or a step such as step-12.")] = FINAL,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Decides every answer; /retry takes the next.")] = 0,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Of an answer; the run's own limit by default.")] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0, max=100, help="The run's own by default; 0 takes the likeliest token.")
    ] = None,
    beside: Annotated[bool, typer.Option("--beside", help="Beside a training: load a copy of the model on the CPU.")] = False,
    allow_code: AllowCode = None,
    code_sha256: CodeHash = None,
) -> None:
    """Talk to a run's model, before and after training: adapter off and on, with the reward's opinion. /help lists the commands."""
    choice = chosen(run, checkpoint)
    code, config = allowed_code(allow_code, code_sha256, run), load_recipe(run / "recipe.yaml")
    say(f"loading {printable(config.model_name)} with {choice.name}, {choice.about} ...", flush=True)

    from gemma_grpo.grpo.playing import Player
    from gemma_grpo.grpo.setup import functions_of

    player = Player.open(run, checkpoint, beside=beside, reward_functions=None if code is None else functions_of(code, config))
    warmth, limit = config.temperature if temperature is None else temperature, max_tokens or config.max_completion_length
    say(f"on {player.model.device}; seed {seed}, temperature {warmth:g}, at most {limit} tokens an answer. /help lists the commands.")
    _Chat(player, run, seed=seed, max_tokens=limit, temperature=warmth).go()


class _Chat:
    def __init__(self, player: Player, run: Path, *, seed: int, max_tokens: int, temperature: float) -> None:
        self.player, self.run, self.seed, self.max_tokens, self.temperature = player, run, seed, max_tokens, temperature
        self.conversation, self.exchanges = Conversation(), list[Exchange]()
        self.last: list[Exchange] = []
        """The answers to the last question."""
        self.next_prompt = 0
        self.commands: dict[str, Callable[[str], None]] = {
            "tuned": lambda _: self._switch(("tuned",)),
            "base": lambda _: self._switch(("base",)),
            "both": lambda _: self._switch(BOTH),
            "retry": self._retry,
            "reward": self._reward,
            "prompt": self._prompt,
            "checkpoint": self._checkpoint,
            "new": self._new,
            "save": self._save,
            "help": lambda _: say(HELP, flush=True),
        }

    def go(self) -> None:
        """Until there is no line any more, or /quit; Ctrl+C at the prompt leaves too."""
        from gemma_grpo.model.memory import DoesNotFitError

        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            for line in _lines():
                if line in ("/quit", "/exit"):
                    return
                try:
                    self._act(line)
                except (ValueError, ArithmeticError, DoesNotFitError) as error:  # this cannot be had; the conversation can go on
                    say(f"error: {printable(str(error))}", flush=True)
        except KeyboardInterrupt:
            say("", flush=True)
        finally:
            signal.signal(signal.SIGINT, before)

    def _act(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line[1:].partition(" ")
            if name not in self.commands:
                raise ValueError(f"there is no command /{name}. /help lists them; a question that begins with a slash is typed with two.")
            self.commands[name](rest.strip())
        elif line:
            self.conversation.ask(line.removeprefix("/"))
            self._answer()

    # ---- answering

    def _answer(self) -> None:
        """Whoever answers, answers the last question."""
        last = []
        try:
            for side in self.conversation.sides:
                last.append(self._answer_of(side))
                if len(self.conversation.sides) > 1:
                    say(difference_line(last[-1].reply), flush=True)
        except Exception:
            self.conversation.withdraw()
            raise
        self.last = last

    def _answer_of(self, side: Side) -> Exchange:
        messages = self.conversation.messages(side)
        _, left_out = self.player.fitted(messages)
        if left_out:
            limit = self.player.config.max_prompt_length
            say(f"  [the {left_out} oldest messages are left out: with them it is longer than max_prompt_length, {limit} tokens]")
        shown, reply = ModelText(f"{side}> "), None
        try:
            with _until_interrupted() as interrupted:
                for piece in self.player.stream(
                    messages, side, seed=self.seed, max_tokens=self.max_tokens, temperature=self.temperature, stop=interrupted
                ):
                    if isinstance(piece, str):
                        shown.add(piece)
                    else:
                        reply = piece
        finally:
            shown.end()
        assert reply is not None
        if reply.finish != "stop":
            say(f"  [{'interrupted' if reply.finish == 'interrupted' else 'cut off'} after {reply.length} tokens]", flush=True)
        self.conversation.answered(side, reply.text)
        assert self.player.choice is not None
        self.exchanges.append(Exchange(self.player.choice.name, messages, reply, self.temperature))
        return self.exchanges[-1]

    # ---- commands

    def _switch(self, sides: tuple[Side, ...]) -> None:
        if self.conversation.switch(sides):
            self._answer()
        else:
            say(f"{' and '.join(sides)} from here on", flush=True)

    def _retry(self, _: str) -> None:
        self._need_question()
        self.seed += 1
        say(f"seed {self.seed}")
        self._answer()

    def _reward(self, _: str) -> None:
        if not self.last:
            raise ValueError("there is no answer yet for the reward to score. Ask something first.")
        for one in self.last:
            one.opinion = self.player.opinion(one.messages, one.reply)
            say(*opinion_lines(one.reply.side, one.opinion), flush=True)

    def _prompt(self, number: str) -> None:
        prompts = self.player.prompts()
        if number and not (number.isascii() and number.isdigit() and 1 <= int(number) <= len(prompts)):
            raise ValueError(f"there is no held-out prompt {number!r}; they are numbered 1 to {len(prompts)}.")
        if not prompts:
            raise ValueError("the run holds no prompt out: its data.holdout left none. Type a question instead.")
        place = int(number) - 1 if number else self.next_prompt % len(prompts)
        self.next_prompt = place + 1
        prompt = prompts[place]
        say(f"held-out prompt {place + 1} of {len(prompts)}")
        for message in prompt.messages:
            say_data(f"  {message['role']}: " + message["content"].replace("\n", "\n  "))
        self.conversation.begin(prompt.messages)
        self._answer()

    def _checkpoint(self, name: str) -> None:
        if name:
            self.player.choose(name)
        present = self.player.choice
        for one in choices(self.run):
            own = present is not None and one.name == present.name
            about = present.about if present is not None and own else one.about  # what was loaded: a run that goes on replaces its best
            say(f"{'*' if own else ' '} {one.name}: {about}", flush=True)

    def _new(self, _: str) -> None:
        self.conversation.begin()
        self.last = []
        say("a new conversation", flush=True)

    def _save(self, name: str) -> None:
        if not self.exchanges:
            raise ValueError("there is no answer yet to save. Ask something first.")
        from gemma_grpo.monitor.durable import to_json, translated, write_atomically

        path = check_new(Path(name).expanduser() if name else free_file(self.run))
        header = {"run": self.run.resolve().name, "model": self.player.config.model_name}
        lines = [to_json(path.name, record) for record in records(header, self.exchanges)]
        with translated(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(line + "\n" for line in lines))
        say(f"saved {len(self.exchanges)} answers: {printable(str(path))}", flush=True)

    def _need_question(self) -> None:
        if not self.conversation.messages(self.conversation.sides[0]):
            raise ValueError("there is no question yet. Type one, or /prompt for a held-out one.")


def difference_line(reply: Reply) -> str:
    """How much likelier training made a reply, and the tokens where it did most: one line."""
    ranked = sorted(zip(reply.log_ratios, reply.pieces, strict=True), key=lambda one: -abs(one[0]))
    most = [f"{_quoted(piece)} {ratio:+.2f}" for ratio, piece in ranked[:SHOWN_TOKENS] if abs(ratio) >= LEAST_SHOWN]
    where = f"most at {', '.join(most)}" if most else f"nowhere more than {LEAST_SHOWN:g}"
    return f"  [log tuned - log base: {sum(reply.log_ratios) + 0.0:+.2f} nats over {reply.length} tokens, {where}]"


def opinion_lines(side: Side, opinion: Opinion) -> list[str]:
    """What the reward makes of a side's reply, and of what it is made up."""
    told = "no part could score it" if opinion.total is None else f"{opinion.total:.3f}"
    lines = [f"reward of {side}: {told}" + ("" if opinion.complete else " without the parts that could not be computed")]
    width = max((len(part.name) for part in opinion.parts), default=0)
    for part in opinion.parts:
        said = f"{part.raw:8.3f}, counts {part.counted:+.3f}" if part.raw is not None and part.counted is not None else f"none: {part.why}"
        lines.append(f"  {printable(part.name):<{width}} x {part.weight:<4g} {printable(said)}")
    return [*lines, *(f"  [{printable(note)}]" for note in opinion.notes)]


def _quoted(piece: str) -> str:
    return f"'{printable(piece)}'" if piece else "the end"


def _lines() -> Iterator[str]:
    """What is typed, or comes from a pipe, which is shown too: what is printed then reads as the conversation."""
    with suppress(AttributeError):  # where stdin is replaced or closed
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    if sys.stdin is None:
        return
    if not sys.stdin.isatty():
        while line := sys.stdin.readline():
            say(f"{PROMPT}{line.strip()}", flush=True)
            yield line.strip()
        return
    with suppress(ImportError):
        import readline  # noqa: F401  what is typed can be edited, and called back
    while True:
        try:
            yield input(PROMPT).strip()
        except EOFError:
            say("")
            return


@contextmanager
def _until_interrupted() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl+C was pressed since: the first one is only noted, a second leaves at once."""
    pressed = False

    def heard(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, heard)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
