"""The commands of `jlebm` as typed dataclasses: fields are options, `execute` does the work, returns the exit code."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from jlebm_fast.experiments.command import Reproduce
from jlebm_fast.status import print_versions

from ..errors import RunError
from .options import TrainOptions, require_seed
from .run_folder import RunFolder

Run = tyro.conf.Positional[pathlib.Path]
Device = Literal["auto", "cpu", "cuda"]
Count = Annotated[int, tyro.conf.arg(aliases=["-n"])]


@dataclasses.dataclass(frozen=True)
class Train:
    """Learn a joint latent energy prior with its multi-layer generator on images, or one of its rivals (--model), into
    a run folder."""

    run: Run = pathlib.Path("runs/digits")
    """Run folder: config, metrics, checkpoint and figures."""
    resume: bool = False
    """Go on with the run that is in the folder, bit for bit as if it had never stopped."""
    overwrite: bool = False
    """Replace the run that is in the folder."""
    figures: bool = True
    """Draw the figures when training is done."""
    training: TrainOptions = dataclasses.field(default_factory=TrainOptions)

    def __post_init__(self) -> None:
        from .loop import require_one_intent

        require_one_intent(self.resume, self.overwrite)

    def execute(self) -> int:
        from .distributed import rank_and_size
        from .figures import make_figures
        from .loop import train

        folder = train(self.run, self.training, resume=self.resume, overwrite=self.overwrite)
        if rank_and_size()[0] > 0:  # of several, one goes on to draw
            return 0
        print(folder.checkpoint)
        if self.figures:
            # The run itself has found that the images are its own.
            options = {"seed": self.training.seed, "device": self.training.device, "check_images": False}
            _print_paths(make_figures(folder.path, **options))
        return 0


class _Seeded:
    """A command whose --seed is checked where it is parsed, as that of a training run is."""

    seed: int

    def __post_init__(self) -> None:
        require_seed(self.seed)


@dataclasses.dataclass(frozen=True)
class Sample(_Seeded):
    """Draw images from a run's prior, all in one call."""

    run: Run
    """Run folder."""
    n: Count = 100
    """Samples to draw."""
    seed: int = 0
    """Same seed, same samples."""
    out: pathlib.Path | None = None
    """Folder for samples.npz and samples.png; by default RUN/samples."""
    png_files: bool = False
    """Also write one PNG file per sample."""
    chain_steps: int = 0
    """Langevin steps of the prior chain; 0 for as many as in training. Runs with --chains persistent want more."""
    device: Device = "auto"
    """auto takes a GPU if there is one."""

    def execute(self) -> int:
        from .samples import sample_run

        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        out = sample_run(**options)
        _print_paths([out / "samples.npz", out / "samples.png"])
        return 0


@dataclasses.dataclass(frozen=True)
class Figures(_Seeded):
    """Draw a run's figures anew: samples, reconstructions, layers, traverse, long chain, learning curves."""

    run: Run
    """Run folder."""
    seed: int = 0
    """Of the samples that are drawn."""
    data: str | None = None
    """Where the run's images are now, if not where they were; they must be the same."""
    device: Device = "auto"
    """auto takes a GPU if there is one."""

    def execute(self) -> int:
        from .figures import make_figures

        _print_paths(make_figures(self.run, seed=self.seed, data=self.data, device=self.device))
        return 0


@dataclasses.dataclass(frozen=True)
class Evaluate(_Seeded):
    """Measure a run: Fréchet distances of samples to held-out images, reconstruction error, mixing of long prior chains
    (ESS, R-hat), their bias against exact ones (MALA), energies of posterior and prior; table, JSON and figures."""

    run: Run
    """Run folder."""
    n: Count = 10_000
    """Samples to draw."""
    seed: int = 0
    """Of the samples."""
    frechet: bool = True
    """Measure the Fréchet distance, in the features of a small classifier trained on the run's images; they need class
    labels for it."""
    inception_weights: pathlib.Path | None = None
    """Also measure the FID: the Inception net as torch-fidelity distributes it, weights-inception-2015-12-05-….pth."""
    long_steps: int = 2000
    """Langevin steps of the long chains."""
    data: str | None = None
    """Where the run's images are now, if not where they were; they must be the same."""
    device: Device = "auto"
    """auto takes a GPU if there is one."""

    def execute(self) -> int:
        from .evaluation import NotWritten, evaluate, table

        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        try:
            result = evaluate(**options)
        except NotWritten as error:
            print(table(error.result))  # minutes of work
            raise
        print(table(result))
        folder = RunFolder(self.run)
        _print_paths([folder.evaluation, *sorted(folder.figures.glob("evaluation_*.png"))])
        return 0


@dataclasses.dataclass(frozen=True)
class Verify:
    """Check every backend on an energy: parity with the oracle and laws of the noise, as a short certificate."""

    run: tyro.conf.Positional[pathlib.Path | None] = None
    """Run folder whose energy is checked; without one, a fresh net."""
    device: Device = "auto"
    """auto takes a GPU if there is one."""

    def execute(self) -> int:
        import jlebm_fast as jf

        from .run_folder import open_run, pick_device

        z = None
        if self.run is None:
            energy = jf.EnergyMLP((2, 2, 2, 10), hidden=50, depth=4).to(pick_device(self.device))
        else:
            model = open_run(self.run, self.device)[2]
            if not model.has_prior_chain:
                raise RunError(f'the prior of the run in "{self.run}" is no energy: there is nothing to verify')
            energy, z = model.prior_chain(), model.standard_normal(64)
        return 0 if jf.verify(energy, z).passed else 1


@dataclasses.dataclass(frozen=True)
class Info:
    """Show versions and backends, what is missing and how to get it; with a run folder, also that run."""

    run: tyro.conf.Positional[pathlib.Path | None] = None
    """Run folder."""

    def execute(self) -> int:
        print_versions()
        if self.run is not None:
            _print_run(RunFolder(self.run))
        return 0


@dataclasses.dataclass(frozen=True)
class Bench:
    """Time the kernels against their rivals (jlebm bench --help lists its options)."""


COMMANDS = {
    "train": Train,
    "sample": Sample,
    "figures": Figures,
    "evaluate": Evaluate,
    "reproduce": Reproduce,
    "bench": Bench,
    "verify": Verify,
    "info": Info,
}


def _print_paths(paths: Sequence[pathlib.Path]) -> None:
    for path in paths:
        print(path)


def _print_run(folder: RunFolder) -> None:
    config = folder.read_config()
    options = config.options
    print(
        f"\nrun {folder.path}: model {options.model}, prior {options.resolved_prior}, latent dims {options.latent_dims}"
    )
    print(
        f"images: {options.data}, {config.n_images} of {config.image_size} pixels, {config.image_channels} channel(s)"
    )
    lines = folder.read_metrics() if folder.metrics.is_file() else []
    print("metrics: " + (json.dumps(lines[-1]) if lines else "none yet"))
    print(f"checkpoint: {folder.checkpoint if folder.checkpoint.is_file() else 'none yet'}")
