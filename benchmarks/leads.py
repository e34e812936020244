"""What the leads in files of rows come to together: beyond what each cell of the table says for itself.

    python benchmarks/leads.py docs/results/retention.json [OTHER.json ...]

Of the first file: each rival over all texts and budgets, in pairs of the same seed, which leads stand when all tests are
held to 5% together (one-sided paired t-tests, Holm 1979), and what leads there are in the tasks that dense LoRA learned. Of the
others: what they have of the same method, budget and seed, minus the first file's figure, the leads of their ATP on the first
file's rivals, and, where they have other seeds, ATP's leads over the seeds of both; names are compared, not what a method's
words were. Needs scipy (``slimtune[eval]`` brings it).
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from scipy.stats import ttest_1samp

from slimtune.comparison.rows import Row, key_of, read
from slimtune.comparison.stats import OURS, PPL, boards

LEVEL = 0.05


def together(rows: list[Row]) -> list[str]:
    """A line for each rival: how often ATP is ahead, and by what part of its perplexity in the mean."""
    parts: dict[str, list[float]] = {}
    for board in boards(rows):
        for method in board.methods:
            for keep in board.keeps:
                ours = board.of(OURS, keep)
                found = [lead / ours[seed] for seed, lead in board.lead(method, keep).items()]
                parts.setdefault(method, []).extend(found)
    return [
        f"{method}: ahead in {sum(part > 0 for part in found)} of {len(found)} pairs, {statistics.mean(found):+.2%}"
        for method, found in sorted(parts.items())
        if method != OURS and found
    ]


def holm(rows: list[Row]) -> list[str]:
    """A line for each lead, the surest first, with whether it stands among all of them."""
    found = []
    for board in boards(rows):
        for method in board.methods:
            for keep in board.keeps:
                lead = list(board.lead(method, keep).values())
                if method != OURS and len(lead) > 1:
                    chance = float(ttest_1samp(lead, 0.0, alternative="greater").pvalue)
                    found.append((chance, f"{board.domain} {keep:g} {method}"))
    lines, stands = [], True
    for index, (chance, name) in enumerate(sorted(found)):
        bound = LEVEL / (len(found) - index)
        stands = stands and chance <= bound
        lines.append(f"{'stands' if stands else '-':6s}  p {chance:.4f}, bound {bound:.4f}  {name}")
    return lines


def learned(rows: list[Row]) -> list[str]:
    """A line for each rival: what ATP is ahead by, seed by seed, above chance in the tasks that dense LoRA learned."""
    lines = []
    for board in boards(rows):
        for method, keep in board.seeds:
            ours = board.learned_gain(OURS, keep)
            found = [ours[seed] - value for seed, value in board.learned_gain(method, keep).items() if seed in ours]
            if method != OURS and found:
                lines.append(f"{board.domain} {keep:g} {method}: {', '.join(f'{lead:+.3f}' for lead in found)}")
    return lines


def crossed(rows: list[Row], other: list[Row]) -> list[str]:
    """A line for each rival in ``rows``: what the ATP of ``other`` is ahead of it by, mean and standard deviation."""
    mixed = [row for row in rows if row["method"] != OURS] + [row for row in other if row["method"] == OURS]
    return [
        f"{board.domain} {keep:g} {method}: {statistics.mean(lead):+.3f} ± {statistics.stdev(lead):.3f}"
        for board in boards(mixed)
        for method in board.methods
        for keep in board.keeps
        if method != OURS and len(lead := list(board.lead(method, keep).values())) > 1
    ]


def again(rows: list[Row], other: list[Row]) -> list[str]:
    """A line for each run that both files have: the other's perplexity minus the first's, and whether the same units stayed."""
    first = {key_of(row): row for row in rows if row["metric"] == PPL}
    lines = []
    for row in other:
        mine = first.get(key_of(row)) if row["metric"] == PPL else None
        if mine is not None:
            same = "the same" if row.get("plan") == mine.get("plan") else "other"
            _, domain, method, keep, seed = key_of(row)
            lines.append(f"{domain} {keep:g} {method} seed {seed}: {row['value'] - mine['value']:+.3f}, {same} units")
    return lines


def pooled(rows: list[Row], other: list[Row]) -> list[str]:
    """A line for each rival of which ``other`` has seeds that ``rows`` lacks: ATP's lead over the seeds of both."""
    had = {key_of(row) for row in rows}
    fresh = [row for row in other if key_of(row) not in had]
    before = {(board.domain, method, keep): board.lead(method, keep) for board in boards(rows) for method, keep in board.seeds}
    lines = []
    for board in boards([*rows, *fresh]):
        for method, keep in board.seeds:
            lead = list(board.lead(method, keep).values())
            if method != OURS and len(lead) > max(1, len(before.get((board.domain, method, keep), {}))):
                figures = f"{statistics.mean(lead):+.3f} ± {statistics.stdev(lead):.3f}"
                lines.append(f"{board.domain} {keep:g} {method}: {figures} over {len(lead)} seeds")
    return lines


def moved(rows: list[Row], other: list[Row]) -> list[str]:
    """A line for each text: the other's perplexity minus the first's, in the mean over the runs that are not the same."""
    first = {key_of(row): row for row in rows if row["metric"] == PPL}
    found: dict[str, list[float]] = {}
    for row in other:
        same = first.get(key_of(row)) if row["metric"] == PPL else None
        if same and same["value"] != row["value"]:
            found.setdefault(row["domain"], []).append(row["value"] - same["value"])
    return [f"{domain}: {statistics.mean(apart):+.3f} over {len(apart)} runs" for domain, apart in found.items()]


def main() -> None:
    """Print all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("others", type=Path, nargs="*")
    given = parser.parse_args()
    rows = read(given.rows)
    tests = holm(rows)
    print("\n".join([*together(rows), "", f"{sum(line.startswith('stands') for line in tests)} of {len(tests)} stand", *tests]))
    if scores := learned(rows):
        print("\n".join(["", "atp minus the rival in what dense LoRA learned, seed by seed", *scores]))
    for file in given.others:
        other = read(file)
        print("\n".join(["", f"{file} against {given.rows}", *again(rows, other), "", *moved(rows, other)]))
        if lines := pooled(rows, other):
            print("\n".join(["", f"what atp is ahead by on the seeds of both, {given.rows} and {file}", *lines]))
        print("\n".join(["", f"atp of {file} against the rivals of {given.rows}", *crossed(rows, other)]))


if __name__ == "__main__":
    main()
