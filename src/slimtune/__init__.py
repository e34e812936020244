"""slimtune: tune and prune a language model in one stage.

Public names: ``tune``, ``evaluate_model``, ``bench_model``, ``compare``, ``export_model``, ``verify_export``, ``apply_plan``,
``write_report``, ``check_run``, ``Recipe``, ``load_recipe``, ``Plan``, ``UserError``. They are imported on first use, so that
``import slimtune`` costs microseconds; it also teaches transformers to load per-layer models (see ``registration``).
"""

from typing import TYPE_CHECKING, Any

from slimtune.registration import install as _install
from slimtune.version import __version__

if TYPE_CHECKING:
    from slimtune.bench.command import bench_model
    from slimtune.comparison.run import compare
    from slimtune.errors import UserError
    from slimtune.evaluate.command import evaluate_model
    from slimtune.export.again import verify_export
    from slimtune.export.apply import apply_plan
    from slimtune.export.command import export_model
    from slimtune.pipeline import tune
    from slimtune.recipe import Recipe
    from slimtune.recipe import load as load_recipe
    from slimtune.report.check import check as check_run
    from slimtune.report.page import report as write_report
    from slimtune.structure.plan import Plan

__all__ = [
    "Plan",
    "Recipe",
    "UserError",
    "__version__",
    "apply_plan",
    "bench_model",
    "check_run",
    "compare",
    "evaluate_model",
    "export_model",
    "load_recipe",
    "tune",
    "verify_export",
    "write_report",
]

_HOMES = {
    "Plan": ("slimtune.structure.plan", "Plan"),
    "Recipe": ("slimtune.recipe", "Recipe"),
    "UserError": ("slimtune.errors", "UserError"),
    "apply_plan": ("slimtune.export.apply", "apply_plan"),
    "bench_model": ("slimtune.bench.command", "bench_model"),
    "check_run": ("slimtune.report.check", "check"),
    "compare": ("slimtune.comparison.run", "compare"),
    "evaluate_model": ("slimtune.evaluate.command", "evaluate_model"),
    "export_model": ("slimtune.export.command", "export_model"),
    "load_recipe": ("slimtune.recipe", "load"),
    "tune": ("slimtune.pipeline", "tune"),
    "verify_export": ("slimtune.export.again", "verify_export"),
    "write_report": ("slimtune.report.page", "report"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


_install()
