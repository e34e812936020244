"""Which base a run began with: a resumed run must go on with the same weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

from transformers import PreTrainedConfig

from slimtune.models.load import locate
from slimtune.sections import ModelConfig

_SAMPLES = 256
"""Places in a weight file that are read: other weights differ nearly everywhere, and reading 16 GB takes a while."""
_BYTES = 4096


def fingerprint(model: ModelConfig, config: PreTrainedConfig) -> str:
    """SHA-256 of a local base: its config.json, and size, ends and evenly spaced parts of each weight file.

    Of a hub model the commit, of random weights the empty string (the recipe and its seed say it all).
    """
    if model.init == "config":
        return ""
    location, local = locate(model.path)
    if not local:
        return str(getattr(config, "_commit_hash", "") or "")
    digest = hashlib.sha256((Path(location) / "config.json").read_bytes())
    for path in _weight_files(Path(location)):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            _sample(file, path.stat().st_size, digest)
    return digest.hexdigest()


def weight_bytes(folder: Path) -> int:
    """Size of a model folder's weight files."""
    return sum(path.stat().st_size for path in _weight_files(folder))


def _weight_files(folder: Path) -> list[Path]:
    return sorted(path for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind))


def _sample(file: BinaryIO, size: int, digest: hashlib._Hash) -> None:
    for number in range(_SAMPLES):
        file.seek((size - _BYTES) * number // (_SAMPLES - 1) if size > _SAMPLES * _BYTES else number * _BYTES)
        digest.update(file.read(_BYTES))
