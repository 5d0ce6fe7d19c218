"""Whether what was recorded while sampling is what a training pass computes: on this device, in this dtype, for this model.

The ratio of GRPO divides one by the other. A wrong mask, position or cache differs by a nat on some token; rounding by far less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gemma_grpo.config import LoraSettings
from gemma_grpo.data.batch import pad_rollouts, pad_values
from gemma_grpo.data.chat import BOS_ID, prompt_ids
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.logprobs import completion_logprobs
from gemma_grpo.rollout.engine import SamplingParams
from gemma_grpo.rollout.local import LocalEngine
from gemma_grpo.types import Message, Prompt

LIMITS = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.4}
"""Nat, for one token. A logit near 30 is known to 2^-8 of itself in bfloat16 (0.12), 2^-11 in float16 (0.015), 2^-24 in float32; a few
such errors meet in a log-probability, and in float32 the order of sums over thousands of words adds the rest."""

QUESTIONS = ("Hi!", "Why is the sky blue?", "Tell me in three sentences how bread is made, and what yeast does in the dough.")
_PARAMS = SamplingParams(num_generations=2, max_completion_length=24)


@dataclass(frozen=True, slots=True)
class Agreement:
    """The largest difference that was found and what rounding explains, both in nat."""

    model: str
    device: str
    dtype: str
    tokens: int
    difference: float
    limit: float

    @property
    def agrees(self) -> bool:
        """Whether the difference is explained; a NaN is not."""
        return self.difference <= self.limit


def measure(model_name: str, *, precision: str = "auto", quantization: str = "none") -> Agreement:
    """Sample a few replies to prompts of different lengths and score them again as training does.

    Raises ValueError for a model that cannot be loaded, or whose prompts do not hold exactly one <bos>; FloatingPointError for logits
    that are not finite.
    """
    model = Gemma.load(model_name, lora=LoraSettings(), precision=precision, quantization=quantization)
    prompts = [_prompt(model, text) for text in QUESTIONS]
    model.fit_precision([prompt.token_ids for prompt in prompts])
    groups = LocalEngine(model).sample(prompts, _PARAMS)
    batch = pad_rollouts(groups).to(model.device)
    sampled = pad_values([[completion.sampling_logprobs for completion in group.completions] for group in groups], batch).to(model.device)
    with model.role("policy", train=True):  # with gradients: other kernels may be chosen than without
        trained, _ = completion_logprobs(model, batch)
    gap = (trained.detach() - sampled).abs()[batch.completion_mask]
    dtype = model.head_weight.dtype
    return Agreement(
        model=model_name,
        device=torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "the CPU",
        dtype=str(dtype).removeprefix("torch."),
        tokens=gap.numel(),
        difference=float(gap.max()),
        limit=LIMITS[dtype],
    )


def _prompt(model: Gemma, text: str) -> Prompt:
    messages: tuple[Message, ...] = ({"role": "user", "content": text},)
    ids = prompt_ids(model.tokenizer, messages)
    if ids.count(BOS_ID) != 1 or ids[0] != BOS_ID:
        raise ValueError(f"{model.name}: a prompt has {ids.count(BOS_ID)} <bos>, not one at its start. Use Gemma 3's own tokenizer.")
    return Prompt(text, "doctor", messages, tuple(ids), conversation_id=text)
