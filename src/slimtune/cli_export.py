"""The commands ``slimtune export`` and ``slimtune verify``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from slimtune.errors import UserError

Run = Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run, or of a model, pruned or not.", show_default=False)]
To = Annotated[str, typer.Option("--to", metavar="hf|hf-uniform|gguf|onnx|vllm", help="For which runtime.")]
Quantize = Annotated[
    str,
    typer.Option(
        "--quantize",
        "-q",
        metavar="KIND",
        help="f32, f16 or bf16 (not onnx); gguf: q8_0, q5_1, q5_0, q4_1 or q4_0 too.",
        show_default="as the weights",
    ),
]
Form = Annotated[
    str,
    typer.Option(
        "--form", metavar="transformers|deci", help="For which of vLLM's classes: its Transformers backend, or DeciLM."
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="The file (gguf) or the folder.", show_default="beside the model")
]
Check = Annotated[
    bool, typer.Option("--check/--no-check", help="Run it there (hf, vllm: load it anew) and compare with torch.")
]
Export = Annotated[
    str,
    typer.Argument(
        metavar="EXPORT", help="Folder of a run, of a model or of an ONNX graph, or a GGUF file.", show_default=False
    ),
]
Against = Annotated[
    str,
    typer.Option("--against", metavar="RUN", help="The run or model that it should equal.", show_default="what was recorded"),
]
PlanFile = Annotated[
    str, typer.Argument(metavar="PLAN", help="plan.json, or the folder of a run or adapter that has it.", show_default=False)
]
Base = Annotated[
    str, typer.Argument(metavar="BASE", help="Folder, hub id or builtin that the plan was made for.", show_default=False)
]
Adapter = Annotated[
    str | None, typer.Option("--adapter", metavar="FOLDER", help="The adapter.", show_default="beside plan.json")
]
Revision = Annotated[
    str | None, typer.Option("--revision", metavar="NAME", help="Of a hub BASE.", show_default="that of the run's recipe")
]
NoAdapter = Annotated[bool, typer.Option("--no-adapter", help="Only cut by the plan: a smaller model that is not tuned.")]
Applied = Annotated[
    str | None, typer.Option("--out", metavar="FOLDER", help="The folder to write.", show_default="named after base and plan")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def export(
    run: Run,
    to: To = "gguf",
    quantize: Quantize = "",
    form: Form = "transformers",
    out: Out = None,
    check: Check = True,
    as_json: Json = False,
) -> None:
    """Write a model for another runtime, and run it there.

    hf: all families; the folder anew for transformers, with weights of another type.
    hf-uniform: all families, a stock class, which needs no code: layers are filled up with zeros to the widest one
    (a run with budget.layout=uniform needs none).
    gguf: Llama, Mistral, Qwen2 and Qwen3, uniform or with widths by layer (Qwen3 then with tied embeddings), and
    experts (Mixtral, Qwen3-MoE, GLM4-MoE, Dots1); for llama.cpp and what is built on it.
    onnx: all families, none with experts; token ids and mask in, logits out, for onnxruntime (a folder, fp32).
    vllm: all families; a folder for vLLM's Transformers backend, checked in transformers, not run in vLLM.
    vllm, --form deci: Llama, Mistral without windows and Qwen2; for vLLM's own kernels, with zeros for removed heads.
    """
    from slimtune.export.command import export_model
    from slimtune.runtime import quiet_libraries

    quiet_libraries()
    found = export_model(run, to, quantize=quantize, form=form, out=out, check=check, say=_say)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for name, value in (_told_of_folder(found, to) if "class" in found else _told(found)).items():
        typer.echo(f"{name:14s} {value}")


def verify(export: Export, against: Against = "", as_json: Json = False) -> None:
    """Load an export in a fresh process and compare what it computes.

    A folder is held to what tune recorded in it (verify.json), a GGUF file to the folder beside it that it was made from.
    Exits 1 where it computes something else.
    """
    from slimtune.export.again import verify_export
    from slimtune.runtime import quiet_libraries

    quiet_libraries()
    found = verify_export(export, against=against or None, say=_say)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        for name, value in _verified(found).items():
            typer.echo(f"{name:14s} {value}")
    if not found["ok"]:
        raise typer.Exit(1)


def apply(
    plan: PlanFile,
    base: Base,
    adapter: Adapter = None,
    no_adapter: NoAdapter = False,
    out: Applied = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Rebuild a run's model on its base from its plan and adapter.

    Bit for bit, without data or training. The plan (plan.json) is small; the adapter is LoRA and, unless
    compensate.weights is none, the weights that compensation changed.
    """
    from slimtune.export.apply import apply_plan
    from slimtune.runtime import quiet_libraries

    if adapter and no_adapter:
        raise UserError("--adapter and --no-adapter exclude each other; give one of them")
    quiet_libraries()
    found = apply_plan(
        plan, base, adapter_folder=adapter, use_adapter=not no_adapter, out=out or "", say=_say, revision=revision
    )
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for name, value in _applied(found).items():
        typer.echo(f"{name:14s} {value}")


def _applied(found: dict[str, Any]) -> dict[str, str]:
    count = f"{found['parameters']:,} parameters ({found['total_ratio']:.1%})"
    return {
        "model": found["file"],
        "size": f"{count}, {found['bytes'] / 1e6:,.1f} MB, {found['dtype']}",
        "adapter": found["adapter"] or "none: the base cut by the plan, not tuned",
        **({"weights": "those of the run, bit for bit"} if found["same"] else {}),
    }


def _verified(found: dict[str, Any]) -> dict[str, str]:
    size = f"{found['bytes'] / 1e6:,.1f} MB"
    of_mean = "of the mean " if _of_mean(found) else ""
    return {
        "export": found["export"],
        "model": found["class"] + (f", {found['parameters']:,} parameters" if found["parameters"] else ""),
        "size": f"{size}, loads in {found['load_s']:.2f} s",
        "runtime": found["runtime"],
        "next tokens": f"{found['tokens_same']} of {found['tokens']} as expected",
        "difference": f"{_difference(found)} (limit {of_mean}{found['limit']:.2g})",
        "verdict": _verdict(found),
    }


def _verdict(found: dict[str, Any]) -> str:
    if not found["ok"]:
        return "NOT the same model"
    return "the same model" + ("; the difference is what fewer bits cost" if _of_mean(found) else "")


def _of_mean(found: dict[str, Any]) -> bool:
    return bool(found.get("limit_of") == "logprob_mean")


def _told(found: dict[str, Any]) -> dict[str, str]:
    kind = found.get("kind", "fp32")
    lines = {"file": found["file"], "size": f"{found['bytes'] / 1e6:,.1f} MB, {kind}"}
    if "architecture" in found:
        lines["architecture"] = f"{found['architecture']} of llama.cpp"
    if found.get("kept"):
        lines["wider"] = f"{len(found['kept'])} tensors stay in 16 bits: their rows are no multiple of 32"
    if "note" in found:
        lines["note"] = found["note"]
    if "tokens" in found:
        where = "llama.cpp" if "architecture" in found else "onnxruntime"
        lines[f"in {where}"] = (
            f"{found['tokens_same']} of {found['tokens']} greedy tokens as in torch (up to the first other one of each text), "
            f"{_difference(found)}; loads in {found['load_s']:.2f} s"
        )
    return lines


def _told_of_folder(found: dict[str, Any], to: str) -> dict[str, str]:
    lines = {"folder": found["file"], "size": f"{found['bytes'] / 1e6:,.1f} MB, {found['kind']}"}
    lines["model"] = f"{found['class']}, {found['parameters']:,} parameters"
    if zeros := found["parameters"] - found["parameters_before"]:
        lines["padding"] = f"{zeros:,} of them are zeros; without them {found['parameters_before']:,}"
        if to == "hf-uniform":
            lines["padding"] += "; a run with budget.layout=uniform has equal widths, and a stock class, without zeros"
    if "tokens" in found:
        lines["fresh process"] = (
            f"{found['tokens_same']} of {found['tokens']} next tokens as in the model's folder, {_difference(found)}; "
            f"loads in {found['load_s']:.2f} s"
        )
    if to == "vllm":
        trust = " --trust-remote-code" if found["remote_code"] else ""
        lines["in vLLM"] = f"not run here; vllm serve {found['file']}{trust}"
    return lines


def _difference(found: dict[str, Any]) -> str:
    if "logit_difference" in found:
        return f"logits within {found['logit_difference']:.2g}"
    mean = f", {found['logprob_mean']:.2g} in the mean" if _of_mean(found) else ""
    return f"log-probabilities within {found['logprob_difference']:.2g}{mean}"


def _say(line: str) -> None:
    typer.secho(line, fg=typer.colors.BRIGHT_BLACK, err=True)
