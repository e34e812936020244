"""Bounds that a run's figures must keep, and what happens when they do not. Needs no torch."""
