"""What is held at a time, in bytes, as functions of shape and settings: one function for each thing that takes memory.

Counted from the code that makes the tensors (model/attention.py, model/logprobs.py, rollout, grpo/update.py and transformers' decoder
layer) and checked against what that code holds in tests/test_planner_terms.py: change one, and the other tells. "16 bit" is bfloat16
or float16. N prompts of P tokens, G completions of C tokens each; token counts include padding.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemma_grpo.cards import GIB, MIB, Number
from gemma_grpo.config.schema import LoraSettings, SamplingSettings
from gemma_grpo.shapes import ModelShape

LOGITS_CHUNK = 256
"""model/logprobs.py makes the logits of so many tokens at a time."""
LOGITS_COPIES = 2
"""Chunks of float32 logits that live at once, forward and backward: log-probabilities and their exponential."""
SAMPLING_COPIES = 6
"""[rows, vocabulary] float32 tensors in one sampling step: logits, log-probabilities, and two of float64, each worth two."""
TOP_K_COPIES, TOP_P_COPIES, CUDA_SORT_COPIES = 6, 8, 4
"""With filters: a mask and a second normalisation; top-p sorts, and an index is worth two. The sort's workspace on CUDA is not measured."""
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
HEAP_BLOCK = 32 * MIB
"""glibc hands larger blocks back at once (DEFAULT_MMAP_THRESHOLD_MAX)."""
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
    """What one pass reads: N prompts with G completions each, in padded tokens. N and G need not be whole: a budget is not."""

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

    @property
    def keys(self) -> float:
        """Keys that all completions attend to, their prompt's and their own: N G (P + C)."""
        return self.prompts * self.group * (self.prompt_length + self.completion_length)

    @property
    def mask_entries(self) -> float:
        """Pairs of query and key in both attention masks: N P P + N G C (P + C)."""
        return self.prompt_tokens * self.prompt_length + self.completion_tokens * (self.prompt_length + self.completion_length)


def kept_by_c_library(shape: ModelShape, lora: LoraSettings, numbers: Numbers, piece: Pass) -> float:
    """On a CPU, what glibc keeps of a layer's backward pass until its phase ends: freed blocks below 32 MiB (measured).

    Logits larger than that are blocks of their own and come on top in the next pass; smaller ones are put where those were. On a GPU
    such blocks are given back when they are needed.
    """
    if numbers.on_cuda or min(LOGITS_CHUNK, piece.completion_tokens) * shape.vocab_size * 4 < HEAP_BLOCK:
        return 0
    kept = saved_attention(shape, lora, numbers, piece) + saved_norms(shape, numbers, piece, layer_input=False)
    if piece.tokens * shape.intermediate_size * numbers.bytes < HEAP_BLOCK:
        kept += saved_mlp(shape, lora, numbers, piece) + mlp_backward(shape, lora, numbers, piece)
    return kept


def base_weights(shape: ModelShape, numbers: Numbers) -> float:
    """The one frozen base. float16 keeps its gains in float32 (model/loading.py)."""
    return shape.weight_bytes(numbers.bytes, nf4=numbers.nf4, fp32_norms=numbers.kind == "fp16_rescaled")


def nf4_workspace(shape: ModelShape, numbers: Numbers) -> float:
    """The largest linear layer in 16 (or 32) bits: bitsandbytes unpacks one at a time."""
    return max(inputs * outputs for inputs, outputs in shape.linear_sizes.values()) * numbers.bytes if numbers.nf4 else 0


def adapters(shape: ModelShape, lora: LoraSettings, copies: int) -> float:
    """`copies` float32 numbers for each number of an adapter."""
    return 4 * copies * shape.lora_parameters(lora)


def kv_cache(shape: ModelShape, numbers: Numbers, tokens: float) -> tuple[float, float]:
    """Keys and values in sliding and global layers: every layer keeps every token, the prompt's once for its whole group."""
    each = tokens * shape.kv_bytes_per_token_per_layer(numbers.bytes)
    return each * shape.num_sliding_layers, each * shape.num_global_layers


def sampling(shape: ModelShape, settings: SamplingSettings, numbers: Numbers, rows: float) -> float:
    """Drawing one token for each row: copies of the float32 distribution over the vocabulary."""
    copies = TOP_K_COPIES if settings.top_k else SAMPLING_COPIES
    if settings.top_p < 1:
        copies = TOP_P_COPIES + (CUDA_SORT_COPIES if numbers.on_cuda else 0)
    return copies * rows * shape.vocab_size * 4


def decode_scores(shape: ModelShape, rows: float, length: int) -> float:
    """Attention scores of one new token of each row over `length` keys in one layer: four float32 copies at once."""
    return 4 * 4 * rows * shape.num_heads * length


def forward_logits(shape: ModelShape, numbers: Numbers, completion_tokens: float) -> float:
    """Chunks of float32 logits while log-probabilities are computed."""
    chunk = min(LOGITS_CHUNK, completion_tokens) * shape.vocab_size * 4
    return max(LOGITS_COPIES * chunk, chunk + _head_copy(shape, numbers))


def backward_logits(shape: ModelShape, numbers: Numbers, completion_tokens: float) -> float:
    """Chunks of float32 logits while their gradient is computed."""
    chunk = min(LOGITS_CHUNK, completion_tokens) * shape.vocab_size * 4
    head = _head_copy(shape, numbers)
    return max(LOGITS_COPIES * chunk, 2.5 * chunk + head) if head else LOGITS_COPIES * chunk  # in 16 bits, and float32 again


def _head_copy(shape: ModelShape, numbers: Numbers) -> float:
    """16-bit weights on a CPU are multiplied as a float32 copy of the whole head."""
    return 4 * shape.embedding_parameters if numbers.bytes == 2 and not numbers.on_cuda else 0


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
    """After the last layer: its output (float32, for the norm's backward pass), the normed one, and the rows that predict a token."""
    hidden = shape.hidden_size
    return hidden * 4 * piece.tokens + hidden * numbers.bytes * (piece.tokens + piece.completion_tokens)


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


def saved_attention(shape: ModelShape, lora: LoraSettings, numbers: Numbers, piece: Pass) -> float:
    """What one layer's attention keeps for its backward pass, without the layer's input.

    Adapter inputs; queries and keys before their norm (float32), rotated, and values; queries and output as rectangles; keys and
    values repeated for every query head, the prompt's again for each completion; the masks as numbers.
    """
    query, kv, size = shape.query_width, shape.kv_width, numbers.bytes
    per_token = lora_inputs(shape, lora, numbers, {"q_proj", "k_proj", "v_proj", "o_proj"})
    per_token += 4 * (query + kv) + size * (query + 2 * kv) + size * 2 * query
    expanded = 2 * query * size * (piece.prompt_tokens + piece.keys)
    return per_token * piece.tokens + expanded + size * piece.mask_entries


def saved_mlp(shape: ModelShape, lora: LoraSettings, numbers: Numbers, piece: Pass) -> float:
    """What one layer's feed-forward half keeps: gate, its activation and up, and adapter inputs."""
    per_token = 3 * shape.intermediate_size * numbers.bytes
    return (per_token + lora_inputs(shape, lora, numbers, {"gate_proj", "up_proj", "down_proj"})) * piece.tokens


def saved_norms(shape: ModelShape, numbers: Numbers, piece: Pass, *, layer_input: bool) -> float:
    """Inputs of a layer's four norms in float32; in 16 bits the first one is a copy, else the layer's input itself."""
    count = 4 if layer_input or numbers.bytes == 2 else 3
    return count * 4 * shape.hidden_size * piece.tokens


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


def attention_backward(shape: ModelShape, numbers: Numbers, piece: Pass) -> float:
    """Gradients of repeated keys and values, of queries and stream; the 16-bit CUDA kernel sums those of keys and values in float32."""
    query, size = shape.query_width, numbers.bytes
    accumulators = 2 * 4 * query * piece.keys if numbers.on_cuda and size == 2 else 0
    return 2 * query * size * piece.keys + (query + shape.hidden_size) * size * piece.tokens + accumulators


def layer_forward(shape: ModelShape, lora: LoraSettings, numbers: Numbers, piece: Pass) -> float:
    """The most a layer holds while computing forward, the stream included: in its attention or in its feed-forward half."""
    attention = max(_joining_values(shape, numbers, piece), _joining_outputs(shape, numbers, piece))
    return max(attention, _mlp_forward(shape, lora, numbers, piece)) + rotary(shape, numbers, piece.tokens)


def _in_attention(shape: ModelShape, piece: Pass) -> float:
    """Numbers: stream, embedding and normed input; packed queries, keys, values; the prompts' and completions' rectangles."""
    packed = 3 * shape.hidden_size + shape.query_width + 2 * shape.kv_width
    own = (shape.query_width + 2 * shape.kv_width) * piece.completion_tokens
    return packed * piece.tokens + 5 * shape.query_width * piece.prompt_tokens + own


def _joining_values(shape: ModelShape, numbers: Numbers, piece: Pass) -> float:
    """While the repeated values are joined, of which the parts are still there, beside the repeated keys."""
    return numbers.bytes * (_in_attention(shape, piece) + 3 * shape.query_width * piece.keys)


def _joining_outputs(shape: ModelShape, numbers: Numbers, piece: Pass) -> float:
    """While the output is packed again: rectangle, packed part and whole, beside repeated keys and values."""
    outputs = shape.query_width * (2 * piece.completion_tokens + piece.tokens)
    return numbers.bytes * (_in_attention(shape, piece) + 2 * shape.query_width * piece.keys + outputs)


def _mlp_forward(shape: ModelShape, lora: LoraSettings, numbers: Numbers, piece: Pass) -> float:
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
