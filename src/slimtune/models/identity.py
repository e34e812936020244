"""Which base a run began with: a resumed run must go on with the same weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig

from slimtune.models.load import locate
from slimtune.sections import ModelConfig

_SAMPLES = 256
"""Places in a weight file that are read: other weights differ nearly everywhere, and reading 16 GB takes a while."""
_BYTES = 4096
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NOT_THE_MODEL = {"_name_or_path", "transformers_version"}


def fingerprint(model: ModelConfig, config: PreTrainedConfig) -> str:
    """SHA-256 of a base: its config, and of a local one size, ends and evenly spaced parts of each weight file.

    Of a hub model the commit, where it is known.
    """
    described = {key: value for key, value in config.to_dict().items() if key not in _NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    if model.init == "config":
        return digest.hexdigest()
    location, local = locate(model.path)
    if not local:
        return str(getattr(config, "_commit_hash", "") or "")
    for path in _weight_files(Path(location)):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            _sample(file, path.stat().st_size, digest)
    return digest.hexdigest()


def weight_bytes(folder: Path) -> int:
    """Size of a model folder's weight files."""
    return sum(path.stat().st_size for path in _weight_files(folder))


def stored_dtype(model: ModelConfig) -> torch.dtype | None:
    """The one type of all tensors in a local base's safetensors files: loaded in it to a CPU, they take no memory of their own.

    None where there are several, or none to look at.
    """
    location, local = locate(model.path)
    folder, found = Path(location), set[str]()
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    for path in (folder / name for name in sorted(names) if local and (folder / name).is_file()):
        with safe_open(path, "pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return _DTYPES.get(found.pop()) if len(found) == 1 else None


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _sample(file: BinaryIO, size: int, digest: hashlib._Hash) -> None:
    for number in range(_SAMPLES):
        file.seek((size - _BYTES) * number // (_SAMPLES - 1) if size > _SAMPLES * _BYTES else number * _BYTES)
        digest.update(file.read(_BYTES))
