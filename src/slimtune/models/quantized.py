"""A frozen base in 4 bits (QLoRA, Dettmers et al. 2023), through bitsandbytes.

The linears of the blocks are quantised on the device, one at a time, so that of a model from files it never holds a whole
unquantised one (a model of ``init: config`` is drawn there). Each keeps the weight that it was quantised from in host memory,
where a weight of the file's own type is the mapped file. Forward passes compute with 4 bits; what is decided from weights, cut,
merged and written is of originals (``models.weights``).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from slimtune.errors import UserError
from slimtune.models.load import load_model
from slimtune.models.surgery import blocks_of, linears_of
from slimtune.models.weights import is_quantized, quantize
from slimtune.recipe import Recipe
from slimtune.sections import ModelConfig
from slimtune.structure.axes import Structure


def check_quantizable(recipe: Recipe) -> None:
    """Raise UserError where ``model.quantize`` does not go with another key."""
    if (kind := recipe.model.quantize) == "none":
        return
    if recipe.method == "finetune" and recipe.model.init == "config":
        raise UserError(
            f"model.quantize={kind} is of frozen weights, and model.init=config with method=finetune trains all of them; set "
            "model.quantize=none"
        )
    if recipe.train.compile is True:
        raise UserError(f"model.quantize={kind} does not go with train.compile=true; leave one of them out")


def check_bitsandbytes(kind: str, device: str) -> None:
    """Raise UserError where ``model.quantize=kind`` cannot be had on ``device``: by quantising a few numbers there."""
    asked = f"model.quantize={kind}"
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{asked} needs the package bitsandbytes: pip install 'slimtune[qlora]', or set model.quantize=none")
    try:
        quantize(torch.ones(64, 64), device)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # it has as many ways to lack a kernel
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{asked}: bitsandbytes cannot quantise on {device} ({reason}); install a build of it for this machine, or set "
            "model.quantize=none"
        ) from error


def load_as_trained(config: ModelConfig, structure: Structure, device: str, dtype: torch.dtype) -> Any:
    """The causal LM on ``device`` in ``dtype``, its blocks' linears quantised where the recipe says so."""
    if config.quantize == "none":
        return load_model(config, device, dtype)
    return quantized(load_on_host(config, device, dtype), structure, device)


def load_on_host(config: ModelConfig, device: str, dtype: torch.dtype) -> Any:
    """The causal LM in host memory; random weights are drawn on ``device``, for the same numbers as an unquantised run's."""
    return load_model(config, device if config.init == "config" else "cpu", dtype).to("cpu")


@torch.no_grad()
def quantized(model: Any, structure: Structure, device: str) -> Any:
    """A plain ``model``, which lies in host memory, brought to ``device`` with the linears of its blocks in 4 bits."""
    for block in blocks_of(model, structure):
        for row in structure.family.linears:
            block.set_submodule(row.path, _quantized_linear(block.get_submodule(row.path), device))
    model.is_loaded_in_4bit = True  # PEFT asks for it
    return model.to(device)


def unquantized(model: Any) -> Any:
    """``model`` with the originals of its quantised weights, which lie in host memory; all else stays where it is."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and is_quantized(module.weight):
            model.set_submodule(name, _whole_linear(module))
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.is_loaded_in_4bit = False
    return model


def to_measure(model: Any, structure: Structure, device: torch.device) -> Any:
    """A whole model, its blocks' linears in host memory, brought to ``device``, which may have no room but for 4 bits of it.

    Where it would take more than half of what is free there, those linears stay, and each comes for as long as it computes.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what training gave back is free as well
        if sum(each.numel() * each.element_size() for each in model.parameters()) > torch.cuda.mem_get_info(device)[0] / 2:
            return lent(model, structure, device)
    return model.to(device)


def lent(model: Any, structure: Structure, device: torch.device) -> Any:
    """``model`` on ``device`` but for the linears of its blocks, each of which is there while it computes."""
    linears: dict[nn.Module, list[Tensor]] = {}
    for _, _, module in linears_of(model, structure):
        inner: Any = module.base_layer if isinstance(module, LoraLayer) else module
        linears[inner] = [each.data for each in inner.parameters(recurse=False)]

    def come(module: nn.Module, _: Any) -> None:
        for each, resting in zip(module.parameters(recurse=False), linears[module], strict=True):
            each.data = resting.to(device)

    def go(module: nn.Module, _: Any, __: Any) -> None:
        for each, resting in zip(module.parameters(recurse=False), linears[module], strict=True):
            each.data = resting

    for module in model.modules():
        if module in linears:
            module.register_forward_pre_hook(come)
            module.register_forward_hook(go, always_call=True)
            continue
        for each in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            each.data = each.data.to(device)
    return model


def _quantized_linear(linear: Any, device: str) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    weight = linear.weight
    shape = linear.in_features, linear.out_features, linear.bias is not None
    # it computes in the weights' own type: biases of another than it computes in it would round for good
    made = Linear4bit(*shape, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
    made.weight, made.bias = quantize(weight, device), linear.bias
    made.support_avx512bf16_for_cpu = False  # in eval mode it would round to bf16 for good
    return made.train(linear.training)


def _whole_linear(linear: Any) -> nn.Module:
    made = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    made.weight, made.bias = nn.Parameter(linear.weight.original, requires_grad=False), linear.bias
    return made.train(linear.training)
