"""`jlebm evaluate`: distances of samples, reconstruction error, and what the prior chain does; JSON, table, figures."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from jlebm_fast.models import LatentModel

from ..errors import ImageError, RunError
from .diagnostics import LONG_STEPS, Histogram, bias, energy_of, mixing
from .figures import DPI, save_figure
from .files import require_writable, write_atomically
from .frechet import NonFiniteFeatures, frechet_to_held_out
from .inception import inception_fid, require_inception
from .run_folder import RunFolder, open_run
from .samples import DECODED_AT_ONCE, DivergedSamples, decoded_pixels, drawn_prior
from .sources import Images, load_images, to_network

CURVES_SHOWN = 32
ENERGY_IMAGES = 2000  # held-out images whose latents' energies are shown


class NotWritten(RunError):
    """An evaluation is done and could not be written.

    result   what `evaluate` would have returned
    """

    def __init__(self, message: str, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.result = result


def evaluate(
    run: pathlib.Path | str,
    n: int = 10_000,
    *,
    seed: int = 0,
    frechet: bool = True,
    inception_weights: pathlib.Path | None = None,
    long_steps: int = LONG_STEPS,
    data: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Measures a trained run; writes RUN/evaluation.json and the figures RUN/figures/evaluation_*.png.

    Arguments:
        run: the run folder.
        n: samples to draw.
        seed: of the samples.
        frechet: measure the Fréchet distance, which needs class labels.
        inception_weights: file of the Inception net for the FID; None leaves the FID out, and says so.
        long_steps: Langevin steps of the long chains.
        data: where the run's images are now; None is where they were.

    Returns:
        n, n_held_out, reconstruction_mse (per pixel, pixels in [-1, 1]), those of `frechet_to_held_out`, fid, and for a
        model whose prior has a chain: mixing, bias (see diagnostics.py), energy_histogram.

    Raises:
        RunError: there is no trained run, its images are others now, have no labels or are too few, `n` is below 2, the
            Inception net is missing, the run's folder cannot be written, or prior chains left the finite numbers.
        NotWritten: the folder could be written before the work and cannot after it.
    """
    if n < 2:
        raise RunError(f"evaluation needs at least 2 samples, got {n}")
    if long_steps < 20:
        raise RunError(f"--long-steps must be at least 20 Langevin steps, got {long_steps}")
    if inception_weights is not None:
        require_inception(inception_weights)
    folder, config, model = open_run(run, device)
    for place in (folder.path, folder.figures):
        if place.exists():
            require_writable(place)
    images = load_images(data or config.options.data, config.image_size)
    folder.require_same_images(config, images)
    if frechet:
        try:
            images.require_classes()
        except ImageError as error:
            raise ImageError(
                f"{error}; the Fréchet distance is measured in the features of a classifier: --no-frechet measures the "
                "rest"
            ) from error
    generator = torch.Generator(model.device).manual_seed(seed)
    result: dict[str, Any] = {"n": n, "n_held_out": len(images.held_out)}
    samples = decoded_pixels(model, drawn_prior(model, n, generator))
    if frechet:
        normal = None
        if model.has_prior_chain:
            normal = decoded_pixels(model, model.standard_normal(n, generator))
        result |= frechet_to_held_out(images, samples, normal, model.device)
    result["fid"] = _fid(samples, images, inception_weights, model.device)
    result["reconstruction_mse"] = _reconstruction_error(model, images, generator)
    draw: Callable[[], None] | None = None
    if model.has_prior_chain:
        measured, draw = _prior_chain(folder, model, images, generator, long_steps)
        result |= measured
    try:
        write_atomically(folder.evaluation, (json.dumps(result, indent=2) + "\n").encode())
        if draw is not None:
            draw()
    except OSError as error:
        raise NotWritten(
            f'the evaluation is done, but "{error.filename or folder.path}" cannot be written: '
            f"{error.strerror or error}",
            result,
        ) from error
    return result


def table(result: dict[str, Any]) -> str:
    """The numbers of a result, one a line; nested ones with their path.

    Example:
        >>> print(table({"n": 3, "bias": {"acceptance": 0.5}, "fid": None}))
        n                              3
        bias.acceptance                0.5000
    """
    lines = []
    for name, value in _leaves(result):
        shown = f"{value:.4f}" if isinstance(value, float) else str(value)
        lines.append(f"{name:30} {shown}")
    return "\n".join(lines)


def _leaves(node: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in node.items():
        if isinstance(value, dict):
            found += _leaves(value, f"{prefix}{name}.")
        elif value is not None and not isinstance(value, list):
            found.append((prefix + name, value))
    return found


def _fid(samples: Tensor, images: Images, weights: pathlib.Path | None, device: torch.device) -> float | str:
    if weights is None:
        return (
            "not measured: --inception-weights takes the Inception net of torch-fidelity, the file "
            "weights-inception-2015-12-05-6726825d.pth of its releases"
        )
    return inception_fid(samples, images.held_out, weights, device)


def _reconstruction_error(model: LatentModel, images: Images, generator: torch.Generator) -> float:
    total = 0.0
    for piece in images.held_out.split(DECODED_AT_ONCE):
        truth = to_network(piece, model.device)
        total += (model.reconstruct(truth, generator) - truth).square().sum(dtype=torch.float64).item()
    if not math.isfinite(total):
        raise DivergedSamples(
            "reconstructions of held-out images are not finite: the posterior chain or the generator diverged; train "
            "another run with a smaller --posterior-step-size or --autoencoder-lr"
        )
    return total / images.held_out.numel()


def _prior_chain(
    folder: RunFolder, model: LatentModel, images: Images, generator: torch.Generator, n_steps: int
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Mixing, bias and energies of the prior chain, and what draws their figures.

    Raises:
        DivergedSamples: long chains left the finite numbers.
    """
    long_chain_remedy = "pass fewer --long-steps, or train another run with a --step-size smaller than "
    long_chain_remedy += f"{model.config.step_size:g}"
    mixed, curves = mixing(model, generator, n_steps)
    bad = ~torch.isfinite(curves)
    if bad.any():
        first = (int(bad.any(dim=1).nonzero()[0]) + 1) * mixed["draw_every"]
        raise DivergedSamples(
            f"{int(bad.any(dim=0).sum())} of {bad.shape[1]} long prior chains are not finite, from Langevin step "
            f"{first} of {n_steps} on: {long_chain_remedy}"
        )
    try:
        biased, ends = bias(model, generator, n_steps)
    except NonFiniteFeatures as error:
        raise DivergedSamples(
            f"prior chains of {n_steps} steps are not finite at their ends ({error}): {long_chain_remedy}"
        ) from error
    shown = to_network(images.held_out[:ENERGY_IMAGES], model.device)
    chain = model.prior_chain()
    energies = {
        "posterior, held-out images": energy_of(chain, model.encode(shown, generator)),
        f"prior, {chain.n_steps} steps as in training": ends["short"],
        f"prior, MALA {n_steps} steps": ends["mala"],
        "N(0, I)": energy_of(chain, model.standard_normal(len(ends["mala"]), generator)),
    }
    histogram = Histogram.of(energies)

    def draw() -> None:
        _draw_energies(folder, histogram)
        _draw_chains(folder, curves, ends, n_steps, mixed)

    counted = {"edges": histogram.edges, "counts": histogram.counts}
    return {"mixing": mixed, "bias": biased, "energy_histogram": counted}, draw


def _draw_energies(folder: RunFolder, histogram: Histogram) -> None:
    """f at latents of images, at samples of the prior, and at N(0, I)."""
    figure = Figure(figsize=(8, 4), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    width = histogram.edges[1] - histogram.edges[0]
    for name, counts in histogram.counts.items():
        total = max(sum(counts), 1)
        axis.stairs([count / total / width for count in counts], histogram.edges, label=name, linewidth=1.6)
    axis.set(xlabel="f(z)", ylabel="density")
    axis.legend()
    save_figure(figure, folder.figures / "evaluation_energies.png")


def _draw_chains(
    folder: RunFolder, curves: Tensor, ends: dict[str, Tensor], n_steps: int, mixed: dict[str, Any]
) -> None:
    """f along the long chains, and the quantiles of f at the ends of unadjusted chains against those of MALA."""
    figure = Figure(figsize=(11, 4), dpi=DPI, layout="constrained")
    along, quantiles = figure.subplots(1, 2)
    steps = torch.arange(1, len(curves) + 1) * mixed["draw_every"]
    along.plot(steps, curves[:, :CURVES_SHOWN].cpu(), linewidth=0.4, alpha=0.5)
    along.plot(steps, curves.mean(dim=1).cpu(), color="black", linewidth=1.5)
    along.set(xlabel="Langevin step", ylabel="f(z)", xlim=(0, n_steps))
    if mixed.get("rhat_energy") is not None:
        along.set_title(
            f"{mixed['chains']} chains: R-hat {mixed['rhat_energy']:.3f}, ESS {mixed['ess_energy']:.0f}", fontsize=10
        )
    at = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    exact = torch.quantile(ends["mala"].double().cpu(), at)
    for name in ("short", "long"):
        quantiles.plot(exact, torch.quantile(ends[name].double().cpu(), at), label=f"{name} unadjusted chain")
    low, high = float(exact[0]), float(exact[-1])
    quantiles.plot([low, high], [low, high], color="gray", linestyle=":", label="the same law")
    quantiles.set(xlabel="quantiles of f(z), MALA", ylabel="quantiles of f(z)")
    quantiles.legend()
    save_figure(figure, folder.figures / "evaluation_chains.png")
