"""Every setting: one frozen pydantic model per stage. Each field has a default, a unit and a sentence; unknown keys are errors.

Owns what a setting means and its limits; reading recipes is recipe.py. Defaults: the reasons are in docs/method.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gemma_grpo.config.base import TOO_MANY, Count, Fraction, NonNegative, Positive, Stage, Whole
from gemma_grpo.config.machine import MemorySettings, RanksSettings, SandboxSettings, ServingSettings, WatchdogSettings
from gemma_grpo.redact import holds_secret

SERVED_TIS_CAP = 2.0
"""loss.tis_cap of a run whose completions come from other engines, where none is given; 2 to 3 are usual for weights of tokens."""


class LoraSettings(Stage):
    """The low-rank adapter of the policy and of the reward (arXiv:2106.09685)."""

    r: Count = 8
    """Rank of the update."""
    alpha: Positive = 16
    """Scale numerator: the update is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an adapter input while training; sampling and scoring never drop."""
    target_modules: tuple[Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], ...] = ("q_proj", "v_proj")
    """Linear layers that get an adapter. Never lm_head or embed_tokens: Gemma ties them, and merging would change both."""


class SamplingSettings(Stage):
    """Filters on the sampled distribution; off by default, because a filter makes the sampler differ from the scored policy."""

    top_k: Whole = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep the smallest set of tokens with this probability mass; 1 keeps all."""

    @property
    def is_filtered(self) -> bool:
        """Whether log-probabilities of what was sampled are other than the policy's own."""
        return self.top_k > 0 or self.top_p < 1


class AdvantageSettings(Stage):
    """How rewards become advantages (docs/method.md, advantages)."""

    baseline: Literal["leave_one_out", "mean", "length_weighted"] = "leave_one_out"
    """Subtracted from each reward: mean of the group's others (RLOO, unbiased), of all (GRPO), or length-weighted (OPO)."""
    scale: Literal["batch", "group", "none"] = "batch"
    """Divide by the std of the centred rewards of the batch, of each group's rewards (GRPO), or not at all (Dr. GRPO)."""
    clip: Positive | None = 5.0
    """Largest absolute advantage; null for no limit."""
    aggregation: Literal["sum", "gdpo"] = "sum"
    """Several rewards: weighted sum first, or each normalised within its group first (GDPO)."""
    no_signal_steps: Whole = 20
    """Stop after so many steps in a row in which every group's rewards were equal, and fail when all of a run's were; 0 allows both."""


class LossSettings(Stage):
    """The policy surrogate (docs/method.md, losses)."""

    type: Literal["ppo", "gspo", "cispo", "sapo"] = "ppo"
    """Clipped token ratio (PPO, GRPO), clipped sequence ratio (GSPO), clipped weight (CISPO) or soft gate (SAPO, which reads no clip)."""
    aggregation: Literal["dr_grpo", "grpo", "dapo", "bnpo"] = "dr_grpo"
    """Denominator: completions x max length, each completion's own length, all tokens of the step, or of the micro-batch."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Importance ratio is clipped below at 1 - clip_low."""
    clip_high: Positive = 0.2
    """Importance ratio is clipped above at 1 + clip_high. PPO 0.2; DAPO 0.28, for verifiable rewards (arXiv:2503.14476)."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """For negative advantages the loss is capped at -dual_clip x advantage; null for no cap."""
    tis_cap: Positive | None = None
    """Truncated importance sampling between sampler and trainer: weight min(ratio, cap). null: none, and 2 with serving.urls."""
    tis_mask: Annotated[float, Field(gt=1)] | None = None
    """Tokens whose ratio of trainer to sampler is outside [1 / tis_mask, tis_mask] count nothing (IcePop); null masks none."""


class KLSettings(Stage):
    """The leash to the reference, and the limit of one step (docs/method.md, KL)."""

    placement: Literal["loss", "reward", "off"] = "loss"
    """Penalty in the loss per token, in the reward per sequence, or none (the reference pass is then skipped)."""
    estimator: Literal["ratio_k3", "ratio_k1", "k1", "k2", "k3"] = "ratio_k3"
    """Per-token estimator in the loss. ratio_k3 descends the reverse KL; plain k3 descends the forward one."""
    beta: NonNegative = 0.05
    """Initial weight of the penalty, per nat: in units of advantage in the loss, of reward in the reward."""
    beta_min: NonNegative = 0.005
    """The controller never goes below."""
    beta_max: Positive = 1.0
    """The controller never goes above."""
    ref_target: Positive | None = 0.05
    """KL to the reference the controller steers to, nat per token; null keeps beta fixed."""
    step_limit: Positive | None = 0.05
    """KL to the sampling policy, nat per token: above it the remaining passes stop, above 1.5 x it the update is rolled back."""
    hard_stop_steps: Whole = 20
    """Stop training when the smoothed KL stays above twice ref_target for so many steps; 0 never stops."""


class EntropySettings(Stage):
    """Keeps the policy from collapsing; asleep until needed (docs/method.md, entropy)."""

    threshold: NonNegative = 0.7
    """The bonus wakes when entropy falls below this fraction of its first value; 0 switches it off."""
    max_alpha_ratio: NonNegative = 0.1
    """The bonus weight never exceeds this fraction of the KL weight: alpha tempers the reference to (beta + alpha) / beta."""
    step: Positive = 0.05
    """Change of the bonus weight per training step, as a fraction of its maximum: up while below the threshold, down above."""


class OptimizerSettings(Stage):
    """AdamW over the adapter's weights."""

    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.0
    """Decoupled decay per update."""
    max_grad_norm: Positive | None = 1.0
    """Gradients are scaled down to this norm; null for no limit."""
    warmup_updates: Whole = 0
    """Updates over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """After the warm-up: constant, or down to 0 at the last update."""
    spike_sigma: Positive | None = 6.0
    """A gradient norm is a spike beyond so many standard deviations (of its logarithm) above those before; null looks for none."""
    on_spike: Literal["skip", "stop"] = "skip"
    """What a spike does: the step's remaining updates are left out and counted (skipped_updates), or the run stops."""


class RewardModelSettings(Stage):
    """Training of the "reward" adapter on preference pairs: Bradley-Terry on the judge's log-odds."""

    path: str | None = None
    """A trained reward adapter to use instead of training one."""
    learning_rate: Positive = 1e-4
    """Peak learning rate; linear decay to 0 over the one epoch."""
    batch_size: Count = 16
    """Pairs per update; both sides of a pair are always in one batch."""
    max_pairs: Count | None = None
    """Train on at most so many pairs; null for all."""
    max_length: Annotated[int, Field(ge=16, lt=TOO_MANY)] = 1024
    """Longest dialogue in tokens, verdict included; longer ones lose whole turns from the left."""
    centering: NonNegative = 0.01
    """Weight of (r_chosen + r_rejected)^2, which keeps rewards around 0 (arXiv:2312.09244)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of wrong labels."""
    shaping: Literal["par", "none"] = "par"
    """PAR: sigmoid(reward - reference reward), bounded, so that no outlier buys an update (arXiv:2502.18770)."""
    par_reference: Literal["chosen", "samples"] = "chosen"
    """PAR's reference: the dataset's preferred reply (else the untouched model's mean), or one reply of the untouched model per prompt."""
    members: Count = 1
    """Adapters trained as judges (for each source, with per_source); each leaves out another part of the conversations."""
    combine: Literal["uwo", "worst"] = "uwo"
    """Several judges as one: mean - uncertainty x variance, or the lowest (arXiv:2310.02743)."""
    uncertainty: NonNegative = 0.5
    """Weight of the judges' variance in uwo, per unit of log-odds."""
    per_source: bool = False
    """Adapters of their own for every source of the pairs: preferences for helpful and for harmless replies contradict each other."""
    implicit_member: bool = False
    """One more member, trained on the same pairs as DPO trains: its verdict is dpo_beta (log pi - log pi_ref) of the whole reply."""
    dpo_beta: Positive = 0.1
    """Of that member, and of DPO among the baselines (`evaluate --baselines`): reward per nat of distance to the untouched model."""
    length_residual: bool = False
    """Takes out of the reward what a linear function of the reply's length explains, source by source."""


class WitnessSettings(Stage):
    """What watches a run without being trained on: a judge of its own on other pairs, and counts (docs/overoptimisation.md)."""

    share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the pairs' conversations that teach the witness and not the reward; 0 for no witness. Only where the reward is trained."""
    path: str | None = None
    """A trained witness adapter to use instead of training one; null takes the one beside reward_model.path, if there is one."""
    every: Whole = 5
    """Steps between two looks; 0 never looks."""
    num_prompts: Count = 64
    """Held-out prompts answered at each look, always the same and with the same random numbers."""
    num_completions: Count = 1
    """Replies to each of them."""
    look_alikes: Annotated[int, Field(ge=0, le=40)] = 16
    """Bundled harmless requests that only look harmful, asked beside them where the data have none: are they refused? 0 asks none."""
    stop_on_alert: bool = False
    """Ends the run at an alarm of the highest level; the best adapter by witness is kept in any case."""


class JudgeSettings(Stage):
    """The untouched model as a judge: reward "judge" reads one reply, "pairwise" compares two, in both orders."""

    rubric: str | None = None
    """What makes a reply good, in a few lines of text that the judge is shown before its question; null asks plainly."""
    opponents: Whole = 3
    """pairwise: how many others of its group each completion is compared with; 0 for all."""
    least_accuracy: Fraction = 0.6
    """Below this share of held-out pairs, on any source, a judge is logged and counts for nothing; 0 takes any. Of no use without pairs."""


class RewardFunctionSettings(Stage):
    """How a reward function given in Python is called. Rewards named in a recipe are the package's own, and always stop the run."""

    timeout: Positive | None = None
    """Seconds for one call, which then has its own process and is killed; null calls it in this one: it remembers, and may use the GPU."""
    on_failure: Literal["stop", "skip"] = "stop"
    """A call that fails or is late, a score that cannot be used: stop the run, or leave those completions unscored and count them."""
    max_skipped: Fraction = 0.5
    """Share of a step's completions that may be skipped; above it the run stops."""


class DataSettings(Stage):
    """Which rows, and how they are parted."""

    source: str | None = None
    """Name of the rows' origin such as "harmless-base"; null takes it from the file name."""
    max_prompts: Count | None = None
    """Train on at most so many prompts; null for all."""
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of conversations kept for evaluation; a conversation is never on both sides."""
    strict: bool = False
    """true stops at the first row that is no usable pair or prompt, with its place; false drops and counts it."""


class EvaluationSettings(Stage):
    """Before and after, on held-out prompts."""

    num_prompts: Whole = 128
    """Held-out prompts sampled with and without the adapter; 0 skips the evaluation."""
    num_completions: Count = 1
    """Completions of each held-out prompt."""
    primary: (
        Literal["gold", "witness", "win_rate", "win_rate_chosen", "reward", "refusal_harmful", "refusal_looks_harmful", "refusal_benign"]
        | None
    ) = None
    """What the run is judged by, named before it begins; null: gold where it is known, else the held-out judge, else the reward."""


class GRPOConfig(Stage):
    """The whole run. Same names in Python, in a recipe and as key=value on the command line."""

    model_name: str = "google/gemma-3-4b-it"
    """Hub id or folder of a Gemma 3 checkpoint; "miniature" is the tiny one that ships with the package."""
    dataset: str = "Anthropic/hh-rlhf"
    """Hub id or file of preference pairs or prompts; "miniature" is the shipped world, "bundled:NAME" an application's prompts."""
    reward: dict[str, float] | None = None
    """Reward name -> weight; null takes the trained generative reward with small rules against degenerate text."""
    output_dir: str | None = None
    """Run directory; null makes runs/<model>-<dataset>-<number>."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Decides adapter start, data order and every sampled token."""
    learning_rate: Positive = 1e-5
    """Peak learning rate of the policy adapter."""
    batch_size: Count = 2
    """Prompts per micro-step (not completions)."""
    gradient_accumulation_steps: Count = 8
    """Micro-steps per update; prompts per update = batch_size x this."""
    epochs: Positive = 1.0
    """Passes over the training prompts."""
    max_steps: Count | None = None
    """Stop after so many rollout batches, whatever epochs says."""
    max_minutes: Positive | None = None
    """Stop in time, with a checkpoint to go on from (exit code 75): a session that will be ended, or a slot of a cluster."""
    gpus: Count = 1
    """Processes that share the run on this machine, each with a GPU of its own (with a CPU core where there is none)."""
    num_generations: Annotated[int, Field(ge=2, lt=TOO_MANY)] = 8
    """Completions per prompt (G); a group needs at least 2 to have a baseline."""
    planning_steps: Count = 2
    """Optimisation passes over one rollout batch."""
    max_prompt_length: Annotated[int, Field(ge=8, lt=TOO_MANY)] = 512
    """Prompt tokens; longer conversations lose whole turns from the left, and a last turn that alone is longer is dropped and counted."""
    max_completion_length: Count = 256
    """Tokens sampled at most per completion, stop token included."""
    temperature: Positive = 1.0
    """Divides the logits, in sampling and in every log-probability alike."""
    save_steps: Whole = 50
    """Steps between checkpoints; 0 saves at the end only."""
    keep_checkpoints: Annotated[int, Field(ge=2, lt=TOO_MANY)] | None = 3
    """How many of the newest are kept; null keeps all. Never fewer than 2: a disk can damage the last one."""
    precision: Literal["auto", "fp32", "bf16", "fp16_rescaled"] = "auto"
    """Weights of the frozen base: auto takes bf16 where a GPU has units for it, else fp16 rescaled by a power of two; fp32 on a CPU."""
    quantization: Literal["none", "nf4"] = "none"
    """nf4 keeps the base's linear layers in 4 bits (QLoRA, arXiv:2305.14314); the embedding stays as precision says."""
    sharding: Literal["auto", "none", "full"] = "auto"
    """Whether ranks share out the base's layers, each keeping a part (FSDP2); auto does so where the whole base does not fit a card."""
    gradient_checkpointing: bool = True
    """Recompute each layer in the backward pass: memory for about a third more time."""
    lora: LoraSettings = LoraSettings()
    sampling: SamplingSettings = SamplingSettings()
    advantage: AdvantageSettings = AdvantageSettings()
    loss: LossSettings = LossSettings()
    kl: KLSettings = KLSettings()
    entropy: EntropySettings = EntropySettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    reward_model: RewardModelSettings = RewardModelSettings()
    judge: JudgeSettings = JudgeSettings()
    witness: WitnessSettings = WitnessSettings()
    reward_function: RewardFunctionSettings = RewardFunctionSettings()
    sandbox: SandboxSettings = SandboxSettings()
    memory: MemorySettings = MemorySettings()
    watchdog: WatchdogSettings = WatchdogSettings()
    ranks: RanksSettings = RanksSettings()
    serving: ServingSettings = ServingSettings()
    data: DataSettings = DataSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="before")
    @classmethod
    def _served_is_weighted(cls, given: Any) -> Any:
        """Another engine's log-probabilities are never quite the learner's: a cap is in force, and every recipe written shows it."""
        if not isinstance(given, Mapping) or not _part(given.get("serving"), "urls"):
            return given
        loss = given.get("loss", {})
        if _part(loss, "tis_cap") is not None or not isinstance(loss, Mapping | LossSettings):
            return given
        chosen = loss.model_dump(exclude_unset=True) if isinstance(loss, LossSettings) else dict(loss)
        return {**given, "loss": {**chosen, "tis_cap": SERVED_TIS_CAP}}

    @model_validator(mode="after")
    def _no_secret(self) -> GRPOConfig:
        for name, text in _texts(self.model_dump()):
            if holds_secret(text):
                raise ValueError(
                    f"{name} holds what looks like a token, a key or a password, and settings are written to files and shown. "
                    "Leave it out: the Hub's token comes from `hf auth login` or the variable HF_TOKEN."
                )
        return self

    @model_validator(mode="after")
    def _limits_agree(self) -> GRPOConfig:
        if self.kl.beta_min > self.kl.beta_max:
            raise ValueError(f"kl.beta_min is {self.kl.beta_min}, above kl.beta_max {self.kl.beta_max}. Lower kl.beta_min.")
        self._kl_can_be_kept()
        if self.advantage.aggregation == "gdpo" and self.kl.placement == "reward":
            raise ValueError("advantage.aggregation is gdpo, which normalises each reward alone: KL cannot be one. Use kl.placement=loss.")
        if self.sharding == "full" and self.quantization != "none":
            raise ValueError("sharding is full, and a quantised base is never shared out. Use sharding=none, or quantization=none.")
        if self.reward is not None and not self.reward:
            raise ValueError("reward names no reward. Leave it out for the trained generative reward, or name one.")
        return self

    def _kl_can_be_kept(self) -> None:
        kl = self.kl
        if kl.placement != "off" and kl.ref_target is not None and not kl.beta_min <= kl.beta <= kl.beta_max:
            raise ValueError(
                f"kl.beta is {kl.beta}, outside [{kl.beta_min}, {kl.beta_max}] (kl.beta_min, kl.beta_max), where the controller keeps it. "
                "Move a limit, or use kl.ref_target=null for a fixed beta, or kl.placement=off for no penalty."
            )
        if kl.placement == "reward" and self.sampling.is_filtered:
            raise ValueError("kl.placement is reward, which measures KL where it sampled: top_k, top_p must be off. Use kl.placement=loss.")

    @property
    def prompts_per_step(self) -> int:
        """Prompts per rollout batch, all micro-steps of one update."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def completions_per_step(self) -> int:
        """Completions per rollout batch."""
        return self.prompts_per_step * self.num_generations


def _part(stage: Any, name: str) -> Any:
    """One setting of a stage that may still be as it was written."""
    return stage.get(name) if isinstance(stage, Mapping) else getattr(stage, name, None)


def _texts(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every text in the settings with the setting's name; the names within `reward` are texts too."""
    for name, value in values.items():
        if prefix == "reward.":
            yield "reward", name
        if isinstance(value, Mapping):
            yield from _texts(value, f"{prefix}{name}.")
        else:
            texts = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
            yield from ((prefix + name, text) for text in texts if isinstance(text, str))
