"""A model's folder written anew: for transformers, in other types or with equal widths, or for vLLM; and held to torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from slimtune.errors import UserError, nearest
from slimtune.export import card_again, deci, huggingface, record, tokenizer
from slimtune.export.folder import check_target
from slimtune.export.gguf import head_of, widths_of
from slimtune.export.gguf_layout import Widths
from slimtune.export.onnx import LIMIT
from slimtune.export.padding import padded
from slimtune.export.verify import reloaded
from slimtune.models import per_layer
from slimtune.models.buffers import exact_buffers
from slimtune.models.identity import weight_bytes
from slimtune.models.load import TOKENIZER_FILES, load_config, load_tokenizer, pretrained
from slimtune.models.piecewise import in_fp32
from slimtune.sections import ModelConfig
from slimtune.structure.families import family_of

TARGETS = ("hf", "hf-uniform", "vllm")
FORMS = ("transformers", "deci")
KINDS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_CARRIED = ("generation_config.json", "plan.json", *TOKENIZER_FILES)
Say = Callable[[str], None]


@dataclass(frozen=True)
class _Laid:
    """A model as it is to be written.

    Attributes:
        config: with the name of the class that builds ``weights``.
        facts: ``parameters`` of it, ``parameters_before``: those that are not padding.
    """

    config: PreTrainedConfig
    weights: dict[str, Tensor]
    facts: dict[str, int] = field(default_factory=dict)


def check_kind(kind: str, to: str) -> None:
    """Raise UserError for a kind of weights that a folder is not written in."""
    if kind.lower() not in KINDS:
        close = nearest(kind.lower(), KINDS)
        raise UserError(f"--quantize {kind} is not for --to {to}.{close} Kinds: {', '.join(KINDS)} (fewer bits: --to gguf)")


def check_form(form: str, to: str) -> None:
    """Raise UserError for a form that is not known, or another target's."""
    if form not in FORMS:
        raise UserError(f"--form {form!r} is not known.{nearest(form, FORMS)} Forms: {', '.join(FORMS)}")
    if to != "vllm" and form != FORMS[0]:
        raise UserError(f"--form {form} is for --to vllm; leave it out")


def default_target(folder: Path, to: str, form: str, kind: str) -> Path:
    """Beside ``folder``, named after what is written."""
    parts = [folder.name, to, *([form] if form != FORMS[0] else []), *([kind.lower()] if kind else [])]
    return folder.with_name("-".join(parts))


@torch.no_grad()
def rewrite(
    folder: Path, target: Path, to: str, form: str, kind: str, check: bool, say: Say = lambda _: None
) -> dict[str, Any]:
    """Write the model of ``folder`` as the folder ``target``, whole or not at all, with tokenizer, plan and card.

    Args:
        to: one of ``TARGETS``; form: one of ``FORMS``; kind: one of ``KINDS``, or nothing: as the weights are.
        check: hold what a fresh process computes to the model of ``folder``, its weights rounded alike, and record that.

    Returns:
        ``file``, ``bytes``, ``kind``, ``class``, ``remote_code`` (the folder carries the class), ``parameters``,
        ``parameters_before`` (without padding); checked: ``logit_difference`` (the largest), its ``limit``, ``tokens_same`` of
        ``tokens`` (likeliest next ones), ``load_s``.

    Raises:
        UserError: no class holds the model, it cannot be loaded or written, or computes something else then.
    """
    if target.resolve() == folder:
        raise UserError(f"--out {str(target)!r} is the model's own folder; name another")
    check_target(target)
    config = load_config(ModelConfig(path=str(folder)), "RUN")
    _check_whole(folder, config)
    if form == "deci":
        deci.check(config, family_of(_family(config)))
    kind = kind.lower() or _kind_in(folder, config)
    model = _loaded(folder, kind)
    laid = _laid(model, to, form)
    laid.config.dtype = KINDS[kind]
    compared: dict[str, Any] = {}

    def finish(partial: Path) -> None:
        for file in sorted({file for pattern in _CARRIED for file in folder.glob(pattern) if file.is_file()}):
            copyfile(file, partial / file.name)
        tokenizer.settle(lambda: load_tokenizer(ModelConfig(path=str(folder)), "RUN"), partial, say)
        card_again.write(folder, partial, to, laid.facts)

    def run_there(partial: Path) -> None:
        say("loading it in a fresh process, and the model's folder in torch ...")
        compared.update(_compared(folder, model, partial))

    say(f"writing {target} ...")
    huggingface.write(target, laid.config, laid.weights, KINDS[kind], finish, run_there if check else None)
    return {
        "file": str(target),
        "bytes": weight_bytes(target),
        "kind": kind,
        "class": (laid.config.architectures or ["?"])[0],
        "remote_code": any(target.glob("modeling_*.py")),
        **laid.facts,
        **compared,
    }


def _compared(folder: Path, model: Any, written: Path) -> dict[str, Any]:
    """``written`` in a fresh process held to ``model``, and what it should compute put into it."""
    ids = record.drawn(int(model.config.vocab_size))
    with in_fp32(model):
        expected = model(input_ids=ids, use_cache=False).logits
    found = reloaded(written, {"input_ids": ids, "expected": expected})
    limit = LIMIT * max(1.0, float(expected.abs().max()))
    if not found["difference"] <= limit:
        raise UserError(
            f"the new folder computes other figures than {str(folder)!r} (logits differ by {found['difference']:.3g}); "
            "nothing was written: use the model's folder as it is"
        )
    record.write(written, record.of(ids[-1], expected[-1]))
    figures = {"logit_difference": found["difference"], "limit": limit, "load_s": found["load_s"]}
    return {**figures, "tokens_same": found["same"], "tokens": found["places"]}


def _check_whole(folder: Path, config: PreTrainedConfig) -> None:
    if getattr(config, "quantization_config", None):
        raise UserError(f"{str(folder)!r} holds quantised weights (quantization_config in config.json); give the original ones")


def _kind_in(folder: Path, config: PreTrainedConfig) -> str:
    """What the weights are: by the files' first one of a known type, else by the config."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    if (found := tensors.get_slice(name).get_dtype().lower()) in KINDS:
                        return str(found)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{str(file)!r} cannot be read ({error}); fetch or export the folder again") from error
    return next((kind for kind, dtype in KINDS.items() if dtype == config.dtype), "f32")


def _loaded(folder: Path, kind: str) -> Any:
    """The model in ``kind``; nothing in memory where the files are in it too."""
    # eager, as the fresh process has it: the one implementation that applies every family's soft caps
    model: Any = pretrained(ModelConfig(path=str(folder)), {"dtype": KINDS[kind], "attn_implementation": "eager"}, "RUN")
    exact_buffers(model, load_config(ModelConfig(path=str(folder)), "RUN"))
    for name, parameter in model.named_parameters():
        if kind == "f16" and not parameter.isfinite().all():
            raise UserError(f"--quantize {kind}: {name!r} has values that {kind} does not hold; choose bf16 or f32")
    return model.eval()


def _family(config: PreTrainedConfig) -> str:
    return str(config.model_type).removeprefix("slimtune_")


def _laid(model: Any, to: str, form: str) -> _Laid:
    weights = _as_published(model)
    count = sum(map(Tensor.numel, weights.values()))
    if form == "deci":
        widths = widths_of(model.config)
        wanted = deci.widths_for(widths)
        wide = padded(weights, family_of(_family(model.config)), head_of(model.config), widths, wanted)
        config: PreTrainedConfig = deci.config_of(huggingface.keys_of(model.config), wanted, wide)
    else:
        config, wide = _for_transformers(model.config, weights, to == "hf-uniform")
    return _Laid(config, wide, {"parameters": sum(map(Tensor.numel, wide.values())), "parameters_before": count})


def _as_published(model: Any) -> dict[str, Tensor]:
    """Parameters by the names of published files, tied ones once: experts one by one, and not, as in memory, in one tensor.

    Others than transformers read these names alone. A part of a tensor is copied, for files hold tensors whole.
    """
    weights = dict(model.named_parameters())
    if not any(tensor.ndim == 3 for tensor in weights.values()):
        return weights
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():  # one by one: what is made on the way is in memory once
        parts = revert_weight_conversion(model, {name: tensor})
        found |= {key: part if part is tensor else part.clone() for key, part in parts.items()}
    return found


def _for_transformers(
    config: PreTrainedConfig, weights: dict[str, Tensor], equal: bool
) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """The config of a stock class where one holds the model, padded if ``equal`` widths are asked for; else its own."""
    if not isinstance(config, tuple(per_layer.CONFIGS.values())):  # of transformers' own classes each has equal widths
        return config, weights
    widths, family = widths_of(config), family_of(_family(config))
    for wanted in _equal(config, widths):
        if not equal and wanted != widths:
            break
        keys = {
            "num_attention_heads": wanted[0].heads,
            "num_key_value_heads": wanted[0].kv_heads,
            "intermediate_size": wanted[0].mlp,
        }
        wide = padded(weights, family, head_of(config), widths, wanted)
        options = huggingface.stock(family.model_type, {**huggingface.keys_of(config), **keys})
        found, _ = huggingface.fitting(options, {name: tuple(tensor.shape) for name, tensor in wide.items()})
        if found is not None:
            return found, wide
    if equal:
        raise UserError(
            f"no stock class of {family.model_type!r} takes as many heads as the widest layer has, nor more up to those of the "
            "base; use --to hf"
        )
    return config, weights


def _equal(config: PreTrainedConfig, widths: list[Widths]) -> Iterator[list[Widths]]:
    """Equal widths of all layers: those of the widest, then with more KV groups, up to those before the cut."""
    widest, mlp = max(each.kv_heads for each in widths), max(each.mlp for each in widths)
    group = max(each.heads // max(each.kv_heads, 1) for each in widths)
    for groups in range(widest, max(widest, config.num_key_value_heads) + 1):
        yield [Widths(groups * group, groups, mlp)] * len(widths)
