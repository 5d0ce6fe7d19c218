"""Is a judge that was never trained good enough to train with? On held-out pairs, source by source, before it decides anything.

A small model's own verdict can be near chance, and a judge of two replies can like the first place more than either reply.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gemma_grpo.data.prompts import EncodedPair
from gemma_grpo.reward.generative import pair_groups
from gemma_grpo.reward.pairwise import PairwiseJudge
from gemma_grpo.reward.quality import accuracy
from gemma_grpo.reward.zero_shot import ZeroShotJudge

PAIRS_OF_A_SOURCE = 128
REMEDY = "Take a larger model, a rubric (judge.rubric), or the trained reward (generative)."


def gate_report(judge: ZeroShotJudge | PairwiseJudge, pairs: Sequence[EncodedPair]) -> dict[str, Any]:
    """Source -> accuracy on its first held-out pairs; {} without pairs. Of two replies only a verdict of both orders counts as right."""
    seen: Counter[str] = Counter()
    kept: list[EncodedPair] = []
    for pair in pairs:
        seen[pair.pair.source] += 1
        if seen[pair.pair.source] <= PAIRS_OF_A_SOURCE:
            kept.append(pair)
    if not kept:
        return {}
    groups = pair_groups(kept)
    if isinstance(judge, PairwiseJudge):
        right = [a > 0.5 and same for a, same in zip(judge.preferences(groups), judge.consistent(groups), strict=True)]
        margins = torch.tensor([1.0 if one else -1.0 for one in right])
    else:
        scores = torch.tensor(judge.score(groups), dtype=torch.float32)
        margins = scores[:, 0] - scores[:, 1]
    sources = [pair.pair.source for pair in kept]
    places = {source: [n for n, other in enumerate(sources) if other == source] for source in sorted(set(sources))}
    return {source: accuracy(margins[rows]) for source, rows in places.items()}


def failing(report: Mapping[str, Any], least: float) -> list[str]:
    """The sources on which a judge is right on less than `least` of the pairs."""
    return [source for source, found in report.items() if found["value"] < least]


def gate_warning(name: str, report: Mapping[str, Any], least: float) -> str:
    """Why a judge is not trained with, and what would help."""
    shown = ", ".join(f"{report[source]['value']:.0%} on {source}" for source in failing(report, least))
    return (
        f"reward {name!r} is right on {shown} of the held-out pairs, below judge.least_accuracy ({least:.0%}): it is logged and counts "
        f"for nothing. {REMEDY}"
    )
