"""A base whose layers ranks share out (FSDP2): the run is the one with a whole base on one rank, gathered whole or layer by layer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import COMMON, assert_same, ended, lines, start_ranks, train_on
from safetensors.torch import load_file

REWARD = {"mean_letter": 1.0, "length": 0.1}
NO_ROOM = {"memory.limit_gib": 0.01, "force": True, "witness.every": 0, "evaluation.num_prompts": 0}
"""The plan then gathers layer by layer, and cuts passes so small that ranks make different numbers of them."""

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def train(small_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    root, count = tmp_path_factory.mktemp("runs"), itertools.count()

    def run(world: int, path: Path | None = None, **settings: Any) -> Path:
        path = path or root / f"run-{next(count)}"
        return train_on(world, path, model_name=str(small_model_dir), **{"max_steps": 4, **settings})

    return run


@pytest.fixture(scope="module")
def whole(train: Train) -> Path:
    return train(1, reward=REWARD)


@pytest.fixture(scope="module")
def whole_in_small_pieces(train: Train) -> Path:
    return train(1, reward=REWARD, **NO_ROOM)


def plan_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))["plan"]["sharding"]
    return found


@pytest.mark.parametrize(
    ("world", "settings", "gathered_whole"),
    [
        (2, {}, True),
        pytest.param(2, {**NO_ROOM, "gradient_checkpointing": True}, False, marks=pytest.mark.slow),
        pytest.param(3, {}, True, marks=pytest.mark.slow),
        pytest.param(3, NO_ROOM, False, marks=pytest.mark.slow),
    ],
    ids=["whole", "layers-recomputed", "whole-3", "layers-3"],
)
def test_a_shared_out_base_learns_what_a_whole_one_does(
    train: Train, whole: Path, whole_in_small_pieces: Path, world: int, settings: dict[str, Any], gathered_whole: bool
) -> None:
    run = train(world, reward=REWARD, sharding="full", **settings)
    assert plan_of(run) == {"ranks": world, "whole_while_sampling": gathered_whole}
    assert_same(run, whole if gathered_whole else whole_in_small_pieces, 1e-5)


@pytest.mark.slow
def test_a_judge_and_its_witness_are_trained_on_a_shared_out_base(train: Train) -> None:
    judged = {"reward_model.batch_size": 4, "reward_model.max_pairs": 12, "witness.share": 0.3, "max_steps": 2}
    run, expected = train(2, sharding="full", **NO_ROOM, **judged), train(1, **NO_ROOM, **judged)
    assert_same(run, expected, 1e-5)
    for name in ("reward", "witness"):
        one, other = (load_file(path / name / "adapter_model.safetensors") for path in (run, expected))
        for key, value in one.items():
            torch.testing.assert_close(value, other[key], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_with_a_whole_base_and_with_a_shared_out_one(train: Train) -> None:
    settings = {"reward": REWARD, "save_steps": 1}
    path = train(2, max_steps=3, sharding="full", **settings)
    train(1, path, max_steps=6, resume=True, sharding="none", **settings)
    assert len(lines(path, "metrics.jsonl")) == 6
    train(2, path, max_steps=7, resume=True, sharding="full", **settings)
    assert_same(path, train(1, max_steps=7, **settings), 1e-5)


HELD = """
import json, sys
import torch
from gemma_grpo import distributed
from gemma_grpo.config import build_config
from gemma_grpo.distributed import here
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.rollout.engine import SamplingParams
from gemma_grpo.rollout.local import LocalEngine
from gemma_grpo.rollout.shared import SharedEngine
from gemma_grpo.types import Prompt

with distributed.joined(30):
    model = Gemma.load(sys.argv[1], lora=build_config({}).lora, sharding=sys.argv[2])
    weights = dict(model.causal_lm.named_parameters())
    layers = [name for name in weights if ".layers." in name and "lora_" not in name]

    def held():
        "Bytes of the layers' whole weights that are here now."
        gathered = [p for name, p in model.causal_lm.model.layers.named_parameters() if "lora_" not in name]
        return sum(p.untyped_storage().nbytes() for p in gathered if type(p) is torch.nn.Parameter)

    own = sum(here(weights[name]).numel() for name in layers)
    total = sum(weights[name].numel() for name in layers)
    seen = []
    processor = lambda logits, rows, places: seen.append(held()) or logits
    prompts = [Prompt(str(n), "here", (), (2, 10, 11, 12 + n), str(n)) for n in range(3)]
    SharedEngine(LocalEngine(model, processor=processor)).sample(prompts, SamplingParams(2, 4))
    embedding = here(weights["model.embed_tokens.weight"]).numel()
    print(json.dumps({"own": own, "total": total, "while": seen, "after": held(), "embedding": embedding}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["layers", "whole"])
def test_a_rank_holds_its_part_and_what_is_gathered(small_model_dir: Path, sharding: str) -> None:
    found = ended(start_ranks(HELD, 2, arguments=[str(small_model_dir), sharding]), 120)
    assert [code for code, _, _ in found] == [0, 0], [err[-3000:] for _, _, err in found]
    ranks = [json.loads(out) for _, out, _ in found]
    assert sum(rank["own"] for rank in ranks) == ranks[0]["total"]
    for rank in ranks:
        assert rank["own"] == rank["total"] / 2  # every axis is even
        assert rank["embedding"] > 0
        assert rank["after"] == 0
        # a token is drawn after the last layer has gone, or with all of them here
        assert rank["while"]
        assert set(rank["while"]) == {4 * rank["total"] if sharding == "whole" else 0}


FAILS = """
import json, os, signal, sys
from conftest import PAIR_ROWS, mean_letter
from gemma_grpo import GRPOTrainer, distributed
from gemma_grpo.model.gemma import Gemma
settings, how = json.loads(sys.argv[1]), sys.argv[2]
trainer = GRPOTrainer(dataset=PAIR_ROWS, reward_functions={"mean_letter": mean_letter}, **settings)
def fail():
    if how == "stop":
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        raise MemoryError("no more") if how == "memory" else ValueError("cosmic ray")
whole = Gemma.hidden_states
def hidden_states(self, layout):
    if self._role[1] and distributed.rank() == 1 and trainer.step == 1:
        if how == "error":
            fail()
        second = self.causal_lm.model.layers[1]  # in the middle of a pass
        second.mlp.register_forward_pre_hook(lambda *_: fail())
    return whole(self, layout)
Gemma.hidden_states = hidden_states
trainer.train()
"""


@pytest.mark.parametrize("how", ["stop", *(pytest.param(how, marks=pytest.mark.slow) for how in ("error", "memory", "inside"))])
def test_a_rank_that_fails_or_is_stopped_ends_all_and_is_named(small_model_dir: Path, tmp_path: Path, how: str) -> None:
    run = tmp_path / "run"
    settings = {**COMMON, "model_name": str(small_model_dir), "output_dir": str(run), "sharding": "full", "max_steps": 3}
    settings |= {"reward": {"mean_letter": 1.0}, "ranks.timeout_seconds": 60.0, "witness.every": 0, "evaluation.num_prompts": 0}
    found = ended(start_ranks(FAILS, 2, arguments=[json.dumps(settings), how]), 120)
    assert all(code for code, _, _ in found)
    if how == "stop":  # the pass comes to its end, then all stop at one place
        assert all("Stopped: by SIGTERM" in err for _, _, err in found)
        assert (run / "checkpoints" / "step-00000001").is_dir()
    else:
        said = "share out it cannot be tried again in smaller pieces. Set memory.token" if how == "memory" else "cosmic ray"
        assert said in found[1][2]
        assert "rank 1 " in found[0][2].splitlines()[-1], found[0][2][-2000:]
    assert [line["step"] for line in lines(run, "metrics.jsonl")] == [1]  # no update anywhere in the second step
