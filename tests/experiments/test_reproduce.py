"""`jlebm reproduce mnist` on small shapes: the whole of it, stopped and gone on with, and its pieces."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from PIL import Image

from jlebm_fast.errors import RunError
from jlebm_fast.experiments import drawing, work
from jlebm_fast.experiments.cells import Plan, model_cell
from jlebm_fast.experiments.command import usable_cores
from jlebm_fast.experiments.measures import Subject, anomaly, class_score, train_on_latents
from jlebm_fast.experiments.reproduce import Request, _images, reproduce, time_estimate
from jlebm_fast.experiments.settings import FULL, PARTS, QUICK, Settings
from jlebm_fast.experiments.tables import Results, all_tables, claims
from jlebm_fast.experiments.work import Place, StopRequested, run_cell, save_images, train_cell, without
from jlebm_fast.models import MODELS
from jlebm_fast.training import figures
from jlebm_fast.training.checkpoints import load_checkpoint
from jlebm_fast.training.inception import inception_fid
from jlebm_fast.training.sources import load_images
from jlebm_fast.training.trainer import Trainer

SMALL = Settings(
    steps=4,
    seeds=(0, 1),
    samples=30,
    chain_steps=(2, 3),
    energy_widths=(0, 8),
    digits=(1,),
    classifier_steps=30,
    content_steps=20,
    batch_size=8,
    width=4,
    latent_dims=(2, 2, 3),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """120 images of two classes, bars and squares."""
    root = tmp_path_factory.mktemp("images")
    for i in range(120):
        pixels = np.zeros((16, 16), np.uint8)
        place = 1 + (5 * i) % 11
        if i % 2:
            pixels[:, place : place + 3] = 255 - i
        else:
            pixels[place : place + 4, place : place + 4] = 200 - i
        folder = root / ("bars" if i % 2 else "squares")
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return str(root)


def request_of(root, data, parts=PARTS, **changes):
    return Request(root, data, dataclasses.replace(SMALL, **changes), parts, "cpu", jobs=1)


@pytest.fixture
def place(tmp_path, data):
    images = _images(request_of(tmp_path / "out", data))
    return Place(tmp_path / "out", SMALL, images.fingerprint(), "cpu"), images


def never():
    return False


def test_the_whole_set_once_and_then_from_its_cache(tmp_path, data, monkeypatch):
    monkeypatch.setattr(figures, "LONG_CHAIN_STEPS", 200)
    parts = ("models", "energy_width", "layers", "anomaly", "figures")
    request = request_of(tmp_path / "out", data, parts, seeds=(0,))
    report = reproduce(request)
    page = report.read_text()
    assert "http:" not in page  # opens without a network; the figures in base64 have no colon
    assert "https:" not in page
    names = ["samples_of_all_models", "curves", "joint_samples", "joint_reconstructions", "joint_long_chain"]
    names += [f"hierarchy_{name}" for name in ("layers_swapped", "layers_masked", "traverse", "scatter")]
    assert {path.stem for path in (tmp_path / "out" / "figures").iterdir()} == set(names)
    assert page.count("data:image/png;base64,") == len(names)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    tables = {table["title"]: table["rows"] for table in results["tables"]}
    assert len(tables) == 4
    (models,) = (rows for title, rows in tables.items() if title.startswith("All models"))
    assert {row[0] for row in models[1:]} == set(MODELS)
    assert all(float(row[1]) > 0 for row in models[1:])
    assert data not in json.dumps(results["cells"])  # no path of this machine in what may be committed
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.parent.name == "cells"}
    assert len(before) == len(results["cells"])
    monkeypatch.setattr(work, "run_cell", None)  # nothing is left to run
    assert reproduce(request) == report
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_a_stopped_cell_goes_on_bit_for_bit(place, monkeypatch):
    here, images = place
    cell = model_cell(SMALL, images.name, "cpu", "joint", 0, steps=6)
    calls = iter([False, False, True])
    with pytest.raises(StopRequested):
        train_cell(here, cell, images, lambda: next(calls))
    assert load_checkpoint(here.run(cell).checkpoint)["step"] == 3
    advance, steps_run = Trainer.advance, []
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", lambda trainer: steps_run.append(trainer.step) or advance(trainer))
        stopped = train_cell(here, cell, images, never)
    assert steps_run == [3, 4, 5]
    elsewhere = dataclasses.replace(here, root=here.root / "elsewhere")
    whole = train_cell(elsewhere, cell, images, never)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, stopped.model.state_dict()[key])
    steps = [[line["step"] for line in p.run(cell).read_metrics()] for p in (here, elsewhere)]
    assert steps[0] == steps[1]


def test_another_cell_s_first_stage_is_as_good_as_its_own(place):
    here, images = place
    cell = model_cell(SMALL, images.name, "cpu", "ncp_vae", 0)
    alone = train_cell(here, dataclasses.replace(cell, first_stage=None), images, never).model.state_dict()
    elsewhere = dataclasses.replace(here, root=here.root / "elsewhere")
    train_cell(elsewhere, cell.first_stage, images, never)
    shared = train_cell(elsewhere, cell, images, never).model.state_dict()
    assert alone.keys() == shared.keys()
    assert all(torch.equal(alone[key], shared[key]) for key in alone)


def test_a_diverged_cell_is_a_result(place):
    here, images = place
    cell = model_cell(SMALL, images.name, "cpu", "joint", 0, autoencoder_lr=1e15, steps=30)
    result = run_cell(here, cell, images, never)
    assert result["failed"].startswith("diverged: ")
    again = run_cell(here, cell, None, never)  # from its file
    assert again["failed"] == result["failed"]


def test_the_plan_has_each_run_once_and_hashes_tell_what_matters():
    plan = Plan(FULL, "mnist", "cpu", PARTS)
    # 13 models, K and width beside the models' own (60, and 0 and 100), anomaly twice, one hierarchy
    assert len(plan.cells) == 3 * (13 + 4 + 3) + 2 * 5 + 1
    joint = plan.cells[plan.tables["models"]["joint", 0]]
    assert plan.tables["chain_steps"][60, 0] == plan.tables["energy_width"][100, 0] == joint.run_identity
    assert set(joint.measures) == {"distance", "content"}
    assert plan.tables["energy_width"][0, 2] == plan.tables["models"]["vlae", 2]
    key = joint.key(FULL, "abc")
    assert key == dataclasses.replace(joint, options=dataclasses.replace(joint.options, data="elsewhere")).key(
        FULL, "abc"
    )
    assert key != joint.key(FULL, "abd")
    assert key != joint.key(dataclasses.replace(FULL, samples=5), "abc")
    assert key != dataclasses.replace(joint, options=dataclasses.replace(joint.options, width=3)).key(FULL, "abc")
    assert len(Plan(QUICK, "mnist", "cpu", PARTS).cells) == 19
    assert list(Plan(QUICK, "mnist", "cpu", ["figures"]).cells) == list(
        dict.fromkeys(Plan(QUICK, "mnist", "cpu", ["figures"]).tables["figures"].values())
    )


def results_of(distances):
    plan = Plan(dataclasses.replace(SMALL, seeds=(0, 1, 2)), "x", "cpu", ["models"])
    found = {}
    for model, values in distances.items():
        for seed, value in enumerate(values):
            measures = {"distance": {"frechet": value, "class_score": 5.0, "reconstruction_mse": 0.01}}
            found[plan.tables["models"][model, seed]] = {"measures": measures}
    return Results(plan, found)


def test_what_the_report_claims():
    clear = claims(results_of({"joint": [10.0, 11.0, 12.0], "vlae": [40.0, 41.0, 42.0]}))
    assert "11.0 ± 0.6" in clear[0]
    assert "at most half" in clear[0]
    error = math.sqrt(2 / 3)
    assert f"{30 / error:.1f} standard errors" in clear[1]
    assert "more than two" in clear[1]
    close = claims(results_of({"joint": [10.0, 30.0, 50.0], "vlae": [20.0, 30.0, 50.0]}))
    assert "more than half, the mark that was set" in close[0]
    assert "not more than two" in close[1]
    assert "not both finished" in claims(results_of({"joint": [1.0]}))[0]
    (table,) = all_tables(results_of({"joint": [1.0], "lvae": [0.5]}))
    assert [row[0] for row in table.rows[1:3]] == ["lvae", "joint"]  # best first
    assert table.rows[3][1] == "–"


def test_too_few_images_without_a_digit_are_told_before_the_classifier(tmp_path, data):
    words = "52 training images of other classes than 1; a batch of the experiments takes 61: use more"
    with pytest.raises(RunError, match=words):
        reproduce(request_of(tmp_path / "out", data, ("anomaly",), batch_size=61))
    assert not (tmp_path / "out" / "classifier.safetensors").exists()


def test_class_score_of_known_predictions():
    half = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(50, 1)
    assert class_score(half) == pytest.approx(2.0)
    assert class_score(torch.full((10, 4), 0.25)) == pytest.approx(1.0)


def test_a_layer_with_the_label_is_told_from_one_without():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (600,), generator=generator)
    knows = torch.nn.functional.one_hot(labels, 3) * 3.0 + torch.randn(600, 3, generator=generator)
    nothing = torch.randn(600, 3, generator=generator)
    right = [(train_on_latents(z, labels, 200)(z).argmax(1) == labels).double().mean() for z in (knows, nothing)]
    assert right[0] > 0.9
    assert right[1] < 0.6


def test_anomalies_are_what_has_low_joint_density(place):
    _, images = place

    class Model:
        device = torch.device("cpu")
        config = types.SimpleNamespace(reconstruction_weight=1.0)

        def encode(self, x, generator):
            return [x.mean(dim=(1, 2, 3))[:, None]]

        def generator(self, zs):  # reconstructs squares, not bars
            return torch.full((len(zs[0]), 1, 16, 16), -1.0)

        def log_prior(self, zs):
            return torch.zeros(len(zs[0]))

    bars, squares = 0, 1
    cell = model_cell(SMALL, images.name, "cpu", "joint", 0)
    subject = Subject(Model(), dataclasses.replace(cell, without_digit=bars), images, None, SMALL)
    found = anomaly(subject)["auprc"]
    other = anomaly(subject._replace(cell=dataclasses.replace(cell, without_digit=squares)))["auprc"]
    assert found > 0.9 > other
    assert set(without(images, bars).train_labels.tolist()) == {squares}
    assert len(without(images, None).train) == len(images.train)


def test_the_inception_fid_says_what_is_missing(tmp_path, monkeypatch):
    pixels = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    weights = tmp_path / "weights.pth"
    with pytest.raises(RunError, match="no Inception weights at"):
        inception_fid(pixels, pixels, weights, torch.device("cpu"))
    weights.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(RunError, match="pip install torch-fidelity"):
        inception_fid(pixels, pixels, weights, torch.device("cpu"))

    def calculate_metrics(input1, input2, **options):
        assert len(input1) == 3
        assert input1[0].shape == (3, 8, 8)
        assert input1[0].dtype == torch.uint8
        assert options["feature_extractor_weights_path"] == str(weights)
        assert options["fid"] is True
        return {"frechet_inception_distance": 12.5}

    monkeypatch.setitem(sys.modules, "torch_fidelity", types.SimpleNamespace(calculate_metrics=calculate_metrics))
    for content in (b"", b"garbage", b"PK\x03\x04 cut off"):
        weights.write_bytes(content)
        with pytest.raises(RunError, match="is cut off or no file of Inception weights"):
            inception_fid(pixels, pixels, weights, torch.device("cpu"))
    for other in ({"weight": torch.ones(1)}, [torch.ones(1)]):
        torch.save(other, weights)
        with pytest.raises(RunError, match="holds other weights than those of the Inception net"):
            inception_fid(pixels, pixels, weights, torch.device("cpu"))
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.ones(1)}, weights)
    assert inception_fid(pixels, pixels, weights, torch.device("cpu")) == 12.5


def test_damaged_files_are_one_sentence(place, tmp_path, data):
    here, images = place
    cell = model_cell(SMALL, images.name, "cpu", "joint", 0)
    here.result(cell).parent.mkdir()
    for content in ('{"label": "joi', "[]", "{}"):
        here.result(cell).write_text(content)
        with pytest.raises(RunError, match="is damaged: remove it, and the same command measures this cell again"):
            run_cell(here, cell, images, never)
    for content in (b"", b"PK\x03\x04 cut", b"words"):
        here.images.write_bytes(content)
        with pytest.raises(RunError, match="is damaged: remove it, and the same command reads the images again"):
            _images(request_of(tmp_path / "out", data))


ENDLESS = """
import dataclasses, pathlib, sys
sys.path.insert(0, sys.argv[1])
from test_reproduce import request_of
from jlebm_fast.experiments.reproduce import Stopped, reproduce

if __name__ == "__main__":
    try:
        reproduce(request_of(pathlib.Path(sys.argv[2]), sys.argv[3], ("chain_steps",), steps=10**6))
    except Stopped as stopped:
        print(stopped)
"""


def lives(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_first_process(tmp_path, data, number):
    """SIGKILL to the first process alone, or SIGTERM to all of them, as batch systems send it."""
    (tmp_path / "endless.py").write_text(ENDLESS)
    out = tmp_path / "out"
    command = [sys.executable, tmp_path / "endless.py", pathlib.Path(__file__).parent, out, data]
    job = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        wait_until(lambda: any(out.glob("runs/*/metrics.jsonl")))
        with pytest.raises(RunError, match="another process is at work in"):
            reproduce(request_of(out, data, ("chain_steps",)))
        children = pathlib.Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        assert len(children) >= 2  # the worker, and what watches shared memory
        if number == signal.SIGKILL:
            job.kill()
        else:
            os.killpg(job.pid, number)
        said, _ = job.communicate(timeout=60)
        wait_until(lambda: not any(lives(pid) for pid in children))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    if number == signal.SIGTERM:
        assert job.returncode == 0
        assert said.startswith("stopped with 0 of 4 cells done; the same command goes on")


def test_cells_at_a_time_are_as_many_as_usable_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 6}, raising=False)
    assert usable_cores() == 3


def test_the_plan_is_timed(tmp_path, data):
    lines = time_estimate(request_of(tmp_path / "out", data, ("chain_steps",), seeds=(0,)))
    assert re.search(r"2 cells, .* 1 at a time: 0\.0 hours", lines[-1])


def test_the_scatter_shows_the_points():
    generator = torch.Generator().manual_seed(0)
    near, far = torch.randn(1000, 2, generator=generator), 3 * torch.randn(1000, 2, generator=generator)
    assert drawing.scatter_reach([near]) == 4.0
    reach = drawing.scatter_reach([near, far])
    assert (far.abs() > reach).double().mean() <= 0.005
    far[0] = 1e6  # a chain that runs away makes the others no dot
    assert drawing.scatter_reach([near, far]) < 15


def test_figures_are_small(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)).save(path)
    before = path.stat().st_size
    drawing.Drawing(path, "").shrink()
    assert path.stat().st_size < before / 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "nowhere"], 'no such file or folder: "nowhere"'),
        (["--data", "FLAT"], "has no class labels"),
        (["--data", "DATA"], "has no held-out images of class 4"),
        (["--seeds", "-1"], "--seeds must be positive"),
        (["--inception-weights", "nowhere.pth"], 'no Inception weights at "nowhere.pth"'),
        (["--inception-weights", "FILE", "--parts", "layers"], "it needs the part models"),
        (["--parts", "dreams"], "dreams"),
        (["svhn"], "mnist"),
    ],
)
def test_wrong_input_is_one_sentence(tmp_path, data, capsys, monkeypatch, arguments, words):
    from jlebm_fast.cli import main

    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(12):
        Image.new("L", (16, 16), 20 * i).save(flat / f"{i}.png")
    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    places = {"DATA": data, "FLAT": str(flat), "FILE": "file"}
    what = [] if arguments == ["svhn"] else ["mnist", "--out", "out"]
    assert main(["reproduce", *what, *[places.get(a, a) for a in arguments]]) in (1, 2)
    said = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "images" not in line[:20]]
    assert len(said) == 1
    assert said[0].startswith("jlebm: ")
    assert words in said[0]
    assert not (tmp_path / "out" / "report.html").exists()


def test_a_class_that_the_kept_images_lack_is_missed_too(tmp_path, data, capsys, monkeypatch):
    """Other parts have kept the folder's images; the anomaly table, asked for later, needs what they lack."""
    from jlebm_fast.cli import main

    monkeypatch.chdir(tmp_path)
    pathlib.Path("out").mkdir()
    save_images(pathlib.Path("out/images.npz"), load_images(data))
    assert main(["reproduce", "mnist", "--out", "out", "--data", data, "--parts", "anomaly"]) in (1, 2)
    assert "has no held-out images of class 4" in capsys.readouterr().err
    assert not pathlib.Path("out/report.html").exists()
