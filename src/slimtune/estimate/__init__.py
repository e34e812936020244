"""What a run will cost: parameters, memory, steps and time, from config.json alone."""

from slimtune.estimate.build import Estimate, estimate
from slimtune.estimate.table import render

__all__ = ["Estimate", "estimate", "render"]
