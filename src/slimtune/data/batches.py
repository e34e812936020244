"""Splits of a run: rows divided by hash, guarded against overlap, tokenised once; and the order they are visited in."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from slimtune.data.overlap import apart, told
from slimtune.data.prompts import ASSISTANT, Encoded, encode_examples, encode_texts, pad_id
from slimtune.data.sources import Row, read_counted
from slimtune.data.windows import Windows
from slimtune.errors import UserError
from slimtune.sections import DataConfig

__all__ = ["Order", "Splits", "Windows", "divide", "fit", "guard", "load_splits", "place"]

SPLITS = ("test", "valid", "decision", "train")
"""By precedence: a row that stands in two of them stays in the first."""
PRECEDENCE = ("test", "valid", "protect", "decision", "train")
"""The same with the rows of other evaluations, which are no split: they are only kept from being learned."""
ALL = frozenset(SPLITS)


@dataclass(frozen=True)
class Splits:
    """What a run trains on and is measured on. A split that was not asked for is empty.

    Attributes:
        train: windows to tune on.
        decision: windows the pruning decision is learned on; disjoint from the others, as all are.
        valid: windows for figures during the run.
        test: windows for the figures of the summary.
        rows: number of rows in each split, before long examples are dropped.
        choice_rows: rows of the test split that carry ``choices`` and ``label``.
        notes: counts worth telling, e.g. ``{"train.empty": 3, "train.overlap": 12, "train.near": 5, "test.long": 1}``.
        in_train: per cent of the word n-grams of test and valid that stand anywhere in the train rows.
    """

    train: Windows
    decision: Windows
    valid: Windows
    test: Windows
    rows: dict[str, int] = field(default_factory=dict)
    choice_rows: list[Row] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    in_train: dict[str, float] = field(default_factory=dict)

    @property
    def summary(self) -> dict[str, dict[str, Any]]:
        """What summary.json tells of the data."""
        percent = {name: round(value, 2) for name, value in self.in_train.items()}
        return {"rows": {**self.rows, **self.notes}, "ngrams_in_train_percent": percent}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all token ids and targets: whether a resumed run reads what the interrupted one read."""
        return self._digest(*SPLITS)

    @property
    def fingerprints(self) -> dict[str, str]:
        """The same of each split that has windows: which of them two runs have in common."""
        return {name: self._digest(name) for name in SPLITS if len(getattr(self, name))}

    def _digest(self, *names: str) -> str:
        digest = hashlib.sha256()
        for name in names:
            windows: Windows = getattr(self, name)
            for array in (windows.ids, windows.target, windows.offsets):
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def load_splits(config: DataConfig, tokenizer: Any, need: frozenset[str] = ALL) -> Splits:
    """Read, divide, guard and tokenise.

    Held-out rows never train: whenever train or decision data is asked for, validation, test and protected rows and
    those nearly the same are taken out of it, needed or not.

    Raises:
        UserError: a source cannot be read, train or decision data is missing or empty, splits overlap, or an example is
            too long (see ``DataConfig.on_overlap`` and ``on_long``).
    """
    notes: Counter[str] = Counter()
    rows = divide(config, need, notes)
    in_train: dict[str, float] = {}
    if config.ngram and need & {"train", "decision"}:
        rows, in_train = apart(rows, config, notes)
    windows = {name: _windows(name, rows[name] if name in need else [], config, tokenizer, notes) for name in SPLITS}
    for name in ("train", "decision"):
        if name in need and not windows[name].targets:
            _check_roles(name, rows[name])
            raise UserError(_nothing_to_learn(name, len(rows[name]), config, notes))
    unlabelled = sum(row.choices is not None and row.label is None for row in rows["test"])
    notes.update({"test.outside_accuracy": unlabelled} if unlabelled else {})
    return Splits(
        **windows,
        rows={name: len(rows[name]) for name in SPLITS if name in need},
        choice_rows=[row for row in rows["test"] if row.choices is not None and row.label is not None],
        notes=dict(notes),
        in_train=in_train,
    )


def _nothing_to_learn(name: str, rows: int, config: DataConfig, notes: Mapping[str, int]) -> str:
    counts = "".join(f", {key} {count}" for key, count in notes.items() if key.startswith(name))
    told = f"data.{name} has no token to learn from ({rows} rows{counts}); give "
    if not rows and (left_out := notes.get(f"{name}.overlap", 0) + notes.get(f"{name}.near", 0)):
        return f"{told}rows that stand in no held-out split: {left_out} were left out because they do, or nearly"
    more = f", raise data.decision_fraction={config.decision_fraction}" if name == "decision" else ""
    return f"{told}more rows{more}, raise data.max_length={config.max_length} or change data.on_long/on_overlap"


def _check_roles(name: str, rows: Sequence[Row]) -> None:
    roles = {message["role"] for row in rows for message in row.messages or ()}
    if roles and ASSISTANT not in roles:
        raise UserError(
            f"data.{name}: no message has the role {ASSISTANT!r}, whose words are learned; found {sorted(roles)}. "
            "Rename the role of the answers"
        )


def divide(config: DataConfig, need: frozenset[str], notes: Counter[str]) -> dict[str, list[Row]]:
    """The rows of every split (and of ``protect``), disjoint. ``notes`` gains the counts of empty and overlapping rows."""
    given = {name: getattr(config, name) for name in PRECEDENCE}
    learns = bool(need & {"train", "decision"}) or any(not given[name] for name in need)
    wanted = need | {"test", "valid", "protect"} | ({"train"} if not given["decision"] else set()) if learns else need
    from_train = [(name, getattr(config, f"{name}_fraction")) for name in SPLITS[:3] if name in wanted and not given[name]]
    if not given["train"] and ("train" in need or any(name in need for name, _ in from_train)):
        raise UserError("data.train is empty; name a file, e.g. data.train=train.jsonl, or builtin:python-docs")
    if sum(share for _, share in from_train) >= 1:
        parts = " + ".join(f"data.{name}_fraction={share}" for name, share in from_train)
        raise UserError(f"{parts} leaves nothing of data.train; lower the fractions or give the splits their own files")
    rows: dict[str, list[Row]] = {name: [] for name in PRECEDENCE}
    for name in PRECEDENCE:
        for source in given[name] if name in wanted else ():
            found, empty = read_counted(source)
            notes.update({f"{name}.empty": empty} if empty else {})
            for row in found:
                rows[place(row.key, from_train) if name == "train" else name].append(row)
    return guard(rows, config.on_overlap, notes)


def place(key: str, shares: Sequence[tuple[str, float]]) -> str:
    """The split of a train row: the share its hash falls into, else ``train``. Depends on the key, not on other rows.

    Example: shares test 0.05, valid 0.02 own the hash ranges [0, 0.05) and [0.05, 0.07).
    """
    point = int(key[:16], 16) / 2**64
    end = 0.0
    for name, share in shares:
        end += share
        if point < end:
            return name
    return "train"


def guard(rows: Mapping[str, list[Row]], on_overlap: Literal["error", "drop"], notes: Counter[str]) -> dict[str, list[Row]]:
    """Rows of each split without those that stand in one of higher precedence (test, valid, protect, decision, train).

    Raises:
        UserError: with ``on_overlap="error"``, if there is one.
    """
    owner: dict[str, tuple[str, Row]] = {}
    kept: dict[str, list[Row]] = {}
    clashes: list[tuple[str, Row, str, Row]] = []
    for name in PRECEDENCE:
        kept[name] = []
        for row in rows[name]:
            first, twin = owner.setdefault(row.key, (name, row))
            if first == name:
                kept[name].append(row)
            elif name != "protect":  # that an evaluation's row is measured here as well is no harm
                clashes.append((name, row, first, twin))
                notes[f"{name}.overlap"] += 1
    if clashes and on_overlap == "error":
        name, row, first, twin = clashes[0]
        raise UserError(
            f"{len(clashes)} rows stand in two splits, e.g. {row.origin} (data.{name}) is the same as {twin.origin} "
            f"({told(first)}); set data.on_overlap=drop to keep such rows in the held-out split only, or remove them"
        )
    return kept


def _windows(name: str, rows: list[Row], config: DataConfig, tokenizer: Any, notes: Counter[str]) -> Windows:
    texts = [row for row in rows if row.text is not None]
    others = [row for row in rows if row.text is None]
    examples = fit(name, others, encode_examples(others, tokenizer, config.answer_only), config, notes)
    streams = encode_texts(texts, tokenizer) if texts else ()
    return Windows.build(streams, examples, config.max_length, pad_id(tokenizer), config.packing)


def fit(name: str, rows: Sequence[Row], examples: Iterable[Encoded], config: DataConfig, notes: Counter[str]) -> list[Encoded]:
    """Examples of at most ``config.max_length`` tokens, those with nothing to predict left out (and counted).

    Raises:
        UserError: with ``on_long="error"``, if one is longer; it names the first, their number and the longest.
    """
    kept: list[Encoded] = []
    long: list[tuple[Row, int]] = []
    for row, example in zip(rows, examples, strict=True):
        if len(example) > config.max_length:
            long.append((row, len(example)))
            if config.on_long != "truncate":
                continue
            example = _truncated(example, config.max_length)
        if example.target[1:].any():
            kept.append(example)
        else:
            notes[f"{name}.no_answer"] += 1
    if long and config.on_long == "error":
        row, length = long[0]
        longest = max(length for _, length in long)
        raise UserError(
            f"{row.origin}: {length} tokens exceed data.max_length={config.max_length} (as do {len(long) - 1} more "
            f"rows of data.{name}; the longest has {longest}); set data.max_length={longest}, or data.on_long=truncate "
            "(cuts the prompt from the left), or data.on_long=drop"
        )
    notes.update({f"{name}.long": len(long)} if long else {})
    return kept


def _truncated(example: Encoded, max_length: int) -> Encoded:
    """The prompt cut from the left (BOS stays), the answer whole; an answer longer than the window loses its end."""
    cut = min(len(example) - max_length, example.head - example.prefix)
    keep = np.r_[0 : example.prefix, example.prefix + cut : len(example)][:max_length]
    return Encoded(example.ids[keep], example.target[keep], example.prefix, example.head - cut)


class Order:
    """The endless order of ``n`` items: a fresh permutation each epoch, a pure function of (seed, position)."""

    def __init__(self, n: int, seed: int):
        if n < 1:
            raise UserError(f"nothing to order: {n} windows; give data with at least one window")
        self.n = n
        self.seed = seed
        self._epoch = -1
        self._permutation: NDArray[np.int64] = np.zeros(0, np.int64)

    def indices(self, start: int, count: int) -> list[int]:
        """Items at positions ``start`` ... ``start + count - 1``; a resumed run goes on exactly where it stopped."""
        return [int(self._epoch_of(position // self.n)[position % self.n]) for position in range(start, start + count)]

    def _epoch_of(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.n)
            self._epoch = epoch
        return self._permutation
