"""``python two_ranks.py RECIPE``: two ranks, forked after the imports, run it until it stops and go on to its end.

Each writes what it was told of both into ``rank-N.json`` beside the recipe.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.run

import slimtune
import slimtune.pipeline
from slimtune.train.judgement import Breach

GO_ON = ["alarm.begin=end", "speed.measure=true", "speed.prompt=8", "speed.context=8", "speed.steps=2", "speed.repeats=1"]


def run_rank(file: Path) -> None:
    slimtune.pipeline.self_check = lambda config, seed: 0.0
    told = {}
    for name, overrides in (("stopped", []), ("ended", GO_ON)):
        try:
            slimtune.pipeline.tune(slimtune.load_recipe(file, overrides), resume=name == "ended")
        except Breach as breach:
            told[name] = str(breach)
    (file.parent / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        torch.set_num_threads(1)
        run_rank(Path(sys.argv[1]))
    else:
        words = ["--standalone", "--nproc_per_node=2", "--start-method=fork", "--run-path", __file__, sys.argv[1]]
        torch.distributed.run.main(words)
