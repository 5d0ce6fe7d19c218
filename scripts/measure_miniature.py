"""Measures the shipped tiny Gemma 3: what it says at temperature 1, by kind of request, and how good an untrained judge it is.

    python scripts/measure_miniature.py [--model DIR]

scripts/build_miniature.py writes the same numbers into the model card. It trains nothing and writes no file.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, Gemma3ForCausalLM, PreTrainedTokenizerBase

from gemma_grpo.data.chat import PAD_ID, STOP_IDS, encode_plain, judge_suffix_ids, prompt_ids, reply_ids, reply_text
from gemma_grpo.miniature import world
from gemma_grpo.miniature.gold import gold_score
from gemma_grpo.reward.generative import JUDGE_QUESTION

Table = dict[str, dict[str, float]]
"""Kind of request, or "all", to column, to rate."""


def padded(rows: Sequence[Sequence[float]], fill: float) -> torch.Tensor:
    """Rows of unequal length as a rectangle, filled on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


@torch.no_grad()
def sample_texts(model: Gemma3ForCausalLM, tokenizer: PreTrainedTokenizerBase, requests: Sequence[world.Request]) -> list[str]:
    """One reply to each request at temperature 1, nothing filtered."""
    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": request.text}]) for request in requests]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), 128):
        chosen = order[start : start + 128]
        width = max(len(prompts[index]) for index in chosen)
        ids = torch.tensor([[PAD_ID] * (width - len(prompts[index])) + prompts[index] for index in chosen])
        out = model.generate(
            input_ids=ids, attention_mask=(ids != PAD_ID).long(), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=80, eos_token_id=list(STOP_IDS), pad_token_id=PAD_ID,
        )  # fmt: skip
        for index, row in zip(chosen, out[:, width:].tolist(), strict=True):
            while row and row[-1] == PAD_ID:
                row.pop()
            texts[index] = reply_text(tokenizer, row)
    return texts


@torch.no_grad()
def verdicts(model: Gemma3ForCausalLM, tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[tuple[str, str]]) -> list[float]:
    """Log-odds of Yes over No after the judge's question, one for each (request, reply)."""
    suffix = judge_suffix_ids(tokenizer, JUDGE_QUESTION)
    yes, no = (encode_plain(tokenizer, answer)[0] for answer in ("Yes", "No"))
    rows = [
        prompt_ids(tokenizer, [{"role": "user", "content": request}]) + reply_ids(tokenizer, reply) + suffix for request, reply in dialogues
    ]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    odds = [0.0] * len(rows)
    for start in range(0, len(order), 128):
        chosen = order[start : start + 128]
        hidden = model.model(input_ids=padded([rows[index] for index in chosen], PAD_ID)).last_hidden_state
        last = hidden[range(len(chosen)), [len(rows[index]) - 1 for index in chosen]]
        logits = model.lm_head(last)
        for index, value in zip(chosen, (logits[:, yes] - logits[:, no]).tolist(), strict=True):
            odds[index] = value
    return odds


def measure(model: Gemma3ForCausalLM, tokenizer: PreTrainedTokenizerBase, per_kind: int = 200, num_pairs: int = 2000) -> Table:
    """What the built model does at temperature 1, by kind, and how often its verdict agrees with a noisy pair."""
    model.eval()
    torch.manual_seed(1)
    rng = random.Random("measure")
    requests = [request for kind in world.KINDS for request in rng.choices(world.requests_by_kind()[kind], k=per_kind)]
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    gold: dict[str, float] = defaultdict(float)
    for request, text in zip(requests, sample_texts(model, tokenizer, requests), strict=True):
        composition = world.parse_reply(request, text)
        marks = [composition.body, composition.opener, *["ramble"] * (composition.num_fillers > 0), "fluent"] if composition else []
        for name in (request.kind, "all"):
            counts[name].update(marks)
            gold[name] += gold_score(request, text).total
    columns = ("fluent", "right", "wrong", "refusal", "comply", "polite", "none", "rude", "ramble")
    sizes = {**dict.fromkeys(world.KINDS, per_kind), "all": per_kind * len(world.KINDS)}
    table = {
        name: {**{column: counts[name][column] / size for column in columns}, "gold": gold[name] / size} for name, size in sizes.items()
    }
    for name, value in judge_accuracy(model, tokenizer, num_pairs).items():
        table[name]["judge"] = value
    return table


def judge_accuracy(model: Gemma3ForCausalLM, tokenizer: PreTrainedTokenizerBase, num_pairs: int) -> dict[str, float]:
    """Share of noisy held-out pairs in which the untrained judge prefers the chosen reply, by kind; "clean" is on unflipped labels."""
    agreed: dict[str, list[bool]] = defaultdict(list)
    for name, flip in (("all", 0.2), ("clean", 0.0)):
        pairs = world.sample_pairs(seed=987, count=num_pairs, flip=flip)
        dialogues = [(pair[side][0]["content"], pair[side][1]["content"]) for pair in pairs for side in ("chosen", "rejected")]
        odds = verdicts(model, tokenizer, dialogues)
        for index, pair in enumerate(pairs):
            agreed[name].append(odds[2 * index] > odds[2 * index + 1])
            if flip:
                agreed[pair["kind"]].append(agreed[name][-1])
    clean = agreed.pop("clean")
    print(f"judge, zero-shot: {sum(agreed['all']) / num_pairs:.3f} of noisy pairs, {sum(clean) / num_pairs:.3f} of unflipped ones")
    return {name: sum(values) / len(values) for name, values in agreed.items()}


def as_markdown(table: Table) -> str:
    """The table as the model card shows it."""
    columns = list(table["all"])
    rows = [f"| {name} | " + " | ".join(f"{values[column]:.3f}" for column in columns) + " |" for name, values in table.items()]
    return "\n".join(["| kind | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns), *rows])


def main() -> None:
    """Print the table of a built model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=world.MODEL_DIR, help="folder of the model (default: the shipped one)")
    settings = parser.parse_args()
    model = Gemma3ForCausalLM.from_pretrained(settings.model)
    print(as_markdown(measure(model, AutoTokenizer.from_pretrained(settings.model))))


if __name__ == "__main__":
    main()
