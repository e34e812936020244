"""Pictures as SVG: drawn by matplotlib, coloured by the style sheet of the page, so that they follow light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import Any

WIDTH = 340
"""Pixels: what fits a telephone at full size; on a wide page pictures stand beside one another."""
INK, FAINT = "#010203", "#0a0b0c"
SERIES = ("#c00001", "#c00002", "#c00003", "#c00004", "#c00005", "#c00006", "#c00007", "#c00008", "#c00009", "#c00010")
"""Stand-ins for the style sheet's colours."""
STYLES: tuple[Any, ...] = (
    "-",
    "--",
    "-.",
    ":",
    (0, (5, 1)),
    (0, (3, 1, 1, 1)),
    (0, (1, 1)),
    (0, (7, 2)),
    (0, (2, 2)),
    (0, (9, 1)),
)
"""Lines, and with ``MARKERS`` points, that do without colour."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\")
LEVEL: dict[str, Any] = {"color": INK, "linewidth": 1.0, "linestyle": (0, (1.5, 2.5))}
"""Of a line that a figure is held to: dots that are seen as such."""
_VARIABLES = {INK: "--ink", FAINT: "--faint", **{name: f"--s{n}" for n, name in enumerate(SERIES, 1)}}
_STYLE: Any = {
    "svg.fonttype": "none",  # text that can be searched, and read aloud
    "svg.hashsalt": "slimtune",
    "font.size": 10.0,
    "axes.titlesize": 10.0,
    "axes.titley": 1.0,  # else matplotlib looks for a place above the ticks, which takes as long as drawing them
    "axes.titlepad": 5.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.0,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.handlelength": 2.4,
    "legend.borderpad": 0.2,
    "path.simplify": True,
    "text.parse_math": False,  # names are names, whatever dollars are in them
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color", "legend.labelcolor", "hatch.color"),
        INK,
    ),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), FAINT),
}


_LETTERS = 26
"""Of a word along the y axis: with more there is no room for a picture."""


@dataclass(frozen=True)
class Picture:
    """A figure of the page.

    Attributes:
        key: unique on the page.
        title: above it.
        svg: the drawing.
        note: below it.
        head, rows: its data as a table: what those read who do not see it.
    """

    key: str
    title: str
    svg: str
    note: str = ""
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = field(default_factory=list)


@contextmanager
def styled() -> Iterator[None]:
    """Inside, figures are drawn for the page."""
    import warnings

    import matplotlib as mpl

    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the browser has others
        yield


def sheet(height: int, rows: int = 1, left: int = 46, hspace: int = 34, **how: Any) -> tuple[Any, Any]:
    """A figure of ``height`` pixels and its axes, one below another; margins are fixed: finding them takes as long as drawing.

    Args:
        left: pixels for the labels of the y axis; ``right``, ``top`` and ``bottom`` likewise.
        hspace: pixels between the axes.
    """
    from matplotlib.figure import Figure

    margins = {"right": 8, "top": 22, "bottom": 36} | {key: how.pop(key) for key in ("right", "top", "bottom") if key in how}
    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
    inner = (height - margins["top"] - margins["bottom"] - hspace * (rows - 1)) / rows
    figure.subplots_adjust(
        left=left / WIDTH,
        right=1 - margins["right"] / WIDTH,
        top=1 - margins["top"] / height,
        bottom=margins["bottom"] / height,
        hspace=hspace / inner,
    )
    return figure, figure.subplots(rows, **how)


def labels(names: Iterable[str]) -> tuple[list[str], int]:
    """Words along the y axis, long ones shortened, and the pixels that they take: a generous width a letter."""
    short = shortened(list(names))
    return short, round(18 + 5.9 * max(map(len, short), default=0))


def shortened(names: Sequence[str], most: int = _LETTERS) -> list[str]:
    """Long names without their middle, or, where that is what tells them apart, without what they begin with alike."""
    short = [name if len(name) <= most else f"{name[: most - 10]}…{name[-9:]}" for name in names]
    same = [name for name, told in zip(names, short, strict=True) if short.count(told) > 1]
    ends = zip(min(same, default=""), max(same, default=""), strict=False)
    start = max(0, next((place for place, (one, other) in enumerate(ends) if one != other), 0) - 4)
    return [f"…{name[start:]}"[:most] if name in same else told for name, told in zip(names, short, strict=True)]


def room(count: int) -> int:
    """Pixels that a legend of so many names takes below a picture."""
    return 15 * -(-count // 2) + 6


def legend(figure: Any, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Names of runs below a picture, in two columns: within it they would cover what is drawn.

    Laid out here: of ten runs matplotlib's own takes a fifth of all drawing.
    """
    from matplotlib.lines import Line2D
    from matplotlib.transforms import IdentityTransform

    for place, (handle, name) in enumerate(zip(handles, shortened(names, 22), strict=True)):
        left, height = 6 + place % 2 * WIDTH // 2, room(len(names)) - 12 - 15 * (place // 2)
        line = Line2D([], [])
        line.update_from(handle)
        line.set(data=([left, left + 12, left + 24], [height] * 3), drawstyle="default", markevery=[1], gid=None, clip_on=False)
        line.set_transform(IdentityTransform())  # pixels: a figure has 72 an inch
        line.set_clip_path(None)
        figure.add_artist(line)
        figure.text(left + 30, height, name, transform=None, fontsize=9.5, va="center_baseline")


def svg(figure: Any, key: str, title: str) -> str:
    """The drawing as an element of the page: ids of its own, the page's colours, a title for those who do not see it."""
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    words = iter(re.findall(r">([^<]*[^<\s][^<]*)<", text))  # which stay as they are
    text = _of_page(re.sub(r">[^<]*[^<\s][^<]*<", ">\0<", text), key)
    text = re.sub("\0", lambda _: next(words), text)
    view = re.search(r'viewBox="[^"]*"', text)
    opened = f'<svg {view.group() if view else ""} role="img" aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg" '
    body = re.sub(r"<svg[^>]*>", "", text, count=1)
    return f'{opened}xmlns:xlink="http://www.w3.org/1999/xlink">{re.sub(chr(10) + " *", chr(10), body).strip()}'


def _of_page(tags: str, key: str) -> str:
    """Tags with ids of their own, the page's colours, and places to a hundredth of a pixel."""
    tags = re.sub(r'\bid="mark-([^"]*)"', r'class="mark" data-mark="\1"', tags)
    tags = re.sub(r'\bid="', f'id="{key}-', tags)
    tags = re.sub(r"url\(#", f"url(#{key}-", tags)
    tags = re.sub(r'href="#', f'href="#{key}-', tags)
    tags = re.sub(r"#(?:010203|0a0b0c|c000[01][0-9])", lambda found: f"var({_VARIABLES[found.group()]})", tags)
    tags = re.sub(r"font: (?:normal )?([\d.]+)px [^;\"]*", r"font: \1px var(--sans)", tags)
    return re.sub(r"(\d+\.\d\d)\d+", r"\1", tags)


def look(index: int, points: bool = False) -> dict[str, Any]:
    """Colour and line, and if wanted points, of the line of that number; colours come again, with other lines and points."""
    other = index + index // len(SERIES)
    found = {"color": SERIES[index % len(SERIES)], "linestyle": STYLES[other % len(STYLES)]}
    return {**found, "marker": MARKERS[other % len(MARKERS)]} if points else found


def mark(artist: Any, name: str) -> Any:
    """Name what an artist draws: ``data-mark`` in the page, where tests look whether anything is to be seen."""
    artist.set_gid(f"mark-{name}")
    return artist


def grey(axis: Any, parts: Sequence[Sequence[float]], name: str, extent: tuple[float, ...] | None = None) -> None:
    """Parts from 0 to 1 as fields, a row a line: the more, the more a field stands out from the page."""
    how = {"cmap": "Greys", "vmin": 0, "vmax": 1.25, "aspect": "auto", "interpolation": "none"}
    mark(axis.imshow(parts, **how, **({"extent": extent} if extent else {})), name)
    axis.grid(visible=False)


def scale(figure: Any) -> None:
    """What fields of ``grey`` stand for, below the picture at the left, where its margins leave room."""
    width, height = (72 * size for size in figure.get_size_inches())
    axis = figure.add_axes((20 / width, 5 / height, 48 / width, 8 / height), xticks=[], yticks=[])
    grey(axis, [[step / 7 for step in range(8)]], "scale")
    for place, told, side in ((17, "0%", "right"), (71, "100%", "left")):
        figure.text(place / width, 9 / height, told, fontsize=9, ha=side, va="center_baseline")


def thin(xs: Sequence[float], ys: Sequence[float], most: int = 400) -> tuple[list[float], list[float]]:
    """At most about ``most`` points of a line that look like all of them: of each stretch the lowest and the highest."""
    if len(xs) <= most:
        return list(xs), list(ys)
    size = -(-2 * len(xs) // most)
    kept: list[int] = []
    for start in range(0, len(xs), size):
        stretch = range(start, min(start + size, len(xs)))
        kept += sorted({min(stretch, key=lambda index: ys[index]), max(stretch, key=lambda index: ys[index])})
    kept = sorted({0, *kept, len(xs) - 1})
    return [xs[index] for index in kept], [ys[index] for index in kept]


def smooth(ys: Sequence[float], window: int) -> list[float]:
    """Centred running mean over ``window`` points, fewer at the ends."""
    sums = [0.0]
    for value in ys:
        sums.append(sums[-1] + value)
    half, last = window // 2, len(ys)
    ends = [(max(0, index - half), min(last, index + half + 1)) for index in range(last)]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in ends]
