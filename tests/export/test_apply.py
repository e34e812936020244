"""A run's model from its base, the plan and the adapter, bit for bit; and from the plan alone."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import slimtune
from bases import Bench, plan_of, verify_here, write_base
from slimtune import delivery
from slimtune.cli import app
from slimtune.export import huggingface
from slimtune.methods.teacher import Teacher
from slimtune.models.surgery import merge_lora

METHODS: dict[str, dict[str, Any]] = {
    "atp": {"compensate": {"weights": "decide"}, "model__dtype": "bfloat16"},
    "plain": {"compensate": {"weights": "none"}, "lora__alpha": 3.7},
    "finetune": {"method": "finetune", "train__steps": 3},
    "flap": {"method": "twostage", "twostage": {"scores": "flap", "batches": 2, "compensate": True}, "recover": {"steps": 2}},
    "dropped": {
        "method": "twostage",
        "twostage": {"scores": "layer_drop", "batches": 2},
        "budget": {"keep": 0.6, "tolerance": 0.09},
    },
}


def run(words: list[str]) -> Any:
    return CliRunner().invoke(app, ["apply", *words])


@pytest.fixture(scope="module")
def tuned(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("apply")
    slimtune.tune(bench.recipe(folder / "run", **METHODS["atp"]))
    return folder


def same_files(one: Path, other: Path) -> None:
    names = sorted(
        path.name for path in one.iterdir() if path.suffix != ".md" and path.name not in ("plan.json", "verify.json")
    )
    assert names == sorted(path.name for path in other.iterdir() if path.suffix != ".md" and path.name != "plan.json")
    assert [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()] == []


@pytest.mark.parametrize("name", METHODS)
def test_the_same_bits(name: str, bench: Bench, tmp_path: Path, tuned: Path) -> None:
    out = tuned / "run"
    if name != "atp":
        out = tmp_path / "run"
        slimtune.tune(bench.recipe(out, **METHODS[name]))
    found = slimtune.apply_plan(out / "plan.json", bench.base, out=tmp_path / "again")
    assert found["same"]
    same_files(out / "model", tmp_path / "again")
    assert (out / "adapter" / "changed.safetensors").is_file() == (name in ("atp", "flap"))
    assert plan_of(out).digest == slimtune.Plan.from_json((tmp_path / "again" / "plan.json").read_text()).digest
    told = (out / "adapter" / "adapter_config.json").read_text() + (out / "adapter" / "apply.json").read_text()
    assert str(Path(bench.base).parent) not in told


def test_one_model_is_held_while_it_is_handed_over(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []
    teachers: list[Any] = []
    handed: list[Any] = []
    real, stay, measured = huggingface.save, Teacher.stay, delivery._measured

    def save(model: Any, *rest: Any, **more: Any) -> Any:
        written.append({parameter.dtype for parameter in model.parameters()})
        assert [each for each in teachers if each() is not None] == []  # the uncut model is gone
        handed.append(weakref.ref(model))
        return real(model, *rest, **more)

    def remember(teacher: Teacher, *rest: Any) -> None:
        stay(teacher, *rest)
        teachers.append(weakref.ref(teacher.model))

    def measure(*rest: Any) -> Any:
        assert {parameter.device.type for parameter in handed[-1]().parameters()} == {"meta"}
        return measured(*rest)

    monkeypatch.setattr(huggingface, "save", save)
    monkeypatch.setattr(Teacher, "stay", remember)
    monkeypatch.setattr(delivery, "_measured", measure)
    monkeypatch.setattr(delivery, "verify", verify_here)
    model, distill = {"path": bench.base, "dtype": "bfloat16"}, {"weight": 1.0, "recover": True}
    recipe = bench.recipe(tmp_path / "run", model=model, distill=distill, export={"dtype": "bfloat16", "verify": True})
    summary = slimtune.tune(recipe)
    assert len(teachers) == 1
    assert summary["reload_difference"] < 1e-4  # it computes in fp32, as the fresh process does
    assert slimtune.apply_plan(tmp_path / "run", bench.base, out=tmp_path / "again")["same"]
    assert written == [{torch.bfloat16}] * 2  # fp32 would be twice the memory


def test_the_adapter_is_one_of_peft(bench: Bench, tuned: Path, tmp_path: Path) -> None:
    slimtune.apply_plan(tuned / "run", bench.base, use_adapter=False, out=tmp_path / "cut")
    cut: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=torch.float32)
    for each in cut.parameters():  # as they rested in training
        each.data = each.data.to(torch.bfloat16).float()
    changed = load_file(tuned / "run" / "adapter" / "changed.safetensors")
    assert all(name.endswith(("o_proj.weight", "down_proj.weight")) for name in changed)
    cut.load_state_dict(changed, strict=False)
    theirs = PeftModel.from_pretrained(cut, str(tuned / "run" / "adapter")).merge_and_unload()
    ours: Any = AutoModelForCausalLM.from_pretrained(tuned / "run" / "model", dtype=torch.float32)
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_merge_is_that_of_peft_and_needs_no_order() -> None:
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(700, 600, bias=False))
    tuned = get_peft_model(model, LoraConfig(r=8, lora_alpha=3, target_modules=["0"]))
    layer: Any = tuned.base_model.model[0]
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    before, left, right = (
        each.weight.detach().clone() for each in (layer.base_layer, layer.lora_B["default"], layer.lora_A["default"])
    )
    expected = (before.double() + 3 / 8 * (left.double() @ right.double())).float()
    whole = merge_lora(tuned).get_submodule("0").weight.detach()
    assert (whole != before).any()
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-6)
    exact = before.double()
    total = sum((left[:, [rank]].double() * right[[rank]].double() for rank in range(8)), torch.zeros(600, 700).double())
    assert torch.equal(whole, (exact + total * (3 / 8)).float())


def test_words_and_json(bench: Bench, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run([str(tuned / "run"), bench.base])
    assert done.exit_code == 0, done.output
    assert "those of the run, bit for bit" in done.stdout
    assert (tmp_path / f"base-{plan_of(tuned / 'run').digest[:8]}" / "config.json").is_file()
    done = run([str(tuned / "run" / "model"), bench.base, "--no-adapter", "--json", "--out", "cut"])
    found = json.loads(done.stdout)
    assert (found["adapter"], found["same"], found["file"]) == (None, None, "cut")
    assert found["parameters"] == sum(each.numel() for each in load_file(tmp_path / "cut" / "model.safetensors").values())


def test_another_base_is_told(bench: Bench, tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(bench.base, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["model.embed_tokens.weight"][0, 0] += 1
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    done = run([str(tuned / "run"), str(tmp_path / "other"), "--out", str(tmp_path / "no")])
    assert done.exit_code == 2
    assert "gives other weights than the run wrote, so it is not the 'base' that was tuned" in " ".join(done.stderr.split())
    assert not (tmp_path / "no").exists()
    write_base(tmp_path / "wide", num_hidden_layers=2)
    done = run([str(tuned / "run"), str(tmp_path / "wide"), "--out", str(tmp_path / "no")])
    assert done.exit_code == 2
    assert "the plan was made for" in done.stderr


BAD = {
    "no plan": (["{run}/nowhere", "{base}"], "is no plan.json and no folder that has one"),
    "not a plan": (["{run}/run/summary.json", "{base}"], "this is not a plan.json of slimtune"),
    "no base": (["{run}/run", "{base}x"], "BASE='{base}x' does not exist"),
    "no adapter": (["{run}/alone", "{base}"], "no adapter lies beside '{run}/alone/plan.json'; give it with --adapter FOLDER"),
    "not an adapter": (["{run}/run", "{base}", "--adapter", "{base}"], "is no adapter that slimtune tune wrote"),
    "both": (["{run}/run", "{base}", "--adapter", "x", "--no-adapter"], "exclude each other; give one of them"),
    "binary": (["{base}/model.safetensors", "{base}"], "this is no text; give the plan.json that a run wrote"),
    "pruned": (["{run}/run", "{run}/run/model"], "is pruned already; give the model that the plan was made for"),
    "types": (["{run}/types", "{base}"], "(apply.json: types float99 and bfloat16)"),
    "revision": (["{run}/run", "{base}", "--revision", "v2"], "--revision v2 is for a hub id, and BASE='{base}' is a folder"),
    "out": (["{run}/run", "{base}", "--out", "{run}"], "holds other files than a model (no config.json)"),
    "cut short": (["{run}/broken", "{base}", "--out", "{run}/no"], "is missing or not the file that the run wrote"),
    "model of the run": (["{run}/run", "{base}", "--out", "{run}/run/model"], "is the model of the run '{run}/run'; choose"),
}


@pytest.mark.parametrize(("words", "told"), BAD.values(), ids=BAD)
def test_bad_words_are_told_in_one_line(bench: Bench, tuned: Path, words: list[str], told: str) -> None:
    (tuned / "alone").mkdir(exist_ok=True)
    shutil.copyfile(tuned / "run" / "plan.json", tuned / "alone" / "plan.json")
    if not (tuned / "broken").exists():
        shutil.copytree(tuned / "run" / "adapter", tuned / "broken")
        (tuned / "broken" / "adapter_model.safetensors").write_bytes(b"\x08")

    if not (tuned / "types").exists():
        shutil.copytree(tuned / "run" / "adapter", tuned / "types")
        record = json.loads((tuned / "types" / "apply.json").read_text())
        (tuned / "types" / "apply.json").write_text(json.dumps({**record, "base_dtype": "float99", "dtype": "bfloat16"}))

    def filled(text: str) -> str:
        return text.replace("{run}", str(tuned)).replace("{base}", bench.base)

    done = run([filled(word) for word in words])
    assert done.exit_code == 2, done.output
    assert filled(told) in " ".join(done.stderr.split())
    assert len(done.stderr.strip().splitlines()) <= 3
    assert not (tuned / "no").exists()
