"""Fresh processes without their seconds of imports: one process has the libraries loaded and forks for each.

``Warm`` has torch and transformers, and nothing of slimtune: what a child loads it loads by the folder alone, as in a process
of its own; ``test_verify.py`` has one of those. Run as a script, this is that process. ``Loaded`` is a copy of the test process
from before its first test, slimtune and all: for children of whom it is asked what they do, and not what they load.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any


class Warm:
    """Stands in for the module ``subprocess`` where children are started as ``python -P script ...``."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin
        assert self._process.stdout
        self._ask: IO[str] = self._process.stdin
        self._told: IO[str] = self._process.stdout

    def run(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path | None = None, **settings: Any
    ) -> subprocess.CompletedProcess[str]:
        """As ``subprocess.run`` of a script, with its output captured as text."""
        assert list(command[:2]) == [sys.executable, "-P"]
        with tempfile.TemporaryDirectory() as scratch:
            asked = {"words": list(command[2:]), "env": dict(os.environ if env is None else env)}
            asked |= {"cwd": str(cwd or Path.cwd()), "scratch": scratch}
            self._ask.write(json.dumps(asked) + "\n")
            self._ask.flush()
            child = int(self._told.readline())
            try:
                code = int(self._told.readline())
            except BaseException:  # a test that takes too long leaves nothing behind
                os.killpg(child, signal.SIGKILL)
                self._told.readline()
                raise
            out, err = (Path(scratch, name).read_text(encoding="utf-8") for name in ("out", "err"))
        return subprocess.CompletedProcess(list(command), code, out, err)

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.communicate()


class Loaded(Warm):
    """A fork of this process as it is now, which forks for each child."""

    def __init__(self) -> None:
        (theirs, ask), (told, ours) = os.pipe(), os.pipe()
        self._child = os.fork()
        if self._child == 0:
            try:
                os.close(ask)  # else it would not see the end of this process
                os.close(told)
                for number in (0, 1, 2):
                    os.dup2(os.open(os.devnull, os.O_RDWR), number)
                _serve(os.fdopen(theirs), os.fdopen(ours, "w"))
            finally:
                os._exit(0)
        os.close(theirs)
        os.close(ours)
        self._ask, self._told = os.fdopen(ask, "w"), os.fdopen(told)

    def close(self) -> None:
        """End the process."""
        os.kill(self._child, signal.SIGKILL)  # later forks have the ends of its pipes as well, so it would not see them closed
        self._ask.close()
        os.waitpid(self._child, 0)
        self._told.close()


def _child(words: list[str], env: dict[str, str], cwd: str, scratch: str) -> None:
    from transformers import dynamic_module_utils

    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(scratch, name), os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115  (not what pytest put there)
    os.environ.clear()
    os.environ.update(env)
    warnings.resetwarnings()  # of tests, where each is an error
    warnings.simplefilter("ignore" if env.get("PYTHONWARNINGS") == "ignore" else "default")
    dynamic_module_utils.HF_MODULES_CACHE = env.get("HF_MODULES_CACHE", scratch)  # which is read as transformers is imported
    os.chdir(cwd)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def _serve(asks: IO[str], tells: IO[str]) -> None:
    """Fork for each line of ``asks``; tell the child's id, and how it ended."""
    for line in asks:
        asked = json.loads(line)
        if (child := os.fork()) == 0:
            os.setpgid(0, 0)
            code = 1
            if torch := sys.modules.get("torch"):  # a fork makes its pool anew: not while two threads ask for it at once
                torch.set_num_threads(torch.get_num_threads())
            try:
                _child(**asked)
                code = 0
            except BaseException as error:
                import traceback

                if isinstance(error, SystemExit) and not error.code:
                    code = 0
                else:
                    traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(child, flush=True, file=tells)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True, file=tells)


def load() -> None:
    """What a ``Warm`` has loaded."""
    assert "slimtune" not in sys.modules
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline  # noqa: F401  (loaded once)

    torch.set_num_threads(1)  # threads do not survive a fork


if __name__ == "__main__":
    load()
    _serve(sys.stdin, sys.stdout)
