"""Drawing from a trained run: any number of samples by one call of the prior chain."""

from __future__ import annotations

import pathlib

import numpy as np
import torch
from PIL import Image

from .errors import RunError
from .figures import tile
from .files import whole_file
from .run_folder import open_run
from .sources import to_pixels

PREVIEW = 100  # images in samples.png


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
        png_files: also write 000000.png, 000001.png, … into the folder png/, for tools that read folders.

    Returns:
        The folder written to.

    Raises:
        RunError: there is no trained run, or `n` is not positive.
    """
    if n < 1:
        raise RunError(f"-n must be a positive number of samples, got {n}")
    if chain_steps < 0:
        raise RunError(f"--chain-steps must be positive, or 0 for as many as in training, got {chain_steps}")
    folder, _, model = open_run(run, device)
    if chain_steps and not model.has_prior_chain:
        raise RunError(f'--chain-steps does nothing here: the prior of the run in "{folder.path}" has no chain')
    out = folder.samples if out is None else pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    zs = model.sample_prior(n, generator, chain_steps or None)
    pixels = to_pixels(model.decode(zs))
    images = pixels.permute(0, 2, 3, 1).numpy()
    images = images[..., 0] if images.shape[-1] == 1 else images
    with whole_file(out / "samples.npz") as file:
        np.savez(file, images=images, z=torch.cat(zs, dim=1).cpu().numpy())
    with whole_file(out / "samples.png") as file:
        Image.fromarray(tile(pixels[:PREVIEW], columns=10)).save(file, format="PNG")
    if png_files:
        (out / "png").mkdir(exist_ok=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(out / "png" / f"{i:06d}.png")
    return out
