"""Roles: one frozen base, two adapters, and nothing of one role leaking into another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from gemma_grpo.config.schema import LoraSettings
from gemma_grpo.data.batch import pad_groups
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.logprobs import completion_logprobs

BATCH = pad_groups([[2, *range(150, 162)], [2, 170]], [[[210, 211, 212, 106], [220, 106]], [[106], [230, 231, 106]]])
IDS = torch.tensor([[2, *range(150, 175)]])


def logprobs(model: Gemma, role: Any) -> Tensor:
    with torch.no_grad(), model.role(role):
        return completion_logprobs(model, BATCH)[0]


def snapshot(model: Gemma, *roles: Any) -> dict[str, Tensor]:
    """Copies of adapter weights; of everything else with no role named."""
    if roles:
        return {f"{role} {name}": p.detach().clone() for role in roles for name, p in model.adapter_parameters(role).items()}
    return {name: p.detach().clone() for name, p in model.causal_lm.named_parameters() if "lora_" not in name}


def unchanged(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def train_a_step(model: Gemma, role: Any) -> None:
    optimizer = torch.optim.AdamW(model.adapter_parameters(role).values(), lr=0.1)
    with model.role(role, train=True):
        completion_logprobs(model, BATCH)[0].sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_the_reference_is_the_base_bit_for_bit(tiny_model_dir: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model = Gemma.load(str(tiny_model_dir), lora=LoraSettings())
    for role in ("policy", "reward"):
        train_a_step(model, role)
    with torch.no_grad():
        with model.role("reference"):
            assert torch.equal(model.causal_lm(IDS).logits, base(IDS).logits)
        with model.role("policy"):
            assert not torch.equal(model.causal_lm(IDS).logits, base(IDS).logits)


def test_a_fresh_adapter_changes_nothing_yet(new_gemma: Callable[..., Gemma]) -> None:
    model = new_gemma(moved=0)
    assert torch.equal(logprobs(model, "policy"), logprobs(model, "reference"))
    assert torch.equal(logprobs(model, "reward"), logprobs(model, "reference"))


def test_on_off_on_is_bit_identical(new_gemma: Callable[..., Gemma]) -> None:
    model = new_gemma()
    rounds = [[logprobs(model, role) for role in ("policy", "reference", "reward", "policy")] for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*rounds, strict=True))
    assert torch.equal(rounds[0][0], rounds[0][3])
    assert not torch.allclose(rounds[0][0], rounds[0][1], atol=1e-2)
    assert not torch.allclose(rounds[0][0], rounds[0][2], atol=1e-2)


@pytest.mark.parametrize(("trained", "other"), [("policy", "reward"), ("reward", "policy")])
def test_training_one_role_changes_no_weight_of_anything_else(new_gemma: Callable[..., Gemma], trained: Any, other: Any) -> None:
    model = new_gemma()
    base, own, others = snapshot(model), snapshot(model, trained), snapshot(model, other)
    before = logprobs(model, other), logprobs(model, "reference")
    train_a_step(model, trained)
    assert unchanged(base, snapshot(model))
    assert unchanged(others, snapshot(model, other))
    after = snapshot(model, trained)
    assert all(not torch.equal(own[name], after[name]) for name in own)
    assert torch.equal(before[0], logprobs(model, other))
    assert torch.equal(before[1], logprobs(model, "reference"))


@pytest.mark.parametrize("trained", ["policy", "reward"])
def test_only_the_role_being_trained_has_gradients(new_gemma: Callable[..., Gemma], trained: Any) -> None:
    model = new_gemma()
    with model.role(trained, train=True):
        wanting = {name for name, parameter in model.causal_lm.named_parameters() if parameter.requires_grad}
        completion_logprobs(model, BATCH)[0].sum().backward()
    assert wanting == set(model.adapter_parameters(trained))
    assert wanting == {name for name, parameter in model.causal_lm.named_parameters() if parameter.grad is not None}


def wants_gradients(model: Gemma) -> bool:
    return any(parameter.requires_grad for parameter in model.causal_lm.parameters())


@pytest.mark.parametrize("role", ["policy", "reward", "reference"])
def test_a_role_that_is_not_trained_has_no_gradients_and_runs_in_eval_mode(new_gemma: Callable[..., Gemma], role: Any) -> None:
    model = new_gemma()
    assert not wants_gradients(model)
    with model.role(role):
        assert not wants_gradients(model)
        assert not model.causal_lm.training
        assert not completion_logprobs(model, BATCH)[0].requires_grad


def test_roles_nest_and_each_end_restores_what_was(new_gemma: Callable[..., Gemma]) -> None:
    model = new_gemma()
    policy, reference = logprobs(model, "policy"), logprobs(model, "reference")
    with model.role("policy", train=True):
        assert torch.equal(logprobs(model, "reference"), reference)
        assert model.causal_lm.training
        assert {n for n, p in model.causal_lm.named_parameters() if p.requires_grad} == set(model.adapter_parameters("policy"))
        with torch.no_grad():
            assert torch.equal(completion_logprobs(model, BATCH)[0], policy)
    assert not wants_gradients(model)
    with torch.no_grad():
        assert torch.equal(completion_logprobs(model, BATCH)[0], reference)


def test_an_error_inside_a_role_leaves_no_trace(new_gemma: Callable[..., Gemma]) -> None:
    model = new_gemma()
    reference = logprobs(model, "reference")
    with pytest.raises(KeyError), model.role("policy", train=True):
        raise KeyError
    assert not wants_gradients(model)
    with torch.no_grad():
        assert torch.equal(completion_logprobs(model, BATCH)[0], reference)


def test_the_reference_cannot_be_trained(new_gemma: Callable[..., Gemma]) -> None:
    model = new_gemma()
    with pytest.raises(ValueError, match="frozen base"), model.role("reference", train=True):
        pass
    assert not wants_gradients(model)


def test_dropout_acts_in_training_only(new_gemma: Callable[..., Gemma]) -> None:
    model = new_gemma(lora=LoraSettings(dropout=0.5))
    assert torch.equal(logprobs(model, "policy"), logprobs(model, "policy"))
    with torch.no_grad(), model.role("policy", train=True):
        assert not torch.equal(completion_logprobs(model, BATCH)[0], completion_logprobs(model, BATCH)[0])


ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("modules", [("q_proj", "v_proj"), ALL_LINEAR])
def test_adapters_sit_on_the_named_linear_layers_and_never_on_head_or_embedding(new_gemma: Callable[..., Gemma], modules: Any) -> None:
    model = new_gemma(lora=LoraSettings(r=4, target_modules=modules))
    for role in ("policy", "reward"):
        names = model.adapter_parameters(role)  # type: ignore[arg-type]
        assert len(names) == 2 * model.config.num_hidden_layers * len(modules)
        assert {name.split(".")[-4] for name in names} == set(modules)
        assert all(parameter.dtype == torch.float32 and 4 in parameter.shape for parameter in names.values())
    assert model.head_weight is model.causal_lm.get_input_embeddings().weight


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens", "all-linear"])
def test_head_and_embedding_cannot_be_asked_for(module: str) -> None:
    with pytest.raises(ValidationError, match="target_modules"):
        LoraSettings(target_modules=(module,))  # type: ignore[arg-type]


def test_the_adapters_start_depends_on_the_seed_and_on_nothing_else(new_gemma: Callable[..., Gemma]) -> None:
    def start(base_seed: int, global_seed: int, seed: int) -> dict[str, Tensor]:
        base: Any = new_gemma(seed=base_seed, moved=0).peft.unload()
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        model = Gemma(base, None, name="tiny", lora=LoraSettings(), seed=seed)  # type: ignore[arg-type]
        assert torch.equal(torch.get_rng_state(), before)  # nor does it draw a number of the caller's
        return snapshot(model, "policy", "reward")

    first = start(0, 1, 7)
    assert unchanged(first, start(0, 2, 7))
    assert unchanged(first, start(3, 1, 7))
    assert not unchanged(first, start(0, 1, 8))


@pytest.fixture
def saved(tiny_model_dir: Path, tmp_path: Path) -> tuple[Gemma, Path]:
    """A policy trained for a step, and the folder of its adapter."""
    model = Gemma.load(str(tiny_model_dir), lora=LoraSettings())
    train_a_step(model, "policy")
    model.save_adapter("policy", tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_a_saved_adapter_loads_with_peft_on_a_fresh_base(saved: tuple[Gemma, Path], tiny_model_dir: Path) -> None:
    model, folder = saved
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), folder)
    with torch.no_grad(), model.role("policy"):
        expected, found = model.causal_lm(IDS).logits.log_softmax(-1), loaded(IDS).logits.log_softmax(-1)
    assert torch.allclose(found, expected, atol=1e-5)
    with torch.no_grad(), model.role("reference"):
        assert not torch.allclose(model.causal_lm(IDS).logits.log_softmax(-1), expected, atol=1e-2)


def test_a_saved_adapter_names_its_base_and_its_layers(saved: tuple[Gemma, Path], tiny_model_dir: Path) -> None:
    _, folder = saved
    card = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert card["base_model_name_or_path"] == str(tiny_model_dir)
    assert (card["r"], card["lora_alpha"], sorted(card["target_modules"])) == (8, 16, ["q_proj", "v_proj"])
    assert not list(folder.rglob("*.bin"))
    assert all(".q_proj." in name or ".v_proj." in name for name in load_file(folder / "adapter_model.safetensors"))


def test_save_and_load_is_a_round_trip_between_runs_and_roles(saved: tuple[Gemma, Path], tiny_model_dir: Path) -> None:
    model, folder = saved
    other = Gemma.load(str(tiny_model_dir), lora=LoraSettings(), seed=9)
    reward = logprobs(other, "reward")
    other.load_adapter("policy", folder)
    assert torch.equal(logprobs(other, "policy"), logprobs(model, "policy"))
    assert torch.equal(logprobs(other, "reward"), reward)
    other.load_adapter("reward", folder)
    assert torch.equal(logprobs(other, "reward"), logprobs(model, "policy"))
    assert not wants_gradients(other)


@pytest.mark.parametrize("role", ["policy", "reward"])
def test_each_role_is_saved_with_its_own_weights(new_gemma: Callable[..., Gemma], tmp_path: Path, role: Any) -> None:
    model = new_gemma()
    model.save_adapter(role, tmp_path / "nested" / "adapter")
    written = load_file(tmp_path / "nested" / "adapter" / "adapter_model.safetensors")
    own = {"base_model.model." + name.replace(f".{role}.", "."): weight for name, weight in model.adapter_parameters(role).items()}
    assert unchanged(written, own)


@pytest.mark.parametrize("role", ["policy", "reward"])
def test_an_adapters_files_are_those_that_peft_writes(new_gemma: Callable[..., Gemma], tmp_path: Path, role: Any) -> None:
    model = new_gemma()
    files = model.adapter_files(role)
    model.peft.save_pretrained(str(tmp_path), selected_adapters=[role], save_embedding_layers=False)
    theirs = {path.name: path.read_bytes() for path in (tmp_path / role).iterdir()}
    assert files.keys() == theirs.keys()
    assert files["adapter_model.safetensors"] == theirs["adapter_model.safetensors"]
    mine, other = (json.loads(content["adapter_config.json"]) for content in (files, theirs))
    assert mine == {**other, "target_modules": sorted(other["target_modules"])}


def test_saving_again_replaces_the_older_adapter_and_leaves_no_staging(saved: tuple[Gemma, Path]) -> None:
    model, folder = saved
    (folder / "calibration.json").write_text("{}")
    (folder / "adapter_model.bin").write_bytes(b"stale")
    train_a_step(model, "policy")
    model.save_adapter("policy", folder)
    written = load_file(folder / "adapter_model.safetensors")
    for name, parameter in model.adapter_parameters("policy").items():
        assert torch.equal(written["base_model.model." + name.replace(".policy.", ".")], parameter)
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "calibration.json"} <= names
    assert "adapter_model.bin" not in names
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraSettings(r=4), r"lora_A.weight, which is \(8, 32\) there and \(4, 32\) here"),
        (LoraSettings(target_modules=("k_proj", "v_proj")), r"k_proj.lora_A.weight, which is absent there"),
        (LoraSettings(target_modules=("q_proj",)), r"v_proj.lora_A.weight, which is \(8, 32\) there and absent here"),
        (LoraSettings(alpha=8), "trained with lora_alpha=16.*this run has 8"),
    ],
)
def test_an_adapter_of_other_shape_or_scale_is_refused_and_nothing_replaced(
    saved: tuple[Gemma, Path], tiny_model_dir: Path, lora: LoraSettings, message: str
) -> None:
    other = Gemma.load(str(tiny_model_dir), lora=lora)
    before = snapshot(other, "policy", "reward")
    with pytest.raises(ValueError, match=message):
        other.load_adapter("policy", saved[1])
    assert unchanged(before, snapshot(other, "policy", "reward"))


def test_a_folder_without_an_adapter_or_with_a_pickled_one_is_refused(saved: tuple[Gemma, Path], tmp_path: Path) -> None:
    model, folder = saved
    with pytest.raises(ValueError, match=r"holds no adapter_model\.safetensors"):
        model.load_adapter("policy", tmp_path)
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(ValueError, match=r"holds no adapter_model\.safetensors"):
        model.load_adapter("policy", folder)


def test_an_adapter_with_a_tensor_missing_is_refused_by_its_name(saved: tuple[Gemma, Path]) -> None:
    model, folder = saved
    weights = load_file(folder / "adapter_model.safetensors")
    lost = sorted(weights)[3]
    save_file({name: weight for name, weight in weights.items() if name != lost}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=lost):
        model.load_adapter("policy", folder)


def test_an_adapter_that_is_no_number_is_refused_by_name(saved: tuple[Gemma, Path]) -> None:
    model, folder = saved
    weights = load_file(folder / "adapter_model.safetensors")
    broken = sorted(weights)[2]
    weights[broken].view(-1)[0] = torch.nan
    save_file(weights, folder / "adapter_model.safetensors")
    before = snapshot(model, "policy")
    with pytest.raises(ValueError, match=f"{broken} has numbers that are NaN or infinite"):
        model.load_adapter("policy", folder)
    assert unchanged(before, snapshot(model, "policy"))


@pytest.mark.parametrize("change", [{"alpha_pattern": {"q_proj": 640}}, {"rank_pattern": {"q_proj": 16}}])
def test_an_adapter_with_a_scale_of_its_own_for_some_layers_is_refused(saved: tuple[Gemma, Path], change: dict[str, Any]) -> None:
    model, folder = saved
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"was trained with {next(iter(change))}="):
        model.load_adapter("policy", folder)


@pytest.mark.parametrize(("name", "content"), [("adapter_model.safetensors", b"\x08"), ("adapter_config.json", b"{")])
def test_a_damaged_adapter_file_is_named(saved: tuple[Gemma, Path], name: str, content: bytes) -> None:
    model, folder = saved
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"its {name} cannot be read \(.*Copy the adapter again"):
        model.load_adapter("policy", folder)
