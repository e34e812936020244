"""The figures of a model."""
