"""Against TRL 1.16's DPOTrainer: the same pairs, weights and beta give the same loss and LoRA gradients.

So that DPO among the baselines (docs/overoptimisation.md) is what TRL's users would train, though it goes through the loop that trains
judges. TRL reads our token ids through its own collator, and its own _compute_loss does its half.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PAIR_ROWS
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma_grpo.config.schema import LoraSettings
from gemma_grpo.data.hh_rlhf import load_hh_rlhf
from gemma_grpo.data.prompts import encode_pairs
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.reward.implicit import ImplicitScorer
from gemma_grpo.reward.training import bradley_terry_loss

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed: pip install 'gemma-grpo[peer]'"),
    pytest.mark.filterwarnings("ignore"),  # of TRL's and transformers' options that will change their names
]
TOLERANCE = 1e-5
"""Of the norm, the gradient being one vector: both programs are float32, and sum in another order."""


def theirs(folder: Path, output: Path, weights: dict[str, torch.Tensor], beta: float) -> Any:
    import trl

    class OfflineTrainer(trl.DPOTrainer):  # type: ignore[misc]
        def _send_telemetry(self) -> None:
            """Nothing of a test leaves this machine."""

    settings: dict[str, Any] = {"output_dir": str(output), "use_cpu": True, "bf16": False, "report_to": [], "disable_dropout": True}
    settings |= {"gradient_checkpointing": False, "beta": beta, "loss_type": ["sigmoid"]}
    trainer = OfflineTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=trl.DPOConfig(**settings),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    trainer.model.train()
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(weights[ours(name)])
    return trainer


def ours(name: str) -> str:
    """TRL's name of an adapter weight as ours."""
    return name.removeprefix("base_model.model.").replace(".default.", ".policy.")


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_loss_and_gradient_are_trls(small_model_dir: Path, tmp_path: Path, beta: float) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    model = Gemma.load(str(small_model_dir), lora=LoraSettings(), precision="fp32", seed=0)
    weights = model.adapter_parameters("policy")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in weights.values():
            parameter.normal_(std=0.1)
    pairs = encode_pairs(load_hh_rlhf(PAIR_ROWS, name="a").pairs, model.tokenizer, 512, reserved=10).pairs[:5]
    assert len({len(pair.prompt_ids) for pair in pairs} | {len(pair.chosen_ids) for pair in pairs}) > 2  # ragged

    scorer = ImplicitScorer(model, beta)
    with model.role("policy", train=True):
        loss = bradley_terry_loss(scorer.scores(scorer.batch(pairs)))
        loss.backward()
    mine = {name: parameter.grad for name, parameter in weights.items() if parameter.grad is not None}

    peer = theirs(small_model_dir, tmp_path, weights, beta)
    rows = [{"prompt_ids": list(p.prompt_ids), "chosen_ids": list(p.chosen_ids), "rejected_ids": list(p.rejected_ids)} for p in pairs]
    inputs = DataCollatorForPreference(pad_token_id=0)(rows)
    expected = peer._compute_loss(peer.model, inputs, False)
    expected.backward()
    gradient = {ours(name): p.grad for name, p in peer.model.named_parameters() if p.grad is not None}
    # a reply's log-probabilities, log(vocabulary) nats a token or so, are summed in float32: by the last digit of that sum, times beta, a
    # pair's margin may differ, its loss by no more, and by no greater share its gradient, of which sigmoid(-margin) is a factor
    longest = max(len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids))
    rounded = beta * torch.finfo(torch.float32).eps * longest * math.log(model.config.vocab_size)
    assert float(loss) == pytest.approx(float(expected), rel=TOLERANCE, abs=rounded)
    assert abs(float(loss) - 0.6931) > 0.01  # the policy is no copy of the reference
    assert mine.keys() == gradient.keys()
    flat = [torch.cat([one[name].flatten() for name in sorted(gradient)]) for one in (mine, gradient)]
    assert float((flat[0] - flat[1]).norm() / flat[1].norm()) < TOLERANCE + rounded
