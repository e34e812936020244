"""Runs that share a GPU: dealt out evenly, and fewer once its memory was too small for all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from comparisons import stand_in, write_comparison
from slimtune.comparison import gpus, launch
from slimtune.comparison.config import load
from slimtune.comparison.gpus import TRIES, Places, check_there, ran_out
from slimtune.comparison.jobs import Job, jobs_of
from slimtune.comparison.launch import Ended, Launcher
from slimtune.comparison.run import run
from slimtune.errors import UserError


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return jobs_of(load(write_comparison(tmp_path)))[0]


def several(job: Job, count: int) -> list[Job]:
    return [replace(job, seed=seed) for seed in range(count)]


def ranks(folder: Path, **named: int) -> list[Job]:
    """A run for each name, with that rank: what the stand-in does."""
    methods = {name: {"lora.rank": rank} for name, rank in named.items()}
    return jobs_of(load(write_comparison(folder, methods=methods, keep=0.6, seeds=0)))


def test_gpus_fill_evenly_and_no_further(job: Job) -> None:
    places, runs = Places(3, ["0", "1"]), several(job, 4)
    assert [places.take(it) for it in runs] == ["0", "1", "0", None]
    assert places.leave("1", runs[1], short=False) is None
    assert places.take(runs[3]) == "1"


def test_a_gpu_takes_one_fewer_after_each_run_that_found_no_memory(job: Job) -> None:
    places, runs = Places(4), several(job, 4)
    assert [places.take(it) for it in runs] == [""] * 4
    told = str(places.leave("", runs[0], short=True))
    assert told == "ran out of GPU memory beside 3 others: made again later, with 3 at a time"
    assert places.take(runs[0]) is None
    places.leave("", runs[1], short=False)
    assert places.take(runs[0]) == ""
    for it, most in ((runs[2], 2), (runs[3], 1), (runs[0], 1)):  # the last had others beside it while it ran
        assert f"with {most} at a time" in str(places.leave("", it, short=True))
    places.take(runs[1])
    assert places.take(runs[2]) is None
    assert places.leave("", runs[1], short=True) is None  # alone from its start: its own failure


def test_what_is_left_at_the_end_has_fewer_beside_it_as_well(job: Job) -> None:
    places, runs = Places(8), several(job, 3)
    for it in runs:
        places.take(it)
    assert "beside 2 others: made again later, with 2 at a time" in str(places.leave("", runs[0], short=True))


def test_the_last_time_is_alone(job: Job) -> None:
    places, (mine, *others) = Places(8), several(job, 4)
    places.take(others[0])
    for _ in range(TRIES - 1):
        places.gpus[""].most = 8
        assert places.take(mine) == ""
        assert places.leave("", mine, short=True)
    places.gpus[""].most = 8
    assert places.take(mine) is None
    assert places.take(others[1]) == ""  # what may share the GPU need not wait for it
    places.leave("", others[0], short=False)
    places.leave("", others[1], short=False)
    assert places.take(mine) == ""
    assert places.take(others[2]) is None
    assert places.leave("", mine, short=True) is None
    assert places.take(others[2]) == ""


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("error: the GPU is out of memory; work in smaller parts (CUDA out of memory. Tried to allocate 2.00 GiB)", True),
        ("RuntimeError: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa)`", True),
        ("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("RuntimeError: Expected mha_graph.execute(handle, variant_pack, workspace.get()).is_good() to be true", True),
        ("RuntimeError: Expected mha_graph->execute(handle, variant_pack, workspace.get()).is_good() to be true", True),
        ("torch.AcceleratorError: CUDA error: out of memory\n" + 3000 * "CUDA kernel errors ", False),  # long before the end
        ("torch.AcceleratorError: CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
        ("RuntimeError: CUDA error: device-side assert triggered", False),
        ("error: data.train[0].path='memory.jsonl' does not exist", False),
    ],
)
def test_symptoms_of_a_full_gpu(tmp_path: Path, end: str, expected: bool) -> None:
    log = tmp_path / "run.log"
    log.write_text(f"step 1\n{end}\n")
    assert ran_out(log) is expected


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that says which runs were started."""
    monkeypatch.setattr(launch, "TUNE", (*stand_in(tmp_path), "tune"))
    monkeypatch.setattr(gpus, "seen", lambda: ["a"] * 4)
    return tmp_path / "out" / "starts"


@pytest.mark.parametrize(
    ("found", "asked", "message"),
    [
        (["5b1f-1", "77aa-2"], ["0", "9"], "--gpus 9: the GPUs here are 0, 1; give those, or leave --gpus out"),
        (["5b1f-1", "77aa-2"], ["GPU-5b1e"], "--gpus GPU-5b1e: the GPUs here are 0, 1; give those, or leave --gpus out"),
        ([], ["0"], "--gpus 0: torch sees no GPU here; leave --gpus out for runs on the CPU"),
        ([], ["MIG-1"], "--gpus MIG-1: torch sees no GPU here; leave --gpus out for runs on the CPU"),
        (["5b1f-1", "77aa-2"], ["1", "1", "GPU-77aa", "MIG-1"], None),
        (None, ["9"], None),
        ([], [], None),
    ],
)
def test_a_gpu_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, found: list[str] | None, asked: list[str], message: str | None
) -> None:
    monkeypatch.setattr(gpus, "seen", lambda: found)
    if message is None:
        check_there(asked)
    else:
        with pytest.raises(UserError) as caught:
            check_there(asked)
        assert str(caught.value) == message


def test_nothing_runs_on_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "TUNE", (*stand_in(tmp_path), "tune"))
    work = ranks(tmp_path, one=4)
    with pytest.raises(UserError, match="--gpus 999: "):
        run(work, tmp_path / "rows.json", Launcher(1, ["999"]))
    assert not (tmp_path / "out" / "starts").exists()
    assert not (tmp_path / "rows.json").exists()
    run(work, tmp_path / "rows.json", Launcher(1), lambda _: None)
    run(work, tmp_path / "rows.json", Launcher(1, ["999"]), lambda _: None)  # all is there


def result(ended: Ended) -> str:
    if ended.again:
        return "again"
    return "failed" if ended.summary is None or "failed" in ended.summary else "made"


def test_a_run_without_memory_beside_another_is_made_again_when_that_has_ended(tmp_path: Path, starts: Path) -> None:
    work, lines = ranks(tmp_path, stays=70, large=71, late=4), []
    rows = run(work, tmp_path / "rows.json", Launcher(2, ["3"], 1), lines.append)
    assert not [row for row in rows if row["metric"] == "failed"]
    assert len({row["method"] for row in rows}) == 3
    assert [name.partition("-")[0] for name in starts.read_text().split()][2:] == ["late", "large"]
    told = "large 0.6 seed 0: ran out of GPU memory beside 1 other: made again later, with 1 at a time"
    assert lines.index(told) < 2  # on a busy machine the other's end may be seen first
    assert [line[:5] for line in lines if line != told] == ["[1/3]", "[2/3]", "[3/3]"]


def test_a_run_that_never_finds_memory_fails_in_the_end(tmp_path: Path, starts: Path) -> None:
    work = ranks(tmp_path, large=75, stays=70, one=4, two=4, three=4)
    ends = [(end.job.method, result(end)) for end in Launcher(4, ["0"], 1).run_all(work)]
    assert [it for method, it in ends if method == "large"][-1] == "failed"
    assert 2 <= starts.read_text().split().count("large-0.6-0") <= TRIES
    assert {method for method, it in ends if it == "made"} == {"stays", "one", "two", "three"}


@pytest.mark.parametrize(("jobs", "gpus"), [(1, []), (2, ["0", "1"])])
def test_a_gpu_of_its_own_that_is_too_small_is_a_failure_at_once(
    tmp_path: Path, starts: Path, jobs: int, gpus: list[str]
) -> None:
    ends = list(Launcher(jobs, gpus, 1).run_all(ranks(tmp_path, large=71, other=4)))
    assert {end.job.method: result(end) for end in ends} == {"large": "failed", "other": "made"}
    assert len(starts.read_text().split()) == 2
