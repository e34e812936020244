"""What an exported model computes, kept in its folder, so that any copy can be held to it: ``verify.json``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from slimtune.errors import UserError

FILE = "verify.json"
_LENGTH = 64


@dataclass(frozen=True)
class Record:
    """Of one row of tokens, T of them, in fp32 on a CPU.

    Attributes:
        input_ids: [T], drawn at random: text of a user's would go wherever the folder goes.
        tokens: [T], the likeliest token after each of ``input_ids``.
        logprobs: [T], its log-probability, natural.
    """

    input_ids: list[int]
    tokens: list[int]
    logprobs: list[float]


def drawn(vocabulary: int, length: int = _LENGTH) -> Tensor:
    """[1, length] token ids, the same ones for the same arguments."""
    return torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))


def of(input_ids: Tensor, logits: Tensor) -> Record:
    """The record of one row: ids [T], logits [T, V]."""
    best = logits.float().log_softmax(-1).max(-1)
    return Record(input_ids.tolist(), best.indices.tolist(), [round(value, 6) for value in best.values.tolist()])


def write(folder: Path, record: Record) -> None:
    """Put it into ``folder``."""
    (folder / FILE).write_text(json.dumps(asdict(record)) + "\n", encoding="utf-8")


def read(folder: Path) -> Record | None:
    """What ``folder`` has. Raises UserError where the file is no such record."""
    if not (file := folder / FILE).is_file():
        return None
    try:
        record = Record(**json.loads(file.read_text(encoding="utf-8")))
        if not len(record.input_ids) == len(record.tokens) == len(record.logprobs) > 0:
            raise ValueError("its lists differ in length")
    except (ValueError, TypeError) as error:
        raise UserError(f"{str(file)!r} is no record of an export ({error}); fetch the folder again, or remove it") from error
    return record
