"""The figures of a run: samples, reconstructions, what each latent layer holds, and the energy along a long chain."""

from __future__ import annotations

import bisect
import itertools
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from jlebm_fast.models import LatentModel

from .files import whole_file
from .run_folder import RunConfig, RunFolder, open_run
from .samples import decoded_pixels, drawn_prior, tile
from .sources import load_images, to_network

GRID = 10  # images a side of a panel of samples
DPI = 110
LONG_CHAIN_STEPS = 2500
LONG_CHAIN_THIN = 25  # steps between points of the energy curve
IMAGE_EVERY = 100  # steps between images of the long chain
TRAVERSE = torch.linspace(-3.0, 3.0, 13)  # in standard deviations of N(0, 1)


class Panel(NamedTuple):
    """Images in rows and columns under a title.

    images   uint8 [rows * columns, channels, size, size]
    """

    title: str
    images: Tensor
    columns: int


def draw_panels(path: pathlib.Path, panels: Sequence[Panel], panels_per_row: int, title: str = "") -> None:
    """Writes panels side by side as a PNG."""
    rows = -(-len(panels) // panels_per_row)
    pictures = [tile(panel.images, panel.columns) for panel in panels]
    height, width = max(p.shape[0] for p in pictures), max(p.shape[1] for p in pictures)
    panel_width = 12.0 / max(panels_per_row, 2)  # inches
    figure_size = (panel_width * panels_per_row, rows * (panel_width * height / width + 0.35) + (0.4 if title else 0))
    figure = Figure(figsize=figure_size, dpi=DPI, layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(rows, panels_per_row, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, panel, picture in zip(axes, panels, pictures, strict=False):
        axis.set_title(panel.title, fontsize=10)
        axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    save_figure(figure, path)


def save_figure(figure: Figure, path: pathlib.Path) -> None:
    """Writes a figure as a PNG, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)  # no window system needed
    with whole_file(path) as file:
        figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.05)


def make_figures(
    run: pathlib.Path | str,
    *,
    seed: int = 0,
    data: str | None = None,
    device: str = "auto",
    check_images: bool = True,
) -> list[pathlib.Path]:
    """Draws every figure of a run that its model allows into RUN/figures.

    Arguments:
        data: where the run's images are now; None is where they were.
        check_images: read all images and require that they are those of the run; False reads only the held-out ones.

    Raises:
        RunError: there is no trained run, its images can no longer be read or are others, or prior chains left the
            finite numbers.
    """
    folder, config, model = open_run(run, device)
    images = load_images(data or config.options.data, config.image_size, held_out_only=not check_images)
    if check_images:
        folder.require_same_images(config, images)
    held_out = images.held_out
    if held_out.shape[1] < config.image_channels:  # grey held-out images of a colour source
        held_out = held_out.expand(-1, config.image_channels, -1, -1)
    drawings: list[Callable[[Sketch], pathlib.Path]] = [
        draw_samples, draw_reconstructions, draw_layers_swapped, draw_traverse, draw_learning,
    ]  # fmt: skip
    if model.has_prior_chain:
        drawings += [draw_layers_masked, draw_long_chain]
    device_of_model = next(model.parameters()).device
    paths = []
    for drawing in drawings:
        generator = torch.Generator(device_of_model).manual_seed(seed)
        paths.append(drawing(Sketch(folder, config, model, held_out, generator)))
    return paths


class Sketch(NamedTuple):
    """What each figure is drawn from, and where it goes: by default the run's own figures/, else the folder `into`,
    with `prefix` before the name of its file."""

    folder: RunFolder
    config: RunConfig
    model: LatentModel
    held_out: Tensor
    generator: torch.Generator
    into: pathlib.Path | None = None
    prefix: str = ""

    def path(self, name: str) -> pathlib.Path:
        return (self.into or self.folder.figures) / f"{self.prefix}{name}.png"

    def decode(self, zs: list[Tensor]) -> Tensor:
        return decoded_pixels(self.model, zs)

    def sample_prior(self, n: int) -> list[Tensor]:
        return drawn_prior(self.model, n, self.generator)


def draw_samples(sketch: Sketch) -> pathlib.Path:
    """Held-out images, the prior's samples, and N(0, I) through the same generator."""
    n = GRID**2
    panels = [Panel("held-out images", sketch.held_out[:n], GRID)]
    panels.append(Panel(f"samples: {sketch.model.prior_name}", sketch.decode(sketch.sample_prior(n)), GRID))
    if sketch.model.has_prior_chain:
        z0 = sketch.model.standard_normal(n, sketch.generator)
        panels.append(Panel("same generator, z ~ N(0, I)", sketch.decode(z0), GRID))
    draw_panels(sketch.path("samples"), panels, len(panels))
    return sketch.path("samples")


def draw_reconstructions(sketch: Sketch) -> pathlib.Path:
    """Held-out images beside g of their posterior means."""
    n = GRID**2
    images = sketch.held_out[:n]
    device = next(sketch.model.parameters()).device
    reconstructions = sketch.decode(sketch.model.encode(to_network(images, device)))
    panels = [Panel("held-out images", images, GRID), Panel("reconstructions", reconstructions, GRID)]
    draw_panels(sketch.path("reconstructions"), panels, 2)
    return sketch.path("reconstructions")


def _layer_panels(sketch: Sketch, resample: Callable[[int, list[Tensor]], list[Tensor]]) -> list[Panel]:
    """One panel per layer, top first: rows start with a joint sample and go on with that layer resampled.

    resample(layer, zs) returns zs with layer `layer` drawn anew.
    """
    rows, columns = 6, 9
    base = sketch.sample_prior(rows)
    repeated = [z.repeat_interleave(columns, dim=0) for z in base]
    n_layers, panels = len(base), []
    for layer in reversed(range(n_layers)):
        zs = resample(layer, repeated)
        first = torch.arange(0, rows * columns, columns)
        for z, original in zip(zs, base, strict=True):
            z[first] = original
        place = {0: " (bottom)", n_layers - 1: " (top)"}.get(layer, "") if n_layers > 1 else ""
        panels.append(Panel(f"layer {layer + 1}{place} resampled", sketch.decode(zs), columns))
    return panels


def draw_layers_swapped(sketch: Sketch) -> pathlib.Path:
    """Hierarchical sampling by swapping: one layer comes from other joint samples."""

    def swap(layer: int, zs: list[Tensor]) -> list[Tensor]:
        other = sketch.sample_prior(len(zs[0]))
        return [other[i] if i == layer else z.clone() for i, z in enumerate(zs)]

    title = "first column: joint samples; the others: one layer swapped in from other joint samples"
    panels = _layer_panels(sketch, swap)
    draw_panels(sketch.path("layers_swapped"), panels, min(len(panels), 3), title)
    return sketch.path("layers_swapped")


def draw_layers_masked(sketch: Sketch) -> pathlib.Path:
    """Hierarchical sampling by a masked chain: one layer starts at N(0, I) and moves, the others are frozen."""
    chain = sketch.model.prior_chain()

    def rerun(layer: int, zs: list[Tensor]) -> list[Tensor]:
        fresh = sketch.model.standard_normal(len(zs[0]), sketch.generator)
        start = [fresh[i] if i == layer else z for i, z in enumerate(zs)]
        return list(chain.sample(start, generator=sketch.generator, mask=sketch.model.frozen_layers({layer})))

    title = "first column: joint samples; the others: one layer run anew by a chain that keeps the rest fixed"
    panels = _layer_panels(sketch, rerun)
    draw_panels(sketch.path("layers_masked"), panels, min(len(panels), 3), title)
    return sketch.path("layers_masked")


def draw_traverse(sketch: Sketch) -> pathlib.Path:
    """Each latent dim of one joint sample, of wide layers the first ones, moved from -3 to 3, the others fixed."""
    base = sketch.sample_prior(1)
    values = TRAVERSE.to(base[0].device)
    panels = []
    for layer in reversed(range(len(base))):
        blocks, n_dims = [], base[layer].shape[1]
        shown = f", first {GRID} of {n_dims}" if n_dims > GRID else ""
        for dim in range(min(n_dims, GRID)):
            zs = [z.repeat(len(values), 1) for z in base]
            zs[layer][:, dim] = values
            blocks.append(sketch.decode(zs))
        panels.append(Panel(f"layer {layer + 1}: a row per dim{shown}, -3 to 3", torch.cat(blocks), len(values)))
    draw_panels(sketch.path("traverse"), panels, min(len(panels), 3))
    return sketch.path("traverse")


def draw_long_chain(sketch: Sketch) -> pathlib.Path:
    """The energy along chains far longer than those trained with, and images on the way."""
    n_chains, n_shown = 100, 6
    z0 = sketch.model.standard_normal(n_chains, sketch.generator)
    chain = sketch.model.prior_chain(n_steps=LONG_CHAIN_STEPS)
    _, info = chain.sample(
        z0, generator=sketch.generator, return_info=True, return_trajectory=True, thin=LONG_CHAIN_THIN
    )
    every = IMAGE_EVERY // LONG_CHAIN_THIN
    shown = info.trajectory[every - 1 :: every, :n_shown]  # [images, chains, dim]
    first = torch.cat([z[:n_shown] for z in z0], dim=1)[None]
    shown = torch.cat([first, shown]).transpose(0, 1).reshape(-1, shown.shape[-1])
    finite = torch.isfinite(shown).all(dim=1)
    decoded = sketch.decode(list(shown[finite].split(sketch.model.latent_dims, dim=1)))
    images = torch.full((len(shown), *decoded.shape[1:]), 128, dtype=torch.uint8)  # grey where a chain diverged
    images[finite.cpu()] = decoded

    figure = Figure(figsize=(12, 7), dpi=DPI, layout="constrained")
    curve, grid = figure.subplots(2, 1, height_ratios=(1, 1.2))
    energy = info.energy.cpu().numpy()
    steps = np.arange(1, len(energy) + 1) * LONG_CHAIN_THIN
    curve.fill_between(steps, *np.quantile(energy, (0.1, 0.9), axis=1), alpha=0.25, label="10 % to 90 % of chains")
    curve.plot(steps, energy.mean(axis=1), label=f"mean of {n_chains} chains")
    curve.axvline(sketch.config.options.chain_steps, color="gray", linestyle=":", label="length in training")
    curve.set(xlabel="Langevin step", ylabel="f(z)", xlim=(0, LONG_CHAIN_STEPS))
    curve.legend(loc="lower right")
    bad = info.first_bad_step[info.first_bad_step >= 0]
    if len(bad):
        words = (
            f"{len(bad)} of {n_chains} chains left the finite numbers, the first at Langevin step {int(bad.min()) + 1}"
        )
        curve.set_title(words, fontsize=10)
        print(f"jlebm: long_chain.png: {words}", file=sys.stderr)
    grid.imshow(tile(images, len(images) // n_shown), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    grid.set_title(f"{n_shown} of these chains: z ~ N(0, I), then every {IMAGE_EVERY} steps", fontsize=10)
    grid.axis("off")
    save_figure(figure, sketch.path("long_chain"))
    return sketch.path("long_chain")


def draw_learning(sketch: Sketch) -> pathlib.Path:
    """The curves of metrics.jsonl, broken where a stage of the model's learning ended: the losses of the next are of
    another kind."""
    lines = sketch.folder.read_metrics()
    options = sketch.config.options
    first_stage = options.total_steps(sketch.config.n_images // options.batch_size)
    stage_ends = list(itertools.accumulate(sketch.model.stages(first_stage)))[:-1]
    names = list(dict.fromkeys(name for line in lines for name in line))  # stages have metrics of their own
    names = [name for name in names if name not in ("step", "epoch", "steps_per_second")]
    groups = [[name] for name in names if not name.startswith("energy_")]
    if any(name.startswith("energy_") for name in names):
        groups.append([name for name in names if name.startswith("energy_")])
    figure = Figure(figsize=(12, 3), dpi=DPI, layout="constrained")
    for axis, group in zip(figure.subplots(1, max(len(groups), 1), squeeze=False)[0], groups, strict=False):
        for name in group:
            _plot_by_stages(axis, [(line["step"], line[name]) for line in lines if name in line], stage_ends, name)
        for end in stage_ends:
            axis.axvline(end, color="gray", linestyle=":")
        axis.set_xlabel("step")
        axis.legend()
    save_figure(figure, sketch.path("learning"))
    return sketch.path("learning")


def _plot_by_stages(axis: Axes, points: list[tuple[int, float]], stage_ends: Sequence[int], name: str) -> None:
    """One curve, interrupted after each stage; a point without neighbours, which no line reaches, gets a marker."""
    stages = [
        list(found) for _, found in itertools.groupby(points, lambda point: bisect.bisect_left(stage_ends, point[0]))
    ]
    alone = {found[0] for found in stages if len(found) == 1}
    drawn = list(itertools.chain.from_iterable([*found, (found[-1][0], math.nan)] for found in stages))
    marked = [i for i, point in enumerate(drawn) if point in alone]
    axis.plot(*zip(*drawn, strict=True), label=name, marker="o", markersize=4, markevery=marked)
