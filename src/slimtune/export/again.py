"""``slimtune verify``: an export loaded again, in a fresh process, and held to what it should compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimtune.errors import UserError
from slimtune.export import gguf, gguf_compared, onnx, record
from slimtune.export.command import folder_of
from slimtune.export.verify import reloaded
from slimtune.models.identity import weight_bytes
from slimtune.models.load import pretrained
from slimtune.sections import ModelConfig
from slimtune.version import versions

LIMIT = gguf_compared.LARGEST["f32"]
"""Difference of log-probabilities from which on a folder is another model."""
Say = Callable[[str], None]


def verify_export(export: str | Path, *, against: str | Path | None = None, say: Say = lambda _: None) -> dict[str, Any]:
    """Load an export in a fresh process and compare what it computes, in fp32 on the CPU.

    Args:
        export: folder of a run or of a model, a GGUF file, or the folder of an ONNX graph.
        against: the run or model that it should equal. Default: of a folder, what was recorded in it when it was written
            (``verify.json``); of a file or a graph, the folder beside it that ``slimtune export`` made it from.
        say: takes a line for what is done.

    Returns:
        ``export``, ``runtime``, ``class``, ``parameters`` (None of a file), ``bytes``, ``load_s``, ``tokens_same`` of
        ``tokens`` (likeliest next ones; of a file or a graph greedy ones), ``logprob_difference`` (the largest; of a graph
        ``logit_difference``), of a file ``logprob_mean`` too, ``limit`` (of a file for the figure ``limit_of``), ``ok``.

    Raises:
        UserError: it does not load, or there is nothing to compare it with.
    """
    if (file := Path(export).expanduser()).suffix == ".gguf":
        return _of_file(file, against, say)
    folder = folder_of(export, "EXPORT")
    if (folder / onnx.FILE).is_file():
        return _of_graph(folder, against, say)
    expected = _recorded(folder) if against is None else _computed(folder, folder_of(against, "--against"), say)
    say(f"loading {folder} in a fresh process ...")
    rows = {"input_ids": torch.tensor([expected.input_ids]), "tokens": torch.tensor([expected.tokens])}
    found = reloaded(folder, {**rows, "logprobs": torch.tensor([expected.logprobs])})
    libraries = versions()
    return {
        "export": str(folder),
        "runtime": f"transformers {libraries['transformers']}, torch {libraries['torch']}",
        "class": found["class"],
        "parameters": found["parameters"],
        "bytes": weight_bytes(folder),
        "load_s": found["load_s"],
        **_judged(found["same"], found["places"], found["difference"], LIMIT),
    }


def _recorded(folder: Path) -> record.Record:
    if found := record.read(folder):
        return found
    raise UserError(
        f"{str(folder)!r} has no {record.FILE}, so it is not from slimtune tune, or was not checked there (export.verify), or "
        "is older than that file; say what it should equal: --against RUN (or a model's folder)"
    )


@torch.no_grad()
def _computed(folder: Path, other: Path, say: Say) -> record.Record:
    """What ``other`` computes, on the tokens recorded in ``folder`` where there are such."""
    say(f"computing what {other} has to say ...")
    model: Any = pretrained(ModelConfig(path=str(other)), {"dtype": torch.float32}, "--against").eval()
    mine, vocabulary = record.read(folder), int(model.config.vocab_size)
    ids: Tensor = torch.tensor([mine.input_ids]) if mine else record.drawn(vocabulary)
    if int(ids.max()) >= vocabulary:
        raise UserError(f"--against {str(other)!r} has {vocabulary} tokens, fewer than {str(folder)!r}: it is another model's")
    return record.of(ids[0], model(input_ids=ids, use_cache=False).logits[0])


def _of_file(file: Path, against: str | Path | None, say: Say) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"EXPORT={str(file)!r} is no file here; give a GGUF file, or the folder of a run or a model")
    kind = gguf.kind_in(file)
    folder = folder_of(against, "--against") if against else _beside(file, kind)
    say(f"running {file} in llama.cpp, and {folder} in torch ...")
    found = gguf_compared.compared(folder, file)
    judged = gguf_compared.judged(found, kind)
    return {
        "export": str(file),
        "runtime": f"llama.cpp (xllamacpp), against {folder}",
        "class": kind,
        "parameters": None,
        "bytes": file.stat().st_size,
        **{name: figure for name, figure in found.items() if name != "texts"},
        **judged,
        "ok": judged["ok"] and not found["texts"],
    }


def _of_graph(target: Path, against: str | Path | None, say: Say) -> dict[str, Any]:
    beside = target.resolve().with_name(target.resolve().name.removesuffix("-onnx"))
    if against is None and (beside == target.resolve() or not (beside / "config.json").is_file()):
        raise UserError(
            f"no model's folder lies beside {str(target)!r}; say what it was made from: --against RUN (or a model's folder)"
        )
    folder = folder_of(against, "--against") if against else beside
    say(f"running {target} in onnxruntime, and {folder} in torch ...")
    found = onnx.compared(folder, target)
    return {
        "export": str(target),
        "runtime": f"onnxruntime {versions(['onnxruntime'])['onnxruntime']}, against {folder}",
        "class": "ONNX graph",
        "parameters": None,
        "bytes": onnx.size_of(target),
        "load_s": found["load_s"],
        "tokens_same": found["tokens_same"],
        "tokens": found["tokens"],
        "logit_difference": found["logit_difference"],
        "limit": found["limit"],
        "ok": found["logit_difference"] <= found["limit"],
    }


def _beside(file: Path, kind: str) -> Path:
    """The folder that ``slimtune export`` made ``file`` from, by its name."""
    for name in (file.stem, file.stem.removesuffix(f"-{kind}")):
        if (file.parent / name / "config.json").is_file():
            return file.parent / name
    raise UserError(
        f"no model's folder lies beside {str(file)!r}; say what it was made from: --against RUN (or a model's folder)"
    )


def _judged(same: int, tokens: int, difference: float, limit: float) -> dict[str, Any]:
    figures = {"tokens_same": same, "tokens": tokens, "logprob_difference": difference}
    return {**figures, "limit": limit, "ok": difference <= limit}
