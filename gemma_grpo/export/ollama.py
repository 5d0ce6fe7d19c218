"""A Modelfile for Ollama: Gemma's turns as chat.py writes them, its stops, and the run's sampling settings.

Ollama imports a folder of safetensors itself (`ollama create NAME -f Modelfile`), so nothing is converted here.
"""

from __future__ import annotations

from pathlib import Path

from gemma_grpo.config import GRPOConfig

# Ollama fills this in with Go's text/template. A system message goes in front of the first user turn, as in training (chat.fold_system).
TEMPLATE = """\
{{- $system := "" }}
{{- range .Messages }}{{ if eq .Role "system" }}{{ $system = .Content }}{{ end }}{{ end }}
{{- range .Messages }}
{{- if eq .Role "user" }}<start_of_turn>user
{{ if $system }}{{ $system }}

{{ $system = "" }}{{ end }}{{ .Content }}<end_of_turn>
{{ else if eq .Role "assistant" }}<start_of_turn>model
{{ .Content }}<end_of_turn>
{{ end }}
{{- end }}<start_of_turn>model
"""


def modelfile(config: GRPOConfig, source: str = ".") -> str:
    """Its text; `source` is the folder or the GGUF file that the weights are in, seen from the Modelfile."""
    lines = [
        f"FROM {source}",
        f'TEMPLATE """{TEMPLATE}"""',
        'PARAMETER stop "<end_of_turn>"',
        'PARAMETER stop "<start_of_turn>"',
        f"PARAMETER temperature {config.temperature:g}",
        f"PARAMETER top_p {config.sampling.top_p:g}",
        f"PARAMETER top_k {config.sampling.top_k or 0}",
        "PARAMETER repeat_penalty 1",  # Ollama's own default changes what was trained
    ]
    return "\n".join(lines) + "\n"


def write_modelfile(folder: Path, config: GRPOConfig, source: str = ".") -> None:
    """Write it into the folder."""
    (folder / "Modelfile").write_text(modelfile(config, source), encoding="utf-8", newline="\n")
