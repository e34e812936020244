"""A base in 4 bits: forward passes compute with them, everything else reads the weights that they were made from."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor

from families import FAMILY_NAMES
from gated import logits_of, padded_sample, random_model, random_plan
from slimtune.models.load import attach_lora
from slimtune.models.quantized import check_bitsandbytes, lent, quantized, to_measure, unquantized
from slimtune.models.surgery import cut, linears_of, merge_lora
from slimtune.models.weights import dense, held, is_quantized, put, put_back, put_original, quantize
from slimtune.sections import LoraConfig
from slimtune.structure.axes import Structure
from slimtune.structure.plan import Plan

each_family = pytest.mark.parametrize("name", FAMILY_NAMES)


def in_4_bits(name: str) -> tuple[Any, Any, Structure]:
    """A random model, the same one quantised with random LoRA, and their structure."""
    plain, structure = random_model(name)
    model = attach_lora(quantized(copy.deepcopy(plain), structure, "cpu"), structure, LoraConfig(rank=3)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return plain, model, structure


def dequantized(weight: Any) -> Tensor:
    return dequantize_4bit(weight.data, weight.quant_state)


def with_weights(plain: Any, model: Any, structure: Structure, read: Any) -> Any:
    """``plain`` with LoRA like that of ``model`` and ``read`` of its quantised weights."""
    other = attach_lora(copy.deepcopy(plain), structure, LoraConfig(rank=3)).eval()
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for key, parameter in other.named_parameters():
            found: Any = theirs[key]
            parameter.copy_(read(found) if is_quantized(found) else found)
    return other


@each_family
def test_a_pass_computes_with_the_dequantised_weights(name: str) -> None:
    plain, model, structure = in_4_bits(name)
    assert all(is_quantized(module.base_layer.weight) for _, _, module in linears_of(model, structure))
    expected = logits_of(with_weights(plain, model, structure, dequantized), padded_sample())
    torch.testing.assert_close(logits_of(model, padded_sample()), expected, rtol=1e-4, atol=1e-5)
    assert (expected - logits_of(with_weights(plain, model, structure, dense), padded_sample())).abs().max() > 0.01


@each_family
def test_a_cut_is_made_of_the_originals_and_quantised_anew(name: str) -> None:
    plain, model, structure = in_4_bits(name)
    kept = [dict(layer) for layer in random_plan(structure, 3).kept]
    kept[1] = {"kv_group": (), "ffn": ()}  # a whole layer goes
    plan = Plan.of(structure, kept)
    other = with_weights(plain, model, structure, dense)
    cut(model, structure, plan)
    cut(other, structure, plan)
    for key, parameter in model.named_parameters():
        assert torch.equal(dense(parameter), other.get_parameter(key)), key
        if is_quantized(parameter):
            assert torch.equal(dequantized(parameter), dequantized(quantize(other.get_parameter(key), "cpu")))
    merged, expected = merge_lora(unquantized(model)), merge_lora(other)
    assert [*merged.state_dict()] == [*expected.state_dict()]
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in merged.state_dict().items())
    assert torch.equal(logits_of(merged, padded_sample()), logits_of(expected, padded_sample()))


def test_originals_that_wait_are_cut_where_lora_computes() -> None:
    model, structure = random_model("llama", rank=4)
    for _, _, module in linears_of(model, structure):
        for factors in (module.lora_A, module.lora_B):
            factors.to("meta")  # in place of a GPU
    cut(model, structure, Plan.of(structure, [{"kv_group": [0], "ffn": [0, 2]} for _ in structure.layers]))
    for _, row, module in linears_of(model, structure):
        assert module.base_layer.weight.is_meta, row.path
    assert not model.get_input_embeddings().weight.is_meta


def test_a_weight_in_4_bits_takes_another_value_and_gives_it_back() -> None:
    torch.manual_seed(0)
    original, other = torch.randn(2, 96, 64)
    weight: Any = quantize(original, "cpu")
    before = [tensor.clone() for tensor in held(weight)]
    put(weight, other)
    assert torch.equal(dequantized(weight), dequantized(quantize(other, "cpu")))
    assert torch.equal(dense(weight), original)
    put_back(weight, before)
    assert torch.equal(dequantized(weight), dequantized(quantize(original, "cpu")))
    put_original(weight, other)
    assert torch.equal(dense(weight), other)
    assert torch.equal(dequantized(weight), dequantized(quantize(original, "cpu")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_stay_what_they_are_under_autocast(dtype: torch.dtype) -> None:
    plain, structure = random_model("qwen2")
    model = quantized(copy.deepcopy(plain.to(dtype)), structure, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        logits_of(model, padded_sample())
    for key, parameter in plain.named_parameters():
        if key.endswith("bias"):
            assert torch.equal(model.get_parameter(key), parameter)


def test_a_model_keeps_what_it_computes_in_eval_mode() -> None:
    _, model, structure = in_4_bits("llama")
    before = [[tensor.clone() for tensor in held(module.base_layer.weight)] for _, _, module in linears_of(model, structure)]
    logits_of(model, padded_sample())
    after = [held(module.base_layer.weight) for _, _, module in linears_of(model, structure)]
    assert all(torch.equal(one, two) for a, b in zip(before, after, strict=True) for one, two in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["llama-tied", "phi", "gemma3_text"])
def test_linears_come_for_as_long_as_they_compute(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, structure = in_4_bits(name)
    model = unquantized(model)
    expected, device = logits_of(model, padded_sample()), torch.device("cpu")
    resting = [each.data_ptr() for _, _, module in linears_of(model, structure) for each in module.base_layer.parameters()]
    brought, real = list[int](), Tensor.to

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args == (device,) and tensor.data_ptr() in resting:
            brought.append(tensor.data_ptr())
            return tensor.clone()
        return real(tensor, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", to)
    lent(model, structure, device)
    assert not brought
    assert torch.equal(logits_of(model, padded_sample()), expected)
    assert sorted(brought) == sorted(resting)
    after = [each.data_ptr() for _, _, module in linears_of(model, structure) for each in module.base_layer.parameters()]
    assert after == resting
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (1000, 1000))
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    monkeypatch.setattr("slimtune.models.quantized.lent", lambda *_: "lent")
    assert to_measure(model, structure, torch.device("cuda")) == "lent"
    assert to_measure(model, structure, device) is model


def test_a_device_that_bitsandbytes_knows_no_kernel_for(monkeypatch: pytest.MonkeyPatch) -> None:
    check_bitsandbytes("nf4", "cpu")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", fail)
    with pytest.raises(Exception, match=r"model.quantize=nf4: bitsandbytes cannot quantise on cpu \(no kernel for this\)"):
        check_bitsandbytes("nf4", "cpu")
