"""Runs: they learn, stop and go on bit for bit, and a diverging one loses nothing."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from shapes import TINY, write_folder

from jlebm_fast.errors import RunError
from jlebm_fast.training.checkpoints import load_checkpoint
from jlebm_fast.training.evaluation import evaluate
from jlebm_fast.training.figures import make_figures
from jlebm_fast.training.loop import train
from jlebm_fast.training.options import TrainOptions
from jlebm_fast.training.run_folder import RunFolder, open_run
from jlebm_fast.training.samples import sample_run

SMALL = TrainOptions(
    latent_dims=(2, 3),
    width=4,
    energy_hidden=8,
    chain_steps=3,
    batch_size=8,
    steps=30,
    log_every=4,
    checkpoint_every=7,
    device="cpu",
)


def small_options(folder, **changes):
    return dataclasses.replace(SMALL, data=str(folder), **changes)


def flat(state, name=""):
    """Every leaf of a checkpoint by its path."""
    if isinstance(state, dict):
        return {k: v for key in state for k, v in flat(state[key], f"{name}.{key}").items()}
    if isinstance(state, list):
        return {k: v for i, value in enumerate(state) for k, v in flat(value, f"{name}.{i}").items()}
    return {name: state}


def assert_same_run(a, b):
    """Two run folders hold the same bits, apart from timings (which also change the length of metrics.jsonl)."""
    first, second = flat(load_checkpoint(a.checkpoint)), flat(load_checkpoint(b.checkpoint))
    assert first.keys() == second.keys()
    for name in first.keys() - {".metrics_bytes"}:
        same = (
            torch.equal(first[name], second[name])
            if isinstance(first[name], torch.Tensor)
            else first[name] == second[name]
        )
        assert same, name
    lines = [[line | {"steps_per_second": 0} for line in folder.read_metrics()] for folder in (a, b)]
    assert lines[0] == lines[1]


@pytest.fixture(scope="module")
def whole_run(folder_of_shapes, tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "whole", small_options(folder_of_shapes))


def test_a_run_folder_holds_what_it_should(whole_run):
    assert {p.name for p in whole_run.path.iterdir()} == {"config.json", "metrics.jsonl", "checkpoint.safetensors"}
    lines = whole_run.read_metrics()
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 20, 24, 28, 30]
    assert lines[-1]["epoch"] == 7.5
    assert {"loss", "reconstruction", "kl", "energy_posterior", "energy_prior", "steps_per_second"} <= lines[0].keys()
    assert lines[-1]["reconstruction"] < lines[0]["reconstruction"]
    assert load_checkpoint(whole_run.checkpoint)["step"] == 30


def test_same_seed_same_bits_other_seed_others(whole_run, folder_of_shapes, tmp_path):
    assert_same_run(whole_run, train(tmp_path / "again", small_options(folder_of_shapes)))
    other = train(tmp_path / "other", small_options(folder_of_shapes, seed=1))
    assert other.read_metrics()[0]["loss"] != whole_run.read_metrics()[0]["loss"]


def test_stopping_anywhere_changes_nothing(whole_run, folder_of_shapes, tmp_path, monkeypatch):
    """Dies after steps 3, 7, 11, … (before, at and after checkpoints), each time goes on from the last checkpoint."""
    from jlebm_fast.training import loop

    class Death(BaseException):
        pass

    advance, steps_left = loop.Trainer.advance, 0

    def mortal_advance(trainer):
        nonlocal steps_left
        if steps_left == 0:
            raise Death
        steps_left -= 1
        return advance(trainer)

    monkeypatch.setattr(loop.Trainer, "advance", mortal_advance)
    options, resume, deaths = small_options(folder_of_shapes), False, 0
    for lifetime in (0, 3, 7, 11, 1, 15, 30):
        steps_left = lifetime
        try:
            run = train(tmp_path / "run", options, resume=resume)
        except Death:
            deaths += 1
        resume = True
    assert deaths == 6
    assert_same_run(whole_run, run)


def test_killed_runs_go_on_bit_for_bit(folder_of_shapes, tmp_path):
    """SIGKILL at a moment that nobody chose; the process that goes on is a new one."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = [
        *TINY,
        "--data",
        str(folder_of_shapes),
        "--steps",
        "200",
        "--log-every",
        "5",
        "--checkpoint-every",
        "7",
    ]

    def start(name, *more):
        command = [sys.executable, "-m", "jlebm_fast", "train", str(tmp_path / name), *arguments, *more, "--no-figures"]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    whole = start("whole")
    killed = start("killed")
    while killed.poll() is None and not _reached(tmp_path / "killed", 100):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    killed = start("killed", "--resume")
    for process in (killed, whole):
        _, said = process.communicate(timeout=100)
        assert process.returncode == 0, said
    assert_same_run(RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "killed"))


def _reached(run, step):
    metrics = run / "metrics.jsonl"
    lines = metrics.read_bytes().split(b"\n")[:-1] if metrics.exists() else []
    return bool(lines) and json.loads(lines[-1])["step"] >= step


def test_a_polite_stop_saves_first(whole_run, folder_of_shapes, tmp_path, monkeypatch):
    from jlebm_fast.training import loop

    advance = loop.Trainer.advance

    def interrupted_advance(trainer):
        if trainer.step == 16:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "advance", interrupted_advance)
        with pytest.raises(loop.Stopped, match=r"stopped after step 17; .*--resume") as stopped:
            train(tmp_path / "run", small_options(folder_of_shapes))
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")["step"] == 17
    assert_same_run(whole_run, train(tmp_path / "run", small_options(folder_of_shapes), resume=True))


def test_a_longer_run_starts_with_the_shorter_one(whole_run, folder_of_shapes, tmp_path):
    train(tmp_path / "run", small_options(folder_of_shapes, steps=12))
    assert_same_run(whole_run, train(tmp_path / "run", small_options(folder_of_shapes), resume=True))


def test_divergence_keeps_the_last_good_checkpoint(folder_of_shapes, tmp_path):
    with pytest.raises(RunError, match=r"training diverged at step \d+: .*; the last good checkpoint is kept in"):
        train(tmp_path / "run", small_options(folder_of_shapes, autoencoder_lr=1e12, checkpoint_every=1))
    _, _, model = open_run(tmp_path / "run", "cpu")
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_bad_parameters_never_reach_the_checkpoint(folder_of_shapes, tmp_path, monkeypatch):
    from jlebm_fast.training import loop

    advance = loop.Trainer.advance

    def poisoned_advance(trainer):
        values = advance(trainer)  # all losses finite, as when only a gradient overflowed
        if trainer.step == 14:
            next(trainer.model.generator.parameters()).data.view(-1)[0] = float("inf")
        return values

    monkeypatch.setattr(loop.Trainer, "advance", poisoned_advance)
    with pytest.raises(RunError, match="no longer finite"):
        train(tmp_path / "run", small_options(folder_of_shapes))
    state = load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    assert state["step"] == 7
    assert all(torch.isfinite(p).all() for p in state["model"].values())


def test_other_images_cannot_go_on(folder_of_shapes, tmp_path):
    images = tmp_path / "images"
    for i in range(10):
        images.mkdir(exist_ok=True)
        Image.new("L", (16, 16), 20 * i).save(images / f"{i}.png")
    train(tmp_path / "run", small_options(images, steps=1))
    Image.new("L", (16, 16), 255).save(images / "0.png")
    Image.new("L", (16, 16), 254).save(images / "1.png")
    with pytest.raises(RunError, match="not those that"):
        train(tmp_path / "run", small_options(images, steps=2), resume=True)


@pytest.mark.parametrize("command", [make_figures, evaluate])
def test_other_images_are_neither_drawn_nor_measured(tmp_path, command):
    images = write_folder(tmp_path / "images", 20)
    run = train(tmp_path / "run", small_options(images, steps=1)).path
    Image.new("L", (16, 16), 77).save(images / "bars" / "added.png")
    with pytest.raises(RunError, match=r"not those that .*: put them back"):
        command(run, device="cpu")
    assert {p.name for p in run.iterdir()} == {"config.json", "metrics.jsonl", "checkpoint.safetensors"}


def test_overwriting_must_be_asked_for(folder_of_shapes, tmp_path):
    train(tmp_path / "run", small_options(folder_of_shapes, steps=2))
    with pytest.raises(RunError, match="already holds a run"):
        train(tmp_path / "run", small_options(folder_of_shapes, steps=2))
    train(tmp_path / "run", small_options(folder_of_shapes, steps=3, seed=5), overwrite=True)
    assert load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")["step"] == 3


def test_a_run_without_its_configuration_is_not_overwritten(folder_of_shapes, tmp_path):
    options = small_options(folder_of_shapes, steps=4)
    for i, lost in enumerate(
        (["config.json"], ["config.json", "metrics.jsonl"], ["config.json", "checkpoint.safetensors"])
    ):
        run = train(tmp_path / str(i), options).path
        for name in lost:
            (run / name).unlink()
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        with pytest.raises(RunError, match=r"of a run whose config.json is missing: put that back .* --overwrite"):
            train(run, options)
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before
        train(run, options, overwrite=True)
        assert (run / "config.json").exists()


def put_products(run):
    """Files of the names that this program gives them; of each folder, one that it does not."""
    made = ["evaluation.json", "figures/samples.png", "figures/evaluation_chains.png", "samples/samples.npz"]
    made += ["samples/samples.png", "samples/png/000000.png"]
    others = ["notes.txt", "figures/mine.png", "samples/png/mine.png", "samples/mine/000000.png"]
    for name in made + others:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("")
    return set(made), set(others)


def files_in(run):
    kept = {"config.json", "metrics.jsonl", "checkpoint.safetensors"}
    return {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()} - kept


def test_overwriting_removes_what_the_old_run_made_and_nothing_else(folder_of_shapes, tmp_path):
    options = small_options(folder_of_shapes, steps=2)
    run = train(tmp_path / "run", options).path
    made, others = put_products(run)
    with pytest.raises(RunError, match="--batch-size 1000 needs"):
        train(run, dataclasses.replace(options, batch_size=1000), overwrite=True)
    assert files_in(run) == made | others
    assert load_checkpoint(run / "checkpoint.safetensors")["step"] == 2
    train(run, options, overwrite=True)
    assert files_in(run) == others


def test_folders_elsewhere_and_folders_without_a_run_are_left_alone(folder_of_shapes, tmp_path):
    options, elsewhere = small_options(folder_of_shapes, steps=2), tmp_path / "elsewhere"
    made, others = put_products(tmp_path / "run")
    train(tmp_path / "run", options, overwrite=True)
    assert files_in(tmp_path / "run") == made | others
    (tmp_path / "run" / "samples").rename(elsewhere)
    (tmp_path / "run" / "samples").symlink_to(elsewhere)
    train(tmp_path / "run", options, overwrite=True)
    assert (elsewhere / "samples.npz").exists()


def test_going_on_removes_the_old_evaluation(folder_of_shapes, tmp_path):
    run = train(tmp_path / "run", small_options(folder_of_shapes, steps=2)).path
    made, others = put_products(run)
    train(run, small_options(folder_of_shapes, steps=2), resume=True)
    assert files_in(run) == made | others
    train(run, small_options(folder_of_shapes, steps=3), resume=True)
    assert files_in(run) == (made | others) - {"evaluation.json", "figures/evaluation_chains.png"}


def test_lost_metrics_keep_no_run_from_going_on(folder_of_shapes, tmp_path, capsys):
    run = train(tmp_path / "run", small_options(folder_of_shapes, steps=12))
    whole, checkpoint = run.metrics.read_bytes(), run.checkpoint.read_bytes()
    for content, expected in (
        (None, [14]),
        (whole[:-20], [4, 8, 14]),
        (whole[: whole.index(b"\n") + 1] + b"\n", [4, 14]),
    ):
        run.metrics.unlink() if content is None else run.metrics.write_bytes(content)
        run.checkpoint.write_bytes(checkpoint)
        train(run.path, small_options(folder_of_shapes, steps=14), resume=True)
        assert "has lost lines from before step" in capsys.readouterr().err
        assert b"\0" not in run.metrics.read_bytes()
        assert [line["step"] for line in run.read_metrics()] == expected
    make_figures(run.path, device="cpu")


def test_lines_after_the_checkpoint_are_written_again(folder_of_shapes, tmp_path, capsys):
    run = train(tmp_path / "run", small_options(folder_of_shapes, steps=8))
    later = run.metrics.read_bytes().splitlines()[-1].replace(b'"step": 8', b'"step": 12')
    for tail in (later, later + b"\n" + later[:30], later[:30] + b"\n" + later, b"\0\0\n"):
        with open(run.metrics, "ab") as metrics:
            metrics.write(tail)
        train(run.path, small_options(folder_of_shapes, steps=8), resume=True)
        assert [line["step"] for line in run.read_metrics()] == [4, 8]
        assert "lost" not in capsys.readouterr().err


def test_a_lost_checkpoint_is_said_and_the_metrics_stay(folder_of_shapes, tmp_path):
    options = small_options(folder_of_shapes, steps=8)
    run = train(tmp_path / "run", options)
    before = run.metrics.read_bytes()
    run.checkpoint.unlink()
    with pytest.raises(RunError, match=r"has metrics but no checkpoint to go on from: .* --overwrite"):
        train(run.path, options, resume=True)
    assert run.metrics.read_bytes() == before


def test_an_end_that_lies_behind_changes_nothing(folder_of_shapes, tmp_path):
    run = train(tmp_path / "run", small_options(folder_of_shapes, steps=8))
    before = [path.read_bytes() for path in (run.config, run.metrics, run.checkpoint)]
    for changes, words in (({"steps": 5}, "--steps 5 ends at step 5"), ({"epochs": 1}, "--epochs 1 ends at step 4")):
        with pytest.raises(RunError, match=f"{words}, but the run has already come to step 8"):
            train(run.path, small_options(folder_of_shapes, **{"steps": 8} | changes), resume=True)
    assert [path.read_bytes() for path in (run.config, run.metrics, run.checkpoint)] == before


def test_contrary_and_empty_arguments_are_refused(folder_of_shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="--overwrite replaces it: give one"):
        train(tmp_path / "run", small_options(folder_of_shapes), resume=True, overwrite=True)
    with pytest.raises(RunError, match='the run folder must be a path, got ""'):
        train("", small_options(folder_of_shapes))
    assert list(tmp_path.iterdir()) == []


def test_two_processes_never_train_in_one_folder(folder_of_shapes, tmp_path):
    run = RunFolder(tmp_path / "run")
    command = [sys.executable, "-m", "jlebm_fast", "train", run.path, "--data", folder_of_shapes, *TINY]
    command += ["--steps", "1000000", "--log-every", "1", "--no-figures", "--device", "cpu"]
    first = subprocess.Popen(list(map(str, command)), env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    try:
        while first.poll() is None and not _reached(run.path, 3):
            time.sleep(0.01)
        options = dataclasses.replace(run.read_config().options, steps=2_000_000)
        before = run.config.read_bytes()
        for how in ("resume", "overwrite"):
            with pytest.raises(RunError, match=r"another process is training in .*: wait until it has ended"):
                train(run.path, options, **{how: True})
        assert first.poll() is None
        assert run.config.read_bytes() == before
    finally:
        first.kill()
        first.communicate()
    train(run.path, dataclasses.replace(options, steps=5), overwrite=True)


@pytest.mark.parametrize("prior", ["ebm", "gaussian"])
def test_figures_samples_and_evaluation(folder_of_shapes, tmp_path, prior, monkeypatch):
    from jlebm_fast.training import figures, frechet

    monkeypatch.setattr(figures, "LONG_CHAIN_STEPS", 200)
    monkeypatch.setattr(frechet, "CLASSIFIER_STEPS", 30)
    no_energy = {"energy_hidden": TrainOptions.energy_hidden, "chain_steps": TrainOptions.chain_steps}
    changes = {"prior": prior, **(no_energy if prior == "gaussian" else {})}
    run = train(tmp_path / "run", small_options(folder_of_shapes, **changes)).path
    names = {"samples", "reconstructions", "layers_swapped", "traverse", "learning"}
    names |= {"layers_masked", "long_chain"} if prior == "ebm" else set()
    assert {p.stem for p in make_figures(run, device="cpu")} == names
    for name in names:
        with Image.open(run / "figures" / f"{name}.png") as figure:
            figure.load()
            assert max(figure.size) > 300

    import numpy as np

    sample_run(run, 30, seed=3, device="cpu", png_files=True)
    with np.load(run / "samples" / "samples.npz") as first:
        assert first["images"].shape == (30, 16, 16)
        assert first["z"].shape == (30, 5)
        latents = first["z"]
    assert len(list((run / "samples" / "png").iterdir())) == 30
    with np.load(sample_run(run, 30, seed=3, device="cpu", out=tmp_path / "elsewhere") / "samples.npz") as again:
        assert np.array_equal(again["z"], latents)

    result = evaluate(run, 50, long_steps=40, device="cpu")
    assert ("frechet_standard_normal" in result) == (prior == "ebm")
    assert all(value >= 0 for value in result.values() if isinstance(value, float))
