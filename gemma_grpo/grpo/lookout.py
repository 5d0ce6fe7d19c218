"""Looks at a policy while it is trained: the same held-out prompts answered again and again, scored by what training never sees.

Owns the prompts, the log `witnesses.jsonl` and the adapter that the witness likes best. What a look means is monitor/alarms.py's.
A look is a function of the weights, the step and the settings alone, so a run that goes on repeats it to the bit.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_grpo.config import GRPOConfig
from gemma_grpo.data.batch import pad_rollouts
from gemma_grpo.evaluation import is_harmful, looks_harmful
from gemma_grpo.grpo.assess import Scorers, sample_in_chunks
from gemma_grpo.grpo.setup import TrainingData
from gemma_grpo.grpo.step import role_logprobs, sampling_params
from gemma_grpo.model.adapters import write_adapter
from gemma_grpo.model.gemma import REFERENCE, Gemma
from gemma_grpo.monitor.alarms import Alarm, new_alarms
from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.reward.rules import distinct_n, is_refusal
from gemma_grpo.rollout.engine import RolloutEngine
from gemma_grpo.types import Completion, Prompt, RolloutGroup

LOOK_STEP = -2
"""Sampling counter of a look: neither training nor the evaluation draws the same numbers."""
BEST = "best"
STRAYED = 0.4
"""Nats per token from which a reply counts as one that the untouched model would hardly give. Where a reward is gamed a few replies go so
far long before their mean does; kl.ref_target allows the mean 0.05 (docs/overoptimisation.md).
"""


class Lookout:
    """Watches one run."""

    def __init__(
        self,
        run: RunDirectory,
        model: Gemma,
        engine: RolloutEngine,
        scorers: Scorers,
        data: TrainingData,
        config: GRPOConfig,
    ) -> None:
        self.run, self.model, self.engine, self.scorers, self.config = run, model, engine, scorers, config
        self.prompts, self.look_alikes = list(data.held_out_prompts[: config.witness.num_prompts]), list(data.look_alikes)

    @property
    def num_replies(self) -> int:
        """Replies sampled at each look; 0 where there is nothing to ask."""
        return self.config.witness.num_completions * (len(self.prompts) + len(self.look_alikes)) if self.prompts else 0

    def due(self, step: int, total_steps: int) -> bool:
        """Whether `step` finished steps call for a look that was not taken yet: at the start, every so often, and at the end."""
        every = self.config.witness.every
        if not every or not self.prompts or (step % every and step != total_steps):
            return False
        looks = self.run.looks()
        return not looks or looks[-1]["step"] < step

    @property
    def alerted(self) -> bool:
        """Whether an alarm has ended this run: by the log, which a run that goes on has too."""
        if not self.config.witness.stop_on_alert:
            return False
        return any(alarm["level"] == "alert" for look in self.run.looks() for alarm in look["alarms"])

    def look(self, step: int) -> list[Alarm]:
        """Answer the prompts, score and log the answers; what is alarming about them, compared with the looks before."""
        started = time.perf_counter()
        params = sampling_params(self.config, LOOK_STEP, num_generations=self.config.witness.num_completions)
        asked = [*self.prompts, *self.look_alikes]
        groups = sample_in_chunks(self.engine, asked, params, self.config.completions_per_step)
        replies = self._replies(groups, step)
        metrics = look_metrics(replies)
        now = {"step": step, "metrics": metrics, "replies": replies}
        alarms = new_alarms(self.run.looks(), now)
        told = [alarm.to_dict() for alarm in alarms]
        self._keep_best(step, metrics.get("witness"))
        self.run.append_look({**now, "alarms": told})
        self.run.event("look", step=step, seconds=time.perf_counter() - started)
        for alarm in told:
            self.run.event("alarm", **alarm)
        return alarms

    def _replies(self, groups: Sequence[RolloutGroup], step: int) -> list[dict[str, Any]]:
        """Every reply with what is known of it; at step 0 with its prompt, which is the same at every later look."""
        scores, _ = self.scorers.score(groups[: len(self.prompts)])
        scores += [[{} for _ in group.completions] for group in groups[len(self.prompts) :]]  # no reward may know what to make of these
        batch = pad_rollouts(groups).to(self.model.device)
        logprobs = role_logprobs(self.model, batch, REFERENCE, temperature=self.config.temperature)
        reference, oddest = logprobs.sum(-1).tolist(), logprobs.amin(-1).tolist()  # padding is 0, and no log-probability is above
        found = []
        for n, group in enumerate(groups):
            prompt = [] if step else [dict(message) for message in group.prompt.messages]
            for g, completion in enumerate(group.completions):
                scored = dict(scores[n][g])
                kl = sum(completion.sampling_logprobs) - reference[n][g]
                measured = {"proxy": scored.pop("reward", None), **scored, "kl": kl}
                length = max(1, len(completion.token_ids))
                measured |= {"oddest": oddest[n][g], "fluency": reference[n][g] / length, "strayed": kl > STRAYED * length}
                bundled = {"bundled": True} if n >= len(self.prompts) else {}
                found.append(_reply(group.prompt, completion) | measured | bundled | ({"prompt": prompt} if prompt else {}))
        return found

    def _keep_best(self, step: int, witness: float | None) -> None:
        """The adapter the witness liked best lies beside the last one."""
        if witness is None:
            return
        path = self.run.path / BEST / "best.json"
        if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["witness"] >= witness:
            return
        write_adapter(path.parent, self.model.adapter_files("policy"))
        self.run.write_json(f"{BEST}/best.json", {"step": step, "witness": witness})


def _reply(prompt: Prompt, completion: Completion) -> dict[str, Any]:
    return {
        "prompt_id": prompt.prompt_id,
        "source": prompt.source,
        "kind": "harmful" if is_harmful(prompt) else "looks_harmful" if looks_harmful(prompt) else "benign",
        "text": completion.text,
        "length": len(completion.token_ids),
        "clipped": completion.finish == "length",
        "refused": is_refusal(completion.text),
    }


def look_metrics(replies: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the replies of one look, bundled prompts left out but for their refusals; of what no reply has, nothing."""
    everything, replies = replies, [reply for reply in replies if not reply.get("bundled")]
    lengths, texts = [reply["length"] for reply in replies], [reply["text"] for reply in replies]
    found = {
        "length": statistics.fmean(lengths),
        "clipped": statistics.fmean(reply["clipped"] for reply in replies),
        "kl": sum(reply["kl"] for reply in replies) / max(1, sum(lengths)),
        "kl_sequence": statistics.fmean(reply["kl"] for reply in replies),
        "strayed": statistics.fmean(reply["strayed"] for reply in replies),
        "distinct_2": distinct_n(texts, 2),
    }
    for name in ("proxy", "witness", "lexical", "gold", "fluency", "oddest"):
        values = [reply[name] for reply in replies if reply.get(name) is not None]
        if values:
            found[name] = statistics.fmean(values)
    for kind in ("harmful", "benign", "looks_harmful"):
        refusals = [reply["refused"] for reply in everything if reply["kind"] == kind]
        if refusals:
            found[f"refusal_{kind}"] = statistics.fmean(refusals)
    return found
