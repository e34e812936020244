"""The upper part of a report as a picture, taken in headless Chromium.

    slimtune report docs/reports/health --out runs/health.html
    python benchmarks/picture.py runs/health.html docs/report-health.png

Needs playwright, and a Chromium on the PATH or in ``SLIMTUNE_CHROMIUM``.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH, HEIGHT = 1240, 940
COLOURS = 160
"""Enough for text and a few series; a third of the bytes."""


def main() -> None:
    """Open the page, take the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--height", type=int, default=HEIGHT)
    args = parser.parse_args()
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = os.environ.get("SLIMTUNE_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if not browser:
        parser.error("no Chromium; install it, or name it in SLIMTUNE_CHROMIUM")
    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        page = opened.new_page(viewport={"width": WIDTH, "height": args.height}, color_scheme="light")
        page.goto(args.page.resolve().as_uri())
        image = Image.open(io.BytesIO(page.screenshot()))
        opened.close()
    image.convert("RGB").quantize(COLOURS).save(args.picture, optimize=True)


if __name__ == "__main__":
    main()
