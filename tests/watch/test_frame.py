"""What a frame shows, in any terminal."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from runs import plan_of, write_experts, write_run
from slimtune.watch.follow import Watched
from slimtune.watch.frame import frame
from watched import RECOVERY, REFERENCE, SEARCH, Folder, closing, finished, guarded, line, step, text


@pytest.fixture
def run(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "health").stages()


def test_before_the_first_step(run: Folder) -> None:
    shown = run.stages(base=None).shown()
    assert "Before the first step." in shown
    (run.path / "stages.json").write_text("{}")
    assert "Before the first step: the base is measured." in run.shown()
    assert line(shown, "search").split()[-1] == "0/5"
    assert "Curves" not in shown
    assert "Shape" not in shown


def test_while_dense_lora_is_tuned(run: Folder) -> None:
    rows = [*REFERENCE[:9], REFERENCE[9] | {"valid_ppl": 21.0}]
    shown = run.rows(*rows).shown()
    assert shown.startswith("health  running  atp, to keep 60% of all parameters\nDense LoRA, step 10 of 15.\n\n")
    assert re.search(r"dense LoRA +━+ +10/15 +500 ms/step +left 2 s", shown)  # 2.5
    assert re.search(r"search +0/5 +about 2 s", shown)
    assert "about 7 s left for all steps" in shown
    assert "Curves (dense LoRA)" in shown
    assert "loss        █▇▆▆▅▄▃▃▂▁  3.000 to 2.100, least 2.100" in shown
    assert "Validation  dense LoRA, step 10" in shown
    assert re.search(r"perplexity +↓ +21\.00 +36\.00", shown)  # beside the base, and not beside itself
    assert "\nkept" not in shown


def test_in_the_search(run: Folder) -> None:
    rows = [closing(1, valid_ppl=36.0), closing(2), closing(3, valid_ppl=40.0, **{"valid_pubmedqa.accuracy": 0.5})]
    stages = {"dense_lora": {"valid_ppl": 20.0}, "valid": {"dense": {"pubmedqa.accuracy": 0.4}}}
    shown = run.stages(**stages).rows(*REFERENCE, closing(0), *rows).shown()
    assert "Search, step 4 of 5." in shown
    assert re.search(r"dense LoRA +━+ +15/15 +500 ms/step +took 8 s", shown)
    assert "perplexity  ▁█    36.00 to 40.00, least 36.00" in shown
    assert line(shown, "kept").endswith("90.0%, target 87.0%, then 60%")
    assert re.search(r"now +change +base +dense LoRA\n", shown)
    assert re.search(r"perplexity +↓ +40\.00 +\+4\.00 +36\.00 +20\.00", shown)
    assert re.search(r"pubmedqa, accuracy +↑ +50\.0% +40\.0%", shown)
    assert "Shape  layer by layer" in shown
    assert "MLP width   ███ ███ ███ ███" in shown
    assert "74% of 400, 60 to 87 a layer" in shown
    assert "62% of 16, 1 to 4 a layer" in shown
    assert "Last step: 3.00% of all units removed, 1.00% came back (in all steps: 4.0%)." in shown


def test_after_the_cut(run: Folder) -> None:
    shown = run.rows(*REFERENCE, *SEARCH, *RECOVERY[:4]).shown()
    assert "Recover, step 4 of 10." in shown
    assert line(shown, "kept").endswith("60.0%, budget 60%")
    assert "Shape  layer by layer, at step 5 of the search\n" in shown
    assert "74% of 400" in shown
    assert "Last step" not in shown  # nothing changes any more
    shown = run.rows(*RECOVERY[4:]).shown()
    assert "All steps are done; the model is written and measured." in shown
    assert "left" not in shown


def test_a_run_without_widths_or_facts(run: Folder) -> None:
    """As those were that an earlier version made."""
    (run.path / "stages.json").unlink()
    bare = [{key: value for key, value in row.items() if "widths" not in key} for row in SEARCH]
    shown = text(run.rows(*bare, *RECOVERY[:2]).look())
    assert "Shape" not in shown
    assert "Recover, step 2 of 10" in shown
    shown = text(run.rows(*SEARCH).look())
    assert "full height: the widest that was seen" in shown
    assert "60 to 86 a layer" in shown


def test_a_recipe_of_another_version(run: Folder) -> None:
    with (run.path / "recipe.yaml").open("a") as file:
        file.write("unheard_of: 3\n")
    shown = run.rows(*SEARCH).shown()
    assert "Search, step 5." in shown
    assert re.search(r"search +━+ +5 +500 ms/step", shown)


def test_figures_that_are_no_numbers_and_names_with_brackets(tmp_path: Path) -> None:
    run = Folder(tmp_path / "[bold]x").stages()
    rows = [closing(0, adapt_loss="nan", valid_ppl="inf", seconds=None), closing(0, adapt_loss=float("nan"))]
    shown = run.rows(*rows, closing(1)).shown()
    assert shown.startswith("[bold]x  running")
    assert "2.900 to 2.900" in shown


def test_a_finished_run(tmp_path: Path) -> None:
    watched = Watched(finished(tmp_path / "run"))
    watched.look()
    shown = text(watched)
    assert shown.startswith("run  finished  atp, to keep 60% of all parameters\n40.0% smaller (600,000 of 1.0 M parameters)")
    assert "Guards  by test figures of the written model\nholds       ppl is 20, to be <= 1.2 x dense = 24" in shown
    kept = plan_of(12, 0.6, 0).kept
    total = sum(len(layer["ffn"]) for layer in kept)
    assert f"{total / (12 * 1024):.0%} of 12,288" in shown
    assert "about" not in shown


def test_a_run_that_makes_experts(tmp_path: Path) -> None:
    run = Folder(tmp_path / "run", method="tomoe", budget={"keep": 0.6, "of": "block"}, evaluate={"dense_lora": False})
    rows = [step("search", number, adapt_generator_target=0.9 - number / 10, kept=0.6) for number in range(3)]
    shown = run.stages().rows(*rows).shown()
    assert shown.startswith("run  running  tomoe, a token to use 60% of the blocks\nSearch, step 3 of 5.")
    assert re.search(r"search +━.* +3/5 ", shown)
    assert re.search(r"recover .* 0/10 ", shown)
    assert line(shown, "used").endswith("70.0%, budget 60%")
    assert "Shape" not in shown
    assert "kept" not in shown
    over = text(run.look())
    command = f"slimtune convert {run.path / 'recipe.yaml'} --resume"
    assert "".join(command.split()) in "".join(over.split())  # which a line may end in the middle of
    shown = text(_looked(write_experts(tmp_path / "done")))
    assert "tomoe, a token to use 60% of the blocks\nA token uses 620,000 parameters, 60.0% of the base's blocks;" in shown
    assert "in experts  " in shown
    assert "75% of 3,072, 768 in every layer" in shown
    told = " ".join(shown.split())
    assert "A layer has 4 experts of 128 channels, of which a token uses 2 beside 256 shared ones" in told
    assert "Of a layer's choices the least used one gets 10.0%, the most used 50.0%; evenly 25.0%." in told
    narrow = text(_looked(tmp_path / "done"), 60)
    assert max(map(len, narrow.splitlines())) <= 60


def _looked(folder: Path) -> Watched:
    watched = Watched(folder)
    watched.look()
    return watched


@pytest.mark.parametrize("layers", [1, 12, 80, 130])
@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_frame_fits_any_width_and_any_number_of_layers(tmp_path: Path, width: int, layers: int) -> None:
    watched = Watched(write_run(tmp_path / "run", layers=layers, guard={"ppl": "<= 1.2 x dense", "loss": "<= 3"}))
    watched.look()
    shown = text(watched, width)
    assert max(map(len, shown.splitlines())) <= min(width, 124)
    assert "MLP width" in shown
    assert ("layers a bar" in shown) == (layers > (34 if width >= 112 else width - 12))
    assert "…" not in shown[: shown.index("Validation")]
    if width >= 112:
        assert re.search(r"^Curves.* Shape  ", shown, re.MULTILINE)  # beside one another


@pytest.mark.parametrize("height", [24, 30, 40])
def test_a_frame_is_cut_down_to_the_height_of_a_terminal(tmp_path: Path, height: int) -> None:
    watched = guarded(tmp_path / "run").rows(*REFERENCE, *SEARCH[:4]).look()
    row = {f"valid_task{number}.accuracy": 0.5 for number in range(12)}
    with (watched.folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(closing(4, valid_ppl=25.0, **row)) + "\n")
    watched.look()
    shown = text(watched, 80, height)
    assert len(shown.splitlines()) <= height < len(text(watched, 80).splitlines())
    assert "in a taller window" in shown
    assert ("to be <= 100" in shown) == (height == 40)  # guards that hold, or are not judged yet, by their names alone
    assert "BREACHED    ppl is 25" in shown
    assert "KV groups" in shown


def test_colour_says_nothing_that_is_not_in_the_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = guarded(tmp_path / "run").rows(*SEARCH[:4], closing(4, valid_ppl=25.0)).look()
    plain = text(watched)
    assert "\x1b[" in text(watched, force_terminal=True, color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", text(watched, force_terminal=True, color_system="standard"))
    assert "BREACHED" in plain


def test_without_block_characters(run: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    class Old(StringIO):
        encoding = "ascii"

    console = Console(file=Old(), width=80)
    console.print(frame(run.rows(*SEARCH, closing(4, valid_ppl=9.0)).look(), console))
    console.file.getvalue().encode("ascii")  # type: ignore[attr-defined]


def test_validation_figures_are_told_as_they_were_however_narrow_their_curve(tmp_path: Path) -> None:
    run = Folder(tmp_path / "run").stages()
    run.rows(*(step("recover", number, valid_ppl=30.0 - number / 7) for number in range(70)))
    assert line(run.shown(60), "perplexity ").split("  ")[-1].strip() == "30.00 to 20.14, least 20.14"
