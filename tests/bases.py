"""A tiny base model with its own tokenizer, a file of sentences, and recipes on them: a whole run takes a second or two."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from slimtune.data.batches import load_splits
from slimtune.evaluate.perplexity import perplexity
from slimtune.models.load import load_config, load_tokenizer, structure_of
from slimtune.pipeline import tune
from slimtune.recipe import Recipe, parse
from slimtune.runtime import Metrics, RunFolder
from slimtune.structure.plan import Plan
from slimtune.train import loop
from slimtune.train.progress import Progress
from slimtune.train.session import Session, make_accelerator

VOCABULARY = 320
_WORDS = {
    "who": ("the doctor", "a nurse", "the old baker", "my neighbour", "the pilot", "a student"),
    "does": ("sees", "calls", "helps", "teaches", "follows", "answers"),
    "whom": ("the child", "a friend", "the driver", "her brother", "the judge", "a farmer"),
    "where": ("at home", "in the garden", "by the river", "near the school", "on the train"),
    "when": ("today", "at night", "in spring", "after lunch", "on Monday"),
}
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


def sentences(count: int, seed: int = 0) -> list[str]:
    """Distinct sentences over a small vocabulary."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(rng.choice(words) for words in _WORDS.values()) + "."] = None
    return list(found)


def make_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``VOCABULARY`` tokens with end and padding, and a beginning token if asked for."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["</s>", "<pad>", *(["<s>"] if bos else [])],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(200), trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    named = {"eos_token": "</s>", "pad_token": "<pad>", **({"bos_token": "<s>"} if bos else {})}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def write_base(folder: Path, model_type: str = "llama", **overrides: Any) -> Path:
    """A random base model and its tokenizer, as a Hugging Face folder."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**TINY, **overrides})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_rows(file: Path, rows: list[dict[str, Any]]) -> str:
    """A jsonl file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


class Bench:
    """The base, the data, and recipes on them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.base = str(write_base(folder / "base"))
        self.texts = write_rows(folder / "texts.jsonl", [{"text": text} for text in sentences(300)])

    def recipe(self, out: Path | str, **overrides: Any) -> Recipe:
        """Four search and four recovery steps; ``overrides`` are ``section__key=value``."""
        raw: dict[str, Any] = {
            "out": str(out),
            "device": "cpu",
            "model": {"path": self.base},
            "data": {
                "train": self.texts,
                "decision_fraction": 0.2,
                "valid_fraction": 0.1,
                "test_fraction": 0.1,
                "max_length": 32,
            },
            "budget": {"keep": 0.7, "ffn_multiple": 1},
            "lora": {"rank": 4},
            "generator": {"width": 16, "heads": 2, "depth": 1, "lr": 0.01, "prior": "none", "prior_steps": 2},
            "search": {"steps": 4},
            "recover": {"steps": 4},
            "train": {"batch": 4, "lr": 2e-3, "steps": 6, "threads": 1, "precision": "float32"},
            "evaluate": {"batch": 32, "windows": 32},
            "export": {"verify": False},
        }
        for name, value in overrides.items():
            section, _, key = name.partition("__")
            if key:
                raw[section] = {**raw.get(section, {}), key: value}
            else:
                raw[section] = value
        return parse(raw)


@torch.no_grad()
def verify_here(folder: Path, input_ids: torch.Tensor, expected: torch.Tensor) -> float:
    """``export.verify`` without its fresh process, which takes longer than a tiny run: for what is read, not for who reads."""
    how: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **how).eval()
    return float((model(input_ids=input_ids).logits - expected).abs().max())


@contextmanager
def kept_as_killed(places: Iterable[tuple[str, str, int]]) -> Iterator[None]:
    """Keep what a kill after each of ``places`` (stage, phase, step) would leave of ``out`` in ``killed`` of that place."""
    real, wanted = loop._run_step, frozenset(places)

    def run_step(session: Session, phase: loop.Phase, step: int) -> None:
        real(session, phase, step)
        if (place := (session.stage, phase.name, step)) in wanted:
            shutil.copytree(session.recipe.out, killed(session.recipe.out, *place))

    loop._run_step = run_step
    try:
        yield
    finally:
        loop._run_step = real


def killed(out: Path | str, stage: str, phase: str, step: int) -> Path:
    """The folder of ``kept_as_killed``, beside ``out``."""
    return Path(out).with_name(f"{Path(out).name}-{stage}-{phase}-{step}")


def metrics(out: Path | str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without their times."""
    lines = (Path(out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if not key.endswith("seconds")} for line in lines]


def losses(out: Path | str, key: str = "adapt_loss") -> list[float]:
    """One figure of every step that has it."""
    return [row[key] for row in metrics(out) if key in row]


def session_of(bench: Bench, out: Path, **overrides: Any) -> Session:
    """The session the pipeline would make, for tests that look inside a method."""
    recipe = bench.recipe(out, **overrides)
    folder = RunFolder(out)
    structure = structure_of(load_config(recipe.model))
    need = frozenset({"train", "decision", "valid", "test"})
    splits = load_splits(recipe.data, load_tokenizer(recipe.model), need)

    def figures(model: torch.nn.Module) -> dict[str, float]:
        return perplexity(model, splits.valid, 32, 32, torch.device("cpu"))

    return Session(
        recipe, make_accelerator(recipe), structure, splits, folder, Metrics(folder), Progress(), valid_figures=figures
    )


def plan_of(out: Path) -> Plan:
    """The Plan of a run's exported model."""
    return Plan.from_json((out / "model" / "plan.json").read_text(encoding="utf-8"))


def stored_shapes(out: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the written weights."""
    with safe_open(out / "model" / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def made_once(
    bench: Bench, factory: pytest.TempPathFactory, kinds: dict[str, dict[str, Any]], fresh: tuple[str, ...] = (), **common: Any
) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Runs by kind, each made when it is first asked for: folder and summary.

    Args:
        fresh: kinds whose model is read again in a process of its own, not here.
    """
    done: dict[str, tuple[Path, dict[str, Any]]] = {}

    def get(kind: str) -> tuple[Path, dict[str, Any]]:
        if kind not in done:
            out = factory.mktemp(kind) / "out"
            with pytest.MonkeyPatch.context() as patch:
                if kind not in fresh:
                    patch.setattr("slimtune.delivery.verify", lambda folder, ids, expected: verify_here(folder, ids, expected))
                done[kind] = out, tune(bench.recipe(out, **{**common, "export__verify": True, **kinds[kind]}))
        return done[kind]

    return get
