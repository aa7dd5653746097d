"""Small images of shapes, and the options of nets that fit them."""

import pathlib

import numpy as np
import torch
from PIL import Image

from jlebm_fast.training.sources import source_order

TINY = ["--latent-dims", "2", "3", "--width", "4", "--energy-hidden", "8", "--chain-steps", "3", "--batch-size", "8"]


def shape_pixels(i: int, size: int = 16) -> np.ndarray:
    """A bright bar or square whose place depends on i."""
    pixels = np.zeros((size, size), np.uint8)
    place = 1 + (5 * i) % (size - 5)
    if i % 2:
        pixels[:, place : place + 3] = 255
    else:
        pixels[place : place + 4, place : place + 4] = 200
    return pixels


def write_folder(root: pathlib.Path, n: int = 40, size: int = 16, colour: bool = False, classes: bool = True):
    """PNG files in two class folders (bars, squares), or all in one."""
    for i in range(n):
        folder = root / ("bars" if i % 2 else "squares") if classes else root
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(shape_pixels(i, size))
        (image.convert("RGB") if colour else image).save(folder / f"{i:03d}.png")
    return root


def in_source_order(part: torch.Tensor) -> torch.Tensor:
    """Training or held-out images, or their labels, as the source has them."""
    return part[source_order(len(part)).argsort()]


# The options of a run that takes moments.
SMALL_RUN = {
    "latent_dims": (2, 3),
    "width": 4,
    "energy_hidden": 8,
    "chain_steps": 3,
    "batch_size": 8,
    "log_every": 4,
    "checkpoint_every": 7,
}
