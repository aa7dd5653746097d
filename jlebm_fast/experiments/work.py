"""Running cells: each trains in its own folder, can be stopped between any two steps, and is never run twice."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import signal
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from jlebm_fast.errors import RunError
from jlebm_fast.models import NonFiniteLoss
from jlebm_fast.training.checkpoints import load_checkpoint, save_checkpoint
from jlebm_fast.training.distributed import Ranks
from jlebm_fast.training.files import write_atomically
from jlebm_fast.training.progress import progress_bar
from jlebm_fast.training.run_folder import RunConfig, RunFolder, pick_device
from jlebm_fast.training.samples import DivergedSamples
from jlebm_fast.training.sources import Images
from jlebm_fast.training.trainer import Trainer

from .cells import Cell
from .classifier import cached_classifier
from .measures import MEASURES, Subject
from .settings import Settings

CHECKPOINT_SECONDS = 60.0  # between checkpoints: what a killed run loses at most
METRICS_EVERY = 100  # steps


class StopRequested(Exception):
    """The user stopped the experiments; what was trained so far is in its checkpoint."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where everything is kept, and with what.

    root          the folder of the experiments
    fingerprint   of the training images
    device        "cpu" or "cuda"
    """

    root: pathlib.Path
    settings: Settings
    fingerprint: str
    device: str

    def result(self, cell: Cell) -> pathlib.Path:
        return self.root / "cells" / f"{cell.key(self.settings, self.fingerprint)}.json"

    def run(self, cell: Cell) -> RunFolder:
        """The run folder of a cell; cells that differ only in what is measured share it."""
        bare = dataclasses.replace(cell, measures=())
        return RunFolder(self.root / "runs" / bare.key(Settings(), self.fingerprint))

    @property
    def images(self) -> pathlib.Path:
        return self.root / "images.npz"

    @property
    def classifier(self) -> pathlib.Path:
        return self.root / "classifier.safetensors"


def save_images(path: pathlib.Path, images: Images) -> None:
    """Keeps decoded images, so that the cells need not decode 70,000 files each."""
    temporary = path.with_name(f".{path.stem}.tmp.npz")
    np.savez(
        temporary,
        name=images.name,
        train=images.train.numpy(),
        held_out=images.held_out.numpy(),
        train_labels=images.train_labels.numpy(),
        held_out_labels=images.held_out_labels.numpy(),
    )
    os.replace(temporary, path)


def read_images(path: pathlib.Path) -> Images:
    """What `save_images` kept.

    Raises:
        RunError: the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as found:
            tensors = {key: torch.from_numpy(found[key]) for key in found.files if key != "name"}
            return Images(name=str(found["name"]), **tensors)
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise RunError(f'"{path}" is damaged: remove it, and the same command reads the images again') from error


def read_result(path: pathlib.Path) -> dict[str, Any] | None:
    """The result of a cell; None where there is none yet.

    Raises:
        RunError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if {"label", "measures", "seconds"} <= result.keys():
            return result
    except (ValueError, AttributeError):
        pass
    raise RunError(f'"{path}" is damaged: remove it, and the same command measures this cell again')


def without(images: Images, digit: int | None) -> Images:
    """The same images with one class left out of the training set."""
    if digit is None:
        return images
    kept = images.train_labels != digit
    return dataclasses.replace(images, train=images.train[kept], train_labels=images.train_labels[kept])


def train_cell(place: Place, cell: Cell, images: Images, stop: Callable[[], bool]) -> Trainer:
    """The trained model of a cell: from its checkpoint, from another cell's first stage, or from the start.

    Raises:
        StopRequested: `stop()` said so; the checkpoint holds the place.
        NonFiniteLoss: the training diverged.
    """
    folder, subset = place.run(cell), without(images, cell.without_digit)
    config = RunConfig(cell.options, images.size, images.channels, len(subset.train), subset.fingerprint())
    trainer = Trainer(folder, config, subset, Ranks(device=pick_device(cell.options.device)))
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write_config(config)
    metrics_bytes = 0
    if folder.checkpoint.is_file():
        metrics_bytes = trainer.restore()
    elif cell.first_stage is not None:
        first = place.run(cell.first_stage)
        trainer.model.load_state_dict(load_checkpoint(first.checkpoint)["model"], strict=False)
        trainer.step = trainer.stage_ends[0]

    with open(folder.metrics, "ab") as metrics:
        metrics.truncate(metrics_bytes)

        def checkpoint() -> None:
            trainer.require_finite_parameters()
            metrics.flush()
            save_checkpoint(folder.checkpoint, trainer.state(metrics.tell()))

        saved, since, since_step = time.monotonic(), time.perf_counter(), trainer.step
        while trainer.step < trainer.total_steps:
            trainer.advance()
            if trainer.step % METRICS_EVERY == 0 or trainer.step in trainer.stage_ends:
                now = time.perf_counter()
                metrics.write(trainer.metrics_line((trainer.step - since_step) / (now - since)))
                since, since_step = now, trainer.step
            if stop():
                checkpoint()
                raise StopRequested
            if time.monotonic() - saved > CHECKPOINT_SECONDS or trainer.step == trainer.total_steps:
                checkpoint()
                saved = time.monotonic()
    return trainer


def run_cell(place: Place, cell: Cell, images: Images, stop: Callable[[], bool]) -> dict[str, Any]:
    """Trains and measures a cell, and writes its result; a finished one is read back."""
    path = place.result(cell)
    found = read_result(path)
    if found is not None:
        return found
    started = time.perf_counter()
    result: dict[str, Any] = {"label": cell.label, "run": place.run(cell).path.name, "measures": {}}
    result["options"] = dataclasses.asdict(cell.options)
    del result["options"]["data"]  # a path of this machine
    try:
        trainer = train_cell(place, cell, images, stop)
        device = trainer.device
        classifier = cached_classifier(place.classifier, images, place.settings.classifier_steps, device)
        subject = Subject(trainer.model.eval(), cell, images, classifier, place.settings)
        for name in cell.measures:
            result["measures"][name] = MEASURES[name](subject)
            if stop():
                raise StopRequested
    except (NonFiniteLoss, DivergedSamples) as error:  # the same again tomorrow: a result, and the report shows it
        result["failed"] = f"diverged: {error}"
    result["seconds"] = round(time.perf_counter() - started, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
    return result


_images: Images | None = None  # of a worker process: read once
_fingerprint = ""  # theirs
_stop: Any = None


def _start_worker(images: pathlib.Path, threads: int, stop: Any) -> None:
    global _images, _fingerprint, _stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process tells when to stop
    threading.Thread(target=_end_with_first_process, daemon=True).start()
    torch.set_num_threads(threads)
    _images, _stop = read_images(images), stop
    _fingerprint = _images.fingerprint()


def _end_with_first_process() -> None:
    """Ends this worker once the first process was killed: the next call would train the same cells beside it."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(place: Place, cell: Cell) -> dict[str, Any] | None:
    if _fingerprint != place.fingerprint:  # results are named by it
        raise RunError(
            f'"{place.images}" was replaced by other images while the experiments ran: the same command begins again '
            "with those that are there now"
        )
    try:
        return run_cell(place, cell, _images, _stop.is_set)
    except StopRequested:
        return None


@contextlib.contextmanager
def _stopping(event: Any) -> Iterator[None]:
    """SIGINT and SIGTERM set the event: every cell saves itself and ends."""

    def note(number: int, frame: Any) -> None:
        event.set()

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end_the_others(running: Iterable[concurrent.futures.Future], stop: Any) -> None:
    """Those that train save themselves and end, those that have not begun do not."""
    stop.set()
    for future in running:
        future.cancel()


def run_cells(place: Place, cells: dict[str, Cell], jobs: int, threads: int) -> bool:
    """Runs all cells that have no result yet, `jobs` at a time; False if the user stopped it before the end.

    Cells whose first stage is another's wait for that one.
    """
    waiting = {identity: cell for identity, cell in cells.items() if not place.result(cell).is_file()}
    if not waiting:
        return True
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    running: dict[concurrent.futures.Future, str] = {}
    pool = concurrent.futures.ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_start_worker, initargs=(place.images, threads, stop)
    )
    bar = progress_bar(total=len(cells), initial=len(cells) - len(waiting), desc="cells", unit="cell")
    try:
        with pool, bar, _stopping(stop):
            while waiting or running:
                ready = [
                    identity
                    for identity, cell in waiting.items()
                    if cell.first_stage is None or place.result(cells[cell.first_stage.run_identity]).is_file()
                ]
                for identity in ready if not stop.is_set() else []:
                    running[pool.submit(_work, place, waiting.pop(identity))] = identity
                if not running:
                    break
                done, _ = concurrent.futures.wait(running, timeout=1.0, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    running.pop(future)
                    try:
                        result = None if future.cancelled() else future.result()
                    except (RunError, OSError):
                        _end_the_others(running, stop)
                        raise
                    if result is not None:
                        bar.set_postfix_str(f"{result['label']}: {result['seconds']:.0f} s", refresh=False)
                        bar.update()
                if stop.is_set():
                    _end_the_others(running, stop)
    except concurrent.futures.process.BrokenProcessPool as error:
        if not stop.is_set():  # else it was a SIGTERM to all processes at once
            raise RunError(
                "a worker process was killed (out of memory?); the same command goes on, fewer --jobs need less"
            ) from error
    return not stop.is_set()
