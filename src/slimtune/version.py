"""The version, and those of the libraries that compute, where every room may read them."""

from collections.abc import Iterable

__version__ = "0.1.0"

LIBRARIES = ("torch", "transformers", "peft", "accelerate")
"""Those that compute."""


def versions(libraries: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """Of these libraries, as far as they are installed."""
    from importlib.metadata import PackageNotFoundError, version  # a fifth of the time in which the command line starts

    found = {}
    for library in libraries:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
