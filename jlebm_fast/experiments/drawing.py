"""The figures of the report, as PNG files."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

from jlebm_fast.models import MODELS, LatentModel
from jlebm_fast.training import figures
from jlebm_fast.training.figures import DPI, Panel, Sketch, draw_panels, save_figure
from jlebm_fast.training.files import whole_file
from jlebm_fast.training.run_folder import open_run
from jlebm_fast.training.samples import decoded_pixels, drawn_prior
from jlebm_fast.training.sources import Images, to_network

from .cells import Cell
from .work import Place

COLOURS = 32
SHEET = 6  # samples a side in the sheet of all models
SCATTER_STEPS = (0, 5, 20, 60)  # Langevin steps after which the prior chain is shown
SCATTER_POINTS = 1000
LARGE_RANGE = 5  # of distances: beyond it their axis is logarithmic


class Drawing(NamedTuple):
    """A figure of the report: its file and what it shows."""

    path: pathlib.Path
    caption: str

    def shrink(self) -> None:
        """Rewrites the file with few colours: a third of the size, and grey digits look the same."""
        with Image.open(self.path) as image:
            fewer = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
        with whole_file(self.path) as file:
            fewer.save(file, format="PNG", optimize=True)


def _sketch(place: Place, cell: Cell, images: Images, prefix: str) -> Sketch:
    folder = place.run(cell)
    _, config, model = open_run(folder.path, place.device)
    generator = torch.Generator(model.device).manual_seed(0)
    return Sketch(folder, config, model, images.held_out, generator, place.root / "figures", prefix)


def draw_hierarchy(place: Place, cell: Cell, images: Images) -> list[Drawing]:
    """The L = 3 model with 2-d latents: swap, mask, traverse, and the chain's way from N(0, I) to the posterior."""
    sketch = _sketch(place, cell, images, "hierarchy_")
    return [
        Drawing(
            figures.draw_layers_swapped(sketch),
            "Hierarchical sampling, L = 3, 2-d latents: each row starts with a joint sample (first column); in the "
            "other columns one layer comes from other joint samples.",
        ),
        Drawing(
            figures.draw_layers_masked(sketch),
            "The same by a masked chain: one layer starts anew at N(0, I) and runs while the others stay fixed.",
        ),
        Drawing(figures.draw_traverse(sketch), "Latent traverse: each dim of one joint sample moved from −3 to 3."),
        _draw_scatter(sketch),
    ]


def _draw_scatter(sketch: Sketch) -> Drawing:
    """Prior chain after some of its steps against the aggregate posterior, one row per layer."""
    model, generator = sketch.model, sketch.generator
    z_posterior = _posterior_sample(model, sketch)
    z, columns, done = model.standard_normal(SCATTER_POINTS, generator), [], 0
    for n_steps in SCATTER_STEPS:
        z = model.prior_chain(n_steps - done).sample(z, generator=generator)
        columns.append([layer.cpu() for layer in z])
        done = n_steps
    n_layers = len(z)
    figure = Figure(figsize=(2.6 * len(columns), 2.6 * n_layers), dpi=DPI, layout="constrained")
    grid = figure.subplots(n_layers, len(columns), squeeze=False, sharex="row", sharey="row")
    for row, layer in enumerate(reversed(range(n_layers))):
        posterior = z_posterior[layer].cpu()
        reach = scatter_reach([posterior, *(column[layer] for column in columns)])
        for axis, column, n_steps in zip(grid[row], columns, SCATTER_STEPS, strict=True):
            axis.scatter(*posterior.T, s=2, alpha=0.5, label="posterior")
            axis.scatter(*column[layer].T, s=2, alpha=0.5, label="prior chain")
            axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
            if row == 0:
                axis.set_title(f"{n_steps} steps", fontsize=10)
        grid[row][0].set_ylabel(f"layer {layer + 1}")
    grid[0][0].legend(fontsize=7, markerscale=3)
    save_figure(figure, sketch.path("scatter"))
    return Drawing(
        sketch.path("scatter"),
        "Two-dimensional latents: the prior chain on its way from N(0, I), against z ~ q(z|x) of held-out images.",
    )


def scatter_reach(sets: Sequence[torch.Tensor]) -> float:
    """Where the axes of a layer's points [n, d] end: at least 4, and beyond all but one value in 200 of each set.

    Example:
        >>> scatter_reach([torch.zeros(10, 2), torch.full((10, 2), -7.2)])
        8.0
    """
    far = max(float(torch.quantile(z.abs().flatten(), 0.995)) for z in sets)
    return float(max(4, math.ceil(far)))


def _posterior_sample(model: LatentModel, sketch: Sketch) -> list[torch.Tensor]:
    with torch.no_grad():
        posterior = model.encoder(to_network(sketch.held_out[:SCATTER_POINTS], model.device))
        return posterior.sample(model.standard_normal(len(posterior.mean[0]), sketch.generator))


def draw_joint(place: Place, cell: Cell, images: Images) -> list[Drawing]:
    """The main model: samples, reconstructions, the long chain."""
    sketch = _sketch(place, cell, images, "joint_")
    return [
        Drawing(figures.draw_samples(sketch), "The joint prior: held-out images, samples, and the same generator on "
                "z ~ N(0, I)."),
        Drawing(figures.draw_reconstructions(sketch), "Held-out images and their reconstructions."),
        Drawing(figures.draw_long_chain(sketch), f"A chain of {figures.LONG_CHAIN_STEPS} steps, 60 of which were used "
                "in training: its energy, and images on the way."),
    ]  # fmt: skip


def draw_samples_of_all(place: Place, cells: dict[str, Cell]) -> Drawing:
    """One panel of samples per model."""
    panels = []
    for name in MODELS:
        if name not in cells or not place.run(cells[name]).checkpoint.is_file():
            continue
        model = open_run(place.run(cells[name]).path, place.device)[2]
        generator = torch.Generator(model.device).manual_seed(0)
        panels.append(Panel(name, decoded_pixels(model, drawn_prior(model, SHEET**2, generator)), SHEET))
    path = place.root / "figures" / "samples_of_all_models.png"
    draw_panels(path, panels, 5)
    return Drawing(path, "Samples of every model, first seed, none selected.")


def draw_curves(place: Place, curves: Sequence[tuple[str, str, list[tuple[int, float, float | None]]]]) -> Drawing:
    """Distance against chain length and width.

    Arguments:
        curves: title, name of the abscissa, points (abscissa, mean, standard error or None).
    """
    figure = Figure(figsize=(4.5 * len(curves), 3), dpi=DPI, layout="constrained")
    for axis, (title, name, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        abscissae, means, errors = zip(*points, strict=True)
        axis.errorbar(abscissae, means, [e or 0.0 for e in errors], marker="o", capsize=3)
        axis.set(title=title, xlabel=name, ylabel="Fréchet distance")
        if max(means) > LARGE_RANGE * min(means):  # else one point alone would be seen
            axis.set_yscale("log")
            axis.yaxis.set(
                major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter=NullFormatter()
            )
        else:
            axis.set_ylim(0, None)
    path = place.root / "figures" / "curves.png"
    save_figure(figure, path)
    return Drawing(path, "Fréchet distance (mean and standard error over seeds) as the chain or f grows.")
