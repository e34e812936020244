"""Tokenizers made here: byte-level BPE over one sentence, with or without BOS, padding and a chat template."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCE = "user: what is it? assistant: it is fine. yes no answer question system be brief héllo "


def make_tokenizer(bos: bool = True, pad: bool = True, trim: bool = True, chat_template: str | None = None) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SENTENCE * 20], trainer)
    steps = [processors.ByteLevel(trim_offsets=trim)]
    if bos:
        steps.append(processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]))
    tokenizer.post_processor = processors.Sequence(steps)
    specials = {"bos_token": "<s>", "eos_token": "</s>", **({"pad_token": "<pad>"} if pad else {})}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **specials)


@pytest.fixture(scope="session")
def tokenizer_with() -> Callable[..., Any]:
    return make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """With BOS and padding, without a chat template."""
    return make_tokenizer()
