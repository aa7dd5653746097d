"""A model on its way through the images: everything that a checkpoint holds, on one rank or several."""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch
from torch import Tensor

from jlebm_fast.models import Batch, LearningStep, NonFiniteLoss

from ..errors import CheckpointError, RunError
from .averaging import ParameterAverage, put_parameters
from .chains import PersistentChains
from .checkpoints import load_checkpoint
from .distributed import Ranks
from .run_folder import RunConfig, RunFolder, build_model, load_state
from .schedules import rate_factor
from .sources import Images, to_network
from .steps import TrainingStep


class Trainer:
    """A model, its optimisers and its place in the images: all that a checkpoint holds.

    Batches of epoch e follow a permutation drawn from (seed, e) alone, and a step's randomness is a function of the
    seed and the step's number, so a place in the run is just a step number. With several ranks each takes its rows of
    every batch; nothing in a checkpoint tells how many there were.
    """

    def __init__(self, folder: RunFolder, config: RunConfig, images: Images, ranks: Ranks | None = None) -> None:
        options = config.options
        self.folder, self.options, self.images = folder, options, images
        self.ranks = Ranks() if ranks is None else ranks
        self.device = self.ranks.device
        self.steps_per_epoch = len(images.train) // options.batch_size
        if self.steps_per_epoch == 0:
            raise RunError(
                f"--batch-size {options.batch_size} needs at least as many training images, "
                f'"{options.data}" has {len(images.train)}'
            )
        self.rows = self.ranks.rows(options.batch_size)
        torch.manual_seed(options.seed)
        self.model = build_model(config).to(self.device)
        self.optimisers = self.model.optimisers(options.learning_rates())
        self.initial_rates = {name: opt.param_groups[0]["lr"] for name, opt in self.optimisers.items()}
        # Number of the step that follows each stage of the model's learning.
        self.stage_ends = list(itertools.accumulate(self.model.stages(options.total_steps(self.steps_per_epoch))))
        self.average = ParameterAverage(self.model, options.ema_decay) if options.ema_decay > 0 else None
        self.replay = self._replay_buffer() if options.chains == "persistent" else None
        self.reducers = self._reducers()
        self.step = 0
        self.sums: dict[str, float] = {}  # of the metrics over the steps since the last line of metrics.jsonl
        self.counts: dict[str, int] = {}  # and how many steps had each: stages have metrics of their own
        self.epoch_order: tuple[int, Tensor] | None = None

    def _replay_buffer(self) -> PersistentChains:
        if self.model.energy is None:
            raise RunError("--chains persistent needs a model with an energy prior: there are no prior chains here")
        return PersistentChains(
            self.options.replay_batches,
            self.options.batch_size,
            self.model.latent_dims,
            self.options.refresh_fraction,
            noise_key=LearningStep({}, self.options.seed).noise_key("replay buffer"),
            first=self.rows.start,
            n=self.rows.stop - self.rows.start,
            device=self.device,
        )

    def _reducers(self) -> dict[str, torch.nn.Module]:
        if self.ranks.size == 1:
            return {}
        parameters = {
            name: [p for group in optimiser.param_groups for p in group["params"]]
            for name, optimiser in self.optimisers.items()
        }
        return {name: self.ranks.reducer(found) for name, found in parameters.items() if found}

    def state(self, metrics_bytes: int) -> dict[str, Any]:
        """What a checkpoint holds; all ranks call it, for the chains are spread over them."""
        state: dict[str, Any] = {
            "step": self.step,
            "stage_ends": self.stage_ends,
            "sums": self.sums,
            "counts": self.counts,
            "metrics_bytes": metrics_bytes,
            "model": dict(self.model.state_dict()),
            "optimisers": {name: opt.state_dict() for name, opt in self.optimisers.items()},
        }
        if self.average is not None:
            state["average"] = self.average.values
        if self.replay is not None:
            state["replay"] = self.ranks.gather(self.replay.states, dim=1)
        return state

    def restore(self) -> int:
        """Takes everything from the checkpoint; returns the length that metrics.jsonl had then."""
        path = self.folder.checkpoint
        state = load_checkpoint(path)
        load_state(self.model, state, path)
        try:
            for name, optimiser in self.optimisers.items():
                optimiser.load_state_dict(state["optimisers"][name])
            self.step, self.sums, self.counts = state["step"], state["sums"], state["counts"]
            if self.average is not None:
                self.average.load(state["average"])
            if self.replay is not None:
                self.replay.load(state["replay"])
            metrics_bytes = state["metrics_bytes"]
            past = [end for end in state["stage_ends"][:-1] if end <= self.step]
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f'"{path}" does not fit this run: {error}') from error
        if past != self.stage_ends[: len(past)]:
            raise RunError(
                f"--resume cannot change --steps or --epochs now: stage {len(past)} of this model's learning ended at "
                f"step {past[-1]}"
            )
        return metrics_bytes

    @property
    def total_steps(self) -> int:
        """Learning steps of all stages."""
        return self.stage_ends[-1]

    @property
    def stage(self) -> int:
        """The stage that the current step belongs to."""
        return next(i for i, end in enumerate(self.stage_ends) if self.step < end)

    def batch(self) -> Batch:
        """This rank's images of the current step."""
        epoch, position = divmod(self.step, self.steps_per_epoch)
        if self.epoch_order is None or self.epoch_order[0] != epoch:
            # Any fixed mixing of seed and epoch does; the odd factor keeps neighbouring seeds apart.
            mixed = (self.options.seed * 1_000_003 + epoch) % 2**63
            order = torch.randperm(len(self.images.train), generator=torch.Generator().manual_seed(mixed))
            self.epoch_order = (epoch, order)
        size = self.options.batch_size
        rows = self.epoch_order[1][position * size : (position + 1) * size][self.rows]
        return Batch(to_network(self.images.train[rows], self.device), rows, self.images.train)

    def set_learning_rates(self) -> None:
        """The learning rates of the current step."""
        start, end = ([0, *self.stage_ends])[self.stage], self.stage_ends[self.stage]
        options = self.options
        factor = rate_factor(
            options.lr_schedule,
            self.step - start,
            end - start,
            self.steps_per_epoch,
            decay=options.lr_decay,
            warmup_steps=options.warmup_steps,
        )
        for name, optimiser in self.optimisers.items():
            for group in optimiser.param_groups:
                group["lr"] = self.initial_rates[name] * factor

    def learning_step(self) -> TrainingStep:
        """What the model meets in the current step."""
        return TrainingStep(
            self.optimisers,
            self.options.seed,
            self.step,
            self.stage,
            self.rows.start,
            ranks=self.ranks,
            reducers=self.reducers,
            replay=self.replay,
            clip_norm=self.options.clip_norm,
        )

    def advance(self) -> dict[str, float]:
        """One learning step; returns its metrics, means over the whole batch."""
        self.set_learning_rates()
        metrics = self.model.update(self.batch(), self.learning_step())
        if self.average is not None:
            self.average.update(self.model, self.step + 1)
        means = self.ranks.mean(torch.stack([value.detach().float() for value in metrics.values()]))
        values = dict(zip(metrics, means.tolist(), strict=True))
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.step += 1
        if self.average is not None and self.step in self.stage_ends[:-1]:
            # a second stage learns of what the first one's average makes of images, as what is sampled later does
            put_parameters(dict(self.model.named_parameters()), self.average.values)
        return values

    def metrics_line(self, steps_per_second: float) -> bytes:
        """One line of metrics.jsonl: means over the steps since the line before."""
        line: dict[str, Any] = {"step": self.step, "epoch": round(self.step / self.steps_per_epoch, 4)}
        line |= {name: total / self.counts[name] for name, total in self.sums.items()}
        line["steps_per_second"] = round(steps_per_second, 2)
        self.sums, self.counts = {}, {}
        return (json.dumps(line) + "\n").encode()

    def require_finite_parameters(self) -> None:
        """A loss can be finite while an optimiser's step was not: such parameters must never reach the checkpoint."""
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise NonFiniteLoss(f"parameter {name} is no longer finite")
