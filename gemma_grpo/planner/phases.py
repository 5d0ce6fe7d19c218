"""The phases of a run and what each holds at its peak, from the terms of terms.py, attention.py and sampling.py.

A phase passes through stages (a layer's backward pass, then the head's, and so on) that give their memory back one after the other:
the largest counts. Batches are planned at full length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gemma_grpo.config.schema import GRPOConfig
from gemma_grpo.planner import attention, sampling, terms
from gemma_grpo.planner.terms import NOT_SHARDED, Numbers, Pass, Sharding
from gemma_grpo.room import Room
from gemma_grpo.shapes import ModelShape

BASE, ADAPTERS, SLIDING_KV, GLOBAL_KV = "base weights", "adapters, optimizer", "KV, sliding layers", "KV, global layers"
ACTIVATIONS, LOGITS, PROGRAM = "activations", "logits, sampling", "program, context"
PARTS = (BASE, ADAPTERS, SLIDING_KV, GLOBAL_KV, ACTIVATIONS, LOGITS, PROGRAM)

JUDGE_TOKENS = 24
"""The judge's question after a completion, closing and opening turn included, rounded up."""
REFERENCE_PROMPTS, REFERENCE_SAMPLES = 64, 4
"""Prompts on which the trained reward is centred, and completions of each (grpo/assess.py)."""

Stage = Mapping[str, float]


@dataclass(frozen=True)
class Phase:
    """What is held at one phase's peak."""

    name: str
    parts: Mapping[str, int]
    """Part -> bytes; every part of PARTS, 0 where there is none of it."""

    @property
    def total(self) -> int:
        """Bytes of all parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Budgets:
    """Padded tokens of one pass, and tokens of keys and values held while sampling."""

    tokens: int
    kv_tokens: int


@dataclass(frozen=True)
class Run:
    """What the phases are worked out for."""

    config: GRPOConfig
    shape: ModelShape
    numbers: Numbers
    rewards: frozenset[str]
    """Names of the rewards; "generative" is trained unless reward_model.path is given, "judge" is the base's own verdict."""
    sharding: Sharding = NOT_SHARDED

    @property
    def trains_reward(self) -> bool:
        """Whether a reward adapter is trained before the policy."""
        return "generative" in self.rewards and self.config.reward_model.path is None

    @property
    def whole_step(self) -> Budgets:
        """batch_size full groups a pass, and all prompts of a step sampled together."""
        config = self.config
        group = config.max_prompt_length + config.num_generations * config.max_completion_length
        return Budgets(config.batch_size * group, config.prompts_per_step * group)

    @property
    def smallest(self) -> Budgets:
        """One completion at a time: what cannot be cut further."""
        one = self.config.max_prompt_length + self.config.max_completion_length
        return Budgets(one, one)

    @property
    def rooms(self) -> list[int]:
        """Tokens of keys and values that make a difference while sampling, ascending: one more completion of one group, then one
        more group."""
        config = self.config
        prompt, completion, group = config.max_prompt_length, config.max_completion_length, config.num_generations
        parts = [prompt + rows * completion for rows in range(1, group)]
        return parts + [count * (prompt + group * completion) for count in range(1, config.prompts_per_step + 1)]

    def phases(self, budgets: Budgets) -> list[Phase]:
        """All phases that this run has, in their order."""
        held = [self.loading(), *([self.reward_training(budgets.tokens)] if self.trains_reward else [])]
        held.append(self.rollout(budgets))
        if self.rewards & {"generative", "judge"}:
            held.append(self.reward(budgets.tokens))
        if self.config.kl.placement != "off" and "judge" not in self.rewards:
            held.append(self.reference(budgets.tokens))
        held.append(self.update(budgets.tokens))
        if self.evaluation_groups():
            held.append(self.evaluation(budgets))
        return held

    def loading(self) -> Phase:
        """The base, as its last tensor is read; with NF4 a linear layer is there in full before it is quantised."""
        whole_layer = 2 * terms.nf4_workspace(self.shape, self.numbers)
        return self._phase("loading", 0, {ACTIVATIONS: terms.READING_BYTES + whole_layer})

    def rollout(self, budgets: Budgets) -> Phase:
        """Sampling the groups of a step: as many prompts together as keys and values allow."""
        return self._sampling("rollout", budgets, {self.config.num_generations: self.config.prompts_per_step})

    def evaluation(self, budgets: Budgets) -> Phase:
        """Sampling held-out prompts, fewer completions of more prompts than in training."""
        return self._sampling("evaluation", budgets, self.evaluation_groups())

    def evaluation_groups(self) -> dict[int, int]:
        """Completions per prompt -> prompts sampled together, in evaluation and in centring the reward (grpo/assess.py)."""
        config, groups = self.config, dict[int, int]()
        if config.evaluation.num_prompts:
            size = config.evaluation.num_completions
            groups[size] = min(config.evaluation.num_prompts, max(1, config.completions_per_step // size))
        if self.trains_reward:
            size = REFERENCE_SAMPLES
            groups[size] = max(groups.get(size, 0), min(REFERENCE_PROMPTS, max(1, config.completions_per_step // size)))
        return groups

    def reward(self, tokens: int) -> Phase:
        """A judge reads completions and its question: two rows of the head, no logits. The zero-shot judge's pass gives the KL's
        log-probabilities too (reward/zero_shot.py)."""
        piece = self._pass(tokens, judged=True)
        heads = [self._head(piece)] if "judge" in self.rewards and self.config.kl.placement != "off" else []
        return self._phase("reward", terms.ADAPTER_COPIES, self._forward(piece), *heads)

    def reference(self, tokens: int) -> Phase:
        """Log-probabilities with the adapters off, without gradients."""
        piece = self._pass(tokens)
        return self._phase("reference", terms.ADAPTER_COPIES, self._forward(piece), self._head(piece))

    def update(self, tokens: int) -> Phase:
        """Forward and backward through the policy, beside what the updater keeps to take a step back."""
        piece = self._pass(tokens)
        head = self._learned_head(piece, slopes=1 + self._rewards_entropy)
        return self._phase("update", terms.ADAPTER_COPIES + terms.UPDATE_COPIES, *self._backward(piece), head)

    def _learned_head(self, piece: Pass, slopes: int) -> Stage:
        """Log-probabilities that are learned from: what the layers and the head keep for the backward pass, and the logits."""
        shape, numbers = self.shape, self.numbers
        read = self._after_layers(piece) + terms.rotary(shape, numbers, piece.tokens) + terms.kept_by_head(shape, piece, slopes)
        logits = terms.logits(shape, numbers, piece.completion_tokens, slopes)
        return {ACTIVATIONS: self._kept_by_layers(piece) + read, LOGITS: logits}

    @property
    def _rewards_entropy(self) -> bool:
        """Whether an update may have to learn from the entropy too."""
        kl, entropy = self.config.kl, self.config.entropy
        return bool(kl.placement != "off" and kl.beta and entropy.threshold and entropy.max_alpha_ratio)

    def reward_training(self, tokens: int) -> Phase:
        """Bradley-Terry on pairs: a conversation and its two replies are never cut apart."""
        settings = self.config.reward_model
        longest = 2 * settings.max_length  # a short question with two replies that fill the limit
        read = max(longest, min(tokens, settings.batch_size * longest))
        half = settings.max_length // 2
        piece = Pass.of(read, settings.max_length - half, 2, half)
        # DPO's member reads log-probabilities, as an update does
        heads = [self._learned_head(piece, slopes=1)] if settings.implicit_member else []
        return self._phase("reward training", terms.REWARD_TRAINING_COPIES, *self._backward(piece), *heads)

    @property
    def _further_judges(self) -> int:
        """Adapters beside policy and reward: other members of the ensemble, and the witness. Two sources are assumed for per_source."""
        settings, witness = self.config.reward_model, self.config.witness
        if "generative" not in self.rewards:
            return 0
        members = settings.members + settings.implicit_member
        return members * (2 if settings.per_source else 1) - 1 + bool(witness.share or witness.path)

    def _phase(self, name: str, copies: int, *stages: Stage, sampling: bool = False) -> Phase:
        fixed = {
            BASE: terms.base_weights(self.shape, self.numbers, self.sharding, sampling=sampling),
            ADAPTERS: terms.adapters(self.shape, self.config.lora, copies + self._further_judges),
            PROGRAM: terms.program(self.shape, self.numbers),
        }
        largest = max(stages, key=lambda stage: sum(stage.values()))
        held = {part: round(fixed.get(part, 0) + largest.get(part, 0)) for part in PARTS}
        return Phase(name, held)

    def _sampling(self, name: str, budgets: Budgets, groups: Mapping[int, int]) -> Phase:
        stages = [stage for group, prompts in groups.items() for stage in self._sampling_stages(group, prompts, budgets)]
        return self._phase(name, terms.ADAPTER_COPIES, *stages, sampling=True)

    def _sampling_stages(self, group: int, prompts: int, budgets: Budgets) -> list[Stage]:
        """Prefill; drawing a token for every row; a layer of the next token."""
        config, shape, numbers = self.config, self.shape, self.numbers
        room = Room.of(prompts, config.max_prompt_length, group, config.max_completion_length, budgets.kv_tokens)
        held = dict(zip((SLIDING_KV, GLOBAL_KV), sampling.kv_cache(shape, numbers, room), strict=True))
        rows, draw = sampling.rows(shape, numbers, room), sampling.drawing(shape, config, numbers, room)
        decode = sampling.decoding(shape, numbers, room) + terms.nf4_workspace(shape, numbers)
        # graphs keep what a step needs to themselves: it is there beside what a step without a graph, or a prefill, takes
        graphs = max(draw, decode) if numbers.on_cuda else 0.0
        # admitted as whole groups, read as many at a time as a pass may
        new = Pass(max(1, min(room.rows // group, budgets.tokens // room.width)), room.width, 0, room.length)
        prefill = max(self._forward(new)[ACTIVATIONS], self._beside_layers(new) + attention.prefill(shape, numbers, new.prompt_tokens))
        return [
            {**held, ACTIVATIONS: rows + prefill, LOGITS: graphs},
            {**held, ACTIVATIONS: rows, LOGITS: graphs + draw},
            {**held, ACTIVATIONS: rows + decode, LOGITS: graphs},
        ]

    def _pass(self, tokens: int, *, judged: bool = False) -> Pass:
        config = self.config
        length = config.max_completion_length + (JUDGE_TOKENS if judged else 0)
        # PAR's reference reply is judged as one more completion of its group (reward/shaping.py)
        group = config.num_generations + (judged and config.reward_model.shaping == "par")
        # no pass is longer than its step
        step = config.prompts_per_step * (config.max_prompt_length + group * length)
        return Pass.of(min(tokens, step), config.max_prompt_length, group, length)

    def _beside_layers(self, piece: Pass) -> float:
        """What is there while any layer computes: positions, masks, and an unpacked linear layer."""
        shape, numbers = self.shape, self.numbers
        shared = terms.rotary(shape, numbers, piece.tokens) + attention.masks(shape, numbers, piece)
        return shared + terms.nf4_workspace(shape, numbers)

    def _forward(self, piece: Pass) -> Stage:
        """The most a layer holds while computing forward: in its attention or in its feed-forward half."""
        shape, numbers = self.shape, self.numbers
        layer = max(attention.forward(shape, numbers, piece), terms.mlp_forward(shape, self.config.lora, numbers, piece))
        return {ACTIVATIONS: self._beside_layers(piece) + layer}

    def _head(self, piece: Pass) -> Stage:
        """Log-probabilities from the hidden states, without gradients."""
        logits = terms.logits(self.shape, self.numbers, piece.completion_tokens, 0)
        return {ACTIVATIONS: self._after_layers(piece), LOGITS: logits}

    def _after_layers(self, piece: Pass) -> float:
        return terms.last_hidden(self.shape, self.numbers, piece) + attention.masks(self.shape, self.numbers, piece)

    def _saved(self, piece: Pass, *, layer_input: bool) -> tuple[float, float]:
        """What one layer keeps: its attention, and the rest."""
        shape, lora, numbers = self.shape, self.config.lora, self.numbers
        rest = terms.saved_mlp(shape, lora, numbers, piece) + terms.saved_norms(shape, numbers, piece, layer_input=layer_input)
        return attention.saved(shape, lora, numbers, piece), rest

    def _kept_by_layers(self, piece: Pass) -> float:
        """What all layers keep between forward and backward: their inputs alone, or all that they saved."""
        if self.config.gradient_checkpointing:
            return terms.checkpoints(self.shape, self.numbers, piece.tokens)
        return self.shape.num_layers * sum(self._saved(piece, layer_input=True))

    def _backward(self, piece: Pass) -> list[Stage]:
        """A layer computed forward; then backward through its last norm, its feed-forward half and its attention."""
        shape, lora, numbers = self.shape, self.config.lora, self.numbers
        kept = self._kept_by_layers(piece)
        held = kept + self._beside_layers(piece)
        # checkpointed, one layer's saved tensors come on top; else the last layer's are among those kept
        saved, rest = self._saved(piece, layer_input=False) if self.config.gradient_checkpointing else (0.0, 0.0)
        mlp, norm = terms.saved_mlp(shape, lora, numbers, piece), terms.first_norm(shape, numbers, piece)
        left = held + saved + norm if self.config.gradient_checkpointing else held - mlp
        return [
            {ACTIVATIONS: kept + self._forward(piece)[ACTIVATIONS]} if self.config.gradient_checkpointing else {ACTIVATIONS: held},
            {ACTIVATIONS: held + saved + rest + terms.norm_backward(shape, numbers, piece)},
            {ACTIVATIONS: held + saved + rest + terms.mlp_backward(shape, lora, numbers, piece)},
            {ACTIVATIONS: left + attention.backward(shape, numbers, piece)},
        ]
