"""One thread, no network, fixed seeds; ``--record`` writes golden files anew."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, which reads it once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("dist", "no") != "no":  # hands out tests to workers and runs none: nothing heavy, they wait for it
        return
    gc.disable()  # until all is imported, which makes a million objects that stay
    import hypothesis
    import torch

    torch.set_num_threads(1)
    # Before a GPU is in use, each manual_seed keeps its caller's stack for every kind of GPU, which tells of errors that come
    # then. Under pytest such a stack is deep: a twentieth of a tiny run.
    for kind in (torch.cuda, torch.xpu, torch.mtia):
        vars(kind)["traceback"] = SimpleNamespace(format_stack=list)
    if hasattr(config, "workerinput"):  # of a whole suite, which needs all this anyway: so the process of Warm costs nothing
        import warm

        warm.load()
        config.stash[WARM] = warm.Loaded()
    # Examples take as long as a shared machine lets them; the same ones on every run, so a red run can be repeated.
    hypothesis.settings.register_profile("slimtune", deadline=None, derandomize=True, print_blob=True)
    hypothesis.settings.load_profile("slimtune")


SLOW = (
    *("methods", "test_appraisal.py", "test_pipeline.py", "test_assets.py", "parity", "export", "report", "e2e", "models"),
    *("test_benchmarks.py", "test_estimate.py", "watch", "contract", "evaluate", "comparison"),
)
"""What takes long is handed out first, and the rest evens out which worker ends when."""


WARM, LOADED = pytest.StashKey[Any](), pytest.StashKey[Any]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        here = Path(__file__).parent
        name = item.path.relative_to(here).parts[0] if item.path.is_relative_to(here) else ""
        return SLOW.index(name) if name in SLOW else len(SLOW)

    items.sort(key=place)


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.freeze()  # the million objects of the libraries stay: the collector need not look at them again and again
    if any("loaded" in getattr(item, "fixturenames", ()) for item in session.items):
        from warm import Loaded

        session.config.stash[LOADED] = Loaded()  # now: after a test it would be a copy of what that left
    gc.enable()


def pytest_unconfigure(config: pytest.Config) -> None:
    for key in (WARM, LOADED):
        if key in config.stash:
            config.stash[key].close()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write the golden losses instead of comparing them")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be written."""
    return bool(request.config.getoption("--record"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of the larger data sets and models: ``data/...`` and ``models/base-44m``."""
    value = os.environ.get("SLIMTUNE_DATA")
    if not value:
        pytest.skip("SLIMTUNE_DATA is not set: the larger data sets are not at hand")
    folder = Path(value)
    assert folder.is_dir(), f"SLIMTUNE_DATA={value} is no folder"
    return folder


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny base, texts, and recipes on them; see ``bases.Bench``."""
    from bases import Bench

    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="session")
def warm(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Runs scripts in processes that have torch and transformers loaded already; see ``warm.Warm``."""
    if WARM in request.config.stash:
        yield request.config.stash[WARM]
        return
    from warm import Warm

    made = Warm()
    yield made
    made.close()


@pytest.fixture(scope="session")
def loaded(request: pytest.FixtureRequest) -> Any:
    """Runs scripts in processes that have slimtune loaded already, and nothing of any test; see ``warm.Loaded``."""
    return request.config.stash[LOADED]


@pytest.fixture(scope="module")
def forked(warm: Any) -> Iterator[None]:
    """The export's and verify's own fresh processes, forked from a loaded one."""
    from slimtune.export import verify

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "subprocess", warm)
        yield
