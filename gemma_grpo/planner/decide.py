"""Decides a run's budgets for a card, whether it fits, and what would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from gemma_grpo.access import config_file
from gemma_grpo.cards import GIB, Card, known_cards, number_format
from gemma_grpo.config.schema import GRPOConfig
from gemma_grpo.planner.phases import PROGRAM, Budgets, Phase, Run
from gemma_grpo.planner.plan import Plan, Suggestion
from gemma_grpo.planner.terms import NOT_SHARDED, Numbers, Sharding
from gemma_grpo.shapes import ModelShape, known_shapes, shape_of

HEADROOM = 0.9
"""Budgets that are planned fill so much of the limit; the rest is for batches of other lengths and for the plan's own error."""
DEFAULT_REWARDS = frozenset({"generative"})
_WORTH_TELLING = 0.01
"""Suggestions save at least this share of the peak."""


class PreflightError(ValueError):
    """A run that would not fit, refused before anything is loaded."""


def find_shape(model_name: str) -> ModelShape:
    """Shape of any checkpoint: of a released one from the table, of a folder or another Hub id by its config.json, fetched alone.

    Raises AccessError when that cannot be had, ValueError when it is no Gemma 3.
    """
    return shape_of(model_name if model_name in known_shapes() else str(config_file(model_name).parent))


def plan_run(
    config: GRPOConfig,
    shape: ModelShape,
    card: Card,
    *,
    rewards: Collection[str] | None = None,
    num_prompts: int | None = None,
    ranks: int | None = None,
) -> Plan:
    """What a run holds on a card, phase by phase, with the budgets it shall use.

    `rewards` are the names of its rewards where the settings do not say (a function given in Python); `num_prompts` the training
    prompts, once known; `ranks` how many processes have been started, else there will be config.gpus of them. Raises ValueError when
    the card cannot do what precision or sharding asks.
    """
    names = frozenset(config.reward or DEFAULT_REWARDS) if rewards is None else frozenset(rewards)
    run = Run(config, shape, numbers_of(config, card), names)
    for sharding in _shardings(run, card, ranks or config.gpus):
        plan = _planned(replace(run, sharding=sharding), card, num_prompts)
        if plan.fits:
            break
    return plan


def _shardings(run: Run, card: Card, ranks: int) -> list[Sharding]:
    """How the base may be shared out, what costs least time first."""
    config = run.config
    if config.sharding == "full" and run.numbers.kind == "fp16_rescaled":
        raise ValueError(
            f"sharding is full, and on {card.name} the base is float16, whose passes are repeated at other scales: ranks could not keep "
            "step. Use sharding=none with quantization=nf4, or precision=fp32."
        )
    shared = [Sharding(ranks, whole_while_sampling=whole) for whole in (True, False)]
    if config.sharding == "none" or ranks == 1 or not _can_be_shared_out(run.numbers):
        return [NOT_SHARDED]
    return shared if config.sharding == "full" else [NOT_SHARDED, *shared]


def _can_be_shared_out(numbers: Numbers) -> bool:
    return not numbers.nf4 and numbers.kind != "fp16_rescaled"


def _planned(run: Run, card: Card, num_prompts: int | None) -> Plan:
    config, limit = run.config, _limit(run.config, card)
    budgets = _decided(run, limit)
    plan = Plan(
        model_name=config.model_name,
        card=card,
        precision=f"{run.numbers.kind}, linear layers in nf4" if run.numbers.nf4 else run.numbers.kind,
        lora=f"LoRA r={config.lora.r} on {_modules(config)}",
        limit_bytes=limit,
        sharding=run.sharding,
        token_budget=budgets.tokens,
        kv_token_budget=budgets.kv_tokens,
        one_completion=run.smallest.tokens,
        reduced=_reduced(run, budgets),
        phases=tuple(run.phases(budgets)),
        two_copies_bytes=_two_copies(run),
        batch_size=config.batch_size,
        num_generations=config.num_generations,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_prompts=num_prompts,
    )
    return plan if plan.fits else replace(plan, suggestions=tuple(_suggestions(run, card)))


def numbers_of(config: GRPOConfig, card: Card) -> Numbers:
    """How numbers are held on a card. Raises ValueError for a format it has not."""
    on_cuda = card.kind == "cuda"
    kind = number_format(config.precision, on_cuda=on_cuda, native_bf16=card.native_bf16, card=card.name)
    return Numbers(kind, config.quantization == "nf4", on_cuda)


def _limit(config: GRPOConfig, card: Card) -> int:
    """memory.limit_gib where it is set, but never more than the card has."""
    wanted = config.memory.limit_gib
    return card.usable_bytes if wanted is None else min(card.usable_bytes, round(wanted * GIB))


def _decided(run: Run, limit: int) -> Budgets:
    """Budgets as set, else those of a whole step, made smaller until the phases they decide leave their headroom."""
    memory, whole, least = run.config.memory, run.whole_step, run.smallest
    tokens = memory.token_budget or _largest(least.tokens, whole.tokens, partial(_passes, run), HEADROOM * limit)
    return Budgets(tokens, memory.kv_token_budget or _largest_room(run, tokens, HEADROOM * limit))


def _passes(run: Run, tokens: int) -> Iterator[Phase]:
    yield from (run.update(tokens), run.reference(tokens), run.reward(tokens))
    if run.trains_reward:
        yield run.reward_training(tokens)


def _samplings(run: Run, budgets: Budgets) -> Iterator[Phase]:
    yield run.rollout(budgets)
    if run.evaluation_groups():
        yield run.evaluation(budgets)


def _peak(phases: Iterator[Phase]) -> int:
    return max(phase.total for phase in phases)


def _largest(least: int, most: int, phases: Callable[[int], Iterator[Phase]], room: float) -> int:
    """The largest number of tokens from least to most whose phases fit the room, by halving; least where none does.

    A phase that is above the room whatever the budget says no reason to make the others' passes smaller: it may stay as it is.
    """
    allowed = {phase.name: max(room, phase.total) for phase in phases(least)}

    def fits(tokens: int) -> bool:
        return all(phase.total <= allowed[phase.name] for phase in phases(tokens))

    if fits(most):
        return most
    low, high = least, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _largest_room(run: Run, pass_tokens: int, room: float) -> int:
    """Tokens of keys and values of the most completions that fit; then room for prompts whose completions wait for each other's end."""
    rooms = run.rooms
    allowed = {phase.name: max(room, phase.total) for phase in _samplings(run, Budgets(pass_tokens, rooms[0]))}

    def fits(kv_tokens: int) -> bool:
        return all(phase.total <= allowed[phase.name] for phase in _samplings(run, Budgets(pass_tokens, kv_tokens)))

    def largest(choices: Sequence[int]) -> int:
        """By trying: other groups, those of the evaluation, do not hold ever more with ever more tokens."""
        return next(filter(fits, reversed(choices)), choices[0])

    found = largest(rooms)
    above = next((tokens for tokens in rooms if tokens > found), found + 1)
    return largest(range(found, above, run.config.max_prompt_length))


def _reduced(run: Run, budgets: Budgets) -> tuple[str, ...]:
    memory, whole = run.config.memory, run.whole_step
    cut = []
    if memory.token_budget is None and budgets.tokens < whole.tokens:
        cut.append("token_budget")
    if memory.kv_token_budget is None and budgets.kv_tokens < whole.kv_tokens:
        cut.append("kv_token_budget")
    return tuple(cut)


def _two_copies(run: Run) -> int:
    """Two copies of the whole checkpoint, vision tower included, unquantised, and the program: before a token is computed."""
    whole = run.shape.weight_bytes(run.numbers.bytes) + run.numbers.bytes * run.shape.vision_parameters
    return 2 * whole + run.loading().parts[PROGRAM]


def _modules(config: GRPOConfig) -> str:
    modules = dict.fromkeys(config.lora.target_modules)
    return "all linear layers" if len(modules) == 7 else ", ".join(modules)


# ---- what would help


def _smallest_peak(run: Run) -> int:
    """The peak at the smallest budgets that the settings allow."""
    memory, least = run.config.memory, run.smallest
    return _peak(iter(run.phases(Budgets(memory.token_budget or least.tokens, memory.kv_token_budget or least.kv_tokens))))


def _suggestions(run: Run, card: Card) -> list[Suggestion]:
    """Changes that lower the peak, the most effective first; then the smallest card that takes the run as it is."""
    now, found = _smallest_peak(run), []
    for change, settings, shape in _alternatives(run, card):
        config = _changed(run.config, settings)
        numbers = numbers_of(config, card)
        sharding = run.sharding if _can_be_shared_out(numbers) else NOT_SHARDED
        peak = _smallest_peak(replace(run, config=config, shape=shape or run.shape, numbers=numbers, sharding=sharding))
        if now - peak > _WORTH_TELLING * now:
            found.append(Suggestion(change, now - peak, peak <= _limit(config, card)))
    wanted = run.config.memory.limit_gib
    if wanted is not None and wanted * GIB < now <= card.usable_bytes:
        found.append(Suggestion("memory.limit_gib=null", 0, True))
    models = [suggestion for suggestion in found if suggestion.change.startswith("model_name=")]
    kept = next((model for model in models if model.fits), models[-1] if models else None)
    found = [suggestion for suggestion in found if suggestion not in models or suggestion is kept]
    found.sort(key=lambda suggestion: -suggestion.saves_bytes)
    return [*found, *_larger_card(run, card)]


def _alternatives(run: Run, card: Card) -> Iterator[tuple[str, dict[str, Any], ModelShape | None]]:
    """What to say, the settings changed, and the shape where it is another."""
    config, memory = run.config, run.config.memory
    changes: dict[str, Any] = {"max_completion_length": config.max_completion_length // 2 or 1}
    changes["max_prompt_length"] = max(8, config.max_prompt_length // 2)
    changes["num_generations"] = max(2, config.num_generations // 2)
    changes["reward_model.max_length"] = max(16, config.reward_model.max_length // 2)
    if not run.numbers.nf4 and card.kind == "cuda":
        changes["quantization"] = "nf4"
    if run.numbers.kind == "fp32" and card.kind == "cuda":
        changes["precision"] = "auto"
    if not config.gradient_checkpointing:
        changes["gradient_checkpointing"] = True
    if memory.token_budget is not None:
        changes["memory.token_budget"] = None
    if memory.kv_token_budget is not None:
        changes["memory.kv_token_budget"] = None
    if config.lora.r > 8:
        changes["lora.r"] = 8
    if set(config.lora.target_modules) - {"q_proj", "v_proj"}:
        changes["lora.target_modules"] = ("q_proj", "v_proj")
    for key, value in changes.items():
        also = {"sharding": "none"} if key == "quantization" and config.sharding == "full" else {}
        settings = {**also, key: value}
        yield " ".join(f"{name}={_shown(setting)}" for name, setting in settings.items()), settings, None
    # the largest first
    smaller = [shape for name, shape in known_shapes().items() if name.endswith("-it") and shape.parameters < run.shape.parameters]
    for shape in reversed(smaller):
        yield f"model_name={shape.name}", {"model_name": shape.name}, shape


def _changed(config: GRPOConfig, settings: dict[str, Any]) -> GRPOConfig:
    for key, value in settings.items():
        stage, _, name = key.rpartition(".")
        if stage:
            config = config.model_copy(update={stage: getattr(config, stage).model_copy(update={name: value})})
        else:
            config = config.model_copy(update={name: value})
    return config


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(value)}]"
    return "null" if value is None else str(value).lower()


def _larger_card(run: Run, present: Card) -> Iterator[Suggestion]:
    """The smallest known card above the present one on which the settings, limit_gib among them, fit as they are."""
    for card in sorted(known_cards().values(), key=lambda card: card.usable_bytes):
        if card.usable_bytes <= present.usable_bytes or (run.config.precision == "bf16" and not card.native_bf16):
            continue
        numbers = numbers_of(run.config, card)
        sharding = run.sharding if _can_be_shared_out(numbers) else NOT_SHARDED
        if _smallest_peak(replace(run, numbers=numbers, sharding=sharding)) <= _limit(run.config, card):
            yield Suggestion(f"a larger card, such as {card.name} ({card.usable_bytes / GIB:.1f} GiB)", 0, True)
            return
