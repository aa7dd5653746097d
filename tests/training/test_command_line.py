"""The command line from outside: help, work, and one clear sentence for every wrong input."""

import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from shapes import TINY, write_folder

TRAIN = ["--steps", "3", "--spectral-norm", "--no-figures", "--device", "cpu", *TINY]


@pytest.fixture(scope="module")
def trained(folder_of_shapes, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "trained"
    command = [sys.executable, "-m", "jlebm_fast", "train", run, "--data", folder_of_shapes, *TRAIN]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return run


def assert_one_sentence(process, words, codes=(1, 2)):
    assert process.returncode in codes, process.stderr
    assert "Traceback" not in process.stderr
    said = [line for line in process.stderr.splitlines() if line.strip()]
    assert len(said) == 1, process.stderr
    assert said[0].startswith("jlebm: ")
    assert words in said[0]


def copy_of(trained, run):
    run.mkdir()
    for file in ("config.json", "metrics.jsonl", "checkpoint.safetensors"):
        (run / file).write_bytes((trained / file).read_bytes())
    return run


def test_help_lists_commands_and_defaults(jlebm):
    commands = jlebm("--help")
    assert commands.returncode == 0
    for name in ("train", "sample", "figures", "evaluate", "bench", "verify", "info"):
        assert name in commands.stdout
    options = jlebm("train", "--help")
    assert options.returncode == 0
    for words in ("--latent-dims", "(default: 2 4 8)", "--chain-steps", "(default: digits)", "--resume"):
        assert words in options.stdout


@pytest.mark.parametrize("arguments", [["info"], ["train", "--help"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_hears_no_complaint(arguments, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "jlebm_fast", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    process = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writing)
    assert (process.returncode, process.stderr) == (141, "")


@pytest.mark.parametrize("setting", [("PYTHONOPTIMIZE", "2"), ("PYTHONIOENCODING", "ascii")])
def test_help_whatever_python_and_terminal_are_set_to(setting):
    command = [sys.executable, "-m", "jlebm_fast", "train", "--help"]
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict([setting]))
    assert process.returncode == 0, process.stderr
    assert "--latent-dims" in process.stdout


def test_a_run_has_one_length(jlebm, folder_of_shapes, tmp_path):
    common = ["train", tmp_path / "run", "--data", folder_of_shapes, "--no-figures", *TINY]
    both = "--steps does nothing with --epochs 1: leave it out, or say --epochs 0"
    assert_one_sentence(jlebm(*common, "--epochs", "1", "--steps", "3"), both, (1,))
    assert jlebm(*common, "--epochs", "1").returncode == 0
    assert_one_sentence(jlebm(*common, "--resume", "--steps", "50"), both, (1,))
    longer = jlebm(*common, "--resume", "--epochs", "0", "--steps", "50")
    assert longer.returncode == 0, longer.stderr
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 50


def test_a_run_can_be_sampled_and_shown(jlebm, trained):
    sampled = jlebm("sample", trained, "-n", "1234")
    assert sampled.returncode == 0, sampled.stderr
    with np.load(trained / "samples" / "samples.npz") as samples:
        assert samples["images"].shape == (1234, 16, 16)
    info = jlebm("info", trained)
    assert info.returncode == 0, info.stderr
    assert "eager" in info.stdout
    assert "prior ebm" in info.stdout


def test_resume_keeps_the_options_of_the_run(jlebm, trained, tmp_path):
    copy = copy_of(trained, tmp_path / "copy")
    more = jlebm("train", copy, "--resume", "--steps", "5", "--no-figures")
    assert more.returncode == 0, more.stderr
    config = json.loads((copy / "config.json").read_text())
    assert config["options"]["steps"] == 5
    assert config["options"]["width"] == 4
    assert config["options"]["spectral_norm"] is True
    assert_one_sentence(jlebm("train", copy, "--resume", "--width", "8"), "--resume cannot change --width from 4 to 8")


def test_moved_images_strand_no_run(jlebm, tmp_path):
    old = write_folder(tmp_path / "old")
    run = tmp_path / "run"
    assert jlebm("train", run, "--data", old, *TRAIN).returncode == 0
    new = old.rename(tmp_path / "new")
    for command in (["figures", run], ["evaluate", run, "--no-frechet", "-n", "4", "--long-steps", "20"]):
        assert_one_sentence(jlebm(*command), f'no such file or folder: "{old}"')
        there = jlebm(*command, "--data", new)
        assert there.returncode == 0, there.stderr
    resumed = jlebm("train", run, "--resume", "--steps", "5", "--data", new, "--device", "auto", "--no-figures")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((run / "config.json").read_text())["options"]["data"] == str(new)
    other = write_folder(tmp_path / "other", 60)
    for command in (["train", run, "--resume"], ["figures", run], ["evaluate", run, "-n", "4"]):
        assert_one_sentence(jlebm(*command, "--data", other), "are not those that")


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "during", ["jlebm_fast.cli._main", "jlebm_fast.cli._run", "jlebm_fast.training.loop.load_images"]
)
def test_an_interruption_is_one_line(jlebm, folder_of_shapes, tmp_path, monkeypatch, during):
    monkeypatch.setattr(during, interrupt)
    ended = jlebm("train", tmp_path / "run", "--data", folder_of_shapes)
    assert (ended.returncode, ended.stderr) == (130, "jlebm: interrupted\n")


def test_an_interruption_while_the_command_line_is_imported_is_one_line():
    code = """
import runpy, sys
class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt as error:
                if len(sys.argv) > 2:  # as compiled modules do it
                    raise ImportError("initialization failed") from error
                raise
import jlebm_fast
sys.meta_path.insert(0, Interrupted())
runpy.run_module("jlebm_fast", run_name="__main__", alter_sys=False)
"""
    for module in (["jlebm_fast.cli"], ["tyro"], ["jlebm_fast.training.commands"], ["tyro", "compiled"]):
        ended = subprocess.run([sys.executable, "-c", code, *module], capture_output=True, text=True)
        assert (ended.returncode, ended.stderr) == (130, "jlebm: interrupted\n"), module


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_tells_its_signal(folder_of_shapes, tmp_path, number):
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "jlebm_fast",
        "train",
        run,
        "--data",
        folder_of_shapes,
        *TRAIN,
        "--steps",
        "1000000",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    job = subprocess.Popen([*map(str, command), "--log-every", "1"], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        while job.poll() is None and not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size):
            time.sleep(0.02)
        job.send_signal(number)
        _, said = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode == 128 + number
    assert said.splitlines()[-1].startswith("jlebm: stopped after step ")
    assert said.splitlines()[-1].endswith("--resume goes on")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "RUN", "--foo", "3"], "--foo"),
        (["train", "RUN", "--steps", "many"], "--steps"),
        (["train", "RUN", "--steps", "0"], "--steps must be a positive integer, got 0"),
        (["train", "RUN", "--prior", "laplace"], "--prior"),
        (["train", "RUN", "--step-size", "nan"], "--step-size must be positive and finite"),
        (["train", "RUN", "--image-size", "20"], "--image-size must be 8, 16, 32"),
        (["train", "RUN", "--data", "nowhere"], 'no such file or folder: "nowhere" in "'),
        (["train", "RUN", "--resume"], "no run folder at"),
        (["train", "RUN", "--data", "FOLDER", "--batch-size", "37"], "--batch-size 37 needs at least"),
        (["train", "RUN", "--data", "mnist"], 'cannot download "mnist"'),
        (["train", "RUN", "--device", "cuda"], "no CUDA GPU"),
        (["train", "RUN", "--energy-depth", "40"], "1 to 16 hidden layers"),
        (["bench", "--spoon", "3"], "--spoon"),
        (["paint"], "paint"),
        ([], "train, sample, figures"),
        (["sample"], "Run folder"),
        (["sample", "nowhere"], 'no run folder at "nowhere"'),
        (["sample", "TRAINED", "-n", "0"], "-n must be a positive"),
        (["sample", "TRAINED", "-n", "1000000000000000"], "out of memory, 8000000000000000 bytes were wanted: ask for"),
        (["sample", "TRAINED", "--seed", "-2"], "--seed must be between 0 and 2^63 - 1, got -2"),
        (["evaluate", "TRAINED", "--seed", "-2"], "--seed must be between 0 and 2^63 - 1, got -2"),
        (["figures", "EMPTY"], "is not a run folder"),
        (["evaluate", "nowhere"], 'no run folder at "nowhere"'),
        (["verify", "nowhere"], 'no run folder at "nowhere"'),
        (["info", "nowhere"], 'no run folder at "nowhere"'),
        (["train", "TRAINED", "--data", "FOLDER"], "already holds a run"),
        (["train", "FILE/run"], "Not a directory"),
        (["train", "TRAINED", "--resume", "--overwrite"], "--overwrite replaces it: give one"),
        (["train", "TRAINED", "--resume", "--steps", "2"], "--steps 2 ends at step 2, but the run has already come to"),
        (["train", ""], 'after train must come a value or a path, got ""'),
        (["train", "RUN", "--data="], 'after --data must come a value or a path, got ""'),
        (["bench", "--out", "FILE/run"], "--out must be a file that can be written"),
    ],
)
def test_wrong_input_is_one_sentence(jlebm, trained, folder_of_shapes, tmp_path, monkeypatch, arguments, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    places = {"RUN": tmp_path / "run", "FOLDER": folder_of_shapes, "TRAINED": trained, "EMPTY": tmp_path / "empty"}
    places["FILE/run"] = tmp_path / "file" / "run"
    config = (trained / "config.json").read_bytes()
    assert_one_sentence(jlebm(*[places.get(a, a) for a in arguments]), words)
    assert not (tmp_path / "run").exists()
    assert (trained / "config.json").read_bytes() == config


def test_wrong_input_ends_a_process_with_one_sentence(jlebm_process, tmp_path):
    assert_one_sentence(jlebm_process("train", tmp_path / "run", "--foo", "3"), "--foo", codes=(2,))
    assert_one_sentence(jlebm_process("train", tmp_path / "run", "--data", tmp_path / "no"), "no such file", codes=(1,))


def test_broken_images_are_one_sentence(jlebm, tmp_path):
    images = write_folder(tmp_path / "images", 4, classes=False)
    (images / "zz.png").write_bytes(b"")
    assert_one_sentence(jlebm("train", tmp_path / "run", "--data", images), "zz.png is an empty image file")
    (images / "zz.png").write_bytes(b"\x89PNG\r\n\x1a\n garbage")
    assert_one_sentence(jlebm("train", tmp_path / "run", "--data", images), "zz.png")


def test_runs_of_another_model_are_one_sentence(jlebm, trained, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint.safetensors").write_bytes((trained / "checkpoint.safetensors").read_bytes())
    config = json.loads((trained / "config.json").read_text())

    def sample_with(**changes):
        (run / "config.json").write_text(json.dumps(config | changes))
        return jlebm("sample", run)

    assert_one_sentence(sample_with(model="diffusion"), 'holds a run of model "diffusion"')
    assert_one_sentence(sample_with(format=99), "format 1")
    assert_one_sentence(sample_with(options=config["options"] | {"latent_dims": [2, 4]}), "belongs to another model")
    unknown = (
        f'"{run / "config.json"}" does not fit this version of jlebm_fast: options.spoon is unknown to it; put back'
    )
    assert_one_sentence(sample_with(options={"spoon": 1}), unknown)
    assert_one_sentence(sample_with(fork=1), "does not fit this version of jlebm_fast: fork is unknown to it")
    (run / "config.json").write_text("{")
    assert_one_sentence(jlebm("sample", run), "not readable JSON")
    (run / "config.json").write_text(json.dumps(config))
    (run / "checkpoint.safetensors").unlink()
    assert_one_sentence(jlebm("sample", run), "no checkpoint yet")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model", ["joint"], 'model must be a text, got ["joint"]'),
        ("image_size", "16", 'image_size must be one of 8, 16, 32, 64, 128, 256, got "16"'),
        ("image_channels", 0, "image_channels must be one of 1, 3, got 0"),
        ("n_images", None, "n_images must be an integer, got null"),
        ("options", [], "options must be an object, got []"),
        ("options.chain_steps", 60.5, "options.chain_steps must be an integer, got 60.5"),
        ("options.data", 3, "options.data must be a text, got 3"),
        ("options.spectral_norm", 1, "options.spectral_norm must be true or false, got 1"),
        ("options.latent_dims", 5, "options.latent_dims must be a list of integers, got 5"),
        ("options.step_size", "wide", 'options.step_size must be a number, got "wide"'),
        ("options.chains", "long", 'options.chains must be one of short-run, persistent, got "long"'),
        ("options.energy_depth", 40, "describes no model that can be built"),
    ],
)
def test_a_configuration_of_wrong_types_is_one_sentence(jlebm, trained, tmp_path, name, value, words):
    run = copy_of(trained, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    place, _, last = name.rpartition(".")
    (config[place] if place else config)[last] = value
    (run / "config.json").write_text(json.dumps(config))
    assert_one_sentence(jlebm("sample", run, "-n", "2"), words)


def test_damaged_metrics_are_one_sentence_and_a_cut_last_line_is_none(jlebm, trained, tmp_path):
    run = copy_of(trained, tmp_path / "run")
    line = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)[-1]
    for end in (b"", line[:20], b"\n", line[:20] + b"\n", b"\n\n", b"\0\0"):
        (run / "metrics.jsonl").write_bytes(2 * line + end)
        info = jlebm("info", run)
        assert info.returncode == 0, info.stderr
        assert '"step": 3' in info.stdout
    (run / "metrics.jsonl").write_bytes(line[:20] + b"\n" + line)
    assert_one_sentence(jlebm("info", run), f'line 1 of "{run / "metrics.jsonl"}" is damaged')
    assert_one_sentence(jlebm("train", run, "--resume", "--steps", "4"), "is damaged")
    (run / "metrics.jsonl").unlink()
    assert "metrics: none yet" in jlebm("info", run).stdout


def test_a_run_folder_from_a_stranger_runs_no_code(jlebm, trained, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_bytes((trained / "config.json").read_bytes())

    class Exploit:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "owned",))

    (run / "checkpoint.safetensors").write_bytes(pickle.dumps(Exploit()))
    assert_one_sentence(jlebm("sample", run), "not a readable checkpoint")
    assert not (tmp_path / "owned").exists()


def test_divergence_is_one_sentence_and_loses_nothing(jlebm, jlebm_process, folder_of_shapes, tmp_path):
    arguments = [*TRAIN, "--steps", "50", "--autoencoder-lr", "1e12", "--data", folder_of_shapes]
    process = jlebm_process("train", tmp_path / "run", *arguments)
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    assert "jlebm: training diverged at step" in process.stderr.splitlines()[-1]
    assert jlebm("sample", tmp_path / "run", "-n", "3").returncode == 0


def test_missing_extras_are_named_with_their_remedy():
    blocked = "import sys; sys.modules['tyro'] = None; from jlebm_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    for arguments in (["train"], ["info"]):
        process = subprocess.run([sys.executable, "-c", blocked, *arguments], capture_output=True, text=True)
        assert_one_sentence(process, "pip install 'jlebm_fast[train]'")
    assert "eager" in process.stdout  # info says what it can


def test_the_core_does_not_import_the_extras():
    code = "import jlebm_fast, sys; print([m for m in ('tyro', 'matplotlib', 'datasets', 'PIL', 'sklearn', "
    code += "'jlebm_fast.training', 'jlebm_fast.models', 'jlebm_fast.cli') if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
