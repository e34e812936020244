"""YAML files that people write: what is wrong with one is told in a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from slimtune.errors import UserError


class Loader(yaml.SafeLoader):
    """YAML as it is meant: a key that stands twice in a mapping is an error, not the last of them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path, kind: str, example: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: the file is missing, not YAML, not a mapping, or has a key twice; ``kind`` says in it what the file is, and
            ``example`` what a path may look like.
    """
    file = Path(path)
    if not file.is_file():
        why = "is a folder; give" if file.is_dir() else "does not exist; give"
        raise UserError(f"{kind} {str(path)!r} {why} the path of a YAML file, e.g. {example}")
    try:
        raw = yaml.load(file.read_text(encoding="utf-8"), Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{kind} {str(path)!r} is not valid YAML: {told(error)}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{kind} {str(path)!r} must be a mapping of keys to values, not {type(raw).__name__}")
    return raw


def told(error: Exception) -> str:
    """What is wrong, and of a condition without quotes (``accuracy: >= 0.9``) how to mend it."""
    text = str(error)
    bare = "while scanning a block scalar" in text or "found character '>'" in text
    return f"{text}; a condition that begins with > needs quotes: '>= 0.95 x dense'" if bare else text
