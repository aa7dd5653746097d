"""`jlebm train --model NAME`: every model in a run folder, stopped, gone on with, sampled; and wrong input."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from shapes import write_folder

from jlebm_fast.errors import RunError
from jlebm_fast.models import MODELS, ModelConfig, used_fields
from jlebm_fast.training import loop
from jlebm_fast.training.checkpoints import load_checkpoint
from jlebm_fast.training.figures import make_figures
from jlebm_fast.training.options import TrainOptions
from jlebm_fast.training.run_folder import open_run
from jlebm_fast.training.samples import sample_run

SMALL = {
    "latent_dims": (2, 3),
    "width": 4,
    "energy_hidden": 8,
    "chain_steps": 3,
    "posterior_steps": 3,
    "conditional_hidden": 8,
    "mixture_components": 3,
    "stage_steps": 5,
}
LATER = {"two_stage_vae", "rae", "ncp_vae", "multi_ncp"}  # a prior learned after the autoencoder


def options_of(name, folder, **changes):
    used = used_fields(name, MODELS[name].priors[0])
    fitting = {key: value for key, value in SMALL.items() if key in used}
    small = {"batch_size": 8, "steps": 8, "log_every": 3, "checkpoint_every": 4, "device": "cpu"}
    return TrainOptions(model=name, data=str(folder), **fitting | small | changes)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_goes_on_bit_for_bit(folder_of_shapes, tmp_path, monkeypatch, name):
    options = options_of(name, folder_of_shapes)
    whole = loop.train(tmp_path / "whole", options)

    class Death(BaseException):
        pass

    advance = loop.Trainer.advance
    for lifetime, resume in ((6, False), (3, True)):
        steps_left = [lifetime]

        def mortal_advance(trainer, steps_left=steps_left):
            if steps_left[0] == 0:
                raise Death
            steps_left[0] -= 1
            return advance(trainer)

        monkeypatch.setattr(loop.Trainer, "advance", mortal_advance)
        with pytest.raises(Death):
            loop.train(tmp_path / "broken", options, resume=resume)
    monkeypatch.undo()
    broken = loop.train(tmp_path / "broken", options, resume=True)
    first, second = (load_checkpoint(run.checkpoint)["model"] for run in (whole, broken))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert load_checkpoint(whole.checkpoint)["step"] == 8 + sum(open_run(whole.path)[2].stages(8)[1:])
    with np.load(sample_run(whole.path, 5, device="cpu") / "samples.npz") as samples:
        assert samples["images"].shape == (5, 16, 16)


@pytest.mark.parametrize("name", ["lebm", "cg_ebm", "multi_ncp", "biva"])
def test_figures_of_other_models(folder_of_shapes, tmp_path, monkeypatch, name):
    from jlebm_fast.training import figures

    monkeypatch.setattr(figures, "LONG_CHAIN_STEPS", 100)
    run = loop.train(tmp_path / "run", options_of(name, folder_of_shapes, steps=3)).path
    drawn = {path.stem for path in make_figures(run, device="cpu")}
    assert ("long_chain" in drawn) == (name != "biva")


def test_every_option_of_a_model_is_an_option_of_a_run():
    missing = {field.name for field in dataclasses.fields(ModelConfig)} - {
        f.name for f in dataclasses.fields(TrainOptions)
    }
    assert missing == set()
    assert TrainOptions(model="multi_ncp").model_config().nce_stages == 3
    assert TrainOptions(model="rae").resolved_prior == "gmm"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "vlae", "energy_hidden": 50}, "--energy-hidden does nothing with --model vlae and prior gaussian"),
        ({"posterior_steps": 5}, "--posterior-steps does nothing with --model joint"),
        ({"model": "abp", "energy_lr": 1.0}, "--energy-lr does nothing with --model abp"),
        ({"replay_batches": 7}, "--replay-batches does nothing with --chains short-run: .*say --chains persistent"),
        ({"refresh_fraction": 0.2}, "--refresh-fraction does nothing with --chains short-run"),
        ({"lr_schedule": "cosine", "lr_decay": 0.9}, "--lr-decay does nothing with --lr-schedule cosine"),
        ({"model": "sri", "prior": "nce"}, "--prior nce with --model sri: model sri takes prior gaussian"),
        ({"model": "lebm", "posterior_step_size": 0.0}, "--posterior-step-size must be positive"),
        ({"model": "ncp_vae", "nce_stages": -1}, "--nce-stages must be"),
    ],
)
def test_idle_and_impossible_options_are_refused(options, words):
    with pytest.raises(RunError, match=words):
        TrainOptions(**options)


def test_stages_may_not_move_when_a_run_goes_on(jlebm, folder_of_shapes, tmp_path):
    loop.train(tmp_path / "run", options_of("two_stage_vae", folder_of_shapes))
    process = jlebm("train", tmp_path / "run", "--resume", "--steps", "20")
    assert process.returncode == 1
    assert "--resume cannot change --steps" in process.stderr


@pytest.mark.parametrize("model", ["rae", "joint"])
def test_a_mixture_of_more_components_than_images_is_refused_before_the_first_step(folder_of_shapes, tmp_path, model):
    options = {"model": model, "prior": "gmm", "data": str(folder_of_shapes), "width": 4, "batch_size": 8, "steps": 2}
    words = (
        "mixture of 37 components needs at least as many training images, got 36: --mixture-components must be at most"
    )
    with pytest.raises(RunError, match=words):
        loop.train(tmp_path / "run", TrainOptions(**options, device="cpu", mixture_components=37))
    assert not (tmp_path / "run").exists()
    loop.train(tmp_path / "run", TrainOptions(**options, device="cpu", mixture_components=36))


def test_a_stage_ends_with_a_line_of_metrics(folder_of_shapes, tmp_path):
    """Else the first line of the next would hold the mean of losses of two kinds."""
    run = loop.train(tmp_path / "run", options_of("two_stage_vae", folder_of_shapes))
    assert [(line["step"], "kl" in line, "gamma" in line) for line in run.read_metrics()] == [
        (3, True, False), (6, True, False), (8, True, False), (9, False, True), (12, False, True), (13, False, True),
    ]  # fmt: skip


def test_the_model_of_a_run_is_in_its_config(jlebm, folder_of_shapes, tmp_path):
    run = loop.train(tmp_path / "run", options_of("lvae", folder_of_shapes, steps=2))
    assert json.loads(run.config.read_text())["model"] == "lvae"
    shown = jlebm("info", run.path)
    assert "model lvae, prior gaussian" in shown.stdout


@pytest.mark.parametrize("name", ["cg_ebm", "multi_ncp"])
def test_the_energies_of_other_models_are_verified(jlebm, folder_of_shapes, tmp_path, name):
    run = loop.train(tmp_path / "run", options_of(name, folder_of_shapes, steps=2)).path
    process = jlebm("verify", run, "--device", "cpu")
    assert process.returncode == 0, process.stdout
    assert "certificate: passed" in process.stdout


def said(process):
    assert process.returncode == 1
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, process.stderr
    return lines[0]


def test_bad_images_are_one_sentence_and_lose_nothing(jlebm, tmp_path):
    images = write_folder(tmp_path / "images", 6, classes=False)
    run = tmp_path / "run"
    assert "needs at least as many training images" in said(jlebm("train", run, "--data", images))
    Image.new("L", (20, 20)).save(images / "zz.png")
    assert "images differ in size" in said(jlebm("train", run, "--data", images))
    (images / "zz.png").unlink()
    trained = jlebm("train", run, "--data", images, "--steps", "2", "--batch-size", "3", "--no-figures")
    assert trained.returncode == 0, trained.stderr
    before = (run / "checkpoint.safetensors").read_bytes()
    assert "no class labels" in said(jlebm("evaluate", run))
    Image.new("L", (20, 20)).save(images / "zz.png")
    assert "images differ in size" in said(jlebm("train", run, "--resume", "--steps", "4"))
    assert (run / "checkpoint.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "row 3 of .* has pixels that are NaN or infinite"),
        (0.5, "row 3 of .* must have pixels that are integers from 0 to 255"),
        (300.0, "got 0 to 300"),
        (7.0, None),
    ],
)
def test_pixels_given_as_numbers(tmp_path, value, words):
    import pyarrow
    import pyarrow.parquet

    from jlebm_fast.training.sources import load_images

    tables = np.zeros((12, 8, 8))
    tables[3, 2, 2] = value
    path = tmp_path / "numbers.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": tables.tolist(), "label": [0] * 12}), path)
    if words is None:
        assert load_images(str(path)).train.shape[1:] == (1, 16, 16)
        return
    from jlebm_fast.errors import ImageError

    with pytest.raises(ImageError, match=words):
        load_images(str(path))


@pytest.mark.parametrize("kind", [bool, int])
def test_black_and_white_given_as_numbers(tmp_path, kind):
    """Booleans are black and white; the numbers 0 and 1, of which no image has another, are not taken for shades."""
    import pyarrow
    import pyarrow.parquet

    from jlebm_fast.errors import ImageError
    from jlebm_fast.training.sources import load_images

    tables = np.random.default_rng(0).random((12, 16, 16)) > 0.5
    path = tmp_path / "binarised.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": tables.astype(kind).tolist(), "label": [0] * 12}), path)
    if kind is bool:
        assert load_images(str(path)).train.unique().tolist() == [0, 255]
    else:
        with pytest.raises(ImageError, match=r"all pixels are 0 or 1.*multiply them by 255, or give booleans"):
            load_images(str(path))
