"""A model folder as one GGUF file for llama.cpp and what is built on it: by the ``gguf`` package, tensor by tensor."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from slimtune.errors import UserError, nearest
from slimtune.export import gguf_experts, gguf_vocab
from slimtune.export.gguf_experts import ROUTER, Sparse
from slimtune.export.gguf_layout import ELSEWHERE, Layout, Widths, check_family, layout_of, padded, tensors
from slimtune.models.load import check_weights, load_config
from slimtune.sections import ModelConfig

Check = Callable[[Path, str], None]
KINDS = {"f32": 0, "f16": 1, "bf16": 32, "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9, "q8_0": 7}
"""What weights can be written as -> ``general.file_type``."""
_BY_LLAMA_CPP = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq")
_ENDS = ("token_embd.weight", "output.weight")
"""Tensors that decide what a token is: with 4 or 5 bits elsewhere they keep 8, as is usual."""


def check_kind(kind: str) -> str:
    """``kind`` in small letters. Raises UserError for one that is not written here."""
    small = kind.lower()
    if small in KINDS:
        return small
    if small.startswith(_BY_LLAMA_CPP):
        raise UserError(
            f"--quantize {kind}: K- and I-quants are made by llama.cpp alone; export f16 (or bf16), then run "
            f"llama-quantize MODEL.gguf OUT.gguf {kind.upper()}"
        )
    raise UserError(f"--quantize {kind} is not known.{nearest(small, KINDS)} Kinds: {', '.join(KINDS)}")


def write(folder: Path, file: Path, kind: str = "", check: Check = lambda file, kind: None) -> dict[str, Any]:
    """Write the model of ``folder`` as ``file``, whole or not at all.

    Args:
        folder: a Hugging Face model folder, pruned or not, with ``tokenizer.json``.
        kind: one of ``KINDS``; default: as the weights are.
        check: called with the written file and its kind before it takes the place of ``file``; what it raises stops that.

    Returns:
        ``architecture``, ``kind``, ``bytes``, and ``kept``: {tensor: kind} of those whose rows no block of ``kind`` fits; where
        llama.cpp reads some texts otherwise than the folder's tokenizer, ``note``.

    Raises:
        UserError: llama.cpp has no architecture for the model, or its tokenizer, rotary scaling or weights are not of a kind
            that can be written.
    """
    gguf = _package()
    config = load_config(ModelConfig(path=str(folder)))
    family = str(config.model_type).removeprefix("slimtune_")
    check_family(family)
    sparse = gguf_experts.sparse_of(config, family)
    widths = widths_of(config, sparse)
    partial = file.with_name(f".{file.name}.partial")
    with ExitStack() as stack:
        weights = _Weights(folder, stack, bool(config.tie_word_embeddings))
        layout = layout_of(family, widths, config.hidden_size, head_of(config), weights.files)
        _check_arithmetic(config, layout)
        kind = check_kind(kind) if kind else weights.kind
        vocabulary = gguf_vocab.read(folder, weights.shape("model.embed_tokens.weight")[0], _special(config))
        writer = gguf.GGUFWriter(None, layout.arch)
        _describe(writer, config, layout, padded(widths, layout), KINDS[kind], folder.name)
        if sparse:
            gguf_experts.describe(writer, config, sparse)
        _tell_tokens(writer, vocabulary)
        stack.callback(partial.unlink, missing_ok=True)
        kept = _write(writer, partial, lambda: _all(weights, config, widths, layout, sparse), kind)
        check(partial, kind)
        os.replace(partial, file)
    found = {"architecture": layout.arch, "kind": kind, "bytes": file.stat().st_size, "kept": kept}
    return {**found, **({"note": vocabulary.note} if vocabulary.note else {})}


def _check_arithmetic(config: Any, layout: Layout) -> None:
    """Raise UserError where llama.cpp would compute something else and say nothing."""
    if (act := getattr(config, "hidden_act", "silu")) != "silu":
        raise UserError(f"hidden_act={act!r}: llama.cpp computes these blocks with silu; {ELSEWHERE}")
    if not layout.long_context and _scaling(config)["rope_type"] == "llama3":
        llama = config.model_type == "glm4_moe" and not config.attention_bias  # of Qwen2 no Mixtral is made
        other = "convert with moe.shared=false, whose mixtral has one, or " * llama
        raise UserError(f"rope_type 'llama3': llama.cpp's {layout.arch!r} has no place for it; {other}{ELSEWHERE}")
    share = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    if share != 1:
        raise UserError(f"partial_rotary_factor={share}: llama.cpp turns whole heads in these blocks; {ELSEWHERE}")


def widths_of(config: PreTrainedConfig, sparse: Sparse | None = None) -> list[Widths]:
    """Of every layer; ``sparse``: what ``config`` says of experts."""
    layers = getattr(config, "per_layer_config", None)
    own = [layers[index] if layers else config for index in range(config.num_hidden_layers)]
    mlps = [sparse.width if sparse else each.intermediate_size for each in own]
    return [Widths(each.num_attention_heads, each.num_key_value_heads, mlp) for each, mlp in zip(own, mlps, strict=True)]


def kind_in(file: Path) -> str:
    """The kind that ``file`` says its weights are; else ``other``. Raises UserError for no GGUF file."""
    try:
        field = _package().GGUFReader(file).get_field("general.file_type")
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise UserError(f"{str(file)!r} cannot be read as a GGUF file ({error}); fetch or export it again") from error
    number = field.contents() if field else None
    return next((kind for kind, each in KINDS.items() if each == number), "other")


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError("GGUF files are written with the package gguf; pip install 'slimtune[gguf]'") from error
    return gguf


class _Weights:
    """Tensors of a model folder by name, read one at a time."""

    def __init__(self, folder: Path, stack: ExitStack, tied: bool):
        check_weights(ModelConfig(path=str(folder)))
        index = folder / "model.safetensors.index.json"
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise UserError(
                f"{str(folder)!r} has no {absent[0]}; GGUF is written from safetensors: save_pretrained writes them"
            )
        opened = [stack.enter_context(safe_open(folder / name, "pt")) for name in names]
        self.files = {name: each for each in opened for name in each.keys() if not name.endswith("rotary_emb.inv_freq")}  # noqa: SIM118
        self.read = set[str]()
        if tied:  # some files hold it twice
            self.files.pop("lm_head.weight", None)
        if "model.norm.weight" not in self.files:
            raise UserError(f"{str(folder)!r} has no tensor 'model.norm.weight': these are not the weights of a causal LM")

    def get(self, name: str) -> Tensor:
        if name not in self.files:
            raise UserError(f"the model's files lack the tensor {name!r}, which its config asks for; fetch or save them again")
        self.read.add(name)
        tensor: Tensor = self.files[name].get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name].get_slice(name).get_shape())

    @property
    def kind(self) -> str:
        kinds = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
        return kinds.get(self.get("model.norm.weight").dtype, "f32")


def _all(weights: _Weights, config: PreTrainedConfig, widths: Sequence[Widths], layout: Layout, sparse: Sparse | None) -> Any:
    yield from tensors(weights.get, weights.files, widths, layout, head_of(config), sparse)
    if left := sorted(set(weights.files) - weights.read):
        raise UserError(f"llama.cpp's {layout.arch!r} has no place for {left[0]!r} of this model; {ELSEWHERE}")
    scaling = _scaling(config)
    if scaling["rope_type"] == "llama3":
        yield "rope_freqs.weight", _llama3(scaling, config)


def head_of(config: PreTrainedConfig) -> int:
    """Size of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _special(config: PreTrainedConfig) -> dict[str, int]:
    ids = {short: getattr(config, f"{short}_token_id", None) for short in ("bos", "eos", "pad")}
    found = {short: next(iter(value), None) if isinstance(value, list) else value for short, value in ids.items()}
    return {short: value for short, value in found.items() if value is not None}


def _describe(writer: Any, config: Any, layout: Layout, widths: Sequence[Widths], file_type: int, name: str) -> None:
    head, scaling = head_of(config), _scaling(config)
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    window = getattr(config, "sliding_window", None) if slides else None
    values = [[each.mlp for each in widths], [each.heads for each in widths], [each.kv_heads for each in widths]]
    mlp, heads, kv_heads = values if layout.by_layer else [each[0] for each in values]
    writer.add_name(re.sub("phi-?3", "phi", name, flags=re.IGNORECASE))  # so named, llama.cpp drops spaces after special tokens
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab_size)
    # attention over a window is the same as over all as long as the text is no longer
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(widths))
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(scaling.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0))
    if scaling.get("rope_type") == "linear":
        writer.add_rope_scaling_type(_package().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(scaling["factor"]))


def _scaling(config: Any) -> Mapping[str, Any]:
    """How positions are scaled. Raises UserError for a way that is not written."""
    found: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"rope_type {kind!r} is not written to GGUF yet (default, linear and llama3 are); {ELSEWHERE}")
    return {**found, "rope_type": kind}


def _llama3(scaling: Mapping[str, Any], config: Any) -> Tensor:
    """By what each frequency is divided, [d / 2]: long waves by ``factor``, short ones not, those between by parts."""
    head = head_of(config)
    base = float(scaling.get("rope_theta") or config.rope_theta)
    waves = 2 * torch.pi * base ** (torch.arange(0, head, 2, dtype=torch.float64) / head)
    low, high = float(scaling.get("low_freq_factor", 1)), float(scaling.get("high_freq_factor", 4))
    length, factor = float(scaling["original_max_position_embeddings"]), float(scaling["factor"])
    smooth = ((length / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def _tell_tokens(writer: Any, vocabulary: gguf_vocab.Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.kinds))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
        writer.add_add_space_prefix(vocabulary.space_prefix)
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    for short, index in vocabulary.special.items():
        getattr(writer, f"add_{short}_token_id")(index)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if vocabulary.template:
        writer.add_chat_template(vocabulary.template)


def _write(writer: Any, file: Path, every: Any, kind: str) -> dict[str, str]:
    """All tensors twice: first what they are, which stands at the file's head, then themselves, one in memory at a time."""
    gguf, kept = _package(), dict[str, str]()
    for name, tensor in every():
        own = kind_of(name, tuple(tensor.shape), kind)
        if own not in (kind, "f32") and name not in _ENDS:
            kept[name] = own
        shape, raw = tuple(tensor.shape), gguf.GGMLQuantizationType[own.upper()]
        count = gguf.quant_shape_to_byte_shape(shape, raw)
        writer.add_tensor_info(name, count, np.dtype(np.uint8), int(np.prod(count)), raw)
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in every():
            writer.write_tensor_data(_encoded(tensor, kind_of(name, tuple(tensor.shape), kind)))
    finally:
        writer.close()
    return kept


def kind_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    """What a tensor is written as: norms, biases and routers whole, rows that no block of 32 fits in 16 bits.

    A router is small, and rounded it would send words to other experts.
    """
    if len(shape) == 1 or name == "rope_freqs.weight" or name.endswith(ROUTER):
        return "f32"
    if not kind.startswith("q"):
        return kind
    if shape[-1] % 32:
        return "f16"
    return "q8_0" if name in _ENDS else kind


def _encoded(tensor: Tensor, kind: str) -> NDArray[Any]:
    gguf = _package()
    plain = tensor.detach().float().contiguous().numpy()
    found: NDArray[Any] = gguf.quants.quantize(plain, gguf.GGMLQuantizationType[kind.upper()])
    return found
