"""The folder of `jlebm reproduce`: one process at a time writes to it, and what it keeps is what was asked for."""

import dataclasses
import inspect
import pathlib

import numpy as np
import pytest
import torch
from PIL import Image
from test_reproduce import data, never, place, request_of  # noqa: F401  (fixtures)

from jlebm_fast.errors import RunError
from jlebm_fast.experiments import reproduce as module
from jlebm_fast.experiments.cells import Plan, model_cell
from jlebm_fast.experiments.command import Reproduce
from jlebm_fast.experiments.reproduce import reproduce, time_estimate
from jlebm_fast.experiments.work import read_images, run_cell, run_cells, save_images
from jlebm_fast.models import JointEBM
from jlebm_fast.training.run_folder import locked


@pytest.fixture
def other(tmp_path):
    """Other images of the same two classes."""
    for i in range(120):
        folder = tmp_path / "other" / ("bars" if i % 2 else "squares")
        folder.mkdir(exist_ok=True, parents=True)
        Image.fromarray(np.full((16, 16), i, np.uint8)).save(folder / f"{i:03d}.png")
    return str(tmp_path / "other")


def test_a_refused_process_writes_nothing(tmp_path, data, other):  # noqa: F811
    out = tmp_path / "out"
    module._images(request_of(out, data))
    before = (out / "images.npz").read_bytes()
    with open(out / ".lock", "wb") as file:
        assert locked(file)
        with pytest.raises(RunError, match="another process is at work in"):
            reproduce(request_of(out, other, ("chain_steps",)))
    assert (out / "images.npz").read_bytes() == before


def test_a_plan_writes_nothing(tmp_path, data, other):  # noqa: F811
    time_estimate(request_of(tmp_path / "new", data, ("chain_steps",), seeds=(0,)))
    assert not (tmp_path / "new").exists()
    module._images(request_of(tmp_path / "out", data))
    before = (tmp_path / "out" / "images.npz").read_bytes()
    time_estimate(request_of(tmp_path / "out", other, ("chain_steps",), seeds=(0,)))
    assert (tmp_path / "out" / "images.npz").read_bytes() == before


def test_a_worker_measures_no_other_images(place, other):  # noqa: F811
    """The file was replaced after the first process had read it and before its workers did."""
    here, images = place
    plan = Plan(dataclasses.replace(here.settings, seeds=(0,)), images.name, "cpu", ("chain_steps",))
    save_images(here.images, dataclasses.replace(images, train=255 - images.train))
    with pytest.raises(RunError, match="was replaced by other images while the experiments ran"):
        run_cells(here, plan.cells, jobs=1, threads=1)
    assert not any(here.result(cell).exists() for cell in plan.cells.values())


def test_the_kept_images_are_told_of(tmp_path, data, capsys):  # noqa: F811
    request = request_of(tmp_path / "out", data)
    module._images(request)
    assert capsys.readouterr().err == ""
    module._images(request)
    kept = tmp_path / "out" / "images.npz"
    said = capsys.readouterr().err
    assert said.startswith(f'jlebm: the images are those that "{kept}" kept of "{data}"')
    assert "remove the copy" in said
    assert torch.equal(read_images(kept).train, module._images(request).train)


def test_diverged_samples_are_a_result(place, monkeypatch):  # noqa: F811
    here, images = place
    sample_prior = JointEBM.sample_prior
    monkeypatch.setattr(JointEBM, "sample_prior", lambda *a, **k: [z / 0 for z in sample_prior(*a, **k)])
    result = run_cell(here, model_cell(here.settings, images.name, "cpu", "joint", 0), images, never)
    assert result["failed"].startswith("diverged: 30 of 30 prior chains are not finite")
    assert result["measures"] == {}


def test_help_and_documents_agree_on_the_quick_set():
    document = pathlib.Path(__file__).parents[2] / "docs" / "models.md"
    for text in (document.read_text(encoding="utf-8"), inspect.getsource(Reproduce)):
        assert "six or seven minutes" in text
