"""What a model could do before and can still do after: tasks of EleutherAI's lm-evaluation-harness, with the adapter off and on.

The harness is the field's own for this (pip install 'gemma-grpo[tasks]'); it is imported when tasks are asked for. Both sides answer the
same questions, so that a gain has an interval by question, as every other metric of evaluation.json.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, TypeAlias

from gemma_grpo.evaluation import paired_metric
from gemma_grpo.model.gemma import REFERENCE, Gemma

Task: TypeAlias = "str | dict[str, Any]"
"""A name the harness knows, or a task's own settings as the harness takes them."""
INSTALL = "Tasks are run by the lm-evaluation-harness, which is not installed: pip install 'gemma-grpo[tasks]'."


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises ValueError where the harness is missing, or does not know a name: before any model is loaded."""
    if not tasks:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(INSTALL)
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    for name in tasks:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            raise ValueError(f"the lm-evaluation-harness has no task {name!r}." + (f" Did you mean {', '.join(near)}?" if near else ""))


def evaluate_tasks(model: Gemma, tasks: Sequence[Task], *, limit: int | None, batch_size: int, seed: int) -> dict[str, dict[str, Any]]:
    """Task -> metric -> {"before", "after", "gain", "interval", "n", "higher_is_better"}, over the same questions.

    A group such as "mmlu" gives its parts, and a metric has its filter's name behind it where the task has several filters. `limit` takes
    the first so many questions of each task. Metrics that are no mean over questions, such as perplexities, are left out; a task that has
    no other is there without any.
    """
    before, after = (_run(model, role, tasks, limit, batch_size) for role in (REFERENCE, "policy"))
    found: dict[str, dict[str, Any]] = {}
    for name, metrics in _answers(before).items():
        others, found[name] = _answers(after)[name], {}
        for metric, values in sorted(metrics.items()):
            ids = [one for one in values if one in others.get(metric, {})]
            pairs = [(values[one], others[metric][one]) for one in ids]
            better = before["higher_is_better"].get(name, {}).get(metric.partition(",")[0], True)
            measured = paired_metric([str(one) for one in ids], pairs, seed=seed)
            found[name][metric] = {**measured, "higher_is_better": bool(better)}
    return found


def _run(model: Gemma, role: str, tasks: Sequence[Task], limit: int | None, batch_size: int) -> Mapping[str, Any]:
    """What the harness returns for one side."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with model.role(role):
        harness = HFLM(
            pretrained=model.causal_lm, tokenizer=model.tokenizer, backend="causal", device=str(model.device), batch_size=batch_size
        )
        result = lm_eval.simple_evaluate(model=harness, tasks=list(tasks), limit=limit, bootstrap_iters=0, log_samples=True)
    if result is None:
        raise RuntimeError("the lm-evaluation-harness returned no results.")
    return dict(result)


def _answers(result: Mapping[str, Any]) -> dict[str, dict[str, dict[int, float]]]:
    """Task -> metric -> question -> value, of the metrics whose figure for the task is the mean over its questions."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for name, rows in result["samples"].items():
        filters = {row["filter"] for row in rows}
        task = found.setdefault(name, {})
        for filtered in filters:
            own = [row for row in rows if row["filter"] == filtered]
            for metric in {metric for row in own for metric in row["metrics"]}:
                values = {int(row["doc_id"]): float(row[metric]) for row in own if isinstance(row.get(metric), int | float)}
                told = result["results"][name].get(f"{metric},{filtered}")
                if values and isinstance(told, int | float) and math.isclose(fmean(values.values()), told, abs_tol=1e-9):
                    task[metric if len(filters) == 1 else f"{metric},{filtered}"] = values
    return found
