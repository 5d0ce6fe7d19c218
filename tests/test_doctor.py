"""The doctor: each line against a machine made for it - another home, another Hub, a driver's program and packages of the test's own."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import SECRET, Hub, Machine, Repository, Token, serving

import gemma_grpo
from gemma_grpo.agreement import Agreement
from gemma_grpo.cards import GIB, Card
from gemma_grpo.config import load_recipe
from gemma_grpo.diagnosis import Check, Diagnosis, bitsandbytes_check, card_check, diagnose, disk_check, settings_of
from gemma_grpo.reward.sandbox.running import why_not
from gemma_grpo.shapes import MINIATURE_DIR

GEMMA = "google/gemma-3-1b-it"
T4 = "Tesla T4, 15360, 7.5, 306"


class Patient(Machine):
    """A machine that the doctor looks at; programs and packages put into it are found before the real ones."""

    def __init__(self, hub: Hub, home: Path) -> None:
        super().__init__(hub, home)
        self.programs, self.packages = home / "programs", home / "packages"
        self.programs.mkdir()
        self.packages.mkdir()
        self.gpu("")

    def gpu(self, answer: str) -> None:
        """What nvidia-smi says; without an answer there is no GPU."""
        program = self.programs / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n[ -n '{answer}' ] && echo '{answer}'\n", encoding="utf-8")
        program.chmod(0o755)

    def package(self, name: str, release: str, **files: str) -> None:
        """An installed package of that release."""
        folder = self.packages / f"{name}-{release}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n", encoding="utf-8")
        for file, text in files.items():
            (self.packages / name).mkdir(exist_ok=True)
            (self.packages / name / f"{file}.py").write_text(text, encoding="utf-8")

    def cuda_torch(self) -> None:
        """torch as the CUDA wheels have it; nothing of it is ever imported."""
        self.package("torch", "2.9.1+cu128", __init__="raise ImportError('torch was imported')", version="cuda: Optional[str] = '12.8'\n")

    def doctor(self, *words: str, who: str = "", **environment: str) -> tuple[int, str]:
        """Exit code and screen, 80 columns wide."""
        before = {"PATH": self.programs, "PYTHONPATH": self.packages}
        paths = {name: f"{folder}{os.pathsep}{os.environ.get(name, '')}" for name, folder in before.items()}
        settings = {**paths, "CUDA_VISIBLE_DEVICES": "0", "COLUMNS": "80", **environment}
        done = self.run("-m", "gemma_grpo.cli", "doctor", *words, who=who, **settings)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout + done.stderr

    def line(self, beginning: str, *words: str, **options: Any) -> str:
        """One check of the screen with its remedy, on one line."""
        _, screen = self.doctor(*words, **options)
        (found,) = (check for check in checks_of(screen) if check.startswith(beginning))
        return found

    def facts(self, *words: str, **options: Any) -> dict[str, dict[str, Any]]:
        """Name -> check of --json."""
        return {check["name"]: check for check in json.loads(self.doctor(*words, "--json", **options)[1])["checks"]}


def checks_of(screen: str) -> list[str]:
    """The checks, each with its wrapped lines joined."""
    joined: list[str] = []
    for line in screen.splitlines():
        if line.startswith("        "):
            joined[-1] += " " + line.strip()
        else:
            joined.append(" ".join(line.split()))
    return joined


@pytest.fixture
def hub() -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in MINIATURE_DIR.iterdir()}
    tokens = {f"{SECRET}ana": Token("ana", accepted=frozenset([GEMMA])), f"{SECRET}bob": Token("bob")}
    with serving(Hub({GEMMA: Repository(files, gated=True)}, tokens)) as hub:
        yield hub


@pytest.fixture
def patient(hub: Hub, tmp_path: Path) -> Patient:
    return Patient(hub, tmp_path)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with a checkpoint, to be spoilt."""
    return Path(shutil.copytree(MINIATURE_DIR, tmp_path / "checkpoint"))


# ---- the screen


def test_a_newcomers_machine(patient: Patient) -> None:
    code, screen = patient.doctor()
    assert code == 0
    assert max(map(len, screen.splitlines())) <= 80
    checks = checks_of(screen)
    assert checks[0].startswith("ok Python 3.")
    assert checks[3].startswith("note No GPU (")
    assert checks[3].endswith("Real Gemma 3 training needs one with 8 GB or more; `gemma-grpo demo` works here.")
    assert checks[4] == "ok precision=auto takes fp32: training runs on the CPU"
    assert checks[6] == "note Not logged in to Hugging Face (only needed for Gemma weights) fix: hf auth login"
    assert checks[7].startswith("ok Disk: ")
    assert checks[7].endswith(" GB free in ~/hf/hub")
    assert checks[8] == "Next: gemma-grpo demo, or gemma-grpo doctor google/gemma-3-1b-it"
    assert patient.hub.requests == []


def test_somebody_logged_in(patient: Patient) -> None:
    assert patient.line("ok A Hugging Face token is set", who="ana")


def test_the_screen_is_ascii_wherever_it_is_shown(patient: Patient) -> None:
    shutil.copytree(MINIATURE_DIR, patient.home / "modèle")
    code, screen = patient.doctor("modèle", PYTHONIOENCODING="ascii")
    assert code == 0
    assert "ok mod\\xe8le is a folder of this machine: 1.7 M parameters in 1 .safetensors, 6.7 MB" in checks_of(screen)


def test_a_remedy_is_never_wrapped() -> None:
    command = "pip install " + "x" * 90
    lines = Diagnosis([Check("torch", "fail", "word " * 30, (command, "second step"))]).lines(60)
    assert f"        fix: {command}" in lines
    assert "             second step" in lines
    assert lines[-1] == "  1 failed. Mend it and ask again."
    assert all(len(line) <= 60 for line in lines if "fix" not in line)


def test_it_answers_quickly_and_loads_no_torch(patient: Patient) -> None:
    def cpu_seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    for words in ([], ["miniature"], [GEMMA]):
        before = cpu_seconds()  # not the clock's: other programs here take turns with this one
        patient.doctor(*words)
        assert cpu_seconds() - before < 1.5
    script = (
        "import sys\nfrom gemma_grpo.cli import run\nrun(['doctor', 'miniature'])\n"
        "print('loaded:', *({'torch', 'transformers', 'numpy', 'datasets', 'peft'} & set(sys.modules)))"
    )
    assert patient.run("-c", script).stdout.splitlines()[-1] == "loaded:"


def test_doctor_is_a_public_name_that_prints_and_returns(capsys: pytest.CaptureFixture[str]) -> None:
    found = gemma_grpo.doctor("miniature")
    assert "ok    Python 3." in capsys.readouterr().out
    assert found.ok
    assert repr(found).startswith("Diagnosis(")
    assert gemma_grpo.doctor is gemma_grpo.doctor, "the module of that work must not take the name's place"
    assert callable(gemma_grpo.doctor)


# ---- packages and devices


def test_a_package_outside_its_range_is_named_with_the_command(patient: Patient) -> None:
    patient.package("transformers", "4.57.1")
    patient.package("torch", "2.1.0", version="cuda: Optional[str] = None\n", __init__="")
    code, screen = patient.doctor()
    assert code == 3
    assert "fail transformers 4.57.1 is installed, but >=5.10 is needed fix: pip install 'transformers>=5.10'" in checks_of(screen)
    assert "fail torch 2.1.0 is installed, but >=2.9 is needed fix: pip install 'torch>=2.9'" in checks_of(screen)
    assert checks_of(screen)[-1] == "2 failed. Mend them and ask again."


def test_a_t4_gets_rescaled_fp16_and_the_reason(patient: Patient) -> None:
    patient.gpu(T4)
    patient.cuda_torch()
    code, screen = patient.doctor()
    checks = checks_of(screen)
    assert code == 0, "a T4 is a card to train on"
    assert "ok torch 2.9.1+cu128 (CUDA 12.8 build)" in checks
    assert "ok Tesla T4, compute 7.5, 14.7 GiB usable" in checks
    assert (
        "note precision=auto takes fp16_rescaled: torch says bf16 works because it emulates it; the card has no bf16 units, "
        "and plain fp16 overflows on Gemma 3" in checks
    )


def test_a_card_with_bf16_units_gets_bf16(patient: Patient) -> None:
    patient.gpu("NVIDIA L4, 23034, 8.9, 450")
    patient.cuda_torch()
    assert patient.line("ok precision") == "ok precision=auto takes bf16: the card has bf16 units"


def test_bf16_asked_of_a_card_that_emulates_it_fails(patient: Patient) -> None:
    patient.gpu(T4)
    patient.cuda_torch()
    (patient.home / "mine.yaml").write_text("model_name: miniature\nprecision: bf16\n", encoding="utf-8")
    failed = patient.line("fail", "mine.yaml")
    assert failed == "fail precision is bf16, but Tesla T4 has no bfloat16 units and would emulate them fix: precision=auto"


def test_a_gpu_that_torch_cannot_use_is_told(patient: Patient) -> None:
    patient.gpu(T4)
    patient.package("torch", "2.9.1+cpu", version="cuda: Optional[str] = None\n", __init__="")
    told = patient.line("note torch")
    assert told.startswith("note torch 2.9.1+cpu is the CPU build, so the Tesla T4 here stays unused fix: pip install ")
    assert "--index-url https://download.pytorch.org/whl/cu" in told
    assert patient.facts()["precision"]["facts"]["taken"] == "fp32"


def test_a_small_card_is_pointed_to_4_bits(patient: Patient) -> None:
    patient.gpu("NVIDIA GeForce RTX 3050, 6144, 8.6, 200")
    patient.cuda_torch()
    assert patient.line("note NVIDIA").endswith("compute 8.6, 5.8 GiB usable; small: plan with quantization=nf4")


def test_memory_that_others_hold_is_told_from_a_tenth_on() -> None:
    t4 = Card("Tesla T4", "cuda", 15 * GIB, native_bf16=False, capability=(7, 5))
    free, taken = card_check(t4, t4, GIB), card_check(t4, t4, 4 * GIB)
    assert (free.status, free.text) == ("ok", "Tesla T4, compute 7.5, 15.0 GiB usable")
    assert (taken.status, taken.text) == ("note", "Tesla T4, compute 7.5, 15.0 GiB usable; 4.0 GiB of it are in use now")
    assert taken.facts["in_use"] == 4 * GIB
    machine = Card("CPU", "cpu", 15 * GIB, native_bf16=False)
    assert card_check(None, machine, 4 * GIB).text.startswith("No GPU (15.0 GiB of memory; 4.0 GiB of it are in use now). Real ")
    assert card_check(None, machine, GIB).text.startswith("No GPU (15.0 GiB of memory). Real ")


def test_bitsandbytes_is_only_needed_for_nf4() -> None:
    assert bitsandbytes_check("none", "").status == "note"
    missing = bitsandbytes_check("nf4", "")
    assert (missing.status, missing.fix) == ("fail", ("pip install 'gemma-grpo[nf4]'",))
    assert bitsandbytes_check("nf4", "0.50.2").status == "ok"


# ---- the asked model


def test_a_gated_model_fails_with_the_steps(patient: Patient) -> None:
    code, screen = patient.doctor(GEMMA)
    assert code == 3
    assert f"  fail  {GEMMA} is gated and you are not logged in.\n        fix: 1. Open https://huggingface.co/{GEMMA}, sign in," in screen
    assert "             3. hf auth login " in screen
    assert f"note {GEMMA} is not in the cache: the first run downloads about 2.0 GB" in checks_of(screen)
    assert patient.doctor(GEMMA, who="bob")[0] == 3
    assert patient.hub.fetched() == set(), "it asks, it does not download"


def test_a_model_that_may_be_downloaded(patient: Patient) -> None:
    code, screen = patient.doctor(GEMMA, who="ana")
    assert code == 0
    assert f"ok The Hub lets you download {GEMMA}" in checks_of(screen)


def test_a_model_in_the_cache_needs_no_hub(patient: Patient) -> None:
    patient.run("-c", f"from gemma_grpo.access import checkpoint_folder as f; f({GEMMA!r})", who="ana")
    code, screen = patient.doctor(GEMMA, HF_HUB_OFFLINE="1")
    assert code == 0
    assert f"ok {GEMMA} is in the cache: 1.7 M parameters in 1 .safetensors, 6.7 MB" in checks_of(screen)
    assert "note The Hub is not asked (HF_HUB_OFFLINE is set); the cached files are used" in checks_of(screen)
    code, screen = patient.doctor(GEMMA, who="bob")
    assert code == 0
    (note,) = (check for check in checks_of(screen) if check.startswith("note The cached files are used; a new download would fail: "))
    assert "you are logged in as bob" in note


def test_offline_and_wrong_names_fail_as_they_would_in_a_run(patient: Patient) -> None:
    offline = patient.line("fail", GEMMA, HF_HUB_OFFLINE="1")
    assert offline.startswith(f"fail HF_HUB_OFFLINE=1 and {GEMMA} is not in ~/hf/hub, or not all of it. fix: Unset HF_HUB_OFFLINE and run")
    assert patient.line("fail", "./nowhere") == "fail ./nowhere: no such folder. Check the path."
    assert "Did you mean google/gemma-3-1b-it or google/gemma-3-1b-pt?" in patient.line("fail", "google/gemma-3-1b")


def test_a_recipe_stands_for_its_model_and_its_mistakes_are_those_of_train(patient: Patient) -> None:
    (patient.home / "mine.yaml").write_text(f"model_name: {GEMMA}\n", encoding="utf-8")
    assert patient.line("fail", "mine.yaml").startswith(f"fail {GEMMA} is gated")
    (patient.home / "wrong.yaml").write_text("lerning_rate: 1\n", encoding="utf-8")
    code, screen = patient.doctor("wrong.yaml")
    assert settings_of("miniature") == load_recipe("miniature"), "a shipped recipe by its name"
    assert code == 2
    assert "Did you mean 'learning_rate'?" in screen


def test_a_recipes_own_name_stands_in_the_next_command_and_a_folder_does_not_hide_it(patient: Patient) -> None:
    (patient.home / "miniature").mkdir()
    _, screen = patient.doctor("miniature")
    assert screen.splitlines()[-1] == "  Next: gemma-grpo plan miniature    (whether it fits this machine)"


def test_a_checkpoint_is_looked_into(checkpoint: Path) -> None:
    def failure() -> str:
        (failed,) = (check for check in diagnose(str(checkpoint)).checks if check.status == "fail")
        return failed.text

    tokenizer = checkpoint / "tokenizer.json"
    words = json.loads(tokenizer.read_text(encoding="utf-8"))
    for entry in words["added_tokens"]:
        entry["content"] = {"<end_of_turn>": "<unused0>", "<unused0>": "<end_of_turn>"}.get(entry["content"], entry["content"])
    tokenizer.write_text(json.dumps(words), encoding="utf-8")
    assert failure().startswith("The tokenizer has <end_of_turn> 5; Gemma 3 has <eos> 1, <bos> 2, <start_of_turn> 105, <end_of_turn> 106")
    tokenizer.write_text("{}", encoding="utf-8")
    assert failure().endswith("tokenizer.json cannot be read")
    (checkpoint / "model.safetensors").unlink()
    assert failure().endswith("holds no .safetensors file")
    (checkpoint / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    assert "is the config of a llama model, not of a Gemma 3" in failure()
    (checkpoint / "config.json").unlink()
    assert "holds no config.json" in failure()


def test_the_shipped_model_says_where_prompts_begin_and_replies_end() -> None:
    (line,) = (check.text for check in diagnose("miniature").checks if check.name == "tokenizer")
    assert line == "Tokenizer: one <bos> (2) starts a prompt, <eos> (1) or <end_of_turn> (106) ends a reply"


def test_a_download_that_does_not_fit_on_the_disk_fails() -> None:
    full = disk_check(10**18)
    assert full.status == "fail"
    assert full.text.endswith(", the download needs 1000000000.0 GB")
    assert full.fix == ("Make room, or set HF_HOME to a folder on a larger disk.",)
    assert disk_check(1).status == "ok"


# ---- for a bug report


def test_json_holds_the_facts_and_no_secret(patient: Patient) -> None:
    shutil.copytree(MINIATURE_DIR, patient.home / "mine")
    code, text = patient.doctor(str(patient.home / "mine"), "--json", who="ana")  # run() itself looks for the token
    report = json.loads(text)
    assert (code, report["ok"], report["gemma_grpo"]) == (0, True, gemma_grpo.__version__)
    assert str(patient.home) not in text
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["model"]["facts"]["folder"] == "~/mine"
    assert checks["packages"]["facts"]["transformers"]
    assert checks["tokenizer"]["facts"]["<end_of_turn>"] == 106
    assert checks["torch"]["facts"]["build"] == "cpu"


def test_json_of_a_failure_ends_with_3_as_well(patient: Patient) -> None:
    code, text = patient.doctor(GEMMA, "--json")
    assert code == 3
    failed = [check for check in json.loads(text)["checks"] if check["status"] == "fail"]
    assert [check["name"] for check in failed] == ["hub"]


# ---- sampling against training


def test_deep_compares_sampling_with_training_on_this_device() -> None:
    (found,) = (check for check in diagnose("miniature", deep=True).checks if check.name == "agreement")
    assert found.status == "ok"
    assert found.facts["tokens"] > 30
    assert 0 <= found.facts["difference"] < 1e-4, "float32 on one machine"
    assert found.text.startswith("miniature on ")


def test_deep_takes_the_miniature_where_the_asked_model_is_not_here(patient: Patient) -> None:
    found = patient.line(f"note {GEMMA} was not tried", GEMMA, "--deep", who="ana")
    assert found.startswith(f"note {GEMMA} was not tried, because its files are not here. Instead, miniature on the CPU in ")
    assert "log-probs recorded while sampling and those of a training pass differ by" in found
    assert "model.safetensors" not in patient.hub.fetched()


def test_deep_says_why_a_model_cannot_be_tried(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    (found,) = (check for check in diagnose(str(checkpoint), deep=True).checks if check.name == "agreement")
    assert found.status == "fail"
    assert "cannot sample and score here: " in found.text


@pytest.mark.parametrize(("difference", "agrees"), [(0.0, True), (0.4, True), (0.41, False), (float("inf"), False), (float("nan"), False)])
def test_only_what_rounding_explains_agrees(difference: float, agrees: bool) -> None:
    assert Agreement("miniature", "the CPU", "bfloat16", 10, difference, 0.4).agrees is agrees


def test_a_recipe_that_runs_code_is_told_whether_it_can_be_shut_in() -> None:
    why = why_not()
    (check,) = (one for one in diagnose("code").checks if one.name == "sandbox")
    assert (check.status, check.text.startswith("Programs can be shut in")) == (("ok", True) if why is None else ("fail", False))
    assert not [one for one in diagnose("tutoring").checks if one.name == "sandbox"]
