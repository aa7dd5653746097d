"""Drawing from a trained run: any number of samples by one call of the prior chain."""

from __future__ import annotations

import pathlib

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jlebm_fast.models import LatentModel

from ..errors import RunError
from .files import whole_file
from .run_folder import numbered_pngs, open_run
from .sources import to_pixels

PREVIEW = 100  # images in samples.png
DECODED_AT_ONCE = 500  # images that exist as float32 at the same time


class DivergedSamples(RunError):
    """Chains of a prior left the finite numbers: what they ended in is no sample of it."""


def drawn_prior(model: LatentModel, n: int, generator: torch.Generator, chain_steps: int | None = None) -> list[Tensor]:
    """`model.sample_prior(n, generator, chain_steps)`, all of it finite: L tensors [n, d_i].

    Raises:
        DivergedSamples: chains left the finite numbers; it says how many, and from which Langevin step.
    """
    before = generator.get_state()
    zs = model.sample_prior(n, generator, chain_steps)
    finite = torch.stack([torch.isfinite(z).all(dim=1) for z in zs]).all(dim=0)
    n_bad = n - int(finite.sum())
    if not n_bad:
        return zs
    if not model.samples_by_chain:
        raise DivergedSamples(
            f"{n_bad} of {n} samples of the prior ({model.prior_name}) are not finite: its training diverged, train "
            "another run with smaller learning rates"
        )
    generator.set_state(before)  # the same noise on the same parameters: these very chains again
    chain = model.prior_chain(chain_steps)
    _, info = chain.sample(model.chain_start(n, generator), generator=generator, return_info=True)
    bad = info.first_bad_step[info.first_bad_step >= 0]
    where = f" from Langevin step {int(bad.min()) + 1} of {chain.n_steps} on" if len(bad) else ""
    raise DivergedSamples(
        f"{n_bad} of {n} prior chains are not finite{where}: train another run with a --step-size smaller than "
        f"{float(chain.step_size):g} or fewer --chain-steps, which jlebm sample takes too"
    )


def decoded_pixels(model: LatentModel, zs: list[Tensor]) -> Tensor:
    """Images of latents as uint8 on the CPU, [n, channels, size, size], of which few are float32 at any time.

    Raises:
        DivergedSamples: an image is not finite; as uint8 it would be black, like any other.
    """
    n, pixels = len(zs[0]), None
    for start in range(0, max(n, 1), DECODED_AT_ONCE):
        images = model.decode([z[start : start + DECODED_AT_ONCE] for z in zs])
        if not torch.isfinite(images).all():
            raise DivergedSamples(
                f"the generator's images of latents {start} to {start + len(images) - 1} of {n} are not all finite: a "
                "chain diverged, or the generator did; train another run with a smaller --step-size or --autoencoder-lr"
            )
        if pixels is None:
            pixels = torch.empty((n, *images.shape[1:]), dtype=torch.uint8)
        pixels[start : start + len(images)] = to_pixels(images)
    return pixels


def tile(images: Tensor, columns: int) -> np.ndarray:
    """One picture of many images, row by row, a grey pixel between them: [height, width] or [height, width, 3]."""
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    canvas = torch.full((channels, rows * (height + 1) + 1, columns * (width + 1) + 1), 128, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + 1) + 1, (i % columns) * (width + 1) + 1
        canvas[:, top : top + height, left : left + width] = image
    picture = canvas.permute(1, 2, 0).numpy()
    return picture[:, :, 0] if channels == 1 else picture


def sample_run(
    run: pathlib.Path | str,
    n: int,
    *,
    seed: int = 0,
    out: pathlib.Path | None = None,
    png_files: bool = False,
    chain_steps: int = 0,
    device: str = "auto",
) -> pathlib.Path:
    """Draws `n` images from a run's prior and writes samples.npz, a preview samples.png and, on wish, a PNG per image.

    samples.npz holds `images` (uint8 [n, size, size] or [n, size, size, 3]) and `z` (float32 [n, dim], layers side by
    side, bottom to top).

    Arguments:
        run: the run folder.
        n: samples to draw, in one chain call.
        seed: same seed, same samples.
        out: folder to write to; None is RUN/samples.
        chain_steps: Langevin steps of the prior chain, where there is one; 0 for as many as in training.
        png_files: also write 000000.png, 000001.png, … into the folder png/, for tools that read folders. Those of an
            earlier call are removed in any case, so that they are never taken for samples of this one.

    Returns:
        The folder written to.

    Raises:
        RunError: there is no trained run, `n` is not positive, `chain_steps` would do nothing, or chains left the
            finite numbers.
    """
    if n < 1:
        raise RunError(f"-n must be a positive number of samples, got {n}")
    if chain_steps < 0:
        raise RunError(f"--chain-steps must be positive, or 0 for as many as in training, got {chain_steps}")
    folder, _, model = open_run(run, device)
    if chain_steps and not model.samples_by_chain:
        why = "is sampled by importance resampling, without its chain" if model.has_prior_chain else "has no chain"
        raise RunError(f'--chain-steps does nothing here: the prior of the run in "{folder.path}" {why}; leave it out')
    out = folder.samples if out is None else pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(model.device).manual_seed(seed)
    zs = drawn_prior(model, n, generator, chain_steps or None)
    pixels = decoded_pixels(model, zs)
    images = pixels.permute(0, 2, 3, 1).numpy()
    images = images[..., 0] if images.shape[-1] == 1 else images
    with whole_file(out / "samples.npz") as file:
        np.savez(file, images=images, z=torch.cat(zs, dim=1).cpu().numpy())
        _remove_pngs(out / "png")  # before the new samples are there, and after nothing but a full disk can stop them
    with whole_file(out / "samples.png") as file:
        Image.fromarray(tile(pixels[:PREVIEW], columns=10)).save(file, format="PNG")
    if png_files:
        (out / "png").mkdir(exist_ok=True)
        for i, image in enumerate(images):
            with whole_file(out / "png" / f"{i:06d}.png", durable=False) as file:
                Image.fromarray(image).save(file, format="PNG")
    return out


def _remove_pngs(folder: pathlib.Path) -> None:
    """Removes the samples of an earlier call, and their folder if nothing else is in it and it is no link."""
    earlier = numbered_pngs(folder)
    for path in earlier:
        path.unlink()
    if earlier and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()
