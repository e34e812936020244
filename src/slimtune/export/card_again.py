"""The model card of a folder that was written anew from another: what the other's says still holds, but for how it loads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from slimtune.export import card, card_facts
from slimtune.models.identity import weight_bytes
from slimtune.text_file import write_atomically
from slimtune.version import __version__

_SMALL = """\
---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

Written by slimtune {version} from {name}: the same model in another layout.

| fact | value |
| --- | --- |
| parameters | ? |
| weights | ? |

## Loading

## Licence

That of {name}; look it up there before you use or share this model.
"""


def write(source: Path, folder: Path, to: str, facts: Mapping[str, int]) -> None:
    """Write README.md into ``folder``, which was written from ``source``.

    The card of a run's model is taken over, with another section about loading and other figures of size. A card of others is
    not: what it says about files and classes may no longer hold, so a short one names the source.

    Args:
        to: the target that it was written for.
        facts: ``parameters`` and ``parameters_before``, the latter without padding.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    given = source / "README.md"
    text = given.read_text(encoding="utf-8") if given.is_file() else ""
    if "made with slimtune" not in text or "\n## Loading\n" not in text:
        text = _SMALL.format(name=card_facts.public(str(source)), version=__version__)
    zeros = facts["parameters"] - facts["parameters_before"]
    padding = f" ({zeros:,} of them zeros, for layers that are narrower than others)" if zeros else ""
    text = _row(text, "parameters(?: after)?", f"{facts['parameters']:,}{padding}")
    text = _row(text, "weights", str(config.get("dtype")))
    text = _without(text, card.RELOADED)  # the source's figure, of other files
    text = _row(text, "weights on disk", f"{weight_bytes(folder) / 1e6:,.1f} MB")
    section = card.loading(config, (folder / "plan.json").is_file(), to == "vllm", zeros)
    write_atomically(folder / "README.md", _section(text, section))


def _row(text: str, label: str, value: str) -> str:
    return re.sub(rf"^\| ({label}) \| .* \|$", lambda found: f"| {found[1]} | {value} |", text, count=1, flags=re.MULTILINE)


def _without(text: str, label: str) -> str:
    return re.sub(rf"^\| {re.escape(label)} \| .* \|\n", "", text, count=1, flags=re.MULTILINE)


def _section(text: str, section: str) -> str:
    """``text`` with its section of the same title replaced."""
    title = section.splitlines()[0]
    return re.sub(
        rf"^{title}\n.*?(?=^## |\Z)", lambda _: f"{section.rstrip()}\n\n", text, count=1, flags=re.MULTILINE | re.DOTALL
    )
