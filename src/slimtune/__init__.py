"""slimtune: tune and prune a language model in one stage."""

__version__ = "0.1.0"
