"""`jlebm reproduce`: its options."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Literal

import tyro

from jlebm_fast.errors import INTERRUPTED, RunError

from .settings import FULL, PARTS, QUICK, Settings

Part = Literal["models", "chain_steps", "energy_width", "layers", "anomaly", "figures"]


def usable_cores() -> int:
    """Cores that this process may run on, which taskset or a batch system may have made fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Run the paper's experiments on MNIST into one folder: tables, figures, and a report that opens without a
    network. Stopped or killed, the same command goes on; a cell of a table is never computed twice."""

    what: tyro.conf.Positional[Literal["mnist"]]
    """The set of experiments."""
    out: pathlib.Path = pathlib.Path("runs/reproduce-mnist")
    """Folder of the report, results and runs."""
    data: str = "mnist"
    """Images with labels: mnist (downloaded), or the path of a folder with its Parquet files."""
    quick: bool = False
    """A small version of everything, six or seven minutes on four cores, to show the report rather than the paper."""
    plan: bool = False
    """Only time a few updates of each model and say what the whole would take."""
    parts: tuple[Part, ...] = PARTS
    """Tables and figures to make."""
    steps: int = 0
    """Updates of every model; 0 for the set's own (3,000; quick 400)."""
    seeds: int = 0
    """Seeds 0, 1, … of every row; 0 for the set's own (3; quick 1)."""
    jobs: int = 0
    """Cells at a time; 0 for one per core, on a GPU one."""
    inception_weights: pathlib.Path | None = None
    """torch-fidelity's file of the Inception net: adds a table of Inception-based FIDs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""

    def execute(self) -> int:
        from jlebm_fast.training.run_folder import pick_device

        from .reproduce import Request, Stopped, reproduce, time_estimate

        for name in ("steps", "seeds", "jobs"):
            if getattr(self, name) < 0:
                raise RunError(f"--{name} must be positive, or 0 for the default, got {getattr(self, name)}")
        if not self.parts:
            raise RunError(f"--parts needs at least one of {', '.join(PARTS)}")
        weights = self.inception_weights
        if weights is not None and "models" not in self.parts:
            raise RunError("--inception-weights measures the models' samples: it needs the part models")
        jobs = self.jobs or (1 if pick_device(self.device).type == "cuda" else usable_cores())
        request = Request(self.out, self.data, self.settings(), self.parts, self.device, jobs, weights)
        if self.plan:
            print("\n".join(time_estimate(request)))
            return 0
        try:
            print(reproduce(request))
        except Stopped as stopped:
            print(f"jlebm: {stopped}")
            return INTERRUPTED
        return 0

    def settings(self) -> Settings:
        """The sizes that the options ask for."""
        settings = QUICK if self.quick else FULL
        if self.steps:
            settings = dataclasses.replace(settings, steps=self.steps)
        if self.seeds:
            settings = dataclasses.replace(settings, seeds=tuple(range(self.seeds)))
        return settings
