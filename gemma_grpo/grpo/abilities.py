"""What a model could do before and can still do after: tasks of EleutherAI's lm-evaluation-harness, with the adapter off and on.

The harness is the field's own for this (pip install 'gemma-grpo[tasks]'); it is imported when tasks are asked for. Both sides answer the
same questions, so that a gain has an interval by question, as every other metric of evaluation.json.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from gemma_grpo.evaluation import paired_metric
from gemma_grpo.model.gemma import REFERENCE, Gemma

Task: TypeAlias = "str | dict[str, Any]"
"""A name the harness knows, or a task's own settings as the harness takes them."""
INSTALL = "Tasks are run by the lm-evaluation-harness, which is not installed: pip install 'gemma-grpo[tasks]'."


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises ValueError where the harness is missing, or does not know a name: before any model is loaded."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(INSTALL)
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    for name in tasks:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            raise ValueError(f"the lm-evaluation-harness has no task {name!r}." + (f" Did you mean {', '.join(near)}?" if near else ""))


def evaluate_tasks(model: Gemma, tasks: Sequence[Task], *, limit: int | None, batch_size: int, seed: int) -> dict[str, dict[str, Any]]:
    """Task -> metric -> {"before", "after", "gain", "interval", "n"}, over the same questions. A group such as "mmlu" gives its parts.

    `limit` takes the first so many questions of each task. Metrics that no single question has, such as perplexities, are left out.
    """
    answers = [_answers(model, role, tasks, limit, batch_size) for role in (REFERENCE, "policy")]
    found: dict[str, dict[str, Any]] = {}
    for name, before in answers[0].items():
        after = answers[1][name]
        metrics = {metric for row in before.values() for metric in row}
        for metric in sorted(metrics):
            ids = [one for one in before if metric in before[one] and metric in after.get(one, {})]
            pairs = [(before[one][metric], after[one][metric]) for one in ids]
            if pairs:
                found.setdefault(name, {})[metric] = paired_metric([str(one) for one in ids], pairs, seed=seed)
    return found


def _answers(model: Gemma, role: str, tasks: Sequence[Task], limit: int | None, batch_size: int) -> dict[str, dict[int, dict[str, float]]]:
    """Task -> question -> metric -> value."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with model.role(role):
        harness = HFLM(
            pretrained=model.causal_lm, tokenizer=model.tokenizer, backend="causal", device=str(model.device), batch_size=batch_size
        )
        result = lm_eval.simple_evaluate(model=harness, tasks=list(tasks), limit=limit, bootstrap_iters=0, log_samples=True)
    samples: Mapping[str, Sequence[Mapping[str, Any]]] = (result or {}).get("samples", {})
    return {name: {int(one["doc_id"]): _numbers(one) for one in rows} for name, rows in samples.items()}


def _numbers(sample: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(sample[name]) for name in sample.get("metrics", ()) if isinstance(sample.get(name), bool | int | float)}
