"""The cells of the tables: one training run and its measures each, named by the hash of all that decides them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence

from jlebm_fast.models import MODELS, resolve_prior
from jlebm_fast.training.options import TrainOptions

from .settings import Settings

FORMAT = 1  # of a cell's result; a change of what is measured, or how, counts it up
ONE_LAYER = ("lebm", "abp")
ON_VLAE = ("two_stage_vae", "ncp_vae", "multi_ncp")  # their first stage is the VLAE of the same seed, bit for bit
HIERARCHY_DIMS = (2, 2, 2)
# Options that say where, how fast or how chatty, not what.
NOT_PART_OF_A_CELL = ("data", "device", "log_every", "checkpoint_every")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training run with what is measured on it.

    options         of the run
    without_digit   class left out of the training images, for anomaly detection
    measures        names in `measures.MEASURES`
    first_stage     another cell's run that this one goes on from, instead of repeating its first stage
    """

    options: TrainOptions
    measures: tuple[str, ...] = ()
    without_digit: int | None = None
    first_stage: Cell | None = None

    @property
    def run_identity(self) -> str:
        """What decides the trained model, apart from the images: cells that share it share one run."""
        options = {k: v for k, v in dataclasses.asdict(self.options).items() if k not in NOT_PART_OF_A_CELL}
        return json.dumps({"options": options, "without_digit": self.without_digit}, sort_keys=True)

    def key(self, settings: Settings, fingerprint: str) -> str:
        """Name of the cell's files: a hash of its run, its measures with their sizes, and the images."""
        sizes = {"samples": settings.samples, "content_steps": settings.content_steps}
        sizes["classifier_steps"] = settings.classifier_steps
        text = json.dumps([FORMAT, self.run_identity, sorted(self.measures), sizes, fingerprint], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def label(self) -> str:
        options = self.options
        words = [options.model, f"seed {options.seed}"]
        if options.latent_dims == HIERARCHY_DIMS:
            words.append("2-d latents")
        if options.chain_steps != TrainOptions.chain_steps:
            words.append(f"K {options.chain_steps}")
        if options.energy_hidden != TrainOptions.energy_hidden:
            words.append(f"width {options.energy_hidden}")
        if self.without_digit is not None:
            words.append(f"without {self.without_digit}")
        return ", ".join(words)


def model_cell(settings: Settings, data: str, device: str, model: str, seed: int, **changes: object) -> Cell:
    """The run of a model with the sizes of the settings; `changes` replace options."""
    options: dict[str, object] = {
        "data": data,
        "device": device,
        "model": model,
        "seed": seed,
        "latent_dims": (sum(settings.latent_dims),) if model in ONE_LAYER else settings.latent_dims,
        "width": settings.width,
        "reconstruction_weight": settings.reconstruction_weight,
        "steps": settings.steps,
        "batch_size": settings.batch_size,
    }
    prior = resolve_prior(model, "auto")
    if prior in ("ebm", "nce"):
        options["energy_lr"] = settings.energy_rate if prior == "ebm" else settings.contrastive_rate
    first_stage = model_cell(settings, data, device, "vlae", seed) if model in ON_VLAE else None
    return Cell(TrainOptions(**(options | changes)), ("distance",), first_stage=first_stage)


class Plan:
    """All cells that the chosen parts need, each once, with the union of what the parts measure on it."""

    def __init__(self, settings: Settings, data: str, device: str, parts: Sequence[str]) -> None:
        self.settings, self.data, self.device = settings, data, device
        self.cells: dict[str, Cell] = {}
        self.tables: dict[str, dict[tuple, str]] = {}  # part → (row, seed) → run identity
        for part in parts:
            self.tables[part] = {}
            getattr(self, f"_{part}")(self.tables[part])

    def _add(self, cell: Cell) -> str:
        identity = cell.run_identity
        if cell.first_stage is not None:
            self._add(cell.first_stage)
        known = self.cells.get(identity)
        if known is not None:
            cell = dataclasses.replace(known, measures=tuple(sorted({*known.measures, *cell.measures})))
        self.cells[identity] = cell
        return identity

    def _cell(self, model: str, seed: int, **changes: object) -> Cell:
        return model_cell(self.settings, self.data, self.device, model, seed, **changes)

    def _models(self, table: dict[tuple, str]) -> None:
        for seed in self.settings.seeds:
            for model in MODELS:
                table[model, seed] = self._add(self._cell(model, seed))

    def _chain_steps(self, table: dict[tuple, str]) -> None:
        for seed in self.settings.seeds:
            for n_steps in self.settings.chain_steps:
                table[n_steps, seed] = self._add(self._cell("joint", seed, chain_steps=n_steps))

    def _energy_width(self, table: dict[tuple, str]) -> None:
        for seed in self.settings.seeds:
            for width in self.settings.energy_widths:
                cell = self._cell("joint", seed, energy_hidden=width) if width else self._cell("vlae", seed)
                table[width, seed] = self._add(cell)

    def _layers(self, table: dict[tuple, str]) -> None:
        for seed in self.settings.seeds:
            for model in ("joint", "vlae"):
                cell = self._cell(model, seed)
                table[model, seed] = self._add(dataclasses.replace(cell, measures=("distance", "content")))

    def _anomaly(self, table: dict[tuple, str]) -> None:
        for digit in self.settings.digits:
            for model in ("joint", "vlae"):
                cell = self._cell(model, self.settings.seeds[0])
                cell = dataclasses.replace(cell, measures=("anomaly",), without_digit=digit)
                table[model, digit] = self._add(cell)

    def _figures(self, table: dict[tuple, str]) -> None:
        seed = self.settings.seeds[0]
        table["joint", seed] = self._add(self._cell("joint", seed))
        hierarchy = self._cell("joint", seed, latent_dims=HIERARCHY_DIMS)
        table["hierarchy", seed] = self._add(dataclasses.replace(hierarchy, measures=()))
