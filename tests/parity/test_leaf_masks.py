"""Gradients of leaf masks are the same however the model is run: checkpointing, DDP, FSDP2; and turns alternate."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from gated import random_model
from parity.worker import CHECKPOINTING, WRAPPERS, Alternation
from slimtune.models.surgery import blocks_of, quiet

WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what both ranks recorded."""
    folder = tmp_path_factory.mktemp("ranks")
    paths = [str(Path(__file__).parents[2] / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder)], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    alternation = Alternation(Accelerator(cpu=True), "llama-bias", "none")
    return {**alternation.turns(), "small": alternation.shrink()}


def differences(record: dict[str, Any], reference: dict[str, Any], key: str) -> float:
    """The largest difference over the largest entry."""
    largest = max(float(value.abs().max()) for value in reference[key].values())
    return max(float((record[key][site] - value).abs().max()) for site, value in reference[key].items()) / largest


@pytest.mark.parametrize("name", ["llama-bias", "qwen3", "phi", "gemma2", "gemma3_text"])
def test_checkpointing_changes_nothing(name: str) -> None:
    accelerator = Accelerator(cpu=True)
    plain = Alternation(accelerator, name, "none").turns()
    assert max(float(value.abs().max()) for value in plain["gradients_0"].values()) > 1e-3
    assert differences({"gradients_0": plain["gradients_1"]}, plain, "gradients_0") > 1e-3, "adapt had no effect"
    for checkpointing in CHECKPOINTING[1:]:
        other = Alternation(accelerator, name, checkpointing).turns()
        assert other["losses"] == plain["losses"]
        for key in ("gradients_0", "gradients_1", "lora"):
            assert differences(other, plain, key) <= 1e-7


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_blocks_are_recomputed_when_checkpointing_is_on(checkpointing: str) -> None:
    alternation = Alternation(Accelerator(cpu=True), "llama", checkpointing)
    calls = []
    for block in blocks_of(alternation.model, alternation.structure):
        block.mlp.register_forward_pre_hook(lambda module, args: calls.append(torch.is_grad_enabled()))
    alternation.decide()
    assert len(calls) == (3 if checkpointing == "none" else 6)


def test_leaf_gradients_agree_with_finite_differences() -> None:
    alternation = Alternation(Accelerator(cpu=True), "qwen3", "none")
    alternation.model.double()
    alternation.masks = {site: mask.double() for site, mask in alternation.masks.items()}
    gradients, _ = alternation.decide()
    for site in ((0, "kv_group"), (1, "ffn"), (2, "kv_group")):
        values = []
        for step in (1e-4, -1e-4):
            moved = {key: mask.clone() for key, mask in alternation.masks.items()}
            moved[site][1] += step
            alternation.bank.close(moved)
            with torch.no_grad():
                batch = alternation.parts[0]
                values.append(float(alternation.loss(batch)) / int((batch["labels"][:, 1:] != -100).sum()))
        # cross_entropy_sum computes in fp32, so the difference quotient is good to about 1e-3
        slope = (values[0] - values[1]) / 2e-4
        assert float(gradients[site][1]) == pytest.approx(slope, abs=3e-3)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_ranks_agree_with_one_process(
    wrapper: str, checkpointing: str, rank: int, two_ranks: Path, one_process: dict[str, Any]
) -> None:
    record = torch.load(two_ranks / f"{wrapper}-{checkpointing}-{rank}.pt")
    assert record["losses"] == pytest.approx(one_process["losses"], rel=1e-6)
    assert differences(record, one_process, "gradients_0") <= 1e-6
    # after an AdamW step, which divides by the root of the squared gradient, rounding differences are larger
    assert differences(record, one_process, "gradients_1") <= 1e-5
    assert differences(record, one_process, "lora") <= 1e-5


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_two_ranks_go_on_together_after_a_cut(
    checkpointing: str, rank: int, two_ranks: Path, one_process: dict[str, Any]
) -> None:
    small, expected = torch.load(two_ranks / f"ddp-{checkpointing}-{rank}.pt")["small"], one_process["small"]
    assert small["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert differences(small, expected, "lora") <= 1e-5
    shapes = {name: value.shape for name, value in one_process["lora"].items()}
    assert any(value.shape != shapes[name] for name, value in expected["lora"].items()), "nothing was cut"


def test_quiet_gives_back_what_it_took() -> None:
    model, _ = random_model("phi", rank=2, dropout=0.25, attention_dropout=0.5, resid_pdrop=0.125)
    model.train()
    dropouts = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    attention = model.get_submodule("base_model.model.model.layers.0.self_attn")
    assert set(dropouts.values()) >= {0.25, 0.125}
    with quiet(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))
        assert (attention.attention_dropout, model.training) == (0.0, True)
    assert attention.attention_dropout == 0.5
    assert trained == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert dropouts == {n: module.p for n, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}


def test_a_gate_off_the_models_path_is_an_error() -> None:
    alternation = Alternation(Accelerator(cpu=True), "llama", "none")
    alternation.masks[7, "ffn"] = torch.ones(96)
    with pytest.raises(RuntimeError, match="got no gradient"):
        alternation.decide()
