"""The whole of `jlebm reproduce mnist`: plan, images, classifier, cells, tables, figures, report."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from jlebm_fast.errors import ImageError, RunError
from jlebm_fast.models import Batch, LearningRates, LearningStep, build
from jlebm_fast.training.files import write_atomically
from jlebm_fast.training.inception import inception_fid, require_inception
from jlebm_fast.training.progress import progress_bar
from jlebm_fast.training.run_folder import locked, open_run, pick_device
from jlebm_fast.training.samples import decoded_pixels, drawn_prior
from jlebm_fast.training.sources import Images, load_images, to_network

from .cells import ONE_LAYER, Cell, Plan
from .classifier import GOOD_ENOUGH, accuracy, cached_classifier
from .drawing import Drawing, draw_curves, draw_hierarchy, draw_joint, draw_samples_of_all
from .measures import SAMPLE_SEED
from .report import report_html
from .settings import Settings
from .tables import Results, Table, all_tables
from .work import Place, read_images, read_result, run_cells, save_images, without

MEASURE_SECONDS = 20.0  # of drawing and measuring samples, per cell, in the time estimate
TIMED_UPDATES = 5


class Stopped(RunError):
    """The user stopped it; everything so far is kept."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    root: pathlib.Path
    data: str
    settings: Settings
    parts: tuple[str, ...]
    device: str
    jobs: int
    inception_weights: pathlib.Path | None = None


def reproduce(request: Request) -> pathlib.Path:
    """Runs what is missing and writes report.html, results.json and figures/; returns the report's path.

    Raises:
        RunError: the images are of no use, another process is at work here, a file in the folder is damaged, or the
            Inception net was asked for and is not there.
        Stopped: the user stopped it; the same command goes on.
    """
    device = pick_device(request.device)
    if request.inception_weights is not None:
        require_inception(request.inception_weights)
    request.root.mkdir(parents=True, exist_ok=True)
    with open(request.root / ".lock", "wb") as file:
        if not locked(file):
            raise RunError(
                f'another process is at work in "{request.root}": wait until it has ended, or take another --out'
            )
        return _reproduce(request, _images(request), device)


def _reproduce(request: Request, images: Images, device: torch.device) -> pathlib.Path:
    place = Place(request.root, request.settings, images.fingerprint(), device.type)
    plan = Plan(request.settings, request.data, device.type, request.parts)
    classifier = cached_classifier(place.classifier, images, request.settings.classifier_steps, device)
    good = accuracy(classifier, images, device)
    threads = max(1, torch.get_num_threads() // request.jobs)
    started = time.monotonic()
    done = run_cells(place, plan.cells, request.jobs, threads)
    found = _results(place, plan)
    facts = _facts(request, images, good, found, len(plan.cells), time.monotonic() - started)
    results = Results(plan, found)
    tables = all_tables(results)
    if request.inception_weights is not None:
        tables.append(_inception_table(request, place, results, images, device))
    drawings = _drawings(place, plan, results, images) if "figures" in plan.tables else []
    page = report_html("Joint latent energy priors on MNIST", facts, tables, drawings)
    write_atomically(request.root / "report.html", page.encode())
    content = {
        "settings": dataclasses.asdict(request.settings),
        "classifier_accuracy": good,
        "facts": facts,
        "tables": [table._asdict() for table in tables],
        "cells": list(found.values()),
    }
    write_atomically(request.root / "results.json", (json.dumps(content, indent=1) + "\n").encode())
    if not done:
        raise Stopped(
            f"stopped with {len(found)} of {len(plan.cells)} cells done; the same command goes on "
            f'("{request.root / "report.html"}" has what there is)'
        )
    return request.root / "report.html"


def _images(request: Request) -> Images:
    """The decoded images, which are then kept in the folder; only for who holds its lock, for others read the file."""
    images, are_kept = _read(request)
    if not are_kept:
        request.root.mkdir(parents=True, exist_ok=True)
        save_images(request.root / "images.npz", images)
    return images


def _read(request: Request) -> tuple[Images, bool]:
    """The decoded images, and whether they are the folder's own copy, which is taken where it is of the same source."""
    path = request.root / "images.npz"
    if path.is_file():
        images = read_images(path)
        if images.name == request.data:
            # to compare them would be to decode 70,000 files at every call
            print(
                f'jlebm: the images are those that "{path}" kept of "{request.data}"; if that has changed since, '
                "remove the copy",
                file=sys.stderr,
            )
            _require_enough(request, images)
            return images, True
    images = load_images(request.data)
    images.require_classes()
    _require_enough(request, images)
    return images, False


def _require_enough(request: Request, images: Images) -> None:
    """A batch of training images for every cell, and images of every class that is to be told from the others; said
    before the classifier is trained."""
    missing = [digit for digit in request.settings.digits if not (images.held_out_labels == digit).any()]
    if missing and "anomaly" in request.parts:
        raise ImageError(f'"{request.data}" has no held-out images of class {missing[0]}; the anomaly table needs them')
    batch = request.settings.batch_size
    for digit in (None, *(request.settings.digits if "anomaly" in request.parts else ())):
        found = len(without(images, digit).train)
        if found < batch:
            which = "" if digit is None else f" of other classes than {digit}"
            raise ImageError(
                f'"{request.data}" has {found} training images{which}; a batch of the experiments takes {batch}: '
                "use more images"
            )


def _results(place: Place, plan: Plan) -> dict[str, dict[str, Any]]:
    found = {}
    for identity, cell in plan.cells.items():
        result = read_result(place.result(cell))
        if result is not None:
            found[identity] = result
    return found


def _facts(
    request: Request, images: Images, good: float, found: dict[str, Any], n_cells: int, seconds: float
) -> list[str]:
    settings = request.settings
    cell_seconds = sum(result["seconds"] for result in found.values())
    verdict = "" if good >= GOOD_ENOUGH else f" (below {100 * GOOD_ENOUGH:.1f} %: distances say less)"
    facts = [
        f"{len(found)} of {n_cells} cells done; {cell_seconds / 60:.0f} minutes of cells in all, {request.jobs} at a "
        f"time, the last call {seconds / 60:.1f} minutes; torch {torch.__version__}.",
        f"{len(images.train)} training and {len(images.held_out)} held-out images of {images.size} x {images.size} "
        f"pixels. Every model: {settings.steps} updates of {settings.batch_size} images, latents of "
        f"{', '.join(map(str, settings.latent_dims))} dims bottom to top ({', '.join(ONE_LAYER)}: one layer of "
        f"{sum(settings.latent_dims)}), {settings.width} channels, 1/(2σ²) = {settings.reconstruction_weight:g}, "
        f"learning rate of f {settings.energy_rate:g} (contrastive {settings.contrastive_rate:g}); seeds "
        f"{', '.join(map(str, settings.seeds))}.",
        f"Fréchet distance of {settings.samples} samples to the held-out images in the 64 features of a classifier "
        f"with {100 * good:.2f} % test accuracy{verdict}, and class score (the inception score, by that classifier's "
        "classes): not comparable with published FIDs, which stand beside for their order.",
    ]
    if request.inception_weights is None:
        facts.append("No Inception-based FID: pass --inception-weights with torch-fidelity's file to have one.")
    failed = [result["label"] + ": " + result["failed"] for result in found.values() if "failed" in result]
    return facts + failed


def _drawings(place: Place, plan: Plan, results: Results, images: Images) -> list[Drawing]:
    """The figures whose cells are done."""
    drawings = []
    figures = {row: identity for (row, _), identity in plan.tables["figures"].items()}
    if "models" in plan.tables:
        first = plan.settings.seeds[0]
        done = {name: i for (name, seed), i in plan.tables["models"].items() if seed == first and _drawable(results, i)}
        if done:
            drawings.append(draw_samples_of_all(place, {name: plan.cells[i] for name, i in done.items()}))
    names = {"chain_steps": ("More chain steps", "K"), "energy_width": ("Wider f", "hidden units")}
    curves = [(*names[part], results.curve(part)) for part in names if part in plan.tables]
    curves = [curve for curve in curves if curve[2]]
    if curves:
        drawings.append(draw_curves(place, curves))
    for row, draw in (("joint", draw_joint), ("hierarchy", draw_hierarchy)):
        if _drawable(results, figures[row]):
            drawings += draw(place, plan.cells[figures[row]], images)
    for drawing in drawings:
        drawing.shrink()
    return drawings


def _drawable(results: Results, identity: str) -> bool:
    return identity in results.found and "failed" not in results.found[identity]


def _inception_table(request: Request, place: Place, results: Results, images: Images, device: torch.device) -> Table:
    plan = results.plan
    rows = [["model", "Inception FID"]]
    first = request.settings.seeds[0]
    for (name, seed), identity in plan.tables.get("models", {}).items():
        if seed != first or not _drawable(results, identity):
            continue
        model = open_run(place.run(plan.cells[identity]).path, device.type)[2]
        generator = torch.Generator(device).manual_seed(SAMPLE_SEED)
        samples = decoded_pixels(model, drawn_prior(model, request.settings.samples, generator))
        fid = inception_fid(samples, images.held_out, request.inception_weights, device)
        rows.append([name, f"{fid:.2f}"])
    note = f"{request.settings.samples} samples against {len(images.held_out)} held-out images; the first seed."
    return Table("Inception-based FID (torch-fidelity)", rows, [note])


def time_estimate(request: Request) -> list[str]:
    """What each cell would take, from a few updates of each kind of model, timed one after another on one thread.

    Cells that are done count nothing; those that start from another's first stage count what they add. Nothing is
    written: another process may be at work in the folder.
    """
    device = pick_device(request.device)
    images, _ = _read(request)
    place = Place(request.root, request.settings, images.fingerprint(), device.type)
    plan = Plan(request.settings, request.data, device.type, request.parts)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // request.jobs))
    known: dict[str, float] = {}
    lines, total = [], 0.0
    try:
        for cell in progress_bar(list(plan.cells.values()), desc="timing", unit="cell", leave=False):
            kind = dataclasses.replace(cell.options, seed=0)
            seconds = 0.0
            if not place.result(cell).is_file():
                if str(kind) not in known:
                    known[str(kind)] = _seconds(cell, images, device)
                seconds = known[str(kind)] + MEASURE_SECONDS
            total += seconds
            lines.append(f"{cell.label:40} {seconds / 60:6.1f} min")
    finally:
        torch.set_num_threads(threads)
    hours = total / request.jobs / 3600
    lines.append(
        f"{len(plan.cells)} cells, {total / 3600:.1f} hours of work, {request.jobs} at a time: {hours:.1f} hours"
    )
    return lines


def _seconds(cell: Cell, images: Images, device: torch.device) -> float:
    """Time of a cell's training, all its stages."""
    options: Any = cell.options
    model = build(options.model, options.model_config(), images.size, images.channels, len(images.train)).to(device)
    optimisers = model.optimisers(LearningRates(1e-4, 1e-5))
    rows = torch.arange(options.batch_size)
    batch = Batch(to_network(images.train[rows], device), rows, images.train)
    seconds = 0.0
    stages: Sequence[int] = model.stages(options.steps)
    for stage, steps in enumerate(stages):
        if stage == 0 and cell.first_stage is not None:
            continue
        model.update(batch, LearningStep(optimisers, stage=stage))  # the first is slower
        fastest = float("inf")  # what else runs on the machine only adds
        for index in range(min(TIMED_UPDATES, steps)):
            started = time.perf_counter()
            model.update(batch, LearningStep(optimisers, index=index, stage=stage))
            fastest = min(fastest, time.perf_counter() - started)
        seconds += steps * fastest
    return seconds
