"""TRL's side of the bench, in its own environment: its GRPOTrainer, driven by its own train() from the first step to the last.

A step of ours is one rollout and `planning_steps` updates, so it is as many global steps of TRL's, num_iterations = planning_steps: its
clock starts when train() begins the first and stops when train() ends the last. What lies between (fetching the prompts) is not counted.
Inside, TRL's own methods are timed from outside: _generate (rollout), _get_per_token_logps_and_entropies without gradients (old
log-probabilities with the adapter, reference without) and _calculate_rewards; the rest is the update.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import AutoTokenizer, Gemma3ForCausalLM, LogitsProcessorList, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from bench.machine import versions
from bench.protocol import Line, PeakMemory
from bench.workload import Setting, draw_steps, force_lengths, prompt_texts, varied_reward

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TimedTrainer(GRPOTrainer):
    """TRL's trainer with a clock around its phases, and completions as long as they are told to be."""

    seconds: dict[str, float]
    lengths: torch.Tensor
    given: list[list[int]] | None = None
    """Completions to take instead of generating, for the comparison of losses."""
    sampled: list[int]

    def _send_telemetry(self) -> None:
        """Nothing of a bench leaves the machine."""

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - started

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock("rollout"):
            return super()._generate(*args, **kwargs)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if self.given is not None:
            return self.given, None
        completion_ids, logprobs = super()._generate_single_turn(*args, **kwargs)
        self.sampled = [len(row) for row in completion_ids]
        return completion_ids, logprobs

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        adapters_off = next(module.disable_adapters for module in self.model.modules() if isinstance(module, BaseTunerLayer))
        with self.clock("reference" if adapters_off else "old_logprobs"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock("reward"):
            return super()._calculate_rewards(*args, **kwargs)

    def force(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """As LocalEngine's processor: called by generate for every row at every token."""
        position = torch.full_like(self.lengths, input_ids.shape[1] - self.prompt_width)
        return force_lengths(scores, position, self.lengths, self.args.max_completion_length)

    def force_in(self, model: Any) -> None:
        """Hand the processor to every generate call of the model."""
        generate = model.generate

        def generate_forced(*args: Any, **kwargs: Any) -> Any:
            self.prompt_width = kwargs["input_ids"].shape[1]
            return generate(*args, logits_processor=LogitsProcessorList([self.force]), **kwargs)

        model.generate = generate_forced


def load(folder: str, dtype: torch.dtype) -> Gemma3ForCausalLM:
    """The model as transformers loads it, its embedding scaled as training scaled it: rounded to the checkpoint's bfloat16.

    In float32 transformers takes the root of the hidden size as it is (25.298 instead of 25.25 for 270m), which is another model.
    """
    model = Gemma3ForCausalLM.from_pretrained(folder, dtype=dtype)
    scale = model.model.embed_tokens.embed_scale
    scale.copy_(scale.to(torch.bfloat16))
    return model


def build(setting: Setting, order: dict[str, Any], texts: list[list[str]]) -> TimedTrainer:
    """The trainer with the settings that mean the same as ours; everything else is TRL's default, or what the driver was told."""
    folder = order["folder"]
    rows = setting.batch_size * setting.num_generations
    on_cuda = torch.cuda.is_available()
    arguments: dict[str, Any] = {
        "output_dir": order["output_dir"],
        "use_cpu": not on_cuda,
        "bf16": setting.precision == "bf16",
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": setting.accumulation,
        "num_generations": setting.num_generations,
        "num_iterations": setting.planning_steps,
        "max_completion_length": setting.max_completion_length,
        "temperature": setting.temperature,
        "learning_rate": setting.learning_rate,
        "beta": setting.beta,
        "use_bias_correction_kl": True,  # our ratio_k3
        "loss_type": "dr_grpo",
        "scale_rewards": "batch",
        "gradient_checkpointing": setting.gradient_checkpointing,
        "max_steps": setting.planning_steps * len(texts),
        "shuffle_dataset": False,
        "seed": setting.seed,
        "report_to": [],
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    trainer = TimedTrainer(
        model=load(folder, DTYPES[setting.precision]),
        reward_funcs=varied_reward,
        args=GRPOConfig(**{**arguments, **order["trl"]}),
        train_dataset=Dataset.from_list([{"prompt": text} for step in texts for text in step]),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(
            r=setting.lora_r, lora_alpha=setting.lora_alpha, target_modules=list(setting.target_modules), task_type="CAUSAL_LM"
        ),
    )
    set_peft_model_state_dict(trainer.model, load_peft_weights(order["adapter"]))
    trainer.seconds = defaultdict(float)
    trainer.force_in(trainer.model)
    return trainer


def agree(trainer: TimedTrainer, texts: list[str], num_generations: int, path: str) -> dict[str, Any]:
    """TRL's loss and LoRA gradient on our completions and advantages, beside ours; relative differences of loss and gradient."""
    ours = load_file(path)
    trainer.given = [row[:length].tolist() for row, length in zip(ours["completion_ids"], ours["lengths"].tolist(), strict=True)]
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps  # as its loop does before a step
    trainer.model.train()
    trainer.model.zero_grad()
    inputs = trainer._generate_and_score_completions([{"prompt": text} for text in texts for _ in range(num_generations)])
    inputs["advantages"] = ours["advantages"].to(trainer.model.device)
    size, loss = trainer.args.per_device_train_batch_size, 0.0
    for start in range(0, len(trainer.given), size):
        part = {name: value[start : start + size] if getattr(value, "ndim", 0) else value for name, value in inputs.items()}
        value = trainer._compute_loss(trainer.model, part)
        value.backward()
        loss += float(value.detach())
    difference, norm = 0.0, 0.0
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            own = ours["gradient." + name.removeprefix("base_model.model.").replace(".default.", ".policy.")]
            difference += float((parameter.grad.cpu().float() - own).norm() ** 2)
            norm += float(own.norm() ** 2)
    trainer.model.zero_grad()
    trainer.given = None
    own_loss = float(ours["loss"])
    relative = {"loss": abs(loss - own_loss) / abs(own_loss), "gradient": (difference / norm) ** 0.5}
    return {"loss": loss, "relative_difference": relative}


class Conductor(TrainerCallback):
    """Holds train() before each step until the driver asks for it."""

    def __init__(self, line: Line, setting: Setting, num_steps: int, memory: PeakMemory) -> None:
        self.line, self.setting, self.memory = line, setting, memory
        self.steps = draw_steps(setting, num_steps)
        self.texts = prompt_texts(self.steps)
        self.trainer: Any = None

    def serve(self, index: int) -> None:
        """Answer until the driver asks for a step, which must be the next one: train() takes the prompts in order."""
        while (order := self.line.receive())["do"] != "step":
            if order["do"] == "quit":
                raise SystemExit
            self.line.send(agree(self.trainer, self.texts[order["index"]], self.setting.num_generations, order["path"]))
        assert order["index"] == index, f"asked for step {order['index']}, but train() has come to {index}"
        self.trainer.lengths = torch.tensor(self.steps[index].completions, device=self.trainer.accelerator.device)
        self.trainer.seconds.clear()
        self.memory.reset()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        index, planning_step = divmod(state.global_step, self.setting.planning_steps)
        if planning_step == 0:
            self.serve(index)
            self.started = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.setting.planning_steps:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds, cpu = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
        expected = list(self.steps[state.global_step // self.setting.planning_steps - 1].completions)
        assert self.trainer.sampled == expected, "the completions are not as long as they were forced to be"
        phases = {**self.trainer.seconds, "update": seconds - sum(self.trainer.seconds.values())}
        metrics = {name: values[-1] for name, values in self.trainer._metrics["train"].items() if name in ("kl", "entropy")}
        times = {"seconds": seconds, "cpu_seconds": cpu, "phases": phases}
        self.line.send({**times, "metrics": metrics, "peak_bytes": self.memory.above_base()})


def main() -> None:
    """Serve the driver until it is done."""
    line = Line()
    order = line.receive()
    setting = Setting.of(order["setting"])
    torch.set_num_threads(setting.threads)
    texts = prompt_texts(draw_steps(setting, order["num_steps"]))
    trainer = build(setting, order, texts)
    memory = PeakMemory(trainer.accelerator.device.type)
    conductor = Conductor(line, setting, order["num_steps"], memory)
    conductor.trainer = trainer
    trainer.add_callback(conductor)
    line.send({"base_bytes": memory.base, "versions": versions()})
    trainer.train()


if __name__ == "__main__":
    main()
