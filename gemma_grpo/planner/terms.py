"""What is held at a time, in bytes, as functions of shape and settings: one function for each thing that takes memory.

Counted from the code that makes the tensors (model/logprobs.py, grpo/update.py and transformers' decoder layer) and checked against
what that code holds in tests/test_planner_terms.py: change one, and the other tells. "16 bit" is bfloat16 or float16. N prompts of P
tokens, G completions of C tokens each. Attention and sampling have files of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemma_grpo.cards import GIB, MIB, Number
from gemma_grpo.config.schema import LoraSettings
from gemma_grpo.shapes import ModelShape

TILE = {"cpu": (256, 8192), "cuda": (1024, 16384)}
"""model/logprobs.py makes the logits of so many tokens and words at a time."""
READING_BYTES = 64 * MIB
"""Loading reads a tensor in pieces of 16 MiB; a piece is there as stored, converted, checked and in the file's pages."""
ADAPTER_COPIES = 2 + 2
"""Numbers per adapter number held throughout: policy and reward adapter, and AdamW's two moments of the policy."""
UPDATE_COPIES = 2 + 3 + 3 + 1
"""More of them in an update: the gradient and a piece's share of it, two snapshots of weights and moments, the gradient last applied."""
REWARD_TRAINING_COPIES = 2 + 2 + 2
"""Numbers per adapter number while the reward adapter is trained: both adapters, gradient and a piece's share, two moments."""
CUDA_CONTEXT = round(0.45 * GIB)
"""Context, cuBLAS workspaces and the allocator's rounding."""
CPU_PROGRAM, TOKENIZER_WORD = round(0.5 * GIB), 1024
"""Interpreter, torch and transformers, resident (measured 0.45 to 0.52 GiB), and for each word of the vocabulary."""


@dataclass(frozen=True)
class Numbers:
    """How numbers are held: base weights and what is computed with them; adapters, logits and losses are float32 always."""

    kind: Number
    nf4: bool
    on_cuda: bool

    @property
    def bytes(self) -> int:
        """Of one number of the base's dtype."""
        return 4 if self.kind == "fp32" else 2


@dataclass(frozen=True)
class Pass:
    """What one pass reads: N prompts with G completions each. N and G need not be whole: a budget is not."""

    prompts: float
    prompt_length: int
    group: float
    completion_length: int

    @classmethod
    def of(cls, tokens: int, prompt_length: int, group: int, completion_length: int) -> Pass:
        """Full-length groups of `tokens` together; below one group, a part of its completions, and at least one completion."""
        whole = prompt_length + group * completion_length
        if tokens >= whole:
            return cls(tokens / whole, prompt_length, group, completion_length)
        return cls(1, prompt_length, max(1.0, (tokens - prompt_length) / completion_length), completion_length)

    @property
    def prompt_tokens(self) -> float:
        """N P."""
        return self.prompts * self.prompt_length

    @property
    def completion_tokens(self) -> float:
        """N G C."""
        return self.prompts * self.group * self.completion_length

    @property
    def tokens(self) -> float:
        """What the linear layers see."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Sharding:
    """How ranks share out the base's layers; one rank keeps all of them."""

    ranks: int = 1
    whole_while_sampling: bool = False
    """Gathered once for a rollout, instead of layer by layer in each step of it."""

    @property
    def active(self) -> bool:
        """Whether a rank keeps less than the whole base."""
        return self.ranks > 1


NOT_SHARDED = Sharding()

GATHERED_LAYERS = 3
"""Of a base that is shared out: the layer that computes, and the next one as it arrives and as it is put into its place."""


def base_weights(shape: ModelShape, numbers: Numbers, sharding: Sharding = NOT_SHARDED, *, sampling: bool = False) -> float:
    """The one frozen base, or a rank's part of it and what is gathered. float16 keeps its gains in float32 (model/loading.py)."""
    whole = shape.weight_bytes(numbers.bytes, nf4=numbers.nf4, fp32_norms=numbers.kind == "fp16_rescaled")
    if not sharding.active:
        return whole
    embedding = shape.embedding_parameters * numbers.bytes
    layers = whole - embedding
    gathered = layers if sampling and sharding.whole_while_sampling else GATHERED_LAYERS * layers / shape.num_layers
    return embedding + layers / sharding.ranks + gathered


def nf4_workspace(shape: ModelShape, numbers: Numbers) -> float:
    """The largest linear layer in 16 (or 32) bits: bitsandbytes unpacks one at a time."""
    return max(inputs * outputs for inputs, outputs in shape.linear_sizes.values()) * numbers.bytes if numbers.nf4 else 0


def adapters(shape: ModelShape, lora: LoraSettings, copies: int) -> float:
    """`copies` float32 numbers for each number of an adapter."""
    return 4 * copies * shape.lora_parameters(lora)


def logits(shape: ModelShape, numbers: Numbers, completion_tokens: float, slopes: int) -> float:
    """Tiles of float32 logits while log-probabilities are computed: of the logits and their exponential, which `slopes` sums of head
    rows read in the base's dtype; 16-bit weights on a CPU are multiplied as float32 copies."""
    most_tokens, most_words = TILE["cuda" if numbers.on_cuda else "cpu"]
    tokens, words = min(most_tokens, completion_tokens), min(most_words, shape.vocab_size)
    tile, head = 4 * tokens * words, 4 * words * shape.hidden_size
    short, widened = numbers.bytes == 2, numbers.bytes == 2 and not numbers.on_cuda
    if not slopes:
        return max(2 * tile, tile + head * widened)
    read = 2 * tile + (tile / 2) * short + (tile + head) * widened
    return read + (slopes + 1) * 4 * tokens * shape.hidden_size


def program(shape: ModelShape, numbers: Numbers) -> float:
    """What is held before anything is loaded: on a GPU its context, on a CPU the process itself."""
    return CUDA_CONTEXT if numbers.on_cuda else CPU_PROGRAM + TOKENIZER_WORD * shape.vocab_size


def rotary(shape: ModelShape, numbers: Numbers, tokens: float) -> float:
    """Cosines and sines of every position, for both kinds of layer."""
    return 4 * shape.head_dim * numbers.bytes * tokens


def checkpoints(shape: ModelShape, numbers: Numbers, tokens: float) -> float:
    """Input of every layer, kept for computing it again."""
    return shape.num_layers * shape.hidden_size * numbers.bytes * tokens


def last_hidden(shape: ModelShape, numbers: Numbers, piece: Pass) -> float:
    """After the last layer: its output, normed, and the rows that predict a token."""
    return shape.hidden_size * numbers.bytes * (piece.tokens + piece.completion_tokens)


def kept_by_head(shape: ModelShape, piece: Pass, slopes: int) -> float:
    """For the backward pass, float32: the last norm's input, and how each token's values change with its hidden state."""
    return 4 * shape.hidden_size * (piece.tokens + slopes * piece.completion_tokens)


def lora_inputs(shape: ModelShape, lora: LoraSettings, numbers: Numbers, modules: set[str]) -> float:
    """Per token, what adapters on `modules` keep for their gradient: their input in float32, dropped copies each their own.

    In float32 modules that read the same tensor share it; in 16 bits each makes its own float32 copy.
    """
    sizes, chosen = shape.linear_sizes, modules & set(lora.target_modules)
    small = 4 * lora.r * len(chosen)
    if lora.dropout:
        mask = 1 if numbers.on_cuda else 4  # bytes: the CPU's mask is of float32 numbers
        return small + sum((4 + mask) * sizes[name][0] for name in chosen)
    if numbers.bytes == 2:
        return small + sum(4 * sizes[name][0] for name in chosen)
    readers = ({"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"})
    return small + sum(4 * sizes[min(group)][0] for group in readers if group & chosen)


def saved_mlp(shape: ModelShape, lora: LoraSettings, numbers: Numbers, piece: Pass) -> float:
    """What one layer's feed-forward half keeps: gate, its activation and up, and adapter inputs."""
    per_token = 3 * shape.intermediate_size * numbers.bytes
    return (per_token + lora_inputs(shape, lora, numbers, {"gate_proj", "up_proj", "down_proj"})) * piece.tokens


def saved_norms(shape: ModelShape, numbers: Numbers, piece: Pass, *, layer_input: bool) -> float:
    """Inputs of a layer's four norms in float32; in 16 bits the first one is a copy, else the layer's input itself."""
    count = 4 if layer_input or numbers.bytes == 2 else 3
    return count * 4 * shape.hidden_size * piece.tokens


def first_norm(shape: ModelShape, numbers: Numbers, piece: Pass) -> float:
    """What is left of them while attention goes backward: in 16 bits the first one's copy."""
    return 4 * shape.hidden_size * piece.tokens if numbers.bytes == 2 else 0


def norm_backward(shape: ModelShape, numbers: Numbers, piece: Pass) -> float:
    """Gradients in a layer's last norm, while everything it saved is still there (measured: 5.7 of them, all float32)."""
    return 5.7 * 4 * shape.hidden_size * piece.tokens if numbers.bytes == 2 else 0


def mlp_backward(shape: ModelShape, lora: LoraSettings, numbers: Numbers, piece: Pass) -> float:
    """Gradients in the feed-forward half, beyond what it saved: of the product of gate and up, and of both, at once.

    With an adapter on down_proj the product was saved and is gone by then; 16-bit adapters work on float32 copies.
    """
    size, chosen = numbers.bytes, set(lora.target_modules)
    held = 3 * size
    if size == 2 and "up_proj" in chosen:
        held = size + 2 * 4
    elif size == 2 and "down_proj" in chosen:
        held = 2 * 4
    return (held - 4 * ("down_proj" in chosen)) * shape.intermediate_size * piece.tokens


def mlp_forward(shape: ModelShape, lora: LoraSettings, numbers: Numbers, piece: Pass) -> float:
    """Activated gate, up and their product, or what an adapter there adds; embedding, stream, residual and normed input beside them."""
    inner, hidden, size, chosen = shape.intermediate_size, shape.hidden_size, numbers.bytes, set(lora.target_modules)
    held = 3 * inner * size
    if "down_proj" in chosen and size == 2:
        held = max(held, inner * (size + 4) + 10 * hidden)
    if "gate_proj" in chosen:
        held = max(held, inner * (size + 2 * 4) + (5 * hidden if size == 2 else 0))
    if "up_proj" in chosen:
        held = max(held, inner * (2 * size + 2 * 4) + (5 * hidden if size == 2 else 0))
    return (held + 3.6 * hidden * size) * piece.tokens
