"""Small images of shapes and a runner of the command line."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

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


@pytest.fixture(scope="session")
def folder_of_shapes(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images") / "shapes")


@pytest.fixture
def jlebm(capsys, monkeypatch):
    """Runs `jlebm ARGUMENTS` in this process and returns it as if it had been one of its own."""
    from jlebm_fast.cli import main

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)

    def run(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run


@pytest.fixture
def jlebm_process():
    """Runs `python -m jlebm_fast ARGUMENTS` and returns the finished process."""

    def run(*arguments):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "jlebm_fast", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)

    return run
