"""One run, all that can be made of it: whatever reads it writes the same tokens as the run's folder in torch."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import slimtune
from bases import Bench, metrics, plan_of, write_base
from cuts import UNEVEN, cut_model, logits_of
from pieces import PREPEND, tokenizer_json
from slimtune.export.gguf_run import run as in_llama_cpp
from slimtune.export.greedy import continued
from slimtune.export.huggingface import save
from slimtune.sections import ModelConfig

ALONE = Path(__file__).with_name("alone.py")
TEXTS = ["the doctor sees", " a nurse calls  her brother", "Die Straße 12 im Süden", "my neighbour</s>the pilot\n"]
TOKENS = 10
pytestmark = pytest.mark.usefixtures("forked")
FOLDERS = {
    # target, form -> class, whether it is transformers' own
    "hf": ("transformers", "SlimtuneLlamaForCausalLM", False),
    "hf-uniform": ("transformers", "LlamaForCausalLM", True),
    "vllm": ("transformers", "SlimtuneLlamaForCausalLM", False),
    "vllm-deci": ("deci", "DeciLMForCausalLM", False),
}


class Made(NamedTuple):
    """A run, and what its folder gives in torch: ids of ``TEXTS``, ``TOKENS`` greedy ones after each, chances of the first."""

    out: Path
    ids: list[list[int]]
    tokens: list[list[int]]
    logprobs: list[torch.Tensor]


def made_by(bench: Bench, out: Path, **overrides: Any) -> Made:
    slimtune.tune(bench.recipe(out, export__verify=True, **overrides))
    model: Any = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    with torch.no_grad():
        logprobs = [model(torch.tensor([row])).logits[0, -1].log_softmax(-1) for row in ids]
    tokens = [continued(model, row, TOKENS) for row in ids]
    assert len({token for row in tokens for token in row}) > 3
    return Made(out, ids, tokens, logprobs)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    found = Bench(tmp_path_factory.mktemp("targets"))
    write_base(Path(found.base), num_hidden_layers=2)  # tracing for ONNX takes seconds by the layer
    return found


@pytest.fixture(scope="module")
def made(bench: Bench) -> Made:
    """Five steps, and widths by layer as the run decides."""
    made = made_by(bench, bench.folder / "run", search__steps=3, recover__steps=2)
    assert len([row for row in metrics(made.out) if "adapt_loss" in row]) == 5
    assert not plan_of(made.out).is_uniform
    return made


def said(warm: Any, folders: list[Path]) -> dict[str, Any]:
    """What ``alone.py`` tells of them, by name."""
    done = warm.run([sys.executable, "-P", str(ALONE), json.dumps([list(map(str, folders)), TEXTS, TOKENS])])
    assert done.returncode == 0, done.stderr
    return {Path(folder).name: found for folder, found in json.loads(done.stdout.strip().splitlines()[-1]).items()}


def test_every_folder_writes_the_same_without_slimtune(made: Made, warm: Any) -> None:
    for name, (form, kind, _) in FOLDERS.items():
        found = slimtune.export_model(made.out, name.removesuffix("-deci"), form=form)
        assert (Path(found["file"]).name, found["class"]) == (f"model-{name}", kind)
        assert found["tokens_same"] == found["tokens"]
    written = said(warm, [made.out / "model", *(made.out / f"model-{name}" for name in FOLDERS)])
    for name, (_, kind, stock) in {"": FOLDERS["hf"], **FOLDERS}.items():
        found = written[f"model-{name}".rstrip("-")]
        assert found["class"] == kind
        assert found["module"].startswith("transformers." if stock else "transformers_modules.")
        assert (found["ids"], found["tokens"]) == (made.ids, made.tokens), name
        assert found["static"] == made.tokens[0], name
        assert found["same_text"], name  # of transformers.pipeline
    for name in ("", *FOLDERS):
        assert slimtune.verify_export(made.out / f"model-{name}".rstrip("-"))["ok"], name


def test_a_tokenizer_of_another_class_by_the_folders_name_reads_the_same(warm: Any, tmp_path: Path) -> None:
    """A Mistral's files may name LlamaTokenizer, which transformers passes over, but not for one with widths by layer."""
    (base := tmp_path / "base").mkdir()
    (base / "config.json").write_text('{"model_type": "mistral"}')
    (base / "tokenizer.json").write_text(json.dumps(tokenizer_json(PREPEND)))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    (base / "tokenizer_config.json").write_text(json.dumps(named))
    model, plan = cut_model("mistral", UNEVEN, vocab_size=1024)
    save(model, ModelConfig(path=str(base)), plan, tmp_path / "model", None, {})
    found = said(warm, [tmp_path / "model"])["model"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert found["class"] == "SlimtuneMistralForCausalLM"
    assert found["ids"] == [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_llama_cpp_writes_the_same(made: Made, kind: str) -> None:
    """It splits the texts itself. With fewer bits its tokens may be others, and their chances are near."""
    exported = slimtune.export_model(made.out, "gguf", quantize=kind.upper())
    assert exported["file"] == str(made.out / f"model-{kind}.gguf")
    assert exported["bytes"] == Path(exported["file"]).stat().st_size
    assert exported["tokens_same"] == exported["tokens"] == 96 or kind == "q8_0"
    ran = in_llama_cpp(Path(exported["file"]), TEXTS, TOKENS, top=320)
    assert ran.read == list(map(len, made.ids))
    assert all(len(row) == TOKENS for row in ran.tokens)
    assert ran.tokens == made.tokens or kind == "q8_0"
    for found, expected in zip(ran.logprobs, made.logprobs, strict=True):
        differences = [abs(expected[token].item() - value) for token, value in found.items()]
        assert max(differences) < (1e-3 if kind == "f32" else 0.2)
    assert slimtune.verify_export(exported["file"])["ok"]


def test_onnxruntime_writes_the_same(made: Made) -> None:
    exported = slimtune.export_model(made.out, "onnx")
    assert exported["tokens_same"] == exported["tokens"]
    session = pytest.importorskip("onnxruntime").InferenceSession(Path(exported["file"]) / "model.onnx")
    for row, expected in zip(made.ids, made.tokens, strict=True):
        ids = torch.tensor([row])
        for _ in range(TOKENS):
            given = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
            logits = session.run(["logits"], given)[0][:, -1]
            logits[:, 0] = float("-inf")  # no end, as in the others
            ids = torch.cat([ids, torch.from_numpy(logits).argmax(-1, keepdim=True)], 1)
        assert ids[0, len(row) :].tolist() == expected
    assert slimtune.verify_export(exported["file"])["ok"]


def test_the_folder_takes_lora_again(made: Made) -> None:
    """A step on its own texts, merged, and saved as a folder that loads."""
    model: Any = AutoModelForCausalLM.from_pretrained(made.out / "model", dtype=torch.float32)
    ids = torch.tensor([made.ids[0]])
    before = logits_of(model.eval(), ids)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([each for each in tuned.parameters() if each.requires_grad], lr=0.05)
    for _ in range(2):  # the first moves B alone, which begins at zero
        optimizer.zero_grad()
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    after = logits_of(tuned.eval(), ids)
    assert (after - before).abs().max() > 0.01
    tuned.merge_and_unload().save_pretrained(made.out.parent / "again")
    again = AutoModelForCausalLM.from_pretrained(made.out.parent / "again").eval()
    assert type(again).__name__ == "SlimtuneLlamaForCausalLM"
    assert (logits_of(again, ids) - after).abs().max() < 1e-4


@pytest.mark.parametrize(("bits", "least"), [(8, 0.999), (4, 0.9)])
def test_the_folder_loads_quantised(made: Made, bits: int, least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    # its kernel for processors with bf16 products wants rows by the 32, which one head of a model this small has not
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    kind = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    how = {"device_map": {"": "cpu"}, "dtype": torch.float32}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it computes in 16 bits, and says so
        model: Any = AutoModelForCausalLM.from_pretrained(made.out / "model", quantization_config=kind, **how).eval()
        assert type(model.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
        found = logits_of(model, torch.tensor([made.ids[0]]))[0, -1].log_softmax(-1)
        assert len(continued(model, made.ids[0], TOKENS)) == TOKENS
    assert torch.corrcoef(torch.stack([found.float(), made.logprobs[0]]))[0, 1] > least


def test_lora_alone_merged_into_an_uncut_model(bench: Bench, warm: Any) -> None:
    made = made_by(bench, bench.folder / "finetuned", method="finetune", train__steps=5)
    exported = slimtune.export_model(made.out, "hf")
    found = said(warm, [Path(exported["file"])])["model-hf"]
    assert (found["class"], found["ids"], found["tokens"]) == ("LlamaForCausalLM", made.ids, made.tokens)
    assert slimtune.verify_export(exported["file"])["ok"]
    base: Any = AutoModelForCausalLM.from_pretrained(bench.base)
    assert [continued(base, row, TOKENS) for row in made.ids] != made.tokens  # it was tuned
