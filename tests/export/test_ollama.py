"""Ollama's template writes the turns that the model was trained on; Go itself fills it in, where it is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from gemma_grpo.config import GRPOConfig, build_config
from gemma_grpo.data.chat import fold_system
from gemma_grpo.export.ollama import TEMPLATE, modelfile
from gemma_grpo.types import Message

PROGRAM = """package main
import ("encoding/json"; "os"; "text/template")
type Message struct { Role string; Content string }
func main() {
  var messages []Message
  json.Unmarshal([]byte(os.Args[2]), &messages)
  text := template.Must(template.New("").Parse(os.Args[1]))
  if err := text.Execute(os.Stdout, map[string]any{"Messages": messages}); err != nil { panic(err) }
}
"""
CONVERSATIONS: list[list[Message]] = [
    [{"role": "user", "content": "hello"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c {{ d }}"}],
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ],
]


def turns(messages: list[Message]) -> str:
    """Gemma's turns as text, as chat.prompt_ids writes them in tokens, without <bos>, which Ollama adds itself."""
    roles = {"user": "user", "assistant": "model"}
    written = [f"<start_of_turn>{roles[one['role']]}\n{one['content']}<end_of_turn>\n" for one in fold_system(messages)]
    return "".join(written) + "<start_of_turn>model\n"


@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_the_template_writes_the_turns_of_training(tmp_path: Path, messages: list[Message]) -> None:
    (tmp_path / "main.go").write_text(PROGRAM)
    words = ["go", "run", str(tmp_path / "main.go"), TEMPLATE, json.dumps(messages)]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == turns(messages)


def test_the_modelfile_names_weights_stops_and_the_runs_sampling() -> None:
    config: GRPOConfig = build_config({"model_name": "miniature", "dataset": "miniature", "temperature": 0.7})
    lines = modelfile(config).splitlines()
    assert lines[0] == "FROM ."
    assert 'PARAMETER stop "<end_of_turn>"' in lines
    assert "PARAMETER temperature 0.7" in lines
    assert modelfile(config, "./model.gguf").startswith("FROM ./model.gguf\n")
    assert modelfile(config).count('"""') == 2
