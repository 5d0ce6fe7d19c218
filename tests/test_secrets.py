"""Thirty secrets planted where secrets get: none of them is in anything that is printed or written, whether a run works or fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from page_server import Server

from gemma_grpo.cli import run

HEX = "0123456789abcdef"


def canary(number: int, length: int = 34) -> str:
    """Letters and digits that are found nowhere else."""
    return (f"c4n4ry{number:02d}" + "Qz7Xv9Kj" * 8)[:length]


def hexes(number: int) -> str:
    """What a wandb key looks like."""
    return f"{number:02d}" + (HEX[number % 16 :] + HEX * 3)[:38]


ENVIRONMENT = {
    "HF_TOKEN": f"hf_{canary(0)}",
    "HUGGING_FACE_HUB_TOKEN": f"hf_{canary(1)}",
    "WANDB_API_KEY": hexes(2),
    "OPENAI_API_KEY": f"sk-proj-{canary(3)}",
    "AWS_SECRET_ACCESS_KEY": f"{canary(4, 20)}/+{canary(4, 18)}",
    "GITHUB_TOKEN": f"ghp_{canary(5)}",
    "DATABASE_PASSWORD": f"of no form {canary(6, 14)}",
    "MY_SECRET": canary(7, 16),
    "SERVICE_CREDENTIALS": canary(8, 16),
    "TRACKIO_KEY": canary(9, 12),
}
WORDS = (
    f"dataset=https://me:{canary(10)}@host.org/rows.jsonl",
    f"model_name=org/hf_{canary(11)}",
    f"seed=hf_{canary(12)}",
    f"output_dir=runs/sk-{canary(13)}",
    f"hf_token=hf_{canary(14)}",
    f"sk-{canary(15)}",
    f"data.source=token={canary(16)}",
    f"reward={{hf_{canary(17)}: 1.0, hf_{canary(17)}: 2.0}}",
    f"reward_model.path=s3://{canary(18)}@bucket/adapter",
    f"wandb_api_key={hexes(19)}",
)
MESSAGES = (
    f"401 Client Error for hf_{canary(20)}",
    f"Incorrect API key provided: sk-{canary(21)}",
    f"{{'Authorization': 'Bearer {canary(22)}'}}",
    f"Authorization: Basic {canary(23)}",
    f"cannot reach https://user:{canary(24)}@proxy.org:8080/v1",
    f"GET /x?page=1&token={canary(25)} failed",
    f"wandb: the key {hexes(26)} is not valid",
    f"password={canary(27)}",
    f"api_org_{canary(28)}",
    f"hf_jwt_{canary(29)}.{canary(29)}",
)
TINY = (
    *("batch_size=2", "gradient_accumulation_steps=1", "num_generations=2", "planning_steps=1", "max_completion_length=4"),
    *("max_prompt_length=200", "max_steps=1", "advantage.no_signal_steps=0", "gradient_checkpointing=false", "precision=fp32"),
    *("evaluation.num_prompts=2", "data.holdout=0.3", "reward={mine: 1.0}"),
)


def hits(text: str) -> list[int]:
    """Numbers of the secrets in a text."""
    return [n for n in range(30) if f"c4n4ry{n:02d}" in text or hexes(n) in text]


def test_thirty_secrets_are_planted() -> None:
    planted = " ".join((*ENVIRONMENT.values(), *WORDS, *MESSAGES))
    assert hits(planted) == list(range(30))


def written(folder: Path, *inputs: Path) -> str:
    """All that is in files below a folder, inputs aside."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path not in inputs]
    assert paths
    return "".join(f"{path.relative_to(folder)}\n{path.read_bytes().decode('latin-1')}" for path in paths)


def train(folder: Path, model: Path, rewards: str, *more: str) -> tuple[int, str, str]:
    """A training by the command line in a process of its own: exit code, what it printed, what it wrote."""
    rows, code = folder / "rows.jsonl", folder / "mine.py"
    rows.write_text("".join(json.dumps({"prompt": f"Say {n}"}) + "\n" for n in range(12)), encoding="utf-8")
    code.write_text(rewards, encoding="utf-8")
    words = ["train", "miniature", f"model_name={model}", f"dataset={rows}", f"output_dir={folder / 'run'}", *TINY]
    command = [sys.executable, "-m", "gemma_grpo.cli", *words, "--allow-code", str(code), *more]
    env = {**os.environ, **ENVIRONMENT, "HF_HOME": str(folder / "home")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, cwd=folder, check=False)
    return done.returncode, done.stdout + done.stderr, written(folder, rows, code)


ADDRESSES = (
    *("/", "/api/runs", "/api/runs/run", "/api/runs/run/groups", "/api/runs/run/samples", "/api/runs/run/changed", "/api/panels?run=run"),
    *("/api/runs/run/progress", "/api/runs/run/playground", "/api/chart?run=run&key=reward", "/api/compare?run=run", "/report/run"),
    *("/nothing", "/api/runs/none", "/api/runs/run/groups?step=x", "/api/chart?run=run&key=x"),
)


def on_the_page(folder: Path) -> str:
    """All that `watch` says of the run, and of mistakes in asking for it, while its own environment holds secrets too."""
    server = Server(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        answers = [server.ask(path) for path in ADDRESSES]
    server.stop()
    assert [answer.status for answer in answers[:6]] == [200] * 6
    assert [answer.status for answer in answers[-4:]] == [404, 404, 400, 404]
    return "".join(f"{answer.headers}{answer.body.decode()}" for answer in answers)


def test_a_run_that_works_tells_no_secret_of_its_environment(tmp_path: Path, small_model_dir: Path) -> None:
    code, printed, files = train(tmp_path, small_model_dir, "def mine(completions):\n    return [1.0 * len(c) for c in completions]\n")
    assert code == 0, printed
    assert "run/adapter/adapter_model.safetensors" in files
    assert hits(printed + files + on_the_page(tmp_path)) == []


@pytest.mark.parametrize("debug", [(), ("--debug",)], ids=["", "debug"])
def test_a_run_that_fails_tells_no_secret_of_the_error(tmp_path: Path, small_model_dir: Path, debug: Sequence[str]) -> None:
    # the error's text holds what was sent and what the environment holds, as careless clients' errors do
    told = f"'broke: ' + {' | '.join(MESSAGES)!r} + str([os.environ[name] for name in {list(ENVIRONMENT)}])"
    rewards = f"import os\n\ndef mine(completions):\n    raise RuntimeError({told})\n"
    code, printed, files = train(tmp_path, small_model_dir, rewards, *debug)
    assert code == 1, printed
    assert "broke: 401 Client Error for ***" in printed
    assert "broke: 401 Client Error for ***" in files  # run.json and events.jsonl
    assert ("Traceback" in printed) is bool(debug)
    page = on_the_page(tmp_path)
    assert "broke: 401 Client Error for ***" in page
    assert hits(printed + files + page) == []


@pytest.mark.parametrize("debug", [(), ("--debug",)], ids=["", "debug"])
@pytest.mark.parametrize("verb", ["train", "plan", "train-reward", "demo"])
def test_words_of_the_command_line_that_hold_secrets_are_refused_untold(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, debug: Sequence[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = () if verb == "demo" else ("miniature",)
    for words in (WORDS, *([word] for word in WORDS)):
        assert run([verb, *recipe, *words, *debug]) == 2
        printed = capsys.readouterr()
        assert printed.err
        assert hits(printed.out + printed.err) == []
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_holds_secrets_is_refused_untold(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    lines = [f"{key}: {json.dumps(value)}\n" for key, _, value in (word.partition("=") for word in WORDS) if value and "{" not in value]
    recipe.write_text("".join(line for line in lines if "." not in line.partition(":")[0]), encoding="utf-8")
    assert run(["train", str(recipe), "--debug"]) == 2
    printed = capsys.readouterr()
    assert len(hits(recipe.read_text(encoding="utf-8"))) >= 5
    assert hits(printed.out + printed.err) == []
