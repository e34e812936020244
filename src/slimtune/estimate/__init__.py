"""What a run will cost: parameters, memory, steps and time, from config.json alone."""

from slimtune.estimate.build import Estimate, estimate, job_of
from slimtune.estimate.experts import check as check_experts
from slimtune.estimate.machines import present
from slimtune.estimate.memory import with_room
from slimtune.estimate.phases import phases, with_compiling
from slimtune.estimate.table import render

__all__ = ["Estimate", "check_experts", "estimate", "job_of", "phases", "present", "render", "with_compiling", "with_room"]
