"""Fresh processes without their four seconds of imports: one process has torch and transformers loaded and forks for each.

Nothing of slimtune is in it, so what a child loads it loads by the folder alone, as in a process of its own; ``test_verify.py``
has one of those. Run as a script, this is that process.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Warm:
    """Stands in for the module ``subprocess`` where children are started as ``python -P script ...``."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, **settings: Any
    ) -> subprocess.CompletedProcess[str]:
        """As ``subprocess.run`` of a script, with its output captured as text."""
        assert list(command[:2]) == [sys.executable, "-P"]
        assert self._process.stdin
        assert self._process.stdout
        with tempfile.TemporaryDirectory() as scratch:
            asked = {"words": list(command[2:]), "env": dict(os.environ if env is None else env), "scratch": scratch}
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            code = int(self._process.stdout.readline())
            out, err = (Path(scratch, name).read_text(encoding="utf-8") for name in ("out", "err"))
        return subprocess.CompletedProcess(list(command), code, out, err)

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.communicate()


def _child(words: list[str], env: dict[str, str], scratch: str) -> None:
    from transformers import dynamic_module_utils

    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(scratch, name), os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(env)
    dynamic_module_utils.HF_MODULES_CACHE = env.get("HF_MODULES_CACHE", scratch)  # which is read as transformers is imported
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def _serve() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline  # noqa: F401  (loaded once)

    torch.set_num_threads(1)  # threads do not survive a fork
    for line in sys.stdin:
        asked = json.loads(line)
        if (child := os.fork()) == 0:
            code = 1
            try:
                _child(**asked)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
