"""Numbers as block characters: a line of small bars for a curve, taller bars for layers beside one another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII = ".:-=+*#@"
"""For where blocks cannot be written."""
GONE = "░"
_FAR = 8
"""Largest over smallest number beyond which their logarithms are drawn."""


def means(values: Sequence[float], most: int) -> list[float]:
    """At most ``most`` numbers: the means of as many stretches of about the same length."""
    count = len(values)
    if count <= most:
        return list(values)
    ends = [count * place // most for place in range(most + 1)]
    return [sum(values[first:last]) / (last - first) for first, last in itertools.pairwise(ends)]


def spark(values: Sequence[float], ascii_only: bool = False) -> str:
    """A character a number, from the lowest to the highest of them; all the same are of middle height.

    Numbers that are far apart go by their logarithms, as perplexities do before and after a model is tuned.
    """
    blocks = ASCII if ascii_only else BLOCKS
    if min(values, default=0.0) > 0 and max(values) > _FAR * min(values):
        values = [math.log(value) for value in values]
    low, high = min(values, default=0.0), max(values, default=0.0)
    if high <= low:
        return blocks[len(blocks) // 2] * len(values)
    return "".join(blocks[round((value - low) / (high - low) * (len(blocks) - 1))] for value in values)


def bars(parts: Sequence[float], height: int = 1, width: int = 1, ascii_only: bool = False) -> list[str]:
    """Lines, from the top, of bars that are ``height`` characters high where a part is 1.

    Args:
        parts: 0 to 1; nothing but a 0 has no bar. What is missing to 1 is shaded, a character or more of it.
        width: characters from a bar to the next; the last of several is left free.
    """
    blocks = ASCII if ascii_only else BLOCKS
    eighths = [min(8 * height, max(1, math.floor(8 * height * part + 0.5))) if part > 0 else 0 for part in parts]
    lines = []
    for row in range(height - 1, -1, -1):
        line = ""
        for count in eighths:
            level = min(8, max(0, count - 8 * row))
            sign = blocks[level - 1] if level else " " if ascii_only else GONE
            line += (sign * max(1, width - 1)).ljust(width)
        lines.append(line)
    return lines
