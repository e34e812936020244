from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from slimtune.data.prompts import Encoded, encode_examples, encode_texts, pad_id, special_prefix
from slimtune.data.sources import Row
from slimtune.errors import UserError

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}"
    "{% generation %} {{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %} {{ m.content }}{% endif %}\n{% endfor %}"
)
# As Qwen3: only the last assistant turn keeps its thoughts.
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and loop.last %}[think]{% endif %}{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = Row(
    messages=(
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "what is it?"},
        {"role": "assistant", "content": "it is fine."},
        {"role": "user", "content": "yes?"},
        {"role": "assistant", "content": "no "},
    ),
    origin="chat.jsonl:1",
)


def one(row: Row, tokenizer: Any, **options: Any) -> Encoded:
    (found,) = encode_examples([row], tokenizer, **options)
    return found


def shown(encoded: Encoded, tokenizer: Any) -> tuple[str, str]:
    """The whole row and its targets, as text."""
    return tokenizer.decode(encoded.ids), tokenizer.decode(encoded.ids[encoded.target])


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("trim", [True, False])
def test_an_example_learns_its_completion_and_eos_only(tokenizer_with: Callable[..., Any], bos: bool, trim: bool) -> None:
    tokenizer = tokenizer_with(bos=bos, trim=trim)
    encoded = one(Row(prompt="question: what is it?", completion=" it is\n fine "), tokenizer)
    start = "<s>" if bos else ""
    assert shown(encoded, tokenizer) == (start + "question: what is it? it is\n fine </s>", " it is\n fine </s>")
    assert encoded.prefix == int(bos)
    assert tokenizer.decode(encoded.ids[: encoded.head]) == start + "question: what is it?"


def test_answer_only_off_learns_everything(tokenizer: Any) -> None:
    encoded = one(Row(prompt="question", completion=" yes"), tokenizer, answer_only=False)
    assert encoded.target.all()
    assert 1 < encoded.head < len(encoded)


def test_the_border_is_tokenised_as_in_running_text(tokenizer: Any) -> None:
    encoded = one(Row(prompt="it is fi", completion="ne."), tokenizer)
    joined = tokenizer("it is fine.")["input_ids"]
    assert encoded.ids.tolist() == [*joined, tokenizer.eos_token_id]
    assert shown(encoded, tokenizer)[1] == " fine.</s>"  # the straddling token belongs to the completion


def test_multi_byte_characters_split_over_tokens(tokenizer: Any) -> None:
    encoded = one(Row(prompt="é", completion="日本"), tokenizer)
    assert shown(encoded, tokenizer) == ("<s>é日本</s>", "日本</s>")


@pytest.mark.parametrize(("prompt", "completion"), [("<s>question", " yes"), ("question", " yes</s>"), ("<s>q", " a</s>")])
def test_bos_and_eos_in_the_text_are_not_doubled(tokenizer: Any, prompt: str, completion: str) -> None:
    encoded = one(Row(prompt=prompt, completion=completion), tokenizer)
    assert encoded.ids.tolist().count(tokenizer.bos_token_id) == 1
    assert encoded.ids.tolist().count(tokenizer.eos_token_id) == 1
    assert encoded.prefix == 1
    assert encoded.target[-1]


def test_texts_get_bos_and_eos_once(tokenizer: Any, tokenizer_with: Callable[..., Any]) -> None:
    rows = [Row(text="it is"), Row(text="<s>it is</s>")]
    assert [tokenizer.decode(ids) for ids in encode_texts(rows, tokenizer)] == ["<s>it is</s>"] * 2
    bare = tokenizer_with(bos=False)
    assert bare.decode(next(encode_texts(rows[:1], bare))) == "it is</s>"
    assert special_prefix(tokenizer) == [tokenizer.bos_token_id]
    assert special_prefix(bare) == []


def test_chat_by_prefixes_learns_assistant_turns_with_their_end(tokenizer_with: Callable[..., Any]) -> None:
    tokenizer = tokenizer_with(chat_template=CHATML)
    encoded = one(CHAT, tokenizer)
    whole, learned = shown(encoded, tokenizer)
    assert whole == tokenizer.apply_chat_template(list(CHAT.messages or ()), tokenize=False)
    assert learned == "it is fine.</s>no</s>"
    assert encoded.ids.tolist().count(tokenizer.bos_token_id) == 1
    assert encoded.prefix == 1


def test_chat_whose_template_rewrites_earlier_turns(tokenizer_with: Callable[..., Any]) -> None:
    tokenizer = tokenizer_with(chat_template=FORGETFUL)
    assert shown(one(CHAT, tokenizer), tokenizer)[1] == "it is fine.</s>[think]no </s>"


@pytest.mark.parametrize("trim", [True, False])
def test_chat_with_generation_marks(tokenizer_with: Callable[..., Any], trim: bool) -> None:
    tokenizer = tokenizer_with(chat_template=MARKED, trim=trim)
    encoded = one(CHAT, tokenizer)
    assert shown(encoded, tokenizer)[1] == " it is fine.</s> no </s>"
    assert encoded.ids.tolist().count(tokenizer.bos_token_id) == 1


def test_chat_without_a_template_gets_role_lines(tokenizer: Any) -> None:
    whole, learned = shown(one(CHAT, tokenizer), tokenizer)
    assert whole == ("<s>system: be brief\nuser: what is it?\nassistant: it is fine.\nuser: yes?\nassistant: no \n</s>")
    assert learned == " it is fine.\n no \n</s>"
    assert not one(Row(messages=(CHAT.messages or ())[:2]), tokenizer).target.any()


def test_chats_and_examples_stay_in_order(tokenizer_with: Callable[..., Any]) -> None:
    tokenizer = tokenizer_with(chat_template=MARKED)
    found = list(encode_examples([Row(prompt="q", completion=" yes"), CHAT, Row(prompt="q", completion=" no")], tokenizer))
    learned = [shown(encoded, tokenizer)[1] for encoded in found]
    assert learned == [" yes</s>", " it is fine.</s> no </s>", " no</s>"]


def test_a_chat_the_template_refuses_names_its_origin(tokenizer_with: Callable[..., Any]) -> None:
    tokenizer = tokenizer_with(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match=r"chat.jsonl:1: .*refuses this chat: roles must alternate"):
        one(CHAT, tokenizer)
    tokenizer = tokenizer_with(chat_template="{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    with pytest.raises(UserError, match=r"chat.jsonl:1: the chat template rewrites"):
        one(CHAT, tokenizer)


def test_a_slow_tokenizer_is_refused_for_examples() -> None:
    class Slow:
        is_fast = False
        name_or_path = "old"

    with pytest.raises(UserError, match="'old' has no fast version"):
        one(CHAT, Slow())


def test_tokenizer_and_vocabulary_are_untouched(tokenizer_with: Callable[..., Any]) -> None:
    tokenizer = tokenizer_with(pad=False, chat_template=MARKED)
    before = (tokenizer.backend_tokenizer.to_str(), dict(tokenizer.special_tokens_map), len(tokenizer))
    list(encode_examples([CHAT, Row(prompt="q", completion="a")], tokenizer))
    list(encode_texts([Row(text="it")], tokenizer))
    assert pad_id(tokenizer) == tokenizer.eos_token_id
    assert (tokenizer.backend_tokenizer.to_str(), dict(tokenizer.special_tokens_map), len(tokenizer)) == before


def test_padding_id_falls_back_to_eos_then_zero(tokenizer: Any) -> None:
    class Nothing:
        pad_token_id = None
        eos_token_id = None

    assert pad_id(tokenizer) == tokenizer.pad_token_id == 2
    assert pad_id(Nothing()) == 0
