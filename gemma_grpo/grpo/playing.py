"""Playing with a run: the base with its adapter off and on, one reply at a time, with the run's own reward and what each token drifted.

Owns one loaded model of a run that nobody trains here: it reads the run directory and writes nothing. One reply at a time, from one
thread. Where the words are shown is the terminal's and the page's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from gemma_grpo.access import AccessError
from gemma_grpo.checkpoint import read_checkpoint
from gemma_grpo.config import GRPOConfig, load_recipe
from gemma_grpo.data.batch import pad_rollouts
from gemma_grpo.data.hh_rlhf import LoadedPairs
from gemma_grpo.data.pieces import GrowingText
from gemma_grpo.data.prompts import PromptRow, build_prompts, conversation_id, is_held_out
from gemma_grpo.data.sources import DataError
from gemma_grpo.grpo import preflight
from gemma_grpo.grpo.beside import playing_device
from gemma_grpo.grpo.opinion import Opinion, Rewards
from gemma_grpo.grpo.preparation import PROBE_PROMPTS
from gemma_grpo.grpo.resuming import BASE, check_base
from gemma_grpo.grpo.setup import GIVEN_ROWS, Functions, load_rows
from gemma_grpo.grpo.step import role_logprobs, sampling_params
from gemma_grpo.model.gemma import REFERENCE, Gemma
from gemma_grpo.monitor.choices import FINAL, Choice, choices, chosen
from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.rollout.engine import SamplingParams
from gemma_grpo.rollout.streaming import DrawnToken, stream
from gemma_grpo.types import Completion, Message, PreferencePair, Prompt, RolloutGroup, Side

_ROLES = {"tuned": "policy", "base": REFERENCE}
PLAY_STEP = -4
"""Sampling counter of what is played: neither training nor any measurement draws the same numbers."""
SOURCE = "playground"
"""Of a prompt that somebody typed."""
MOST_PROMPTS = 200
"""Held-out prompts that are made ready: a person looks at a few."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer, and what is known of each of its tokens."""

    side: Side
    seed: int
    text: str
    """Without the stop token."""
    pieces: tuple[str, ...]
    """What each token brought; together the text. Empty for the stop token, and for one whose character was not yet complete."""
    log_ratios: tuple[float, ...]
    """log policy - log reference of each token, in nats, at the run's own temperature: positive where training made it likelier."""
    finish: Literal["stop", "length", "interrupted"]
    completion: Completion
    """The same as rewards see it: an interrupted reply is one that was cut off."""
    left_out: int
    """The conversation's oldest messages that did not fit into max_prompt_length."""

    @property
    def length(self) -> int:
        """Tokens, the stop token included."""
        return len(self.completion.token_ids)


class Player:
    """A run's model, to be asked. Make one with `open`."""

    def __init__(self, run: RunDirectory, model: Gemma, functions: Functions | None, config: GRPOConfig) -> None:
        self.run, self.model, self._functions, self.config = run, model, functions, config
        self.choice: Choice | None = None
        """Whose answers "tuned" are."""

    @classmethod
    def open(
        cls,
        run_dir: str | Path,
        checkpoint: str = FINAL,
        *,
        beside: bool = False,
        reward_functions: Functions | None = None,
        config: GRPOConfig | None = None,
    ) -> Player:
        """Load a run's base once, with one of its adapters on it; with `config`, as that says instead of the run's own settings.

        Raises ValueError for an adapter that is not there, a base that is not the run's, or, unless a device is spare or `beside` puts
        the copy on the CPU, a run that is being written.
        """
        run = RunDirectory.reading(run_dir)
        chosen(run.path, checkpoint)  # before a base is loaded for it
        config, device = config or load_recipe(run.recipe), playing_device(run.path, beside=beside)
        preflight.hold_to_limit(config)
        model = Gemma.load(
            config.model_name,
            lora=config.lora,
            precision=config.precision,
            quantization=config.quantization,
            device=device,
            seed=config.seed,
        )
        if (run.path / BASE).is_file():
            check_base(run, config.model_name, model.checksums)
        player = cls(run, model, reward_functions, config)
        player._fit_precision()
        player.choose(checkpoint)
        return player

    @staticmethod
    def choices(run_dir: str | Path) -> list[Choice]:
        """The adapters that a run has; monitor/choices.py lists them without loading torch."""
        return choices(run_dir)

    def choose(self, checkpoint: str) -> Choice:
        """Put another of the run's adapters on the same base. Raises ValueError for one that is not there or not whole."""
        choice = chosen(self.run.path, checkpoint)
        folder = choice.folder if choice.checkpoint is None else read_checkpoint(choice.checkpoint).adapter("policy")
        self.model.load_adapter("policy", folder)
        self.choice = choice
        return choice

    # ---- asking

    def stream(
        self,
        messages: Sequence[Message],
        side: Side = "tuned",
        *,
        seed: int,
        max_tokens: int | None = None,
        temperature: float | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[str | Reply]:
        """The answer's text in pieces, then the whole as a Reply. The same arguments give the same answer, on either side.

        Limit and temperature are the run's own where none are given; temperature 0 takes the likeliest token. `stop` is asked after
        every token: once it is true the reply ends there, interrupted. Raises ValueError for what cannot be asked.
        """
        prompt, left_out = self.fitted(messages)
        params = self._params(side, seed, max_tokens, temperature)
        self._check_room(prompt, params)
        text, drawn, interrupted = GrowingText(self.model.tokenizer), list[DrawnToken](), False
        for token in stream(self.model, prompt, params):
            drawn.append(token)
            if piece := text.add(token.token_id):
                yield piece
            interrupted = stop()
            if interrupted:
                break
        if rest := text.end():
            yield rest
        yield self._reply(prompt, left_out, side=side, seed=seed, text=text, drawn=drawn, interrupted=interrupted)

    def fitted(self, messages: Sequence[Message]) -> tuple[Prompt, int]:
        """The conversation as the model reads it, and how many of its oldest messages did not fit into max_prompt_length.

        Raises ValueError when the last message alone does not fit, is empty, or roles do not alternate.
        """
        if messages and not messages[-1]["content"].strip():
            raise ValueError("the last message is empty. Write one.")
        limit = self.config.max_prompt_length
        built = build_prompts([PromptRow(SOURCE, tuple(messages))], self.model.tokenizer, limit).prompts
        if not built:
            raise ValueError(f"the last message alone has more than max_prompt_length ({limit}) tokens, the run's limit. Write less.")
        return built[0], len(messages) - len(built[0].messages)

    def opinion(self, messages: Sequence[Message], reply: Reply) -> Opinion:
        """What the run's own reward makes of a reply to these messages; of a held-out prompt with its row's columns."""
        (prompt, _), (known, why) = self.fitted(messages), self._held_out
        notes = ["the reply was cut off, and is scored as such"] if reply.completion.finish == "length" else []
        if why:
            notes.append(f"the run's dataset cannot be read, so rewards get no columns: {why}")
        group = RolloutGroup(known.get(prompt.prompt_id, prompt), (reply.completion,), 0)
        return self._rewards.opinion(group, tuple(notes))

    def prompts(self) -> list[Prompt]:
        """Held-out prompts of the run, whole conversations alone, in the evaluation's order. Raises DataError where they cannot be had."""
        found, why = self._held_out
        if why:
            raise DataError(why)
        return list(found.values())

    # ---- parts

    @cached_property
    def _rewards(self) -> Rewards:
        return Rewards(self.model, self.run, self.config, self._functions)

    @cached_property
    def _held_out(self) -> tuple[dict[str, Prompt], str]:
        """Held-out prompts by id, and why there are none where the dataset cannot be read."""
        try:
            return self._read_held_out(), ""
        except (DataError, AccessError, OSError) as error:
            return {}, str(error)

    def _read_held_out(self) -> dict[str, Prompt]:
        config = self.config
        if config.dataset == GIVEN_ROWS:
            raise DataError("the run was trained on rows given in Python, which it does not keep. Type a question instead.")
        rows = load_rows(config.dataset, config.data.source)
        items: Sequence[PreferencePair | PromptRow] = rows.pairs if isinstance(rows, LoadedPairs) else rows.prompts
        held_out: dict[str, Prompt] = {}
        for item in items:
            if not is_held_out(conversation_id(item.messages), config.data.holdout):
                continue
            for prompt in build_prompts([item], self.model.tokenizer, config.max_prompt_length).prompts:
                # of one that lost turns the rest may be a prompt of training, under another first turn
                if len(prompt.messages) == len(item.messages):
                    held_out.setdefault(prompt.prompt_id, prompt)
            if len(held_out) == MOST_PROMPTS:
                break
        return held_out

    def _fit_precision(self) -> None:
        """As the run's base was; a card that needs float16 where the run did not is probed with held-out prompts."""
        if self.model.dtype != torch.float16:
            return
        divisor = self.run.read_run().get("precision", {}).get("divisor")
        probes = (
            [] if divisor else [*self._held_out[0].values()][:PROBE_PROMPTS] or [self.fitted([{"role": "user", "content": "Hello."}])[0]]
        )
        self.model.fit_precision([prompt.token_ids for prompt in probes], divisor=divisor)

    def _params(self, side: Side, seed: int, max_tokens: int | None, temperature: float | None) -> SamplingParams:
        if side not in _ROLES:
            raise ValueError(f"the side is {side!r}; there are {' and '.join(_ROLES)}. Name one of them.")
        params = sampling_params(self.config, PLAY_STEP, role=_ROLES[side], num_generations=1)
        warmth = self.config.temperature if temperature is None else temperature
        if not 0 <= warmth <= 100:
            raise ValueError(f"the temperature is {warmth:g}; it is at least 0, the likeliest token, and at most 100. Try 1.")
        greedy = {"temperature": 1.0, "top_k": 1, "top_p": 1.0} if warmth == 0 else {"temperature": warmth}
        limit = self.config.max_completion_length if max_tokens is None else max_tokens
        if limit < 1:
            raise ValueError(f"the reply may have {limit} tokens; it needs at least 1. Try {self.config.max_completion_length}.")
        return replace(params, seed=seed, max_completion_length=limit, **greedy)  # type: ignore[arg-type]

    def _check_room(self, prompt: Prompt, params: SamplingParams) -> None:
        wanted, most = len(prompt.token_ids) + params.max_completion_length, self.model.config.max_position_embeddings
        if wanted > most:
            raise ValueError(
                f"the conversation and its reply may have {wanted} tokens, and this model reads {most}. "
                f"Ask for at most {max(1, most - len(prompt.token_ids))} tokens, or begin a new conversation."
            )

    def _reply(
        self, prompt: Prompt, left_out: int, *, side: Side, seed: int, text: GrowingText, drawn: Sequence[DrawnToken], interrupted: bool
    ) -> Reply:
        ids, logprobs = tuple(token.token_id for token in drawn), tuple(token.logprob for token in drawn)
        stopped = text.stopped
        completion = Completion("".join(text.pieces), ids, logprobs, "stop" if stopped else "length")
        finish: Literal["stop", "length", "interrupted"] = "interrupted" if interrupted and not stopped else completion.finish
        ratios = self._log_ratios(RolloutGroup(prompt, (completion,), 0))
        return Reply(side, seed, completion.text, tuple(text.pieces), ratios, finish, completion, left_out)

    def _log_ratios(self, group: RolloutGroup) -> tuple[float, ...]:
        batch = pad_rollouts([group]).to(self.model.device)
        policy, reference = (role_logprobs(self.model, batch, role, temperature=self.config.temperature) for role in _ROLES.values())
        return tuple((policy - reference)[0, 0].tolist())
