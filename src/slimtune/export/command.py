"""``slimtune export``: a run's model, or any model folder, for another runtime, and that it runs there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slimtune.errors import UserError, nearest
from slimtune.export import gguf, gguf_compared, onnx, rewrite
from slimtune.export.folder import check_target
from slimtune.models.load import BUILTIN, load_config, locate
from slimtune.sections import ModelConfig

TARGETS = ("hf", "hf-uniform", "gguf", "onnx", "vllm")
Say = Callable[[str], None]


def export_model(
    run_or_model: str | Path,
    to: str = "gguf",
    *,
    quantize: str = "",
    form: str = "transformers",
    out: str | Path | None = None,
    check: bool = True,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Write a model for another runtime and run it there.

    Args:
        run_or_model: folder of a run, or of a model.
        to: one of ``TARGETS``.
        quantize: kind of the weights, not for ONNX; default: as they are.
        form: of a folder for vLLM, ``transformers`` or ``deci``: for which of vLLM's classes.
        out: the file (GGUF) or the folder; default: beside the model's folder, named after both.
        check: let that runtime go on from a few texts or tokens, and torch from the same. A folder: load it in a fresh process.
        say: takes a line for what is done.

    Returns:
        ``file``, ``bytes``, and, checked: ``tokens_same``, ``tokens`` (greedy ones, up to the first that differs, of how many),
        ``load_s``. GGUF: ``architecture``, ``kind``, ``kept`` (see :func:`slimtune.export.gguf.write`), ``logprob_difference``
        (largest among the likeliest first tokens). ONNX: ``logit_difference`` (the largest) and its ``limit``. A folder: see
        :func:`slimtune.export.rewrite.rewrite`.

    Raises:
        UserError: anything the user can mend; what does not run as torch does is not left behind, and what was there before
            stays.
    """
    _check_words(to, quantize, form)
    if not out and str(run_or_model).startswith(BUILTIN):
        name = "model.gguf" if to == "gguf" else f"model-{to}"
        raise UserError(f"{run_or_model} lies in the package; say where it goes: --out {name}")
    folder = folder_of(run_or_model).resolve()
    _check_class(folder, to)
    if to in rewrite.TARGETS:
        target = Path(out) if out else rewrite.default_target(folder, to, form, quantize)
        return rewrite.rewrite(folder, target, to, form, quantize, check, say)
    if to == "onnx":
        return _to_onnx(folder, Path(out) if out else folder.with_name(f"{folder.name}-onnx"), check, say)
    file = Path(out) if out else folder.parent / f"{folder.name}{'-' + quantize.lower() if quantize else ''}.gguf"
    return _to_gguf(folder, file, quantize, check, say)


def _check_words(to: str, quantize: str, form: str) -> None:
    if to not in TARGETS:
        raise UserError(f"--to {to!r} is not known.{nearest(to, TARGETS)} Targets: {', '.join(TARGETS)}")
    rewrite.check_form(form, to)
    if not quantize:
        return
    if to == "onnx":
        raise UserError(f"--quantize {quantize} is not for --to onnx, which is written in fp32: leave it out")
    if to in rewrite.TARGETS:
        rewrite.check_kind(quantize, to)
    else:
        gguf.check_kind(quantize)


def _check_class(folder: Path, to: str) -> None:
    """Raise UserError for a model with masks of single tokens: nothing but the code in its folder computes those."""
    if '"value_dims"' in (folder / "config.json").read_text(encoding="utf-8", errors="replace"):
        raise UserError(
            f"{str(folder)!r} gives every token its own value dimensions (moe.attention=tokens), which nothing but the code in "
            f"its folder computes, so it cannot be written --to {to}; use the folder as it is, or convert with "
            "moe.attention=pairs or groups"
        )


def _to_gguf(folder: Path, file: Path, quantize: str, check: bool, say: Say) -> dict[str, Any]:
    _check_file(file)
    compared: dict[str, Any] = {}

    def run_there(new: Path, kind: str) -> None:
        say("running it in llama.cpp, and the folder in torch ...")
        compared.update(_checked(gguf_compared.compared(folder, new), kind, folder))

    there = importlib.util.find_spec("xllamacpp") is not None
    say(f"writing {file} ...")
    try:
        written = gguf.write(folder, file, quantize, *([run_there] if check and there else []))
    except OSError as error:
        raise UserError(f"--out {str(file)!r} cannot be written: {error.strerror or error}; name another") from error
    if check and not there:
        say("not run: the package xllamacpp is not installed (pip install 'slimtune[gguf]')")
    return {"file": str(file), **written, **compared}


def _to_onnx(folder: Path, target: Path, check: bool, say: Say) -> dict[str, Any]:
    if target.resolve() == folder:
        raise UserError(f"--out {str(target)!r} is the model's own folder; name another")
    check_target(target)
    compared: dict[str, Any] = {}

    def run_there(written: Path) -> None:
        say("running it in onnxruntime, and the folder in torch ...")
        compared.update(onnx.compared(folder, written))
        if not compared["logit_difference"] <= compared["limit"]:
            raise UserError(
                f"onnxruntime computes other figures than torch from {str(folder)!r} (logits differ by "
                f"{compared['logit_difference']:.3g}); nothing was written: use the model's folder as it is"
            )

    say(f"writing {target} ...")
    written = onnx.write(folder, target, *([run_there] if check else []))
    return {"file": str(target), **written, **compared}


def _checked(compared: dict[str, Any], kind: str, folder: Path) -> dict[str, Any]:
    """The comparison, of a file that is the same model."""
    if compared["texts"]:
        text, here, there = compared["texts"][0]
        raise UserError(
            f"llama.cpp splits {text!r} into {there} tokens and the tokenizer of {str(folder)!r} into {here}; no file was "
            "written: use the model's folder as it is"
        )
    judged = gguf_compared.judged(compared, kind)
    if not judged["ok"]:
        raise UserError(
            f"llama.cpp computes other figures than torch from {str(folder)!r} (log-probabilities differ by "
            f"{compared['logprob_difference']:.3g}, in the mean by {compared['logprob_mean']:.3g}); no file was written: use "
            f"the model's folder as it is{_tipped(folder, kind)}"
        )
    figures = {key: value for key, value in compared.items() if key != "texts"}
    return {**figures, "limit": judged["limit"], "limit_of": judged["limit_of"]}


def _tipped(folder: Path, kind: str) -> str:
    """What else it may be, of a model with experts: an honest file whose figures are far off where one word went elsewhere."""
    if kind == "f32" or not getattr(load_config(ModelConfig(path=str(folder))), "num_local_experts", 0):
        return ""
    return (
        f", or -q f32: rounded to {kind} a word that lies between two experts may go to the other one, which is told apart by "
        "f32 alone (--no-check keeps the file)"
    )


def folder_of(given: str | Path, what: str = "RUN") -> Path:
    """The model's folder of a run, or a model's folder itself. Raises UserError for anything else, naming ``what``."""
    inside = Path(given).expanduser() / "model"
    location, local = locate(str(inside if (inside / "config.json").is_file() else given), what)
    if not local:
        raise UserError(f"{what}={location!r} is no folder here; fetch it (hf download {location}) and give the folder")
    return Path(location)


def _check_file(file: Path) -> None:
    if file.is_dir():
        raise UserError(f"--out {str(file)!r} is a folder; name a file, e.g. {str(file / 'model.gguf')!r}")
    if file.exists() and not _is_gguf(file):
        raise UserError(f"--out {str(file)!r} is no GGUF file and is not replaced; name another")
    if not file.parent.is_dir():
        raise UserError(f"--out {str(file)!r}: there is no folder {str(file.parent)!r}; make it, or name another")


def _is_gguf(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(4) == b"GGUF"
    except OSError as error:
        raise UserError(f"--out {str(file)!r} cannot be read: {error.strerror or error}; name another") from error
