"""The rows of a task as the harness gets them: prompts of training, cut to the model's window; nothing is templated later."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from slimtune.data.pieces import pieces
from slimtune.data.prompts import special_prefix
from slimtune.data.records import is_hub_id
from slimtune.data.sources import BUILTIN, Row, read_counted
from slimtune.data.windows import spread
from slimtune.errors import UserError
from slimtune.evaluate.choices import answers
from slimtune.evaluate.scoring import Scorer, tried
from slimtune.evaluate.tasks import Split, Task
from slimtune.sections import Source

Doc = dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """A task and its rows for one model.

    Attributes:
        docs: what stands in the rows' file: ``prompt``, ``choices``, ``label``; ``prompt``, ``completion``; or ``prompt``
            (what precedes a text: nothing where the tokenizer adds a beginning token, else end-of-text), ``text``,
            ``tokens``, ``bytes``. For a function of the user's also ``fields``, JSON of what else the record has.
        origin: where they came from.
        sha256: of the rows before they were cut to the model's window.
        whole: the same of all rows of the split, also of those that were not chosen.
        empty: rows without an answer, which were left out (a text without a word is none).
        cut: number of prompts that were cut from the left.
        tokens: most tokens to be written; 0 of a perplexity.
        longest: tokens of the row with the most characters, answer included.
        scorer: the user's function, where the metric is one.
    """

    task: Task
    docs: list[Doc]
    origin: Source
    sha256: str
    whole: str
    empty: int
    cut: int
    tokens: int
    longest: int
    scorer: Scorer | None = None

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    @property
    def source(self) -> str:
        """The file, or the id of the hub's data set."""
        return self.origin.path


class Unread(UserError):
    """None of a task's sources can be had.

    Attributes:
        reason: why not, and what to do, in one line.
    """

    def __init__(self, task: Task, split: Split, reasons: Sequence[str]):
        why = "; ".join(" ".join(reason.split()) for reason in reasons)  # the hub's have several lines
        self.reason = f"its {split} rows cannot be read: {why}. Remedy: {_remedy(task)}"
        super().__init__(f"task {task.name!r}: {self.reason}, or leave the task out")


def _remedy(task: Task) -> str:
    """What to do for rows that are nowhere, as the environment is."""
    file = f"name a file (slimtune evaluate --data {task.name}=FILE)"
    variable = next(iter(task.variables), None)
    if variable is None:
        return file
    folder = os.environ.get(variable)
    if folder is None:
        return f"set {variable} to the folder that holds them, or {file}"
    if Path(folder).expanduser().is_dir():
        return f"{variable}={folder!r} does not hold it: set it to the folder that does, or {file}"
    return f"{variable}={folder!r} is no folder: set it to the one that holds the file, or {file}"


def window_of(config: Any) -> int:
    """Tokens that a model can read at once, as the harness finds it."""
    inner = getattr(config, "text_config", None) or config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if getattr(inner, name, None):
            return int(getattr(inner, name))
    return 2048


def prepare(
    task: Task, split: Split, tokenizer: Any, window: int, limit: int | None = None, max_length: int | None = None
) -> Prepared:
    """Read a task's rows and fit them to the tokenizer and window (tokens) of a model.

    Args:
        limit: at most this many rows, evenly spaced over all; of a perplexity pieces of text.
        max_length: tokens of a prompt and its answer in training, if that is less than the window.

    Raises:
        Unread: no source can be had.
        UserError: a source is damaged, a row is not of the shape that the metric needs, or a function of the user's fails.
    """
    rows, empty, origin = _read(task, split)
    most = min(limit or sys.maxsize, task.file.rows or sys.maxsize)
    if task.file.kind == "perplexity":
        every: list[Doc] = [{"text": text} for text in _texts(rows, task)]
        plain = [every[index] for index in spread(len(every), min(most, len(every)))]
        docs = _text_docs([doc["text"] for doc in plain], tokenizer, window)
        return Prepared(task, docs, origin, _digest(plain), _digest(every), 0, 0, 0, _longest(docs, tokenizer))
    make = _choice_doc if task.file.kind == "choice" else _answer_doc
    every = [make(row, task) for row in rows]
    chosen = spread(len(every), min(most, len(every)))
    plain = [every[index] for index in chosen]
    room = min(window, max_length or window)
    tokens, fit = min(task.file.tokens, room // 2), _fitter(tokenizer, room)
    docs = [fit(doc, tokens) for doc in plain]
    cut = sum(doc["prompt"] != before["prompt"] for doc, before in zip(docs, plain, strict=True))
    scorer = tried(task, docs, [rows[index].origin for index in chosen]) if task.function else None
    longest = _longest(docs, tokenizer)
    return Prepared(task, docs, origin, _digest(plain), _digest(every), empty, cut, tokens, longest, scorer)


def held_out(tasks: Sequence[Task]) -> tuple[Source, ...]:
    """Where the test rows of tasks are, and their validation rows where they have some: what nothing may learn from.

    Raises:
        Unread: the test rows of a task cannot be found.
    """
    found = []
    for task in tasks:
        reasons: list[str] = []
        tests = next(_sources(task, "test", reasons), None)
        if tests is None:
            raise Unread(task, "test", reasons)
        found.append(tests)
        with suppress(UserError):  # a task need not have validation rows
            found += islice(_sources(task, "valid", []), 1)
    return tuple(found)


def _read(task: Task, split: Split) -> tuple[list[Row], int, Source]:
    reasons: list[str] = []
    for source in _sources(task, split, reasons):
        try:
            return *read_counted(source, task.file.join, bool(task.function)), source
        except UserError as error:
            if Path(source.path).is_file():
                raise
            if task.data is not None:
                raise UserError(f"--data {task.name}={task.data}: {error}") from error
            reasons.append(str(error))
    raise Unread(task, split, reasons)


def _sources(task: Task, split: Split, reasons: list[str]) -> Iterator[Source]:
    """Those of a task's sources that are there; ``reasons`` gains why others are not."""
    if task.data is not None:
        yield task.source({**task.file.sources[0], "path": task.data, "splits": {}}, "test")
        return
    for raw in task.file.sources:
        try:
            source = task.source(raw, split)
        except UserError as error:
            if "path" in raw and Path(str(raw["path"])).is_file():
                raise
            reasons.append(str(error))
            continue
        if _there(source):
            yield source
        else:
            folder = Path(source.path).expanduser().is_dir()
            reasons.append(f"{source.path!r} is a folder, not a file" if folder else f"{source.path!r} does not exist")


def _there(source: Source) -> bool:
    return source.path.startswith(BUILTIN) or Path(source.path).expanduser().is_file() or is_hub_id(source.path)


def _choice_doc(row: Row, task: Task) -> Doc:
    if row.prompt is None or not row.choices or row.label is None:
        raise UserError(f"{row.origin}: a row of task {task.name!r} (metric: choice) needs prompt, choices and label")
    choices = answers(row)
    if len(set(choices)) < 2 or not all(choice.strip() for choice in choices):
        raise UserError(
            f"{row.origin}: the choices of a row of task {task.name!r} are {choices}; give two different ones, none empty"
        )
    return {"prompt": row.prompt, "choices": choices, "label": row.label}


def _answer_doc(row: Row, task: Task) -> Doc:
    if row.prompt is None or row.completion is None:
        raise UserError(f"{row.origin}: a row of task {task.name!r} (metric: {task.file.metric}) needs prompt and completion")
    doc = {"prompt": row.prompt, "completion": row.completion}
    if row.record is None:
        return doc
    others = {key: value for key, value in row.record.items() if key not in doc}
    return {**doc, "fields": json.dumps(others, default=str)}  # text: rows need not have the same fields of the same types


def _texts(rows: Sequence[Row], task: Task) -> list[str]:
    for row in rows:
        if row.text is None:
            raise UserError(f"{row.origin}: a row of task {task.name!r} (metric: perplexity) needs text")
    texts = [row.text or "" for row in rows]
    if task.file.join is not None:
        texts = ["".join(text if text.endswith("\n") else text + "\n" for text in texts).removesuffix("\n")]
    return [piece for text in texts for piece in pieces(text) if piece.strip()]


def _text_docs(texts: Sequence[str], tokenizer: Any, window: int) -> list[Doc]:
    """Texts that fit the window with what precedes them, with the tokens and bytes to divide by."""
    before = "" if special_prefix(tokenizer) else tokenizer.eos_token
    if before is None:
        raise UserError("the tokenizer has neither a beginning nor an end token: a text's first token has nothing before it")
    head = len(_ids(before, tokenizer))
    docs: list[Doc] = []
    todo = list(reversed(texts))
    while todo:
        text = todo.pop()
        tokens = len(_ids(before + text, tokenizer)) - head
        if tokens >= window and len(text) > 1:
            todo.extend(reversed(pieces(text, (len(text) + 1) // 2)))
        elif tokens:
            docs.append({"prompt": before, "text": text, "tokens": tokens, "bytes": len(text.encode("utf-8"))})
    return docs


def _fitter(tokenizer: Any, window: int) -> Callable[[Doc, int], Doc]:
    """Cuts prompts from the left, at a token, until they and the longest answer fit; the beginning token stays."""
    prefix = len(special_prefix(tokenizer))

    def fit(doc: Doc, tokens: int) -> Doc:
        longest = max(doc.get("choices", ()), key=lambda choice: len(_ids(choice, tokenizer)), default="")
        answer = len(_ids(longest, tokenizer)) if longest else tokens
        room = window - prefix - answer
        if room < 1:
            raise UserError(
                f"the choice {longest[:60]!r} has {answer:,} tokens, which leaves no room for a prompt in {window:,}; shorten "
                "it, or take a model that reads more"
            )
        prompt = doc["prompt"]
        while tokenizer.is_fast:
            found = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            excess = len(found["input_ids"]) - room
            if excess <= 0:
                break
            start = found["offset_mapping"][min(excess, len(found["input_ids"]) - 1)][0]
            if not start:
                break
            prompt = prompt[start:]
        return {**doc, "prompt": prompt}

    return fit


def _ids(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _longest(docs: Sequence[Doc], tokenizer: Any) -> int:
    def whole(doc: Doc) -> str:
        answers: list[str] = [*doc.get("choices", ()), doc.get("completion", ""), doc.get("text", "")]
        return str(doc["prompt"]) + max(answers, key=len)

    return 1 + len(_ids(max((whole(doc) for doc in docs), key=len, default=""), tokenizer))


def _digest(docs: Sequence[Doc]) -> str:
    digest = hashlib.sha256()
    for doc in docs:
        digest.update(json.dumps(doc, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()
