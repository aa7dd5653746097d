"""The training loop: where a run starts, what it writes when, and going on exactly where it stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import pathlib
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import torch

from jlebm_fast.models import NonFiniteLoss, used_fields

from ..errors import CheckpointError, RunError
from .checkpoints import save_checkpoint
from .distributed import Ranks, joined_ranks, local_device
from .options import TrainOptions
from .progress import progress_bar
from .run_folder import RunConfig, RunFolder, pick_device
from .sources import Images, load_images
from .trainer import Trainer


class Stopped(RunError):
    """The user or the system asked the run to stop; its state is in the checkpoint.

    exit_code   of the command line: 128 and the number of the signal
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message, shared=True)
        self.exit_code = 128 + number


def train(
    run: pathlib.Path | str, options: TrainOptions, *, resume: bool = False, overwrite: bool = False
) -> RunFolder:
    """Trains a model in a run folder, goes on with the one that is there, or replaces it.

    A resumed run repeats the steps after its last checkpoint and ends with the same bits as one that was never stopped
    (same machine, thread count and number of ranks). Under torchrun every rank calls this; rank 0 alone writes, and
    all of them read the same folder.

    Raises:
        RunError: bad images, options or run folder, the training diverged, or another rank ended; the last checkpoint
            stays.
        Stopped: SIGINT or SIGTERM came; a checkpoint was written first.
    """
    require_one_intent(resume, overwrite)
    if not str(run):
        raise RunError('the run folder must be a path, got "": give it a name', shared=True)
    folder = RunFolder(pathlib.Path(run))
    with joined_ranks(local_device(pick_device(options.device))) as ranks, contextlib.ExitStack() as stack:
        trainer, config = _prepared(folder, options, ranks, resume=resume, overwrite=overwrite)
        if ranks.is_first:
            print(trainer.images.summary, flush=True)
        metrics = stack.enter_context(_opened(folder, ranks, may_exist=resume or overwrite))
        metrics_bytes = _restored(trainer, ranks) if resume else 0
        if ranks.is_first:
            _begin(trainer, config, resume=resume)
            metrics.truncate(metrics_bytes)  # lines after the checkpoint will be written again
        stop_requested = stack.enter_context(_stop_requests())
        _run(trainer, metrics, stop_requested)
    return folder


def require_one_intent(resume: bool, overwrite: bool) -> None:
    """
    Raises:
        RunError: a run shall be both kept and replaced.
    """
    if resume and overwrite:
        raise RunError("--resume keeps the run that is in the folder, --overwrite replaces it: give one", shared=True)


def _require_no_run(folder: RunFolder) -> None:
    if folder.config.exists():
        raise RunError(
            f'"{folder.path}" already holds a run: pass --resume to go on with it, --overwrite to replace it, '
            "or another folder"
        )
    left = folder.parts_of_a_run()
    if left:
        raise RunError(
            f'"{folder.path}" holds {" and ".join(left)} of a run whose {folder.config.name} is missing: put that back '
            "and pass --resume to go on with it, --overwrite to replace the run, or another folder"
        )


def _prepared(
    folder: RunFolder, options: TrainOptions, ranks: Ranks, *, resume: bool, overwrite: bool
) -> tuple[Trainer, RunConfig]:
    """The trainer, once every rank is found to want the same; nothing is written yet.

    Raises:
        RunError: this rank, or another one, cannot start, or they differ.
    """
    trainer, error, said = None, None, {}
    try:
        saved = folder.read_config() if resume else None
        if not resume and not overwrite and ranks.is_first:
            _require_no_run(folder)
        images = load_images(options.data, options.image_size or None)
        config = _config(options, images)
        if saved is not None:
            folder.require_same_images(saved, images, in_order=True)
        ranks.rows(options.batch_size)
        said = {"--" + name.replace("_", "-"): value for name, value in dataclasses.asdict(options).items()}
        said |= {"--resume": resume, "a fingerprint of the images": config.image_fingerprint}
    except RunError as found:
        error = found
    ranks.agree(error, said)
    error = None
    try:
        trainer = Trainer(folder, config, images, ranks)
    except ValueError as found:
        error = RunError(str(found))
    except RunError as found:
        error = found
    ranks.agree(error, {})
    return trainer, config


def _opened(folder: RunFolder, ranks: Ranks, *, may_exist: bool) -> BinaryIO:
    """metrics.jsonl, which rank 0 opens and locks; what the other ranks would write goes nowhere.

    Raises:
        RunError: another process trains in the folder, or it cannot be written.
    """
    metrics, error = io.BytesIO(), None
    try:
        if ranks.is_first:
            folder.path.mkdir(parents=True, exist_ok=True)
            metrics = folder.open_metrics()
            if not may_exist:  # one may have begun since the images were read
                _require_no_run(folder)
    except RunError as found:
        error = found
    except OSError as found:
        error = RunError(f'{found.strerror or found}: "{found.filename or folder.path}"')
    if error is not None:
        metrics.close()
    ranks.agree(error, {})
    return metrics


def _begin(trainer: Trainer, config: RunConfig, *, resume: bool) -> None:
    """Takes away what will not be true of the run any more, and writes its configuration."""
    folder = trainer.folder
    if not resume:
        if folder.config.exists() or folder.parts_of_a_run():
            folder.remove_products()
        folder.checkpoint.unlink(missing_ok=True)
    elif trainer.step < trainer.total_steps:
        folder.remove_evaluation()
    folder.write_config(config)


def _restored(trainer: Trainer, ranks: Ranks) -> int:
    """The length of metrics.jsonl at the checkpoint that the trainer goes on from; 0 where there is none yet.

    Raises:
        RunError: the checkpoint is missing, damaged or of another run, or lies behind the end that is asked for.
    """
    metrics_bytes, error, folder = 0, None, trainer.folder
    try:
        if folder.checkpoint.exists():
            metrics_bytes = trainer.restore()
            _require_end_ahead(trainer)
            if ranks.is_first:
                metrics_bytes = folder.metrics_until(trainer.step, metrics_bytes)
        elif ranks.is_first and folder.metrics.stat().st_size > 0:
            raise CheckpointError(
                f'"{folder.path}" has metrics but no checkpoint to go on from: put "{folder.checkpoint.name}" back, '
                "or pass --overwrite instead of --resume to begin again"
            )
    except RunError as found:
        error = found
    ranks.agree(error, {"the step of the checkpoint": trainer.step})
    return metrics_bytes


def _require_end_ahead(trainer: Trainer) -> None:
    options, total = trainer.options, trainer.total_steps
    if total < trainer.step:
        asked = f"--epochs {options.epochs}" if options.epochs else f"--steps {options.steps}"
        raise RunError(
            f"{asked} ends at step {total}, but the run has already come to step {trainer.step}: ask for at least as "
            "many, or train another run"
        )


def _config(options: TrainOptions, images: Images) -> RunConfig:
    return RunConfig(options, images.size, images.channels, len(images.train), images.fingerprint())


def _run(trainer: Trainer, metrics: Any, stop_requested: list[int]) -> None:
    options, folder, ranks = trainer.options, trainer.folder, trainer.ranks
    total = trainer.total_steps

    def checkpoint() -> None:
        trainer.require_finite_parameters()
        with writing():
            metrics.flush()
            if ranks.is_first:
                os.fsync(metrics.fileno())
        state = trainer.state(metrics.seek(0, os.SEEK_END))
        if ranks.is_first:
            with writing():
                save_checkpoint(folder.checkpoint, state)
        saved.append(trainer.step)

    @contextmanager
    def writing() -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno is None:  # not the system's: a TimeoutError that somebody raised
                raise
            kept = f"the checkpoint of step {saved[-1]} is kept" if saved else "no checkpoint could be written yet"
            then = f"then jlebm train {folder.path} --resume {'goes on' if saved else 'begins'}"
            raise RunError(
                f'training ended at step {trainer.step}, "{folder.path}" cannot be written to: {error.strerror}; '
                f"{kept}: make room, {then}"
            ) from error

    saved = [trainer.step] if trainer.step else []
    try:
        if trainer.step == 0:
            checkpoint()
        bar = progress_bar(total=total, initial=trainer.step, unit="step", desc="training", disable=not ranks.is_first)
        with bar:
            since, since_step = time.perf_counter(), trainer.step
            while trainer.step < total:
                values = trainer.advance()
                stop = _stop_agreed(ranks, stop_requested)
                bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
                bar.update()
                # a line at the end of each stage: none has the mean of losses that are not of one kind
                if trainer.step % options.log_every == 0 or trainer.step in trainer.stage_ends:
                    now = time.perf_counter()
                    rate = (trainer.step - since_step) / (now - since)
                    with writing():
                        metrics.write(trainer.metrics_line(rate))
                        metrics.flush()
                    since, since_step = now, trainer.step
                if trainer.step % options.checkpoint_every == 0 or trainer.step == total or stop:
                    checkpoint()
                if stop and trainer.step < total:
                    number = next(number for asked in ranks.everyone(stop_requested[:1]) for number in asked)
                    raise Stopped(
                        f"stopped after step {trainer.step}; jlebm train {folder.path} --resume goes on", number
                    )
    except NonFiniteLoss as error:
        raise RunError(
            f"training diverged at step {trainer.step + 1}: {error}; the last good checkpoint is kept in "
            f'"{folder.checkpoint}" (a run begun anew with {_remedy(options, trainer.step, str(error))} usually helps)',
            shared=True,
        ) from error


def _remedy(options: TrainOptions, step: int, reason: str) -> str:
    """The options that a divergence after `step` whole steps can come from; in the first step no rate has acted yet."""
    used = used_fields(options.model, options.resolved_prior)
    remedies = {
        "prior": ["a smaller --step-size", "fewer --chain-steps"] if "chain_steps" in used else [],
        "posterior": ["a smaller --posterior-step-size", "fewer --posterior-steps"]
        if "posterior_steps" in used
        else [],
    }
    rates = {
        "prior": ["a smaller --energy-lr"] if "energy_hidden" in used else [],
        "posterior": ["a smaller --autoencoder-lr"],
    }
    chain = re.search(r"because the (prior|posterior) chain left", reason)
    if chain is not None:
        found = remedies[chain[1]] + (rates[chain[1]] if step else [])
    elif step:
        found = rates["prior"] + rates["posterior"]
    else:
        found = [*remedies["prior"], *remedies["posterior"], "a smaller --reconstruction-weight"]
    return " or ".join([", ".join(found[:-1]), found[-1]]) if len(found) > 1 else found[0]


def _stop_agreed(ranks: Ranks, stop_requested: list[int]) -> bool:
    """Whether any rank was asked to stop: a signal reaches them at different steps, and they must stop at the same."""
    if ranks.size == 1:
        return bool(stop_requested)
    return ranks.mean(torch.tensor(float(bool(stop_requested)), device=ranks.device)).item() > 0


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying from them, so that a step is finished and saved first."""
    received: list[int] = []
    previous: dict[int, Any] = {}
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield received
        return

    def note(number: int, frame: Any) -> None:
        # A second request does not wait for the step. (The first may come twice: from the terminal and the launcher.)
        if number in received:
            raise KeyboardInterrupt
        received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
