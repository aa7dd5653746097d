"""A folder of images and two runners of the command line."""

import os
import subprocess
import sys

import pytest
from shapes import write_folder


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
