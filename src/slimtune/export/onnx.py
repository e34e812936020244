"""A model as an ONNX graph: token ids and their mask in, logits out, batch and length of any size."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimtune.errors import UserError
from slimtune.export import record
from slimtune.export.folder import replacing
from slimtune.export.greedy import continued, same
from slimtune.models.load import TOKENIZER_FILES, load_config, pretrained
from slimtune.sections import ModelConfig

FILE = "model.onnx"
LIMIT = 1e-4
"""Difference of logits from which on a graph is another model: of 1, or of the largest logit where that is more."""
_CARRIED = ("config.json", "generation_config.json", *TOKENIZER_FILES)
_CHILD = Path(__file__).with_name("onnx_child.py")
_TOKENS = 16
_SPARE_BYTES = 1 << 22
_TAIL = 600
Check = Callable[[Path], None]


class _Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, T] and [B, T] -> [B, T, V]. Places are counted from a row's first word, as generate counts them."""
        places = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        logits: Tensor = self.model(input_ids, attention_mask=attention_mask, position_ids=places, use_cache=False).logits
        return logits


def write(folder: Path, target: Path, check: Check = lambda written: None) -> dict[str, Any]:
    """Write the model of ``folder`` (fp32) into the folder ``target``, whole or not at all, with its config and tokenizer.

    Args:
        folder: a Hugging Face model folder, pruned or not.
        check: called with the written folder before it takes the place of ``target``; what it raises stops that.

    Returns:
        ``bytes`` of the graph and its weights.

    Raises:
        UserError: packages are not installed, the model has experts, the disk is full, or ``target`` may not be replaced.
    """
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]:
        raise UserError(f"ONNX needs the package{'s' * (len(missing) > 1)} {', '.join(missing)}; pip install 'slimtune[onnx]'")
    _check_experts(load_config(ModelConfig(path=str(folder)), "RUN"))
    model = _loaded(folder)
    with replacing(target, 4 * sum(each.numel() for each in model.parameters()) + _SPARE_BYTES) as partial:
        _graph(model).save(partial / FILE)
        for file in sorted({file for pattern in _CARRIED for file in folder.glob(pattern) if file.is_file()}):
            copyfile(file, partial / file.name)
        check(partial)
    return {"bytes": size_of(target)}


def size_of(target: Path) -> int:
    """Bytes of graph and weights."""
    return sum(file.stat().st_size for file in target.glob(f"{FILE}*"))


def _check_experts(config: Any) -> None:
    if getattr(config, "num_local_experts", 0) or getattr(config, "num_experts", 0):
        raise UserError(
            f"--to onnx: a model of {config.model_type!r} chooses experts word by word, for which ONNX has no operator; use "
            "--to gguf, or the model's folder as it is"
        )


def _loaded(folder: Path) -> Any:
    # eager: sdpa's own kernels choose by shapes, which are not known in a graph
    model: Any = pretrained(ModelConfig(path=str(folder)), {"dtype": torch.float32, "attn_implementation": "eager"}, "RUN")
    return model.eval()


def _graph(model: Any) -> Any:
    ids = record.drawn(int(model.config.vocab_size), 14).view(2, 7)
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    # which operators of torchvision are left out is no news
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.onnx.export(
            _Logits(model),
            (ids, torch.ones_like(ids)),
            dynamo=True,
            verbose=False,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes={"input_ids": axes, "attention_mask": axes},
        )


@torch.no_grad()
def compared(folder: Path, target: Path) -> dict[str, Any]:
    """onnxruntime (CPU, a fresh process) on ``target`` and torch on ``folder``, both fp32.

    A batch of three rows, one of them padded on the left, of another shape than the graph was traced with; and greedy tokens.

    Returns:
        ``logit_difference``, the largest where no padding is; ``limit``; ``tokens_same`` of ``tokens``; ``load_s``.

    Raises:
        UserError: the graph does not run.
    """
    model = _loaded(folder)
    ids = record.drawn(int(model.config.vocab_size), 3 * 33).view(3, 33)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    prompts = [ids[0, :9].tolist(), ids[2].tolist()]
    found, logits = _ran(target / FILE, ids, mask, prompts)
    expected = _Logits(model)(ids, mask)[mask.bool()]
    difference = (torch.from_numpy(logits)[mask.bool()] - expected).abs().max().item()
    went = [same(continued(model, prompt, _TOKENS), other) for prompt, other in zip(prompts, found["tokens"], strict=True)]
    limit = LIMIT * max(1.0, expected.abs().max().item())
    figures = {"logit_difference": difference, "limit": limit, "tokens_same": sum(went), "tokens": _TOKENS * len(prompts)}
    return {**figures, "load_s": float(found["load_s"])}


def _ran(file: Path, ids: Tensor, mask: Tensor, prompts: list[list[int]]) -> tuple[dict[str, Any], Any]:
    with tempfile.TemporaryDirectory(prefix="slimtune-onnx-") as scratch:
        kept = Path(scratch) / "logits.npy"
        rows = {"ids": ids.tolist(), "mask": mask.tolist(), "logits": str(kept), "prompts": prompts}
        asked = json.dumps({**rows, "tokens": _TOKENS, "threads": torch.get_num_threads()})
        command = [sys.executable, "-P", str(_CHILD), str(file.resolve()), asked]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            raise UserError(
                f"onnxruntime does not run {str(file)!r} (exit {done.returncode}): {' '.join(done.stderr.split())[-_TAIL:]}"
            )
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found, np.load(kept)
