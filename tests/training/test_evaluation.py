"""`jlebm evaluate`: numbers that are known in advance, files that are written, and inputs that it refuses."""

import json
import pathlib

import numpy as np
import pytest
import torch
from PIL import Image
from shapes import SMALL_RUN, write_folder

from jlebm_fast.errors import RunError
from jlebm_fast.models import JointEBM, ModelConfig
from jlebm_fast.training import diagnostics, evaluation, frechet
from jlebm_fast.training.evaluation import evaluate, table
from jlebm_fast.training.loop import train
from jlebm_fast.training.options import TrainOptions


def model_with(prepare, **changes):
    torch.manual_seed(0)
    config = ModelConfig(latent_dims=(2, 3), width=4, energy_hidden=8, chain_steps=3, **changes)
    model = JointEBM(config, image_size=16, image_channels=1)
    with torch.no_grad():
        prepare(model.energy)
    return model.eval()


def flatten(energy):
    for parameter in energy.parameters():
        parameter.zero_()


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def test_the_bias_of_a_large_step_is_the_one_that_theory_gives():
    """f = 0: the unadjusted chain has variance 1/(1 − s²/4), the adjusted one 1."""
    found, _ = diagnostics.bias(model_with(flatten, step_size=1.0), generator(), n_steps=60)
    n = diagnostics.BIAS_CHAINS * 5  # five dims
    assert found["variance_long"] == pytest.approx(1 / (1 - 0.25), rel=5 * (2 / n) ** 0.5)
    assert found["variance_mala"] == pytest.approx(1.0, rel=5 * (1 / n) ** 0.5)
    assert 0.5 < found["acceptance"] < 0.99
    assert found["frechet_latents_long"] > 3 * found["frechet_latents_floor"]
    assert found["energy_gap_long"] == 0.0  # all energies are zero


def test_short_chains_that_stop_early_are_seen():
    def steep(energy):  # f = 3 (z_1 + … + z_5) up to the kink
        flatten(energy)
        energy.layers[0].weight[0] = 1.0
        energy.layers[0].bias[0] = 50.0
        energy.layers[1].weight[0, 0] = 1.0
        energy.layers[2].weight[0, 0] = 3.0

    found, _ = diagnostics.bias(model_with(steep, step_size=0.4), generator(), n_steps=100)
    # N(3, I) is the target: the mean of f there is 3 (5 · 3 + 50); three steps reach about a fifth of the way
    assert found["energy_mala"] == pytest.approx(3 * 65, abs=5 * 3 * (5 / 4000) ** 0.5)
    assert found["energy_gap_short"] < -50
    assert abs(found["energy_gap_long"]) < 5


def test_mixing_of_an_autoregression_has_the_known_sample_size():
    """f = 0: z' = a z + s ε with a = 1 − s²/2, whose autocorrelation time is (1 + a)/(1 − a)."""
    pytest.importorskip("arviz_stats")
    found, curve = diagnostics.mixing(model_with(flatten, step_size=0.8), generator(), n_steps=1000)
    a = 1 - 0.8**2 / 2
    expected = diagnostics.MIXING_CHAINS * found["draws"] * (1 - a) / (1 + a)
    assert found["draws"] == 500
    assert found["ess_mean"] == pytest.approx(expected, rel=0.1)
    assert found["rhat_max"] < 1.02
    assert found["rhat_energy"] is None  # it is constant
    assert curve.shape == (1000, diagnostics.MIXING_CHAINS)


def test_chains_that_never_meet_have_a_large_r_hat():
    pytest.importorskip("arviz_stats")
    found, _ = diagnostics.mixing(model_with(flatten, step_size=0.01), generator(), n_steps=100)
    assert found["rhat_max"] > 1.5


@pytest.fixture(scope="module")
def run(folder_of_shapes, tmp_path_factory):
    options = TrainOptions(**SMALL_RUN | {"data": str(folder_of_shapes), "device": "cpu", "steps": 4})
    return train(tmp_path_factory.mktemp("runs") / "run", options)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(frechet, "CLASSIFIER_STEPS", 20)
    monkeypatch.setattr(diagnostics, "BIAS_CHAINS", 50)


def test_an_evaluation_writes_table_json_and_figures(run, quick, jlebm):
    done = jlebm("evaluate", run.path, "-n", "40", "--long-steps", "60", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    result = json.loads((run.path / "evaluation.json").read_text())
    assert {"frechet_prior", "frechet_train", "reconstruction_mse", "mixing", "bias"} <= result.keys()
    assert all(sum(counts) > 0 for counts in result["energy_histogram"]["counts"].values())
    assert "bias.acceptance" in done.stdout
    assert "not measured: --inception-weights takes the Inception net" in done.stdout
    for name in ("evaluation_energies", "evaluation_chains"):
        with Image.open(run.figures / f"{name}.png") as figure:
            figure.load()
            assert max(figure.size) > 300
    again = evaluate(run.path, 40, long_steps=60, device="cpu")
    assert again == result


def test_a_folder_that_cannot_be_written_is_found_before_the_work(run, quick, monkeypatch, jlebm):
    def refuse(path, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "touch", refuse)
        patch.setattr(evaluation, "load_images", lambda *arguments: pytest.fail("it works"))
        said = jlebm("evaluate", run.path, "-n", "20", "--long-steps", "20")
    assert said.returncode == 1
    assert said.stderr == f'jlebm: Permission denied: "{run.path}"\n'
    assert not list(run.path.glob(".*"))


def test_the_table_is_printed_when_only_writing_fails(run, quick, monkeypatch, jlebm):
    def refuse(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(evaluation, "write_atomically", refuse)
    said = jlebm("evaluate", run.path, "-n", "20", "--long-steps", "20", "--no-frechet")
    assert said.returncode == 1
    assert "reconstruction_mse" in said.stdout
    assert "bias.acceptance" in said.stdout
    assert said.stderr.splitlines()[-1].startswith('jlebm: the evaluation is done, but "')
    assert said.stderr.splitlines()[-1].endswith("cannot be written: No space left on device")


def test_a_missing_inception_net_is_found_before_the_work(run, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation, "open_run", lambda *arguments: pytest.fail("it works"))
    with pytest.raises(RunError, match="no Inception weights at"):
        evaluate(run.path, 20, inception_weights=tmp_path / "no.pth")


def test_without_arviz_the_rest_is_measured(run, quick, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "arviz_stats.base", None)
    result = evaluate(run.path, 20, frechet=False, long_steps=40, device="cpu")
    assert "pip install arviz-stats" in result["mixing"]["ess"]
    assert "frechet_prior" not in result
    assert "mixing.ess" in table(result)


def test_wrong_input_is_one_sentence(run, quick, tmp_path, jlebm):
    unlabelled = write_folder(tmp_path / "images", 20, classes=False)
    options = TrainOptions(**SMALL_RUN | {"data": str(unlabelled), "device": "cpu", "steps": 2})
    other = train(tmp_path / "run", options)
    refused = jlebm("evaluate", other.path, "-n", "20")
    assert refused.returncode == 1
    assert refused.stderr.strip().endswith("--no-frechet measures the rest")
    assert not (other.path / "evaluation.json").exists()
    few = TrainOptions(**SMALL_RUN | {"data": str(write_folder(tmp_path / "few", 9)), "device": "cpu", "steps": 2})
    said = jlebm("evaluate", train(tmp_path / "few run", few).path, "-n", "20")
    assert said.returncode == 1
    assert "has 1 held-out image, a Fréchet distance needs at least 2 of them" in said.stderr
    for more, words in (
        (["-n", "1"], "evaluation needs at least 2 samples, got 1"),
        (["--long-steps", "3"], "--long-steps must be at least 20 Langevin steps, got 3"),
        (["-n", "20", "--inception-weights", tmp_path / "no.pth"], "no Inception weights at"),
    ):
        said = jlebm("evaluate", run.path, *more)
        assert said.returncode == 1
        assert words in said.stderr


@pytest.mark.parametrize("model", ["cg_ebm", "multi_ncp"])
def test_chains_of_other_priors_are_measured_too(folder_of_shapes, tmp_path, quick, model):
    """One differentiates conditional nets by autograd, the other is a sum of classifiers."""
    changes = {"model": model, "steps": 2} | ({"stage_steps": 2} if model == "multi_ncp" else {"posterior_steps": 2})
    options = TrainOptions(**SMALL_RUN | {"data": str(folder_of_shapes), "device": "cpu", **changes})
    run = train(tmp_path / "run", options)
    result = evaluate(run.path, 20, frechet=False, long_steps=30, device="cpu")
    assert 0.5 < result["bias"]["acceptance"] <= 1
    assert result["mixing"]["draws"] == 15


def test_longer_chains_can_be_asked_for(run, jlebm, tmp_path):
    for steps in (0, 50):
        assert (
            jlebm("sample", run.path, "-n", 5, "--chain-steps", steps, "--out", tmp_path / str(steps)).returncode == 0
        )
    short, long = (np.load(tmp_path / name / "samples.npz")["z"] for name in ("0", "50"))
    assert not np.array_equal(short, long)
    refused = jlebm("sample", run.path, "--chain-steps", "-1")
    assert (refused.returncode, "--chain-steps must be positive" in refused.stderr) == (1, True)


def test_a_gaussian_prior_has_no_chain_to_measure(quick, folder_of_shapes, tmp_path):
    small = {name: value for name, value in SMALL_RUN.items() if name not in ("energy_hidden", "chain_steps")}
    options = TrainOptions(**small | {"data": str(folder_of_shapes), "prior": "gaussian", "device": "cpu", "steps": 2})
    result = evaluate(train(tmp_path / "run", options).path, 20, device="cpu")
    assert not {"mixing", "bias", "frechet_standard_normal"} & result.keys()
    assert result["frechet_prior"] > 0


def test_the_sentence_of_a_missing_run(tmp_path):
    with pytest.raises(RunError, match="no run folder at"):
        evaluation.evaluate(tmp_path / "nowhere")
