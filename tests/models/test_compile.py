"""Compiled blocks: one graph for layers of the same widths, the same numbers, and a run that only trains through them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from bases import Bench, losses, verify_here
from gated import random_model, sample_ids
from slimtune.methods import atp
from slimtune.models import compiled
from slimtune.models.compiled import compile_blocks, compiling
from slimtune.models.load import enable_checkpointing
from slimtune.models.surgery import cut
from slimtune.pipeline import Run, tune
from slimtune.preflight import can_compile
from slimtune.runtime import RunFolder
from slimtune.structure.plan import Plan
from slimtune.train import tuner
from slimtune.train.objective import compiled_cross_entropy

# dynamo looks at .grad of inputs that have none, whatever the program does
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    dynamo.reset()
    dynamo.utils.counters.clear()
    with compiling(True):
        yield
    assert settings() == (8, True, True, True)
    dynamo.reset()


def settings() -> tuple[Any, ...]:
    config: Any = dynamo.config
    static = config.force_parameter_static_shapes, config.force_nn_module_property_static_shapes
    return config.recompile_limit, *static, config.optimize_ddp


def graphs() -> int:
    return int(dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    ("widths", "most", "wanted"),
    [((40, 40, 40), 1, 1), ((40, 33, 80), 3, 3), ((40, 33, 80), 2, 2)],
    ids=["same widths", "a graph each", "one of symbolic widths"],
)
def test_layers_of_the_same_widths_or_of_symbolic_ones_share_a_graph_and_all_compute_the_same(
    widths: tuple[int, ...], most: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward passes of symbolic widths take long to trace: ``benchmarks/compiling.py`` compares their gradients."""
    monkeypatch.setattr(compiled, "MOST_GRAPHS", most)
    model, structure = random_model("llama", rank=4)
    cut(model, structure, Plan.of(structure, [{"kv_group": [0, 1], "ffn": range(width)} for width in widths]))
    enable_checkpointing(model, "non_reentrant")
    model.train()

    def step() -> list[Tensor]:
        model.zero_grad()
        logits = model(input_ids=sample_ids(), use_cache=False).logits
        logits.square().mean().backward()
        return [logits, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]

    expected = step()
    compile_blocks(model, structure, backend="eager")
    found = step()
    assert graphs() == wanted
    assert len(found) == len(expected) > 10
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_more_widths_than_dynamo_would_compile_by_itself() -> None:
    limit = 2
    with dynamo.config.patch(recompile_limit=limit):
        model, structure = random_model("llama", rank=4)
        widths = (40, 33, 80)
        assert len(widths) > limit
        cut(model, structure, Plan.of(structure, [{"kv_group": [0, 1], "ffn": range(width)} for width in widths]))
        compile_blocks(model, structure, backend="eager")
        model(input_ids=sample_ids(), use_cache=False)
        assert graphs() == len(widths)


def test_a_block_stays_one_graph_under_ddp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP's buckets, which LoRA of a large model fills several times a block, would part it."""
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 64)
    model, structure = random_model("llama", rank=4)
    made = []

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return graph

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model, bucket_cap_mb=1e-4)
        compile_blocks(model, structure, backend=backend)
        with dynamo.config.patch(optimize_ddp=True):
            wrapped(input_ids=sample_ids(), use_cache=False)
        parted = len(made)
        dynamo.reset()
        wrapped(input_ids=sample_ids(), use_cache=False)
        assert len(made) - parted == 1
        assert parted > 1, "else this shows nothing"
    finally:
        dist.destroy_process_group()


def test_a_run_compiles_the_cut_model_and_nothing_else(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimtune.pipeline.self_check", lambda config, seed: 0.0)
    monkeypatch.setattr("slimtune.delivery.verify", verify_here)
    tune(bench.recipe(tmp_path / "eager"))
    assert graphs() == 0
    monkeypatch.setattr(atp, "compile_blocks", partial(compile_blocks, backend="eager"))
    monkeypatch.setattr(tuner, "compiled_cross_entropy", partial(compiled_cross_entropy, backend="eager"))
    told = settings()
    tune(bench.recipe(tmp_path / "compiled", train__compile=True))
    assert settings() == told, "those of the process, as they were"
    assert losses(tmp_path / "compiled") == losses(tmp_path / "eager")
    trained = graphs()
    assert trained >= 1
    dynamo.reset()
    summary = tune(bench.recipe(tmp_path / "seen", export__verify=True, train__compile=True, evaluate__every=2))
    assert graphs() == 2 * trained  # none for figures or for the comparison of the written model
    assert summary["reload_difference"] < 1e-4


def test_whether_a_run_compiles_is_decided_once(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run may go on where another answer would be given, and where nothing can be compiled."""
    recipe = bench.recipe(tmp_path)
    assert recipe.train.compile == "auto"
    for pays, can, resume, wanted in ((True, True, False, True), (False, True, True, True), (True, False, True, False)):
        monkeypatch.setattr("slimtune.preflight.compiles", lambda *_, pays=pays: pays)
        monkeypatch.setattr("slimtune.preflight.can_compile", lambda device, can=can: can)
        run = Run(recipe, RunFolder(recipe.out), resume)
        run.check()
        assert run.session("main").recipe.train.compile is run.figures.recipe.train.compile is wanted
        assert ("it is expected to save more time than it takes" in capsys.readouterr().err) is wanted
    assert "compile: auto" in (tmp_path / "recipe.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("all_can", [True, False])
def test_all_processes_compile_or_none(all_can: bool, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run goes on in processes of which one has no compiler."""
    monkeypatch.setattr("slimtune.preflight.compiles", lambda *_: True)
    monkeypatch.setattr("slimtune.preflight.can_compile", lambda device: True)
    run = Run(bench.recipe(tmp_path), RunFolder(tmp_path), resume=False)
    monkeypatch.setattr("slimtune.pipeline.gather_object", lambda own: [*own, all_can])
    run.check()
    assert run.session("main").recipe.train.compile is all_can


@pytest.mark.parametrize("all_pay", [True, False])
def test_what_pays_on_each_of_several_gpus_is_compiled(
    all_pay: bool, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimtune.preflight.compiles", lambda *_: True)
    monkeypatch.setattr("slimtune.pipeline.gather_object", lambda own: [*own, (False, all_pay)])
    assert Run(bench.recipe(tmp_path), RunFolder(tmp_path), resume=False).resolved.train.compile is all_pay


def test_a_run_that_goes_on_spread_goes_on_eager(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimtune.preflight.compiles", lambda *_: True)
    monkeypatch.setattr("slimtune.preflight.can_compile", lambda device: True)
    run = Run(bench.recipe(tmp_path, train__shard="full"), RunFolder(tmp_path), resume=False)
    monkeypatch.setattr("slimtune.pipeline.shards", lambda recipe, accelerator: True)
    run.check()
    assert run.session("main").recipe.train.compile is False


def test_a_kernel_is_made_for_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """As here for a CPU that says it is a GPU: the run must not fail where Triton, a compiler or a header is missing."""
    assert not can_compile(torch.device("cpu"))
    gpu, tried = torch.device("cuda"), []
    ones = torch.ones
    monkeypatch.setattr("slimtune.preflight.torch.ones", lambda count, device: ones(count))

    def compiling_by(outcome: Any) -> None:
        def stand_in(function: Any) -> Any:
            tried.append(function)
            return outcome or function

        monkeypatch.setattr("slimtune.preflight.torch.compile", stand_in)

    compiling_by(None)
    assert can_compile(gpu)
    compiling_by(lambda numbers: [][0])
    assert not can_compile(gpu)
    compiling_by(torch.zeros_like)
    assert not can_compile(gpu), "other numbers"
    assert len(tried) == 3
