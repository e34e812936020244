"""What a table of all figures says besides where some models have experts: what a token uses, and how evenly they are used."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from slimtune.comparison.rows import Row
from slimtune.comparison.stats import Board

USED, SHARES, COVERED = "used of blocks", "expert shares", "covered"
LEGEND = (
    f"{USED}: the part of the blocks' parameters that a token uses (M params has what is stored); {SHARES}: of its layer's "
    "choices on validation rows, the least and the most of any expert and seed, in units of an even share; "
    f"{COVERED}: MLP channels that are in some expert"
)


def columns(board: Board) -> list[str]:
    """None where no model has experts."""
    return [USED, SHARES, COVERED] if any("active_ratio" in row for row in board.rows) else []


def cells(rows: Sequence[Row]) -> list[str]:
    """Of the rows of one method and budget, one a seed."""
    parts = [row.get("active_ratio", row.get("block_ratio")) for row in rows]
    used = [part for part in parts if part is not None]
    covered = [row["coverage"] for row in rows if row.get("coverage") is not None]
    least, most = ([row[key] for row in rows if row.get(key) is not None] for key in ("least_share", "most_share"))
    return [
        f"{mean(used):.1%}" if used else "",
        f"{min(least):.2f} to {max(most):.2f}" if least and most else "",
        f"{mean(covered):.1%}" if covered else "",
    ]
