"""A pass that runs out of memory is done again in smaller pieces, to the same numbers, and nothing of the failed attempt is left."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from gemma_grpo.config.schema import LoraSettings
from gemma_grpo.data.batch import GroupBatch, Slot, pad_groups
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.logprobs import completion_logprobs
from gemma_grpo.model.memory import DoesNotFitError, TokenBudget, is_out_of_memory

LENGTHS = [(5, [3, 6, 1]), (17, [5, 2, 4]), (9, [6, 6, 2]), (2, [1, 4, 5])]
"""Prompt and completion lengths; the sliding window is 8."""
BUDGETS = [1, 12, 30, 60, 90, 10_000]


@pytest.fixture
def model(new_gemma: Callable[..., Gemma]) -> Gemma:
    return new_gemma(num_hidden_layers=3, layer_types=["sliding_attention", "full_attention", "sliding_attention"])


@pytest.fixture(scope="module")
def batch() -> GroupBatch:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(107, 363, (count,), generator=generator).tolist()

    return pad_groups([[2, *tokens(length)] for length, _ in LENGTHS], [[tokens(length) for length in group] for _, group in LENGTHS])


@contextmanager
def short_of_memory(module: torch.nn.Module, times: int, *, backward: bool = False, after: int = 0) -> Iterator[list[int]]:
    """The module's forward (or backward) pass runs out of memory `times` times, after so many that did not; counts its passes."""
    passes = [0]

    def fail(*args: Any) -> None:
        passes[0] += 1
        if after < passes[0] <= after + times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    hook = module.register_full_backward_pre_hook(fail) if backward else module.register_forward_pre_hook(fail)
    try:
        yield passes
    finally:
        hook.remove()


def logprobs(model: Gemma, batch: GroupBatch) -> Tensor:
    found = torch.full(batch.completion_ids.shape, torch.nan)
    with torch.no_grad(), model.role("policy"):
        for slot, values in model.budget.run(batch, lambda piece: completion_logprobs(model, piece)[0], doing="scoring"):
            slot.put(values, found)
    return found[batch.completion_mask]


def gradient(model: Gemma, batch: GroupBatch) -> list[Tensor]:
    parameters = list(model.adapter_parameters("policy").values())

    def work(piece: GroupBatch) -> tuple[Tensor, ...]:
        return torch.autograd.grad(completion_logprobs(model, piece)[0].sum(), parameters)

    total = [torch.zeros_like(parameter) for parameter in parameters]
    with model.role("policy", train=True):
        for _, part in model.budget.run(batch, work, doing="learning"):
            total = [sum_ + value for sum_, value in zip(total, part, strict=True)]
    return total


def gap(first: list[Tensor], second: list[Tensor]) -> float:
    """Largest difference, in units of the largest entry."""
    scale = max(float(value.abs().max()) for value in second)
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True)) / scale


@pytest.mark.parametrize("tokens", BUDGETS)
def test_no_budget_changes_a_log_probability_or_a_gradient(model: Gemma, batch: GroupBatch, tokens: int) -> None:
    expected, whole = logprobs(model, batch), gradient(model, batch)
    model.budget = TokenBudget(tokens)
    assert (logprobs(model, batch) - expected).abs().max() < 1e-5
    assert gap(gradient(model, batch), whole) < 1e-5
    assert (model.budget.tokens, model.budget.halvings) == (tokens, 0)


# ---- running out


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(("tokens", "times"), [(None, 2), (60, 2), (30, 1)])
@pytest.mark.parametrize(("layer", "backward"), [(1, False), (0, True)])
def test_a_pass_that_ran_out_of_memory_gives_the_same_numbers(
    model: Gemma, batch: GroupBatch, tokens: int | None, times: int, layer: int, backward: bool
) -> None:
    # going back, the layers above the first one have their gradient already when the memory ends
    whole = gradient(model, batch)
    model.budget = TokenBudget(tokens)
    with short_of_memory(model.causal_lm.model.layers[layer], times, backward=backward, after=1 if tokens else 0):
        found = gradient(model, batch)
    assert model.budget.halvings == times
    assert gap(found, whole) < 1e-5
    assert all(parameter.grad is None for parameter in model.causal_lm.parameters())


def test_halvings_by_hand(model: Gemma, batch: GroupBatch) -> None:
    # prompts of 6, 18, 10 and 3 tokens with <bos>, their completions 10, 11, 14 and 10: groups of 16, 29, 24 and 13, together 82
    model.budget = TokenBudget(1000)
    with short_of_memory(model.causal_lm.model, 3) as passes:
        expected = logprobs(model, batch)
    # 82 fail, not the 1000 there might have been; of at most 41 the third and first group, 40, fail; then of at most 20 two completions
    # of the third, 10 + 6 + 2
    assert model.budget.tokens == 18 // 2
    assert model.budget.halvings == 3
    cut = passes[0] - 3
    with short_of_memory(model.causal_lm.model, 0) as passes:
        assert torch.equal(logprobs(model, batch), expected)  # remembered: cut as at the end, and no attempt fails
    assert passes[0] == cut == len(batch.slots(9))
    assert model.budget.halvings == 3


def test_pieces_that_succeeded_are_not_done_again(model: Gemma, batch: GroupBatch) -> None:
    model.budget = TokenBudget(30)  # 29, 16 + 13 and 24 tokens, the largest first
    seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    with torch.no_grad(), model.role("policy"), short_of_memory(model.causal_lm.model, 1, after=2):
        for slot, _ in model.budget.run(batch, lambda piece: completion_logprobs(model, piece), doing="scoring"):
            seen.append((slot.rows, slot.completions))
    assert model.budget.tokens == 12  # half of the 24
    # the third group one completion at a time: its prompt of 10 leaves no room for two
    assert seen == [((1,), (0, 1, 2)), ((0, 3), (0, 1, 2)), ((2,), (0,)), ((2,), (1,)), ((2,), (2,))]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_when_the_piece_is_repeated_nothing_of_the_failed_attempt_is_left(model: Gemma, batch: GroupBatch) -> None:
    activations: list[weakref.ref[Tensor]] = []
    left: list[int] = []
    layers = model.causal_lm.model.layers

    def remember(module: torch.nn.Module, args: Any, out: Any) -> None:
        activations.append(weakref.ref(out if isinstance(out, Tensor) else out[0]))

    def count(module: torch.nn.Module, args: Any) -> None:
        left.append(sum(activation() is not None for activation in activations))

    hooks = [layer.mlp.register_forward_hook(remember) for layer in layers]
    hooks.append(model.causal_lm.model.register_forward_pre_hook(count))
    with short_of_memory(layers[0], 1, backward=True):
        gradient(model, batch)
    for hook in hooks:
        hook.remove()
    assert model.budget.halvings == 1
    assert len(activations) >= 6  # of three layers, at least twice
    assert left[:2] == [0, 0]


def test_dropout_of_a_failed_attempt_is_taken_back(new_gemma: Callable[..., Gemma], batch: GroupBatch) -> None:
    model = new_gemma(lora=LoraSettings(dropout=0.3), num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])

    def drawn(tokens: int | None, failures: int) -> list[Tensor]:
        model.budget = TokenBudget(tokens)
        torch.manual_seed(7)
        with short_of_memory(model.causal_lm.model.layers[1], failures):
            return gradient(model, batch)

    retried, small = drawn(None, 1), drawn(41, 0)  # half of 82
    assert all(map(torch.equal, retried, small))
    assert not all(map(torch.equal, small, drawn(None, 0)))


def test_one_completion_that_does_not_fit_ends_with_what_to_do(model: Gemma, batch: GroupBatch) -> None:
    with short_of_memory(model.causal_lm.model, 1000) as passes, pytest.raises(DoesNotFitError) as caught:
        logprobs(model, batch)
    assert str(caught.value) == (
        "out of memory on cpu while scoring: one completion of 6 tokens after a prompt of 10 does not fit, and no smaller piece can be "
        "cut. Lower max_completion_length or max_prompt_length, set gradient_checkpointing=true or quantization=nf4, or take a smaller "
        "model."
    )
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert passes[0] < 10
    assert not is_out_of_memory(caught.value)  # there is nothing left to try


def test_a_whole_group_that_does_not_fit_is_named_as_one(model: Gemma, batch: GroupBatch) -> None:
    def run_out(piece: GroupBatch) -> None:
        raise MemoryError

    with pytest.raises(DoesNotFitError, match="while training: one group of 3 completions of 6 tokens after a prompt of 10 does not fit"):
        list(TokenBudget(None).run(batch, run_out, doing="training", whole_groups=True))


def test_any_other_error_passes_through_at_once(batch: GroupBatch) -> None:
    budget, calls = TokenBudget(None), []

    def fail(piece: GroupBatch) -> None:
        calls.append(piece)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        list(budget.run(batch, fail, doing="scoring"))
    assert len(calls) == 1
    assert (budget.tokens, budget.halvings) == (None, 0)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:115] data. DefaultCPUAllocator: not enough memory: you tried ..."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("not enough memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_which_errors_mean_that_memory_ran_out(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


@pytest.mark.skipif(sys.platform != "linux", reason="the address space is limited by RLIMIT_AS, and its size read from /proc")
def test_a_real_allocation_that_fails_is_recognised_and_the_pass_is_done_in_smaller_pieces() -> None:
    # in a process of its own: 256 MiB more than it has; a piece of 4 groups needs 512 MiB, one of 2 or fewer fits
    program = """
        import resource
        import torch
        from gemma_grpo.data.batch import pad_groups
        from gemma_grpo.model.memory import TokenBudget, is_out_of_memory

        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + 256 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        batch = pad_groups([[2] * 8] * 4, [[[3] * 8] * 3] * 4)  # 4 x (8 + 24) = 128 tokens
        budget, errors = TokenBudget(None), []

        def work(piece):
            try:
                held = torch.ones(piece.num_tokens, 2**20)  # 4 MiB for each
            except Exception as error:
                errors.append((type(error).__name__, is_out_of_memory(error)))
                raise
            return piece.num_tokens

        print([tokens for _, tokens in budget.run(batch, work, doing="scoring")], budget.tokens, budget.halvings, errors)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (
        "[64, 64] 64 1 [('RuntimeError', True)]",
        "[32, 32, 32, 32] 32 2 [('RuntimeError', True), ('RuntimeError', True)]",  # where 256 MiB just do not fit into 256 MiB
    )


# ---- what is remembered


def test_a_resumed_run_cuts_as_the_one_that_ran_out() -> None:
    learned = TokenBudget(1000)
    learned.load({"halvings": 3.0, "tokens": 125.0})
    assert (learned.tokens, learned.halvings) == (125, 3)
    assert learned.state() == {"halvings": 3.0, "tokens": 125.0}
    unlimited = TokenBudget(None)
    unlimited.load(learned.state())
    assert (unlimited.tokens, unlimited.halvings) == (125, 3)
    smaller = TokenBudget(64)  # given smaller since
    smaller.load(learned.state())
    assert smaller.tokens == 64


def test_a_budget_that_never_was_too_large_is_the_plans_to_set() -> None:
    given = TokenBudget(1000)
    assert given.state() == {"halvings": 0.0}
    other = TokenBudget(2000)
    other.load(given.state())
    assert (other.tokens, other.halvings) == (2000, 0)


# ---- gradient checkpointing


def saved_and_computed(model: Gemma, batch: GroupBatch, run: Callable[[], object]) -> tuple[int, int]:
    """Bytes kept for a backward pass, each tensor once, and how many times a layer's attention was computed."""
    saved: dict[tuple[int, int], int] = {}
    held: list[Tensor] = []
    computed = 0

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)  # alive, so that no address comes twice
        saved[tensor.data_ptr(), tensor.numel()] = tensor.nbytes
        return tensor

    def count(*args: Any) -> None:
        nonlocal computed
        computed += 1

    hooks = [layer.self_attn.register_forward_pre_hook(count) for layer in model.causal_lm.model.layers]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    for hook in hooks:
        hook.remove()
    return sum(saved.values()), computed


@pytest.mark.parametrize("role", ["policy", "reward", "reference"])
def test_passes_that_do_not_train_keep_nothing_and_compute_each_layer_once(model: Gemma, batch: GroupBatch, role: Any) -> None:
    model.enable_gradient_checkpointing()

    def score() -> None:
        with torch.no_grad(), model.role(role):
            completion_logprobs(model, batch)

    assert saved_and_computed(model, batch, score) == (0, 3)


def test_passes_that_train_keep_layer_inputs_alone_and_compute_each_layer_again(model: Gemma, batch: GroupBatch) -> None:
    plainly, computed = saved_and_computed(model, batch, lambda: gradient(model, batch))
    assert computed == 3
    whole = gradient(model, batch)
    model.enable_gradient_checkpointing()

    def forward() -> None:
        with model.role("policy", train=True):
            completion_logprobs(model, batch)

    kept, computed = saved_and_computed(model, batch, forward)
    assert computed == 3
    assert kept < plainly / 3
    assert saved_and_computed(model, batch, lambda: gradient(model, batch))[1] == 6
    assert gap(gradient(model, batch), whole) < 1e-6


def test_no_pass_keeps_a_cache_of_keys_and_values(model: Gemma, batch: GroupBatch) -> None:
    caches: list[Any] = []

    def look(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        caches.append(kwargs.get("past_key_values"))

    hooks = [layer.self_attn.register_forward_pre_hook(look, with_kwargs=True) for layer in model.causal_lm.model.layers]
    gradient(model, batch)
    logprobs(model, batch)
    for hook in hooks:
        hook.remove()
    assert caches == [None] * 6


def test_a_piece_is_found_where_it_came_from(batch: GroupBatch) -> None:
    found = torch.full(batch.completion_ids.shape, -1)
    places: list[Slot] = []
    for slot, ids in TokenBudget(20).run(batch, lambda piece: piece.completion_ids, doing="nothing"):
        slot.put(ids, found)
        places.append(slot)
    assert len(places) > 4
    assert torch.equal(found[batch.completion_mask], batch.completion_ids[batch.completion_mask])
