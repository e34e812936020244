"""Long texts in pieces: what a perplexity is measured on, and what the guard holds rows to learn from against."""

from __future__ import annotations

PIECE = 4000
"""Characters of text in one row of a perplexity: about a thousand tokens, so that models with different windows are
compared on the same text, and an interval can be made of many pieces."""


def pieces(text: str, size: int = PIECE) -> list[str]:
    """``text`` in parts of at most ``size`` characters: broken at a line's end, else before a space, else anywhere."""
    found = []
    while len(text) > size:
        line, word = text.rfind("\n", size // 2, size), text.rfind(" ", size // 2, size)
        end = line + 1 if line >= 0 else word if word >= 0 else size
        found.append(text[:end])
        text = text[end:]
    return [*found, text] if text else found
