"""slimtune: tune and prune a language model in one stage."""

from slimtune.registration import install as _install

__version__ = "0.1.0"

_install()  # microseconds: transformers learns the per-layer classes when (and if) it is imported
