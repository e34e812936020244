"""The version, and those of the libraries that compute, where every room may read them."""

from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"

LIBRARIES = ("torch", "transformers", "peft", "accelerate")
"""Those that compute."""


def versions() -> dict[str, str]:
    """Of these libraries, as far as they are installed."""
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
