"""Our side of the bench: one process that loads the model once and runs a step whenever the driver asks.

A step is Stepper.train_step, put together as GRPOTrainer does, with the budgets its plan gives and every default of GRPOConfig.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.machine import versions
from bench.protocol import Line, PeakMemory
from bench.workload import Setting, StepLengths, draw_steps, force_lengths, prompt_texts, varied_reward
from gemma_grpo.config import GRPOConfig, build_config
from gemma_grpo.grpo.preflight import plan_for
from gemma_grpo.grpo.step import Stepper, policy_batch, sampling_params
from gemma_grpo.grpo.update import PolicyUpdater
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.memory import TokenBudget
from gemma_grpo.reward.base import RewardStack, WeightedReward
from gemma_grpo.reward.functions import FunctionReward
from gemma_grpo.rollout.local import LocalEngine
from gemma_grpo.types import Prompt

ADAPTER_SPREAD = 0.04
"""Standard deviation of both factors of the adapter: neither is 0, so that policy and reference differ and both have a gradient."""


def config_of(setting: Setting, folder: str) -> GRPOConfig:
    """The run's settings: what both sides have in common, and our defaults for the rest."""
    return build_config(
        {
            "model_name": folder,
            "reward": {"length": 1.0},  # for the plan alone: no judge; the steps use varied_reward
            "batch_size": setting.batch_size,
            "gradient_accumulation_steps": setting.accumulation,
            "num_generations": setting.num_generations,
            "planning_steps": setting.planning_steps,
            "max_prompt_length": setting.max_prompt_length,
            "max_completion_length": setting.max_completion_length,
            "temperature": setting.temperature,
            "learning_rate": setting.learning_rate,
            "precision": setting.precision,
            "gradient_checkpointing": setting.gradient_checkpointing,
            "seed": setting.seed,
            "kl.beta": setting.beta,
            "lora.r": setting.lora_r,
            "lora.alpha": setting.lora_alpha,
            "lora.target_modules": setting.target_modules,
        }
    )


class OwnSide:
    """Model, engine and stepper of one setting, and the steps it will be asked for."""

    def __init__(self, setting: Setting, folder: str, adapter: Path, steps: Sequence[StepLengths]) -> None:
        self.config = config = config_of(setting, folder)
        self.setting, self.steps = setting, steps
        self.model = Gemma.load(folder, lora=config.lora, precision=config.precision, seed=config.seed)
        self._start(adapter)
        if config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        plan = plan_for(config, {"length"}, {})
        self.model.budget = TokenBudget(plan.token_budget)
        self.lengths = torch.zeros(0, dtype=torch.long)
        engine = LocalEngine(self.model, plan.kv_token_budget, processor=self._force)
        rewards = RewardStack([WeightedReward(FunctionReward(varied_reward))])
        self.stepper = Stepper(self.model, engine, rewards, PolicyUpdater(self.model, config, len(steps)), config)
        tokenizer = self.model.tokenizer
        self.prompts = [
            [
                Prompt(f"{index}-{n}", "bench", ({"role": "user", "content": text},), tuple(tokenizer(text)["input_ids"]), f"{index}-{n}")
                for n, text in enumerate(texts)
            ]
            for index, texts in enumerate(prompt_texts(self.steps))
        ]

    def _start(self, adapter: Path) -> None:
        """An adapter that differs from the base, written for the other side to start from."""
        generator = torch.Generator().manual_seed(self.setting.seed)
        with torch.no_grad():
            for parameter in self.model.adapter_parameters("policy").values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * ADAPTER_SPREAD)
        self.model.save_adapter("policy", adapter)

    def _force(self, logits: Tensor, completions: Tensor, positions: Tensor) -> Tensor:
        return force_lengths(logits, positions, self.lengths[completions], self.setting.max_completion_length)

    def prepare(self, index: int) -> StepLengths:
        """Force a step's lengths from now on."""
        self.lengths = torch.tensor(self.steps[index].completions, device=self.model.device)
        return self.steps[index]

    def step(self, index: int) -> dict[str, Any]:
        """Run a step; wall time by phase, and what shows that it did what was asked."""
        lengths = self.prepare(index)
        started, cpu = time.perf_counter(), time.process_time()
        record, groups = self.stepper.train_step(self.prompts[index], index)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        sampled = [len(completion.token_ids) for group in groups for completion in group.group.completions]
        assert sampled == list(lengths.completions), "the completions are not as long as they were forced to be"
        metrics = {name: record.metrics[name] for name in ("loss", "kl", "kl_step", "passes", "rollbacks", "oom_retries", "grad_norm")}
        return {"seconds": seconds, "cpu_seconds": cpu, "phases": dict(record.seconds), "metrics": metrics}

    def agree(self, index: int, path: str) -> dict[str, Any]:
        """Completions, loss and LoRA gradient of a step's first pass, written for the other side to repeat; nothing is updated."""
        self.prepare(index)
        stepper, config = self.stepper, self.config
        groups = stepper.engine.sample(self.prompts[index], sampling_params(config, index))
        scores = stepper.rewards.score(groups)
        batch = policy_batch(self.model, groups, scores, stepper.rewards.weights, config, config.kl.beta)
        gradient, sums, _ = stepper.updater._accumulate(batch)
        tensors = {f"gradient.{name}": value for name, value in zip(stepper.updater.parameters, gradient, strict=True)}
        tensors |= {"advantages": batch.advantages.flatten(), "loss": torch.tensor(sums["loss"], dtype=torch.float64)}
        tensors |= {"completion_ids": batch.completion_ids.flatten(0, 1), "lengths": batch.completion_mask.sum(-1).flatten()}
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
        return {"loss": sums["loss"], "kl": sums["kl_sum"] / sums["tokens"]}


def main() -> None:
    """Serve the driver until it is done."""
    line = Line()
    order = line.receive()
    setting = Setting.of(order["setting"])
    torch.set_num_threads(setting.threads)
    side = OwnSide(setting, order["folder"], Path(order["adapter"]), draw_steps(setting, order["num_steps"]))
    memory = PeakMemory(side.model.device.type)
    line.send({"base_bytes": memory.base, "token_budget": side.model.budget.tokens, "versions": versions()})
    while (order := line.receive())["do"] != "quit":
        if order["do"] == "agree":
            line.send(side.agree(order["index"], order["path"]))
            continue
        memory.reset()
        answer = side.step(order["index"])
        line.send({**answer, "peak_bytes": memory.above_base()})


if __name__ == "__main__":
    main()
