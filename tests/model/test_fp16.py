"""float16 made exact by a power of two: the same function in float32 to the bit, in range and nearer than bfloat16 in float16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Gemma3ForCausalLM

from gemma_grpo.data.batch import GroupBatch, pad_groups
from gemma_grpo.model.attention import GroupLayout
from gemma_grpo.model.decode import Decoder, decode_cache
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.logprobs import completion_logprobs
from gemma_grpo.model.memory import DoesNotFitError
from gemma_grpo.model.precision import FP16_MAX, LossScale, choose_divisor, rescale_residual, watching_peaks

PROMPT = [2, *range(120, 140)]
DIVISORS = [1, 16, 64, 1024, 16384]
HIDDEN = 64


def ragged_batch() -> GroupBatch:
    """Two prompts, three completions each, past the window of 8 and in it."""
    generator = torch.Generator().manual_seed(3)

    def ids(count: int) -> list[int]:
        return list(torch.randint(108, 363, (count,), generator=generator).tolist())

    return pad_groups([[2, *ids(20)], [2, *ids(9)]], [[ids(12), ids(5), ids(9)], [ids(3), ids(14), ids(8)]])


BATCH = ragged_batch()


@torch.no_grad()
def enlarge_gains(base: Gemma3ForCausalLM, seed: int) -> None:
    """What training did to Gemma 3: post-norm gains around 150 with a few channels in the ten thousands, which its readers turn down."""
    generator = torch.Generator().manual_seed(seed)
    for layer in base.model.layers:
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            gain = torch.exp(5 + torch.randn(HIDDEN, generator=generator))
            gain[:4] = 5000 + 25_000 * torch.rand(4, generator=generator)
            norm.weight.copy_(gain - 1)
        for norm in (layer.input_layernorm, layer.pre_feedforward_layernorm):
            norm.weight.copy_(0.3 * torch.randn(HIDDEN, generator=generator))
            norm.weight[:4] = 0.05 - 1
    base.model.norm.weight[:4] = 0.05 - 1


@pytest.fixture
def large_normed(new_gemma: Callable[..., Gemma]) -> Callable[..., Gemma]:
    """A model whose residual stream exceeds 100,000, in a dtype, with a divisor or plain."""

    def build(dtype: torch.dtype = torch.float32, divisor: int | None = None, seed: int = 0) -> Gemma:
        model = new_gemma(seed=seed, moved=0.02, hidden_size=HIDDEN, intermediate_size=128, num_hidden_layers=13)
        for name, weight in model.causal_lm.named_parameters():
            if weight.dim() > 1 and "lora_" not in name:
                weight.data.mul_(HIDDEN**-0.5 / 0.15)
        enlarge_gains(model.causal_lm, seed)
        for name, weight in model.causal_lm.named_parameters():
            # norms as the loader keeps them: float32 beside float16
            if "lora_" not in name and not (dtype == torch.float16 and "norm" in name):
                weight.data = weight.data.to(dtype)
        if divisor is not None:
            rescale_residual(model.causal_lm, divisor)
        return model

    return build


def measured(model: Gemma, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Completion log-probs, and the gradient of a mean over their tokens, for which `scale` is made up."""
    with model.role("policy", train=True):
        logprobs, _ = completion_logprobs(model, BATCH)
        weights = torch.arange(logprobs.numel()).view_as(logprobs).sin() / BATCH.completion_mask.sum()
        ((logprobs * weights).sum() * scale).backward()
    gradient = torch.cat([p.grad.flatten() / scale for p in model.adapter_parameters("policy").values() if p.grad is not None])
    return logprobs.detach()[BATCH.completion_mask], gradient


def test_plain_float16_overflows_where_gemma_does(large_normed: Callable[..., Gemma]) -> None:
    exact = large_normed()
    with watching_peaks(exact.causal_lm) as peaks:
        measured(exact)
    assert peaks.largest("residual") > 100_000 > FP16_MAX
    logprobs, _ = measured(large_normed(torch.float16))
    assert not torch.isfinite(logprobs).any()


@pytest.mark.parametrize("divisor", DIVISORS)
def test_in_float32_the_rescaled_model_is_the_original_to_the_bit(large_normed: Callable[..., Gemma], divisor: int) -> None:
    for before, after in zip(measured(large_normed()), measured(large_normed(divisor=divisor)), strict=True):
        assert torch.equal(before, after)


def test_rescaling_again_replaces_the_divisor(large_normed: Callable[..., Gemma]) -> None:
    model = large_normed(divisor=1024)
    rescale_residual(model.causal_lm, 16)
    with watching_peaks(model.causal_lm) as peaks:
        rescaled, _ = measured(model)
    with watching_peaks((original := large_normed()).causal_lm) as whole:
        expected, _ = measured(original)
    assert torch.equal(rescaled, expected)
    assert peaks.largest("residual") == whole.largest("residual") / 16


@pytest.mark.parametrize("seed", range(4))
def test_in_float16_it_is_nearer_to_float32_than_bfloat16_is(large_normed: Callable[..., Gemma], seed: int) -> None:
    logprobs, gradient = measured(large_normed(seed=seed))
    rounded, rounded_gradient = measured(large_normed(torch.bfloat16, seed=seed))
    half, half_gradient = measured(large_normed(torch.float16, 64, seed), LossScale(torch.float16).of(1 / int(BATCH.completion_mask.sum())))
    assert (half - logprobs).abs().mean() < (rounded - logprobs).abs().mean()

    def error(of: torch.Tensor) -> float:
        return float((of - gradient).norm() / gradient.norm())

    assert error(half_gradient) < min(0.03, error(rounded_gradient))


@pytest.mark.parametrize(("trained_on", "used_on"), [(64, None), (None, 64)])
def test_adapters_interchange_between_the_rescaled_and_the_ordinary_base(
    large_normed: Callable[..., Gemma], tmp_path: Path, trained_on: int | None, used_on: int | None
) -> None:
    trained = large_normed(torch.float16 if trained_on else torch.float32, trained_on)
    parameters = list(trained.adapter_parameters("policy").values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    before, _ = measured(trained)
    for _ in range(3):
        optimizer.zero_grad()
        measured(trained)
        optimizer.step()
    expected, _ = measured(trained)
    trained.save_adapter("policy", tmp_path / "adapter")
    other = large_normed(torch.float16 if used_on else torch.float32, used_on)
    other.load_adapter("policy", tmp_path / "adapter")
    found, _ = measured(other)
    moved = (expected - before).abs().mean()
    assert moved > 0.05
    assert (found - expected).abs().mean() < 0.03 * moved


def test_peft_alone_reads_an_adapter_of_the_rescaled_base(large_normed: Callable[..., Gemma], tmp_path: Path) -> None:
    trained = large_normed(divisor=64)
    trained.save_adapter("policy", tmp_path / "adapter")
    ids = torch.tensor([PROMPT])
    base = large_normed().peft.unload()
    with torch.no_grad(), trained.role("policy"):
        expected = trained.causal_lm(ids).logits
        assert torch.equal(PeftModel.from_pretrained(base, str(tmp_path / "adapter"))(ids).logits, expected)


@pytest.mark.parametrize("divisor", [0, 3, 48, -64])
def test_a_divisor_that_would_round_is_refused(large_normed: Callable[..., Gemma], divisor: int) -> None:
    with pytest.raises(ValueError, match="only a power of two is exact"):
        rescale_residual(large_normed().causal_lm, divisor)


def test_products_of_queries_and_keys_beyond_float16_do_not_break_decoding(new_gemma: Callable[..., Gemma]) -> None:
    # gains of 100 over 16 numbers: q.k reaches 16 * 100 * 100 = 160,000, and a quarter of it after the scaling
    model = new_gemma()
    for name, weight in model.causal_lm.named_parameters():
        if "lora_" not in name:
            weight.data = weight.data + 99 if "q_norm" in name or "k_norm" in name else weight.data.half()
    cache = decode_cache(model, prompts=1, prompt_width=len(PROMPT), rows=2, length=1)
    with torch.no_grad(), model.role("policy"):
        model.hidden_states(GroupLayout(pad_groups([PROMPT], [[()]]), keep_prompt_kv=cache.prefilling(torch.tensor([len(PROMPT)]))))
        cache.add_rows([0, 0])
        hidden = Decoder(model, len(PROMPT) + 1).step(torch.tensor([150, 151]), cache, cache.extent())
    assert hidden.dtype == torch.float16
    assert torch.isfinite(hidden).all()


# ---- the headroom probe


def probe(model: Gemma) -> dict[str, float]:
    return model.fit_precision([PROMPT, PROMPT[:5]])


def test_the_probe_keeps_64_when_that_leaves_headroom(large_normed: Callable[..., Gemma]) -> None:
    found = probe(large_normed(torch.float16))
    assert found["divisor"] == 64
    assert 100_000 < found["residual"] < 64 * FP16_MAX / 4


@pytest.mark.parametrize(("factor", "divisor"), [(16.0, 1024), (300.0, 16384)])
def test_the_probe_divides_by_more_when_it_must(large_normed: Callable[..., Gemma], factor: float, divisor: int) -> None:
    model = large_normed(torch.float16)
    for layer in model.causal_lm.model.layers:
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            norm.weight.data.add_(1).mul_(factor).sub_(1)
    found = probe(model)
    assert found["divisor"] <= divisor
    assert FP16_MAX / 8 / 2 < found["residual"] / found["divisor"] <= FP16_MAX / 4
    logprobs, gradient = measured(model)
    assert torch.isfinite(logprobs).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda layer: layer.post_attention_layernorm.weight.data.fill_(1e9), "residual stream reaches inf"),
        (lambda layer: layer.mlp.up_proj.weight.data.mul_(3e4), r"gate\*up reaches \d"),
        # beyond 65,504 each of them makes the stream behind it infinite too: the first one is named
        (lambda layer: layer.mlp.up_proj.weight.data.mul_(2e5), r"gate\*up reaches inf \(no divisor changes that\)"),
        (lambda layer: layer.self_attn.v_proj.base_layer.weight.data.mul_(3e5), "largest attention projection reaches inf"),
        (lambda layer: layer.self_attn.v_proj.base_layer.weight.data.mul_(1e4), "largest attention projection reaches"),
    ],
)
def test_a_model_float16_cannot_hold_is_refused(large_normed: Callable[..., Gemma], change: Callable[[Any], Any], what: str) -> None:
    model = large_normed(torch.float16)
    change(model.causal_lm.model.layers[2])
    with pytest.raises(FloatingPointError, match=what) as refused:
        probe(model)
    assert "Use precision=fp32" in str(refused.value)


def test_a_final_norm_beyond_float16_is_refused(large_normed: Callable[..., Gemma]) -> None:
    model = large_normed(torch.float16)
    model.causal_lm.model.norm.weight.data.fill_(5e4)
    with pytest.raises(FloatingPointError, match="final norm's output reaches"):
        probe(model)


def test_memory_that_runs_out_in_the_probe_is_told_with_a_remedy(large_normed: Callable[..., Gemma]) -> None:
    model = large_normed(torch.float16)

    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.causal_lm.model.layers[1].register_forward_pre_hook(exhausted)
    with pytest.raises(DoesNotFitError, match=r"out of memory on cpu in the first pass over prompts\. Free the device"):
        probe(model)


def test_a_recorded_divisor_is_taken_without_a_probe(large_normed: Callable[..., Gemma]) -> None:
    model = large_normed(torch.float16)
    assert model.fit_precision([], divisor=256) == {"divisor": 256.0}
    assert model.causal_lm.model.norm.eps == model.config.rms_norm_eps / 256**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_formats_are_left_as_they_are(large_normed: Callable[..., Gemma], dtype: torch.dtype) -> None:
    model = large_normed(dtype)
    assert probe(model) == {}
    assert model.causal_lm.model.norm.eps == model.config.rms_norm_eps


def test_the_probe_leaves_no_hook_and_the_role_as_it_was(large_normed: Callable[..., Gemma]) -> None:
    model = large_normed(torch.float16)
    probe(model)
    with model.role("policy"), torch.no_grad():
        expected = model.hidden_states(GroupLayout(BATCH))
        probe(model)
        assert torch.equal(model.hidden_states(GroupLayout(BATCH)), expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.causal_lm.modules())


def test_a_peak_that_is_nan_counts_as_infinite(large_normed: Callable[..., Gemma]) -> None:
    model = large_normed(torch.float16)
    model.causal_lm.model.embed_tokens.weight.data[5] = torch.nan
    with pytest.raises(FloatingPointError, match="residual stream reaches inf"):
        choose_divisor(model.causal_lm, lambda: model.causal_lm(torch.tensor([[2, 5]])))


# ---- gradients that float16 would lose


@pytest.mark.parametrize(("weight", "scale"), [(1 / 32768, 16 * 32768), (1 / 3000, 16 * 4096), (1.0, 16), (3.0, 8), (0.0, 1)])
def test_a_loss_is_lifted_to_about_sixteen(weight: float, scale: float) -> None:
    assert LossScale(torch.float16).of(weight) == scale
    assert LossScale(torch.bfloat16).of(weight) == LossScale(torch.float32).of(weight) == 1


def half_precision_gradient(scale: LossScale, weight: float, steepness: float) -> list[torch.Tensor | None] | None:
    """Of weight * steepness * w at a float32 w = 1, which passes a float16 number on its way."""
    w = torch.ones(1, requires_grad=True)
    loss = ((w.half() * steepness).float() * weight).sum()
    return scale.gradient(loss, [w], weight)


def test_a_gradient_below_float16_is_found_by_lifting_it() -> None:
    # 1e-9 * 0.5 would be 0 in float16
    (found,) = half_precision_gradient(LossScale(torch.float16), 1e-9, 0.5) or [None]
    assert found is not None
    torch.testing.assert_close(found, torch.tensor([0.5e-9]), rtol=1e-3, atol=0.0)
    (lost,) = half_precision_gradient(LossScale(torch.float32), 1e-9, 0.5) or [None]
    assert lost == 0


def test_a_gradient_that_overflows_is_lifted_less_and_that_is_remembered() -> None:
    scale = LossScale(torch.float16)
    # 0.6 is lifted to 19.2, and by 4 less each time to 4.8, 1.2 and 0.3; times 60,000 only the last is below 65,504
    assert [half_precision_gradient(scale, 0.6, 60_000.0) for _ in range(3)] == [None] * 3
    (found,) = half_precision_gradient(scale, 0.6, 60_000.0) or [None]
    assert found is not None
    torch.testing.assert_close(found, torch.tensor([36_000.0]), rtol=1e-2, atol=0.0)
    resumed = LossScale(torch.float16)
    resumed.load(scale.state())
    assert resumed.of(1.0) == scale.of(1.0) == 16 / 4**3
    assert resumed.retries == 3
    resumed.relax()
    assert resumed.of(1.0) == 16 / 4**2
    LossScale(torch.float16).relax()


def test_a_gradient_that_overflows_at_every_lift_is_given_as_it_is() -> None:
    scale, w = LossScale(torch.float16), torch.ones(1, requires_grad=True)

    def gradient() -> list[torch.Tensor | None] | None:
        # 1e-6 grows to 3,600, which is finite; lifted by 1/64 at least, its gradient grows to 60,000^2 / 64, which is not
        loss = ((w * 1e-6).half() * 60_000 * 60_000).float().sum()
        assert torch.isfinite(loss)
        return scale.gradient(loss, [w], 1.0)

    attempts = [gradient() for _ in range(6)]
    assert attempts[:5] == [None] * 5
    assert attempts[5] is not None
    assert not torch.isfinite(torch.stack([part for part in attempts[5] if part is not None])).any()


def test_a_loss_that_is_no_number_is_no_overflow() -> None:
    scale = LossScale(torch.float16)
    (found,) = half_precision_gradient(scale, 1.0, torch.nan) or [None]
    assert found is not None
    assert torch.isnan(found).all()
    assert scale.reductions == 0
