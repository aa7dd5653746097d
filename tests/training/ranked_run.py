"""One rank of runs whose chains are written down: `python ranked_run.py OUT IMAGES`, or `recorded_run` in one process.

Two ranks write OUT/rank0.pt and OUT/rank1.pt: starts and ends of all prior chains, of short-run and of persistent ones,
the last checkpoints, and what every model has learned after a few steps.
"""

import os
import pathlib
import sys

import torch
from ranked_models import learned
from shapes import SMALL_RUN

from jlebm_fast.training.checkpoints import load_checkpoint
from jlebm_fast.training.loop import train
from jlebm_fast.training.options import TrainOptions
from jlebm_fast.training.steps import TrainingStep

STEPS = 6
KINDS = ("short-run", "persistent")


def run_options(images, **changes):
    return TrainOptions(**SMALL_RUN | {"data": str(images), "device": "cpu", "steps": STEPS, **changes})


def meet_elsewhere(ports: list[str], i: int) -> None:
    """Ranks part after each run; for the next one they take another port."""
    if ports:
        os.environ["MASTER_PORT"] = ports[i]


def recorded_run(out: pathlib.Path, images: pathlib.Path) -> dict:
    """What this process saw of both runs."""
    seen: dict = {}
    start, end = TrainingStep.prior_start, TrainingStep.prior_end
    ports = os.environ.get("PORTS", "").split()
    for i, kind in enumerate(KINDS):
        meet_elsewhere(ports, i)
        record = seen[kind] = {"starts": [], "ends": []}

        def noted_start(step, n, dims, device="cpu", record=record):
            z0 = start(step, n, dims, device)
            record["starts"].append(torch.cat(z0, dim=1).clone())
            return z0

        def noted_end(step, zs, record=record):
            record["ends"].append(torch.cat(zs, dim=1).clone())
            end(step, zs)

        TrainingStep.prior_start, TrainingStep.prior_end = noted_start, noted_end
        try:
            buffer = {"replay_batches": 2} if kind == "persistent" else {}
            folder = train(out / kind, run_options(images, chains=kind, **buffer))
        finally:
            TrainingStep.prior_start, TrainingStep.prior_end = start, end
        record["checkpoint"] = load_checkpoint(folder.checkpoint) if os.environ.get("RANK", "0") == "0" else None
    meet_elsewhere(ports, len(KINDS))
    seen["models"] = learned(images)
    return seen


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    torch.save(recorded_run(folder, pathlib.Path(sys.argv[2])), folder / f"rank{os.environ['RANK']}.pt")
