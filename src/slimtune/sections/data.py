"""Where rows come from and how they are divided."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from slimtune.section import Section
from slimtune.sections.bounds import Count, Fraction, Positive


class Source(Section):
    """Where rows come from. A plain string stands for ``{path: string}``."""

    path: str
    """A file (jsonl, json, csv, parquet, txt; also .gz/.xz/.bz2), ``builtin:python-docs`` or a hub id ``org/name``."""
    name: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    separator: str | None = None
    """For .txt: the line that divides documents (default: the whole file is one document)."""
    text: str | None = None
    """Template of a plain-text row, e.g. ``"{title}\\n{body}"``."""
    prompt: str | None = None
    """Template of the prompt, e.g. ``"Question: {question}\\nAnswer:"``; goes with ``completion``."""
    completion: str | None = None
    """Template of the completion."""
    choices: tuple[str, ...] = ()
    """Templates of all possible completions, e.g. ``[" yes", " no", " maybe"]``; the row's own must be one of them. A test
    source with choices has an accuracy (rows that carry ``choices`` and ``label`` themselves have one without this key)."""
    label: str | None = None
    """Template of the index of the right choice, e.g. ``"{answer}"``; stands with ``choices`` instead of ``completion``."""
    messages: str | None = None
    """Name of the field that holds a list of ``{role, content}``."""
    rows: Positive | None = None
    """Read at most this many rows."""


def _as_sources(value: Any) -> Any:
    if value is None:  # data.valid=null takes a file of the recipe away again
        return ()
    items = value if isinstance(value, (list, tuple)) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_sources)]


class DataConfig(Section):
    """Rows of text, prompt/completion or chat messages, and how they are divided."""

    train: Sources = ()
    """Rows to tune on."""
    decision: Sources = ()
    """Rows the pruning decision is learned on; default: a part of ``train`` chosen by hash."""
    valid: Sources = ()
    """Rows for figures during the run; default: a part of ``train`` chosen by hash."""
    test: Sources = ()
    """Rows for the figures of the summary; default: a part of ``train`` chosen by hash."""
    decision_fraction: Fraction = 0.1
    """Part of ``train`` taken for decisions when ``decision`` is empty."""
    valid_fraction: Fraction = 0.02
    """Part of ``train`` taken for validation when ``valid`` is empty."""
    test_fraction: Fraction = 0.05
    """Part of ``train`` taken for the test when ``test`` is empty."""
    on_overlap: Literal["error", "drop"] = "error"
    """When a row stands in two splits, or one to learn from is nearly one of test, valid or protect: stop, or keep it in
    the first of test, valid, protect, decision, train alone."""
    protect: Sources = ()
    """Rows of evaluations that come later, e.g. the test files of tasks: kept from being learned, not measured. The rows of
    ``evaluate.tasks`` are so without being named here."""
    ngram: Count = 13
    """Rows are compared by their runs of this many words (case and punctuation do not count); 0: only for being the same."""
    ngram_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """A train or decision row is nearly a held-out one from this part of the runs of either on; so it is with its prompt."""
    max_length: Positive = 512
    """Tokens in a window or example."""
    on_long: Literal["error", "truncate", "drop"] = "error"
    """When a prompt/completion or chat example exceeds ``max_length`` (plain text is windowed instead)."""
    packing: bool = True
    """Put several examples into one window (they do not attend to one another)."""
    answer_only: bool = True
    """Loss on completions and assistant turns only. No effect on plain text."""
