"""What a recipe's lengths cut, counted in tokens that can be worked out by hand."""

from __future__ import annotations

from gemma_grpo.config import GRPOConfig
from gemma_grpo.data.hh_rlhf import parse_pairs
from gemma_grpo.data_check.check import check_data


def test_each_limit_is_counted_with_the_rows_that_break_it(tokenizer):
    # one token a byte: a prompt of n bytes has n + 16 tokens, a reply of n bytes n + 1
    config = GRPOConfig(max_prompt_length=64, max_completion_length=16, reward_model={"max_length": 400})
    turns = [("user", "z" * 40), ("assistant", "a"), ("user", "E?")]  # 1 + 48 + 10 + 10 + 7 tokens
    rows = [
        {"prompt": "x" * 48, "chosen": "y" * 15, "rejected": "n"},
        {"prompt": "x" * 49, "chosen": "yes", "rejected": "no"},
        {"prompt": "C?", "chosen": "y" * 16, "rejected": "no"},
        {"prompt": "D?", "chosen": "yes", "rejected": "n" * 390},
        {"prompt": [{"role": role, "content": text} for role, text in turns], "chosen": "yes", "rejected": "no"},
    ]
    report = check_data(parse_pairs(rows), config, tokenizer)
    cut = next(finding for finding in report.findings if finding.name == "truncation")
    assert (cut.count, cut.of, [example.row for example in cut.examples]) == (4, 5, [2, 3, 4])
    assert cut.details == {
        "prompts dropped": 1,
        "chosen replies longer than a rollout": 1,
        "pairs dropped from the reward's training": 1,
        "prompts shortened": 1,
    }
