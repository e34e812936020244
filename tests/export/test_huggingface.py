"""What ``save`` writes, which class it chooses, and that it loads to the same model."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from cuts import UNEVEN, Kept, cut_model, even, generate, logits_of, reference_logits, sample_ids
from families import FAMILY_NAMES
from slimtune.errors import UserError
from slimtune.export import huggingface
from slimtune.export.huggingface import save
from slimtune.models.per_layer import register
from slimtune.sections import ModelConfig
from slimtune.structure.families import FAMILIES
from slimtune.structure.plan import Plan


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def reload(folder: Path, **kwargs: Any) -> Any:
    register()
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


def assert_same(model: Any, folder: Path) -> Any:
    # named, because some versions load gemma2 with an attention that leaves its soft cap out
    loaded = reload(folder, attn_implementation=model.config._attn_implementation)
    ids = sample_ids()
    assert (logits_of(model, ids) - logits_of(loaded, ids)).abs().max() <= 1e-5
    assert generate(loaded, ids) == generate(model, ids)
    return loaded


def stored(folder: Path) -> dict[str, torch.dtype]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {key: tensors.get_tensor(key).dtype for key in tensors.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_uneven_widths_load_as_the_per_layer_class(name: str, tmp_path: Path) -> None:
    model, plan = cut_model(name, UNEVEN)
    model.config.use_cache = False  # as training leaves it
    folder = save(model, None, plan, tmp_path / "out", None, {})
    config = config_of(folder)
    assert config["model_type"] == f"slimtune_{model.config.model_type}"
    assert sorted(config["auto_map"]) == ["AutoConfig", "AutoModel", "AutoModelForCausalLM"]
    assert (config["head_dim"], config["num_attention_heads"], config["intermediate_size"]) == (16, 4, 96)
    assert config["use_cache"]
    assert (folder / "modeling_slimtune.py").is_file()
    assert Plan.from_json((folder / "plan.json").read_text()) == plan
    assert_same(model, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_even_widths_load_as_the_stock_class(name: str, tmp_path: Path) -> None:
    model, plan = cut_model(name, even([1], 40))
    folder = save(model, None, plan, tmp_path / "out", None, {})
    config = config_of(folder)
    assert config["model_type"] == model.config.model_type
    assert config["architectures"] == [type(model).__name__]
    widths = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 40}
    assert widths.items() <= config.items()
    assert not {"auto_map", "per_layer_config"} & set(config)
    assert not (folder / "modeling_slimtune.py").exists()
    assert type(assert_same(model, folder)) is type(model)


# 64 is no multiple of six heads, which some stock configs refuse
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", "mistral"),
        ("llama-tied", "mistral"),
        ("llama-bias", "slimtune_llama"),
        ("mistral", "mistral"),
        ("qwen2", "qwen2"),
        ("granite", "granite"),
        ("gemma", "gemma"),
        ("gemma2", "slimtune_gemma2"),
        ("gemma3_text", "slimtune_gemma3_text"),
    ],
)
def test_head_counts_that_do_not_divide_the_width(name: str, expected: str, tmp_path: Path) -> None:
    wide = {"num_attention_heads": 8, "num_key_value_heads": 4}
    model, plan = cut_model(name, even([0, 1, 3], 96), **wide)
    folder = save(model, None, plan, tmp_path / "out", None, {})
    config = config_of(folder)
    assert config["model_type"] == expected
    if (name, expected) in (("llama", "mistral"), ("llama-tied", "mistral")):
        assert config["sliding_window"] is None
        assert not {"attention_bias", "mlp_bias", "pretraining_tp"} & set(config)
    assert_same(model, folder)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_table_says_which_stock_configs_refuse_head_counts(name: str) -> None:
    keys = {"hidden_size": 64, "num_attention_heads": 5, "num_key_value_heads": 5, "num_hidden_layers": 2, "head_dim": 16}
    if FAMILIES[name].whole_heads or name == "llama":  # mistral stands in for llama
        with pytest.raises(StrictDataclassError, match="hidden size"):
            AutoConfig.for_model(name, **keys)
    else:
        AutoConfig.for_model(name, **keys)


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi", "granite"])
@pytest.mark.parametrize("kept", [UNEVEN, even([1], 40)], ids=["uneven", "even"])
def test_the_size_of_a_head_is_written_when_the_base_leaves_it_out(name: str, kept: Kept, tmp_path: Path) -> None:
    model, plan = cut_model(name, kept, head_dim=None)
    folder = save(model, None, plan, tmp_path / "out", None, {})
    assert config_of(folder)["head_dim"] == 16
    assert_same(model, folder)


def test_llama3_rope_survives_the_change_to_mistral(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    wide = {"num_attention_heads": 8, "num_key_value_heads": 4, "rope_parameters": rope}
    model, plan = cut_model("llama", even([0, 1, 3], 96), **wide)
    folder = save(model, None, plan, tmp_path / "out", None, {})
    assert config_of(folder)["model_type"] == "mistral"
    assert_same(model, folder)


def test_phi_head_norms_need_the_per_layer_class(tmp_path: Path) -> None:
    model, plan = cut_model("phi", even([1], 40), qk_layernorm=True)
    folder = save(model, None, plan, tmp_path / "out", None, {})
    assert config_of(folder)["model_type"] == "slimtune_phi"
    assert_same(model, folder)


def test_an_uncut_plan_is_the_stock_save(tmp_path: Path) -> None:
    model, plan = cut_model("qwen2", None)
    save(model, None, plan, tmp_path / "ours", None, {})
    model.save_pretrained(tmp_path / "stock")
    assert config_of(tmp_path / "ours") == config_of(tmp_path / "stock")
    assert stored(tmp_path / "ours") == stored(tmp_path / "stock")
    assert_same(model, tmp_path / "ours")


@pytest.mark.parametrize("name", ["llama-tied", "gemma"])
def test_tied_weights_are_stored_once(name: str, tmp_path: Path) -> None:
    model, plan = cut_model(name, UNEVEN)
    folder = save(model, None, plan, tmp_path / "out", None, {})
    assert "lm_head.weight" not in stored(folder)
    loaded = reload(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["llama-tied", "phi"])
def test_dtype_is_converted_on_a_copy(name: str, tmp_path: Path) -> None:
    model, plan = cut_model(name, UNEVEN)
    folder = save(model, None, plan, tmp_path / "out", torch.bfloat16, {})
    assert set(stored(folder).values()) == {torch.bfloat16}
    assert config_of(folder)["dtype"] == "bfloat16"
    assert model.dtype == torch.float32
    assert "lm_head.weight" not in stored(folder) or name == "phi"
    expected = reference_logits(model, sample_ids(), torch.bfloat16)
    loaded = reload(folder, dtype=torch.float32)
    assert (expected - logits_of(loaded, sample_ids())).abs().max() <= 1e-5
    assert (expected - logits_of(model, sample_ids())).abs().max() > 1e-4  # rounding is visible here


def test_large_models_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "MAX_SHARD", "60KB")
    model, plan = cut_model("mistral", UNEVEN)
    folder = save(model, None, plan, tmp_path / "out", None, {})
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert (folder / "model.safetensors.index.json").is_file()
    assert_same(model, folder)


def test_tokenizer_files_are_copied_unchanged(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"]
    names += ["tokenizer.model", "spiece.model", "chat_template.jinja", "generation_config.json"]
    for name in names:
        (base / name).write_bytes(b'{"odd":  "sp\xc3\xa4cing"}\r\n')
        (base / name).chmod(0o444)
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_text("old weights")
    model, plan = cut_model("llama", UNEVEN)
    folder = save(model, ModelConfig(path=str(base)), plan, tmp_path / "out", None, {})
    for name in names:
        assert (folder / name).read_bytes() == (base / name).read_bytes()
    assert stored(folder)
    assert config_of(folder)["model_type"] == "slimtune_llama"


def test_generation_settings_are_the_base_s_not_the_tokenizer_s(tmp_path: Path) -> None:
    for name in ("base", "tokenizer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(name)
        (tmp_path / name / "generation_config.json").write_text(f'{{"from": "{name}"}}')
    model, plan = cut_model("llama", UNEVEN)
    origin = ModelConfig(path=str(tmp_path / "base"), tokenizer=str(tmp_path / "tokenizer"))
    folder = save(model, origin, plan, tmp_path / "out", None, {})
    assert (folder / "tokenizer.json").read_text() == "tokenizer"
    assert json.loads((folder / "generation_config.json").read_text()) == {"from": "base"}


@pytest.mark.parametrize(("tokenizer", "revision"), [(None, "v1"), ("org/other", None)])
def test_files_of_a_hub_model_are_those_of_its_revision(
    tokenizer: str | None, revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def fetched(location: str, revision: str | None, allow_patterns: list[str]) -> str:
        for pattern in allow_patterns:
            asked[pattern] = (location, revision)
        return str(tmp_path)

    monkeypatch.setattr(huggingface, "snapshot_download", fetched)
    model, plan = cut_model("llama", UNEVEN)
    save(model, ModelConfig(path="org/base", revision="v1", tokenizer=tokenizer), plan, tmp_path / "out", None, {})
    assert asked["tokenizer*"] == (tokenizer or "org/base", revision)
    assert asked["generation_config.json"] == ("org/base", "v1")


def test_the_base_is_never_replaced(tmp_path: Path) -> None:
    model, plan = cut_model("llama", UNEVEN)
    save(model, None, plan, tmp_path / "base", None, {})
    with pytest.raises(UserError, match="its own base"):
        save(model, ModelConfig(path=str(tmp_path / "base")), plan, tmp_path / "base", None, {})


def test_a_model_that_does_not_fit_its_plan_is_refused(tmp_path: Path) -> None:
    model, _ = cut_model("llama", UNEVEN)
    _, other = cut_model("llama", even([0], 40))
    with pytest.raises(UserError, match=r"layers\.\d.*should be .* and is"):
        save(model, None, other, tmp_path / "out", None, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_old_model(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan = cut_model("llama", UNEVEN)
    folder = save(model, None, plan, tmp_path / "out", None, {})
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def half_written(state: Any, partial: Path, **kwargs: Any) -> None:
        (partial / "model.safetensors").write_bytes(b"half")
        raise failure

    monkeypatch.setattr(huggingface, "save_torch_state_dict", half_written)
    other, uneven = cut_model("qwen2", UNEVEN)
    expected = UserError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        save(other, None, uneven, folder, None, {})
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_earlier_model_is_replaced_as_a_whole(tmp_path: Path) -> None:
    model, plan = cut_model("llama", UNEVEN)
    folder = save(model, None, plan, tmp_path / "out", None, {})
    other, uniform = cut_model("qwen2", even([0], 40))
    save(other, None, uniform, folder, None, {})
    assert config_of(folder)["model_type"] == "qwen2"
    assert not (folder / "modeling_slimtune.py").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
