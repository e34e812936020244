"""Let ``import slimtune`` teach transformers the per-layer classes without importing transformers itself.

``install()`` costs microseconds. If transformers is loaded already, the classes are registered at once; otherwise a
finder waits for ``import transformers`` and registers when that import has finished (docs/decisions/0003).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_WATCHED = "transformers"


def install() -> None:
    """Register now, or as soon as transformers has been imported. May be called again."""
    if _WATCHED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from slimtune.models import per_layer, value_masks

    per_layer.register()
    value_masks.register()


class _Finder:
    """Finds transformers as Python would, with one step added after its import."""

    def __init__(self) -> None:
        self._asking = False

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _WATCHED or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            self._extend(spec)
        return spec

    def _extend(self, spec: ModuleSpec) -> None:
        # On this loader object only: the spec keeps its type, source and resources, which others inspect.
        # The whole package is watched, not its modules for models: those import one another in circles, and in the
        # middle of such a circle the stock classes cannot be imported yet.
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_then_register(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                _register()

        spec.loader.exec_module = execute_then_register  # type: ignore[method-assign]
