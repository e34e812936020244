"""``import slimtune`` alone makes per-layer folders loadable, and stays light."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

import slimtune
from cuts import UNEVEN, cut_model, logits_of, sample_ids
from slimtune import registration
from slimtune.export.huggingface import save

SCRIPT = """
import sys
import slimtune
slimtune.registration.install()
heavy = {"torch", "transformers", "numpy"} & set(sys.modules)
assert not heavy, heavy
import importlib.util
assert importlib.util.find_spec("transformers") and "transformers" not in sys.modules
import transformers.models.llama.modeling_llama  # a submodule first: the order in which imports form circles
from transformers import AutoModelForCausalLM
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "slimtune.registration"]
import torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model).__module__ == "slimtune.models.per_layer"
torch.save(model(torch.load(sys.argv[2])).logits.detach(), sys.argv[3])
"""


def test_a_plain_load_after_import_slimtune(tmp_path: Path) -> None:
    model, plan = cut_model("gemma3_text", UNEVEN)
    folder = save(model, None, plan, tmp_path / "out", None, {})
    torch.save(sample_ids(), tmp_path / "ids")
    arguments = [str(folder), str(tmp_path / "ids"), str(tmp_path / "logits")]
    environment = {**os.environ, "PYTHONPATH": str(Path(slimtune.__file__).parents[1])}
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "per-layer attribute" not in done.stderr
    found = torch.load(tmp_path / "logits")
    assert (found - logits_of(model, sample_ids())).abs().max() <= 1e-5


def test_with_transformers_loaded_registration_is_immediate() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    registration.install()
    assert "slimtune_llama" in CONFIG_MAPPING
    assert not [finder for finder in sys.meta_path if isinstance(finder, registration._Finder)]
