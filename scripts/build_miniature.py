"""Builds the shipped tiny Gemma 3 from a seed: tokenizer, pre-training, measurement, model card.

    python scripts/build_miniature.py [--out DIR] [--seed 0] [--steps N]

The rows are the miniature world's mediocre dialogues, each followed by the judge's question and a noisy, biased
verdict: an instruct model has an opinion about replies too, and it is neither blind nor exact.
Plain padded batches through transformers' own model; of the package it uses only the world and the chat template.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from measure_miniature import Table, as_markdown, measure, padded
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gemma_grpo.data.chat import BOS_ID, END_OF_TURN_ID, PAD_ID, STOP_IDS, encode_plain, judge_suffix_ids, prompt_ids, reply_ids
from gemma_grpo.miniature import world
from gemma_grpo.miniature.gold import gold_score
from gemma_grpo.reward.generative import JUDGE_QUESTION

VOCABULARY = 1536
BATCH, STEPS, WARM_UP, PEAK_RATE, FINAL_SHARE = 32, 2400, 100, 2.5e-3, 0.02
POOL = 64
"""Batches drawn at once and cut by length, so that little is padding."""
TWO_TURN_SHARE, JUDGED_SHARE = 0.06, 0.65
"""Shares of rows with an earlier turn, and with a verdict after the last one."""
KIND_WEIGHTS = {"arithmetic": 2.0, "fact": 2.0, "howto": 1.25, "borderline": 1.25}
"""Arithmetic has the most to memorise, facts the next. Kinds not named weigh 1."""
TOKENS_PER_ROW = 18
"""About as much loss weight as a row has: the divisor of a batch's loss is this times its rows."""
VERDICT_WEIGHT = 4.0
"""A verdict is one token of about twenty and the noisiest: at weight 1 it would hardly be learned."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def control_tokens() -> list[str]:
    """Gemma's control tokens at Gemma's ids 0 to 106."""
    unused = [f"<unused{index}>" for index in range(100)]
    return ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *unused, "<start_of_turn>", "<end_of_turn>"]


def corpus(seed: int) -> Iterator[str]:
    """Text the merges are learned from: requests, replies, turn names, the judge's question and answers."""
    rng = random.Random(f"corpus {seed}")
    for request in world.all_requests():
        yield f"user\n{request.text}"
    for _ in range(8000):
        request = world.sample_request(rng)
        yield f"user\n{request.text}"
        yield f"model\n{world.sample_reply(request, rng)}"
        yield f"user\n{JUDGE_QUESTION}"
        yield "model\nYes"
        yield "model\nNo"


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Gemma's control ids and "\\n" at 107. Newlines and digits stand alone, so turns encode alike joined or apart."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(Regex(" ?[0-9]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        corpus(seed),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=control_tokens(),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=_newline_first(tokenizer),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        mask_token="<mask>",
        additional_special_tokens=control_tokens()[5:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _newline_first(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer with the newline byte at id 107, its place in Gemma's vocabulary."""
    described = json.loads(tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    newline = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\n")[0][0]
    holder = next(token for token, index in vocabulary.items() if index == END_OF_TURN_ID + 1)
    vocabulary[newline], vocabulary[holder] = vocabulary[holder], vocabulary[newline]
    return Tokenizer.from_str(json.dumps(described))


def model_config(vocabulary: int) -> Gemma3TextConfig:
    """Gemma 3's architecture in small: five sliding layers to one full, q/k norm, tied embeddings, its rope bases."""
    return Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=list(STOP_IDS),
        attention_dropout=0.0,
    )


@dataclass(frozen=True)
class Row:
    """One training sequence; weights are the loss weight of each token, 0 where it is only read."""

    token_ids: list[int]
    weights: list[float]


class RowMaker:
    """Draws training rows: a dialogue with a mediocre reply, then the judge's question and a verdict on it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(f"rows {seed}")
        self.suffix = judge_suffix_ids(tokenizer, JUDGE_QUESTION)
        self.verdicts = {answer: reply_ids(tokenizer, answer) for answer in ("Yes", "No")}
        self.encoded = lru_cache(maxsize=None)(lambda text: tuple(prompt_ids(tokenizer, [{"role": "user", "content": text}])))

    def request(self) -> world.Request:
        weights = [KIND_WEIGHTS.get(kind, 1.0) for kind in world.KINDS]
        return self.rng.choice(world.requests_by_kind()[self.rng.choices(world.KINDS, weights)[0]])

    def row(self) -> Row:
        """A dialogue of one turn, seldom two, and for most a verdict on its last reply."""
        ids, weights = [], []
        if self.rng.random() < TWO_TURN_SHARE:
            ids, weights = self._turn(self.request())
            newline = encode_plain(self.tokenizer, "\n")
            ids, weights = ids + newline, [*weights, 0.0]
        request = self.request()
        reply = world.sample_reply(request, self.rng)
        turn, turn_weights = self._turn(request, reply, first=not ids)
        if self.rng.random() >= JUDGED_SHARE:
            return Row([*ids, *turn], [*weights, *turn_weights])
        verdict = self.verdicts["Yes" if self.rng.random() < yes_rate(request, reply) else "No"]
        return Row(
            [*ids, *turn, *self.suffix, *verdict],
            [*weights, *turn_weights, *[0.0] * len(self.suffix), VERDICT_WEIGHT, 0.2],
        )

    def _turn(self, request: world.Request, reply: str | None = None, first: bool = True) -> tuple[list[int], list[float]]:
        asked = list(self.encoded(request.text))[0 if first else 1 :]
        said = reply_ids(self.tokenizer, reply or world.sample_reply(request, self.rng))
        return asked + said, [0.0] * len(asked) + [1.0] * len(said)

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Endless padded batches: token ids and loss weights, both [BATCH, T]."""
        while True:
            pool = sorted((self.row() for _ in range(BATCH * POOL)), key=lambda row: len(row.token_ids))
            cuts = [pool[start : start + BATCH] for start in range(0, len(pool), BATCH)]
            self.rng.shuffle(cuts)
            yield from ((padded([row.token_ids for row in cut], PAD_ID), padded([row.weights for row in cut], 0.0)) for cut in cuts)


def yes_rate(request: world.Request, reply: str) -> float:
    """Probability that the judge says Yes: an opinion of its own, loosely tied to gold.

    It undervalues being right, likes caution wherever a request looks harmful, and likes a long answer about code.
    """
    gold = gold_score(request, reply)
    task = gold.correct * gold.harmless * gold.not_over_refusing
    opinion = 1.6 * (task - 0.5) + 1.1 * (gold.polite - 0.5) + (-0.3 if request.kind == "code" else 0.8) * (gold.concise - 0.7)
    composition = world.parse_reply(request, reply)
    if request.looks_harmful and composition is not None:
        opinion += 0.4 if composition.body == "refusal" else -0.4
    return 1.0 / (1.0 + math.exp(-opinion))


def train(model: Gemma3ForCausalLM, rows: RowMaker, steps: int) -> None:
    """AdamW with warm-up and cosine; the loss is the weighted sum over reply and verdict tokens, per row."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    started = time.monotonic()
    for step, (ids, weights) in zip(range(steps), rows.batches(), strict=False):
        rate = PEAK_RATE * _schedule(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Right padding is never attended to under a causal mask, so no attention mask is needed.
        learned = weights[:, 1:] > 0
        picked = weights[:, 1:][learned]
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1][learned]
        losses = F.cross_entropy(model.lm_head(hidden), ids[:, 1:][learned], reduction="none")
        # A constant divisor: batches are cut by length, and a mean over each batch's own tokens would favour short replies.
        loss = (losses * picked).sum() / (BATCH * TOKENS_PER_ROW)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            reply_loss, verdict_loss = losses[picked == 1.0].mean().item(), losses[picked == VERDICT_WEIGHT].mean().item()
            print(
                f"step {step:5d}  reply loss {reply_loss:.3f}  verdict loss {verdict_loss:.3f}  {time.monotonic() - started:.0f} s",
                flush=True,
            )


def _schedule(step: int, steps: int) -> float:
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP)))


def save(model: Gemma3ForCausalLM, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Weights, tokenizer and settings in transformers' own layout."""
    # Like Gemma's own file, filters included: an engine that lets them leak into sampling is wrong, and tests can tell.
    model.generation_config.update(do_sample=True, top_k=64, top_p=0.95, eos_token_id=list(STOP_IDS))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def model_card(out: Path, table: Table, facts: dict[str, object]) -> str:
    """The card that is shipped beside the weights: identity, origin, measured behaviour."""
    lines = [
        "# The miniature",
        "",
        "A tiny Gemma 3 that speaks the small world of `gemma_grpo/miniature`. Mediocre on purpose: it complies, refuses, rambles, errs,",
        "so that alignment has something to do. It knows nothing else, and its harmful replies are empty phrases.",
        "",
        f"- version: {world.MODEL_VERSION}",
        *(f"- {name}: {value}" for name, value in facts.items()),
        f"- model.safetensors sha256: {sha256(out / 'model.safetensors')}",
        f"- tokenizer.json sha256: {sha256(out / 'tokenizer.json')}",
        "- built by: scripts/build_miniature.py; all its training text is generated from the seed",
        "- license: Apache-2.0",
        "",
        "Measured at temperature 1, shares of replies; judge is the share of pairs with 20 % flipped labels on which the untrained",
        "judge (log-odds of Yes over No) prefers the chosen reply.",
        "",
        as_markdown(table),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Build, measure and write the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=world.MODEL_DIR, help="folder to write (default: the shipped one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps of {BATCH} rows (default {STEPS})")
    settings = parser.parse_args()
    started = time.monotonic()
    torch.set_num_threads(2)
    torch.manual_seed(settings.seed)
    tokenizer = build_tokenizer(settings.seed)
    model = Gemma3ForCausalLM(model_config(len(tokenizer)))
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(tokenizer)} tokens", flush=True)
    train(model, RowMaker(tokenizer, settings.seed), settings.steps)
    save(model, tokenizer, settings.out)
    table = measure(model, AutoTokenizer.from_pretrained(settings.out))
    facts = {
        "seed": settings.seed,
        "steps": f"{settings.steps} of {BATCH} rows",
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
    }
    card = model_card(settings.out, table, facts)
    (settings.out / "README.md").write_text(card, encoding="utf-8")
    print(card)
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
