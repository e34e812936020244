"""What a run will cost: parameters, memory, steps and time, from config.json alone."""

from slimtune.estimate.build import Estimate, estimate, job_of
from slimtune.estimate.memory import with_room
from slimtune.estimate.phases import phases
from slimtune.estimate.table import render

__all__ = ["Estimate", "estimate", "job_of", "phases", "render", "with_room"]
