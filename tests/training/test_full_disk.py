"""A disk that is full: one sentence with the file's name, and everything that was there before."""

import contextlib
import json

import numpy as np
import pytest

resource = pytest.importorskip("resource")  # POSIX

SMALL = ("--batch-size", 8, "--width", 4, "--chain-steps", 3, "--energy-hidden", 8, "--no-figures")


@contextlib.contextmanager
def full_beyond(size):
    """No file grows beyond so many bytes: where a disk is full, the system's answer comes from the same calls."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def run(jlebm, folder_of_shapes, tmp_path):
    done = jlebm("train", tmp_path / "run", "--data", folder_of_shapes, "--steps", 4, *SMALL)
    assert done.returncode == 0, done.stderr
    return tmp_path / "run"


def test_training_names_the_checkpoint_that_is_kept_and_goes_on_from_it(jlebm, folder_of_shapes, tmp_path):
    run = tmp_path / "run"
    options = ("--data", folder_of_shapes, "--steps", 6, "--checkpoint-every", 2, "--log-every", 1)
    first = jlebm("train", tmp_path / "size", *options[:2], "--steps", 1, *SMALL)
    assert first.returncode == 0, first.stderr
    with full_beyond((tmp_path / "size/checkpoint.safetensors").stat().st_size // 2):  # without moments it is a third
        ended = jlebm("train", run, *options, *SMALL)
    assert ended.returncode == 1
    sentence = ended.stderr.strip().splitlines()[-1]
    assert "training ended at step 2" in sentence
    assert "the checkpoint of step 0 is kept" in sentence
    assert "--resume goes on" in sentence
    assert "Traceback" not in ended.stderr
    resumed = jlebm("train", run, "--resume", "--no-figures")
    assert resumed.returncode == 0, resumed.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 7)]


def test_no_room_for_the_first_checkpoint(jlebm, folder_of_shapes, tmp_path):
    with full_beyond(2000):
        ended = jlebm("train", tmp_path / "run", "--data", folder_of_shapes, "--steps", 4, *SMALL)
    assert ended.returncode == 1
    assert (
        f"no checkpoint could be written yet: make room, then jlebm train {tmp_path / 'run'} --resume" in ended.stderr
    )
    begun = jlebm("train", tmp_path / "run", "--resume", "--no-figures")
    assert begun.returncode == 0, begun.stderr


def test_samples_that_were_there_stay(jlebm, run):
    assert jlebm("sample", run, "-n", 3).returncode == 0
    with full_beyond(4096):
        ended = jlebm("sample", run, "-n", 500)
    assert ended.returncode == 1
    assert 'samples.npz"' in ended.stderr
    assert len(np.load(run / "samples/samples.npz")["images"]) == 3
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["samples.npz", "samples.png"]


def test_figures_that_were_there_stay(jlebm, run):
    figure = run / "figures/samples.png"
    figure.parent.mkdir(exist_ok=True)
    figure.write_bytes(b"an older figure")
    with full_beyond(1000):
        ended = jlebm("figures", run)
    assert ended.returncode == 1
    assert 'samples.png"' in ended.stderr
    assert figure.read_bytes() == b"an older figure"
