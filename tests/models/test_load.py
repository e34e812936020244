"""Where models are looked for, and what cannot be loaded together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bases import Bench, write_base
from families import tiny_config
from slimtune.errors import UserError
from slimtune.models import load
from slimtune.models.identity import fingerprint
from slimtune.models.load import (
    attach_lora,
    check_attention,
    load_config,
    load_model,
    load_tokenizer,
    locate,
    structure_of,
    without_flash,
)
from slimtune.sections import LoraConfig, ModelConfig


def test_a_mistyped_path_beside_a_folder_never_reaches_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("models/nope") == ("models/nope", False)
    (tmp_path / "models").mkdir()
    with pytest.raises(UserError, match=r"model.path='builtin:nope' is not shipped .* it has builtin:base-10m"):
        locate("builtin:nope")
    with pytest.raises(UserError, match=r"model.path='models/nope' does not exist; give a model folder"):
        locate("models/nope")


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"has no tokenizer files; .*model\.tokenizer="):
        load_tokenizer(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize(("tokenizer", "expected"), [(None, ("org/base", "v1")), ("org/other", ("org/other", None))])
def test_a_revision_is_that_of_the_model_it_stands_beside(
    tokenizer: str | None, expected: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def from_pretrained(location: str, *, revision: str | None, **_: object) -> None:
        asked.append((location, revision))

    monkeypatch.setattr(load.AutoTokenizer, "from_pretrained", from_pretrained)
    load_tokenizer(ModelConfig(path="org/base", revision="v1", tokenizer=tokenizer))
    assert asked == [expected]


@pytest.mark.parametrize(("device", "installed"), [("cpu", True), ("cuda:0", False)])
def test_flash_attention_that_cannot_run_is_named(device: str, installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "is_flash_attn_2_available", lambda: installed)
    with pytest.raises(UserError, match=rf"flash_attention_2 needs .*{device}.* flash-attn: pip install .*attention=sdpa"):
        check_attention(ModelConfig(attention="flash_attention_2"), device)
    check_attention(ModelConfig(attention="sdpa"), device)
    monkeypatch.setattr(load, "is_flash_attn_2_available", lambda: True)
    check_attention(ModelConfig(attention="flash_attention_2"), "cuda:0")


def test_a_model_of_flash_attention_is_compared_on_cpu_without_it(bench: Bench) -> None:
    model = load_model(ModelConfig(path=bench.base), "cpu", torch.float32)
    ids = torch.arange(8)[None]
    expected = model(input_ids=ids).logits
    model.config._attn_implementation_internal = "flash_attention_2"
    assert torch.equal(without_flash(model)(input_ids=ids).logits, expected)


def test_perplexity_sees_through_lora_what_attention_a_model_has(bench: Bench) -> None:
    model = load_model(ModelConfig(path=bench.base), "cpu", torch.float32)
    tuned = attach_lora(model, structure_of(model.config), LoraConfig(rank=2))
    assert tuned.config._attn_implementation == model.config._attn_implementation == "sdpa"


def test_under_autocast_lora_computes_the_same_without_casting_its_inputs(bench: Bench) -> None:
    ids, labels = torch.arange(8)[None], torch.arange(8)
    found = []
    for autocast in (False, True):
        model = load_model(ModelConfig(path=bench.base), "cpu", torch.bfloat16)
        torch.manual_seed(0)
        tuned = attach_lora(model, structure_of(model.config), LoraConfig(rank=2), autocast)
        factors = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
        for parameter in factors:
            torch.nn.init.normal_(parameter, std=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = tuned(input_ids=ids).logits
        torch.nn.functional.cross_entropy(logits[0].float(), labels).backward()
        found.append([logits, *(parameter.grad for parameter in factors)])
    assert factors[0].dtype is torch.float32
    assert all(torch.equal(cast, uncast) for cast, uncast in zip(*found, strict=True))
    with pytest.raises(RuntimeError, match="dtype"):  # the flag did something: outside autocast the types clash
        tuned(input_ids=ids)


@pytest.mark.parametrize(("layers", "expected"), [(6, "ssffff"), (4, "ssff"), (8, "sfsfsfsf")])
def test_a_model_drawn_with_other_depth_keeps_the_kinds_of_its_layers(tmp_path: Path, layers: int, expected: str) -> None:
    kinds = ["sliding_attention"] * 2 + ["full_attention"] * 4
    config = tiny_config("gemma2", num_hidden_layers=6)
    config.layer_types = kinds
    config.save_pretrained(tmp_path)
    drawn = load_config(ModelConfig(path=str(tmp_path), init="config", config={"num_hidden_layers": layers}))
    found = "".join(kind[0] for kind in drawn.layer_types)
    assert found == expected  # more layers than were stored: the family's own pattern
    assert len(structure_of(drawn).layers) == layers


def test_a_fingerprint_reads_weights_all_over(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", intermediate_size=4000)
    model = ModelConfig(path=str(base))
    file = base / "model.safetensors"
    whole = file.read_bytes()
    assert len(whole) > 2 * 1024 * 1024
    first = fingerprint(model, load_config(model))
    assert fingerprint(model, load_config(model)) == first
    for start in (len(whole) // 3, 2 * len(whole) // 3):  # a tensor of 64 KiB
        file.write_bytes(whole[:start] + bytes(2**16) + whole[start + 2**16 :])
        assert fingerprint(model, load_config(model)) != first
    file.write_bytes(whole)
    config = base / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()), indent=7))  # the same model
    (base / "training_args.bin").write_bytes(b"of a trainer")
    assert fingerprint(model, load_config(model)) == first
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 0.5}))
    assert fingerprint(model, load_config(model)) != first


def test_the_folder_of_a_run_names_its_model(bench: Bench, tmp_path: Path) -> None:
    write_base(tmp_path / "run" / "model")
    with pytest.raises(
        UserError, match=r"has no config\.json; give a Hugging Face model folder: did you mean '.*/run/model'\?"
    ):
        locate(str(tmp_path / "run"))


def test_a_tokenizer_without_its_parts_is_told(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    (Path(base) / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot be loaded \(.*\); check the folder's files"):
        load_tokenizer(ModelConfig(path=str(base)))
