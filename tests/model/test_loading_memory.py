"""What loading holds on the host beside the decoder, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from gemma_grpo.model.loading import MAPPED_BYTES

PEAK = """
import sys, torch
from pathlib import Path
from gemma_grpo.config.schema import LoraSettings
from gemma_grpo.model import gemma
def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))
folder, precision = sys.argv[1:]
decoder = gemma.empty_decoder(Path(folder))
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = status("VmRSS")
dtype = gemma.base_dtype(precision, torch.device("cpu"))
gemma.fill_decoder(decoder, Path(folder), dtype=dtype, device=torch.device("cpu"))
size = sum(weight.numel() * weight.element_size() for weight in decoder.parameters())
print((status("VmHWM") - before) / size, size)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16_rescaled"])
def test_host_memory_peaks_at_most_15_percent_above_the_decoder(large_checkpoint: Path, precision: str) -> None:
    done = subprocess.run([sys.executable, "-c", PEAK, str(large_checkpoint), precision], capture_output=True, text=True, check=True)
    ratio, size = map(float, done.stdout.split())
    assert size > 20 * MAPPED_BYTES
    assert 0.9 < ratio <= 1.15


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of 1b's width and a twelfth of Gemma 3's vocabulary, 430 MB in bfloat16, in two files with a vision tower as large again."""
    folder = tmp_path_factory.mktemp("large")
    config = Gemma3TextConfig(
        vocab_size=20_000, hidden_size=1152, intermediate_size=6912, num_hidden_layers=7, num_attention_heads=4, num_key_value_heads=1
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Gemma3ForCausalLM(config).named_parameters()}
    weights = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(weights, folder / "model-1.safetensors", metadata={"format": "pt"})
    tower = {"vision_tower.vision_model.weight": torch.zeros(200 * 2**20, dtype=torch.bfloat16)}
    save_file(tower, folder / "model-2.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(weights, "model-1.safetensors") | dict.fromkeys(tower, "model-2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
