"""The training loop: batches, learning rates, metrics, checkpoints, and going on exactly where a run stopped."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from jlebm_fast.models import Batch, LearningStep, NonFiniteLoss

from .checkpoints import load_checkpoint, save_checkpoint
from .errors import CheckpointError, RunError
from .options import TrainOptions
from .progress import progress_bar
from .run_folder import RunConfig, RunFolder, build_model, load_state, pick_device
from .sources import Images, load_images, to_network


class Stopped(RunError):
    """The user or the system asked the run to stop; its state is in the checkpoint."""


class Trainer:
    """A model, its optimisers and its place in the images: all that a checkpoint holds.

    Batches of epoch e follow a permutation drawn from (seed, e) alone, and a step's randomness is a function of the
    seed and the step's number, so a place in the run is just a step number.
    """

    def __init__(self, folder: RunFolder, config: RunConfig, images: Images) -> None:
        options = config.options
        self.folder, self.options, self.images = folder, options, images
        self.device = pick_device(options.device)
        self.steps_per_epoch = len(images.train) // options.batch_size
        if self.steps_per_epoch == 0:
            raise RunError(
                f"--batch-size {options.batch_size} needs at least as many training images, "
                f'"{options.data}" has {len(images.train)}'
            )
        torch.manual_seed(options.seed)
        self.model = build_model(config).to(self.device)
        self.optimisers = self.model.optimisers(options.learning_rates())
        self.initial_rates = {name: opt.param_groups[0]["lr"] for name, opt in self.optimisers.items()}
        # Number of the step that follows each stage of the model's learning.
        self.stage_ends = list(itertools.accumulate(self.model.stages(options.total_steps(self.steps_per_epoch))))
        self.step = 0
        self.sums: dict[str, float] = {}  # of the metrics over the steps since the last line of metrics.jsonl
        self.summed_steps = 0
        self.epoch_order: tuple[int, Tensor] | None = None

    def state(self, metrics_bytes: int) -> dict[str, Any]:
        return {
            "step": self.step,
            "sums": self.sums,
            "summed_steps": self.summed_steps,
            "metrics_bytes": metrics_bytes,
            "model": dict(self.model.state_dict()),
            "optimisers": {name: opt.state_dict() for name, opt in self.optimisers.items()},
        }

    def restore(self) -> int:
        """Takes everything from the checkpoint; returns the length that metrics.jsonl had then."""
        path = self.folder.checkpoint
        state = load_checkpoint(path)
        load_state(self.model, state, path)
        try:
            for name, optimiser in self.optimisers.items():
                optimiser.load_state_dict(state["optimisers"][name])
            self.step, self.sums, self.summed_steps = state["step"], state["sums"], state["summed_steps"]
            return state["metrics_bytes"]
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f'"{path}" does not fit this run: {error}') from error

    @property
    def total_steps(self) -> int:
        """Learning steps of all stages."""
        return self.stage_ends[-1]

    @property
    def stage(self) -> int:
        """The stage that the current step belongs to."""
        return next(i for i, end in enumerate(self.stage_ends) if self.step < end)

    def batch(self) -> Batch:
        """The images of the current step."""
        epoch, position = divmod(self.step, self.steps_per_epoch)
        if self.epoch_order is None or self.epoch_order[0] != epoch:
            # Any fixed mixing of seed and epoch does; the odd factor keeps neighbouring seeds apart.
            mixed = (self.options.seed * 1_000_003 + epoch) % 2**63
            order = torch.randperm(len(self.images.train), generator=torch.Generator().manual_seed(mixed))
            self.epoch_order = (epoch, order)
        size = self.options.batch_size
        rows = self.epoch_order[1][position * size : (position + 1) * size]
        return Batch(to_network(self.images.train[rows], self.device), rows, self.images.train)

    def advance(self) -> dict[str, float]:
        """One learning step; returns its metrics."""
        stage = self.stage
        steps_in_stage = self.step - (self.stage_ends[stage - 1] if stage else 0)
        decay = self.options.lr_decay ** (steps_in_stage // self.steps_per_epoch)
        for name, optimiser in self.optimisers.items():
            for group in optimiser.param_groups:
                group["lr"] = self.initial_rates[name] * decay
        step = LearningStep(self.optimisers, self.options.seed, self.step, stage)
        metrics = self.model.update(self.batch(), step)
        values = {name: value.item() for name, value in metrics.items()}
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.step += 1
        self.summed_steps += 1
        return values

    def metrics_line(self, steps_per_second: float) -> bytes:
        """One line of metrics.jsonl: means over the steps since the line before."""
        line: dict[str, Any] = {"step": self.step, "epoch": round(self.step / self.steps_per_epoch, 4)}
        line |= {name: total / self.summed_steps for name, total in self.sums.items()}
        line["steps_per_second"] = round(steps_per_second, 2)
        self.sums, self.summed_steps = {}, 0
        return (json.dumps(line) + "\n").encode()

    def require_finite_parameters(self) -> None:
        """A loss can be finite while its gradient was not: such parameters must never reach the checkpoint."""
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise NonFiniteLoss(f"parameter {name} is no longer finite")


def train(
    run: pathlib.Path | str, options: TrainOptions, *, resume: bool = False, overwrite: bool = False
) -> RunFolder:
    """Trains a model in a run folder, goes on with the one that is there, or replaces it.

    A resumed run repeats the steps after its last checkpoint and ends with the same bits as one that was never stopped
    (same machine and thread count).

    Raises:
        RunError: bad images, options or run folder, or the training diverged; the last checkpoint stays.
        Stopped: SIGINT or SIGTERM came; a checkpoint was written first.
    """
    folder = RunFolder(pathlib.Path(run))
    if resume:
        config = folder.read_config()
    elif folder.config.exists() and not overwrite:
        raise RunError(
            f'"{folder.path}" already holds a run: pass --resume to go on with it, --overwrite to replace it, '
            "or another folder"
        )
    pick_device(options.device)
    images = load_images(options.data, options.image_size or None)
    fingerprint = images.fingerprint()
    if resume and fingerprint != config.image_fingerprint:
        raise RunError(f'the images of "{options.data}" are not those that "{folder.path}" was trained on')
    config = RunConfig(options, images.size, images.channels, len(images.train), fingerprint)
    try:
        trainer = Trainer(folder, config, images)
    except ValueError as error:
        raise RunError(str(error)) from error
    folder.path.mkdir(parents=True, exist_ok=True)
    if not resume:
        folder.checkpoint.unlink(missing_ok=True)
    folder.write_config(config)
    metrics_bytes = trainer.restore() if folder.checkpoint.exists() else 0
    with open(folder.metrics, "ab") as metrics, _stop_requests() as stop_requested:
        metrics.truncate(metrics_bytes)  # lines after the checkpoint will be written again
        _run(trainer, metrics, stop_requested)
    return folder


def _run(trainer: Trainer, metrics: Any, stop_requested: list[int]) -> None:
    options, folder = trainer.options, trainer.folder
    total = trainer.total_steps

    def checkpoint() -> None:
        trainer.require_finite_parameters()
        metrics.flush()
        os.fsync(metrics.fileno())
        save_checkpoint(folder.checkpoint, trainer.state(metrics.seek(0, os.SEEK_END)))

    try:
        if not folder.checkpoint.exists():
            checkpoint()
        with progress_bar(total=total, initial=trainer.step, unit="step", desc="training") as bar:
            since, since_step = time.perf_counter(), trainer.step
            while trainer.step < total:
                values = trainer.advance()
                bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
                bar.update()
                if trainer.step % options.log_every == 0 or trainer.step == total:
                    now = time.perf_counter()
                    rate = (trainer.step - since_step) / (now - since)
                    metrics.write(trainer.metrics_line(rate))
                    metrics.flush()
                    since, since_step = now, trainer.step
                if trainer.step % options.checkpoint_every == 0 or trainer.step == total or stop_requested:
                    checkpoint()
                if stop_requested and trainer.step < total:
                    raise Stopped(f"stopped after step {trainer.step}; jlebm train {folder.path} --resume goes on")
    except NonFiniteLoss as error:
        raise RunError(
            f"training diverged at step {trainer.step + 1}: {error}; the last good checkpoint is kept in "
            f'"{folder.checkpoint}" (a smaller --energy-lr or --autoencoder-lr usually helps)'
        ) from error


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying from them, so that a step is finished and saved first."""
    received: list[int] = []
    previous: dict[int, Any] = {}
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield received
        return

    def note(number: int, frame: Any) -> None:
        if received:  # a second request does not wait for the step
            raise KeyboardInterrupt
        received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
