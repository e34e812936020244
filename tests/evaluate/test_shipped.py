"""Names of shipped tasks and suites, told without reading them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from slimtune.evaluate.shipped import built_in, tasks_of
from slimtune.evaluate.tasks import find_suites


@pytest.mark.parametrize("suite", built_in("suites"))
def test_names_are_those_of_the_tasks_that_are_found(suite: str) -> None:
    found = [task.name for task in find_suites([suite])[suite]]
    assert [name for name in tasks_of(suite) if name in built_in("tasks")] == found
    assert found


def test_a_page_reads_no_task() -> None:
    program = "import sys, slimtune.report.page; heavy = {'pydantic', 'torch'} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", program], check=True)
