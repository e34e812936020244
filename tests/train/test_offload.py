"""Host memory for what waits there: the driver is a stand-in here, but for what a GPU alone can show."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from slimtune.train.offload import SMALL, kept_on, locked

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Driver:
    """Counts what is locked, and refuses all or nothing."""

    def __init__(self) -> None:
        self.locked, self.refuses, self.told = dict[int, int](), False, 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if not self.refuses:
            self.locked[address] = size
        return int(self.refuses)

    def cudaHostUnregister(self, address: int) -> int:
        assert is_mapped(address), "the memory has gone first"
        del self.locked[address]
        return 0


def is_mapped(address: int) -> bool:
    spans = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(start, 16) <= address < int(stop, 16) for start, stop in spans)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()

    @contextmanager
    def on(_: Any) -> Iterator[None]:
        yield

    def told(*_: Any, **__: Any) -> None:
        made.told += 1
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None if not made.refuses else told())
    return made


def test_memory_is_locked_to_its_size_until_the_last_view_has_gone(driver: Driver) -> None:
    tensor = locked((3, 1000), torch.bfloat16, GPU)
    assert driver.locked == {tensor.data_ptr(): 6000}
    assert tensor.shape == (3, 1000)
    assert tensor.dtype is torch.bfloat16
    assert not tensor.any()
    view = tensor[1:].fill_(2.0)
    del tensor
    assert driver.locked
    assert view.eq(2.0).all()
    del view
    assert not driver.locked


@pytest.mark.parametrize("count", [1, 4096, 4097, SMALL, SMALL + 1, 3 * SMALL + 12345])
def test_all_pages_are_there_and_zero(driver: Driver, count: int) -> None:
    tensor = locked((count,), torch.uint8, GPU)
    assert not tensor.any()
    assert driver.locked == {tensor.data_ptr(): count}


def flags_of(address: int) -> list[str]:
    """What the system notes of the mapping in which ``address`` lies."""
    mappings = Path("/proc/self/smaps").read_text().split("VmFlags: ")
    for mapping, after in pairwise(mappings):
        span = next(line for line in mapping.splitlines() if "-" in line.split()[0]).split()[0]
        start, stop = (int(each, 16) for each in span.split("-"))
        if start <= address < stop:
            return after.splitlines()[0].split()
    raise AssertionError("not mapped")


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no large pages")
def test_large_pages_are_asked_for(driver: Driver) -> None:
    tensor = locked((SMALL,), torch.uint8, GPU)
    assert {"hg", "dc"} <= set(flags_of(tensor.data_ptr()))  # and no child gets a copy


def test_a_system_without_large_pages_will_do(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()

    class Old(mmap.mmap):
        def madvise(self, option: int, *span: int) -> None:
            asked.append(option)
            if option == mmap.MADV_HUGEPAGE:
                raise OSError(22, "Invalid argument")
            super().madvise(option, *span)

    monkeypatch.setattr(mmap, "mmap", Old)
    tensor = locked((5000,), torch.uint8, GPU)
    assert mmap.MADV_HUGEPAGE in asked
    assert driver.locked == {tensor.data_ptr(): 5000}


def test_nothing_takes_no_memory(driver: Driver) -> None:
    assert locked((0, 7), torch.float32, GPU).shape == (0, 7)
    assert not driver.locked


def test_where_the_driver_locks_no_more_memory_is_as_any_other(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.refuses = True
    made = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device: made(*size))
    tensor = locked((5,), torch.float32, GPU)
    assert driver.told == 1, "what the driver remembers is asked for, lest it be another's error"
    driver.refuses = False
    tensor += 1.0
    assert tensor.eq(1.0).all()
    del tensor
    assert not driver.locked


def test_a_copy_goes_into_the_room_of_an_earlier_one_if_it_fits() -> None:
    room, other = torch.zeros(4), torch.arange(4.0)
    assert kept_on(CPU, other, room) is room
    assert torch.equal(room, other)
    wide = kept_on(CPU, torch.ones(5), room)
    assert wide is not room
    assert torch.equal(room, other)
    assert wide.eq(1.0).all()
    assert kept_on(CPU, other.bfloat16(), room).dtype is torch.bfloat16
    assert torch.equal(room, other)


@needs_gpu
def test_a_gpu_reads_and_writes_locked_memory_and_survives_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    there = torch.randn(1000, 1000, device=GPU)
    host = kept_on(CPU, there)
    assert host.is_pinned()
    assert torch.equal(host.to(GPU, non_blocking=True), there)
    empty = kept_on(CPU, there[:0])
    assert empty.shape == (0, 1000)
    before, taken = torch.cuda.cudart(), (host.data_ptr(), host.nbytes)

    class Refusing(Driver):
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            return int(before.cudaHostRegister(*taken, flags))

    monkeypatch.setattr(torch.cuda, "cudart", Refusing)
    pageable = kept_on(CPU, there)
    assert not pageable.is_pinned()
    assert torch.equal(pageable, host)
    assert float(torch.ones(3, device=GPU).sum()) == 3.0
    monkeypatch.undo()
    del host
    assert int(before.cudaHostUnregister(taken[0])) != 0, "it was unlocked with its last view"
    with pytest.raises(RuntimeError):  # the driver tells of that as well
        torch.ones(3, device=GPU).sum().item()
