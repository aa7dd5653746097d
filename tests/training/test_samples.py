"""`jlebm sample` and the figures: nothing of a chain that diverged, nothing of an earlier call, little memory."""

import dataclasses

import numpy as np
import pytest
import torch
from shapes import SMALL_RUN
from torch.utils._python_dispatch import TorchDispatchMode

from jlebm_fast.models import JointEBM, LatentModel, ModelConfig
from jlebm_fast.training import diagnostics, figures, frechet
from jlebm_fast.training.evaluation import evaluate
from jlebm_fast.training.figures import make_figures
from jlebm_fast.training.loop import train
from jlebm_fast.training.options import TrainOptions
from jlebm_fast.training.samples import DivergedSamples, decoded_pixels, drawn_prior, sample_run
from jlebm_fast.training.sources import to_pixels


@pytest.fixture(scope="module")
def options(folder_of_shapes):
    return TrainOptions(**SMALL_RUN | {"data": str(folder_of_shapes), "device": "cpu", "steps": 2})


@pytest.fixture(scope="module")
def run(options, tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "run", options).path


@pytest.fixture(scope="module")
def unstable(options, tmp_path_factory):
    """A step size beyond the stable 2: three steps are finite, some hundreds are not."""
    return train(tmp_path_factory.mktemp("runs") / "unstable", dataclasses.replace(options, step_size=2.5)).path


def test_samples_of_diverged_chains_are_not_written(unstable, tmp_path, jlebm):
    assert jlebm("sample", unstable, "-n", 7, "--out", tmp_path).returncode == 0
    before = (tmp_path / "samples.npz").read_bytes()
    ended = jlebm("sample", unstable, "-n", 7, "--out", tmp_path, "--chain-steps", 3000)
    assert ended.returncode == 1
    said = ended.stderr.strip()
    assert said.startswith("jlebm: 7 of 7 prior chains are not finite from Langevin step ")
    assert said.endswith(
        " of 3000 on: train another run with a --step-size smaller than 2.5 or fewer --chain-steps, which jlebm sample "
        "takes too"
    )
    assert (tmp_path / "samples.npz").read_bytes() == before


@pytest.mark.parametrize("name", ["ebm", "nce"])
def test_the_step_that_is_named_is_the_first_that_is_not_finite(name):
    torch.manual_seed(0)
    config = ModelConfig(latent_dims=(2, 3), width=4, energy_hidden=8, step_size=3.0, prior=name)
    model = JointEBM(config, image_size=16, image_channels=1).eval()
    with pytest.raises(DivergedSamples, match=r"from Langevin step (\d+) of 400 on") as caught:
        drawn_prior(model, 5, torch.Generator().manual_seed(3), 400)
    step = int(str(caught.value).split("step ")[1].split()[0])

    def finite(n_steps):
        zs = model.sample_prior(5, torch.Generator().manual_seed(3), n_steps)
        return all(torch.isfinite(z).all() for z in zs)

    assert finite(step - 1)
    assert not finite(step)


def test_diverged_chains_are_neither_drawn_nor_measured(options, tmp_path, monkeypatch):
    monkeypatch.setattr(frechet, "CLASSIFIER_STEPS", 5)
    run = train(tmp_path / "run", options).path
    sample_prior = JointEBM.sample_prior

    def poisoned(model, n, generator=None, n_steps=None):
        zs = sample_prior(model, n, generator, n_steps)
        zs[0][-1, 0] = float("nan")
        return zs

    monkeypatch.setattr(JointEBM, "sample_prior", poisoned)
    with pytest.raises(DivergedSamples, match="1 of 20 prior chains are not finite: train another run"):
        evaluate(run, 20, long_steps=20, device="cpu")
    with pytest.raises(DivergedSamples, match="1 of 100 prior chains are not finite"):
        make_figures(run, device="cpu")
    assert not (run / "evaluation.json").exists()


def test_long_chains_that_diverge_are_said(unstable, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(diagnostics, "BIAS_CHAINS", 50)
    words = r"32 of 32 long prior chains are not finite, from Langevin step \d+ of 2000 on: pass fewer --long-steps, or"
    with pytest.raises(DivergedSamples, match=words):
        evaluate(unstable, 20, frechet=False, device="cpu")
    titles, save = {}, figures.save_figure
    monkeypatch.setattr(
        figures,
        "save_figure",
        lambda figure, path: titles.update({path.stem: [a.get_title() for a in figure.axes]}) or save(figure, path),
    )
    make_figures(unstable, device="cpu")
    assert titles["long_chain"][0].startswith("100 of 100 chains left the finite numbers, the first at Langevin step ")
    assert titles["long_chain"][0] in capsys.readouterr().err


def test_a_distance_of_rows_that_are_not_finite_is_refused():
    rows = torch.randn(5, 2)
    with pytest.raises(frechet.NonFiniteFeatures, match="got 0 of 5 and 1 of 5 rows that are not"):
        frechet.frechet_distance(rows, torch.where(torch.arange(5)[:, None] == 2, float("nan"), rows))


def test_pngs_of_an_earlier_call_are_gone(run, tmp_path):
    (tmp_path / "png").mkdir()
    (tmp_path / "png" / "mine.png").write_text("")
    sample_run(run, 9, out=tmp_path, png_files=True, device="cpu")
    sample_run(run, 4, out=tmp_path, png_files=True, device="cpu", seed=1)
    assert {p.name for p in (tmp_path / "png").iterdir()} == {*(f"{i:06d}.png" for i in range(4)), "mine.png"}
    sample_run(run, 4, out=tmp_path, device="cpu")
    assert [p.name for p in (tmp_path / "png").iterdir()] == ["mine.png"]
    (tmp_path / "png" / "mine.png").unlink()
    sample_run(run, 2, out=tmp_path, png_files=True, device="cpu")
    sample_run(run, 2, out=tmp_path, device="cpu")
    assert not (tmp_path / "png").exists()


def test_pngs_are_whole_or_not_there(run, tmp_path, monkeypatch):
    from PIL import Image

    save = Image.Image.save

    def failing(image, file, **options):
        save(image, file, **options)
        if "000002" in file.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", failing)
    with pytest.raises(OSError, match="000002"):
        sample_run(run, 4, out=tmp_path, png_files=True, device="cpu")
    assert sorted(p.name for p in (tmp_path / "png").iterdir()) == ["000000.png", "000001.png"]


def test_an_option_that_is_never_read_is_refused(folder_of_shapes, tmp_path, jlebm):
    small = {name: value for name, value in SMALL_RUN.items() if name != "chain_steps"}
    options = {"data": str(folder_of_shapes), "device": "cpu", "steps": 2, "model": "ncp_vae"}
    run = train(tmp_path / "run", TrainOptions(**small | options | {"nce_sampler": "resampling"})).path
    refused = jlebm("sample", run, "--chain-steps", 500)
    assert refused.returncode == 1
    assert "--chain-steps does nothing here" in refused.stderr
    assert "is sampled by importance resampling, without its chain; leave it out" in refused.stderr
    assert jlebm("sample", run, "-n", 3).returncode == 0


class Decoder:
    """Stands for a model whose images are large; counts how many exist at a time."""

    decode = LatentModel.decode

    def generator(self, zs):
        images = torch.sin(torch.arange(3 * 32 * 32) * zs[0][:, :1] + zs[1][:, :1])
        return images.view(-1, 3, 32, 32)


def test_pixels_piece_by_piece_are_those_of_all_at_once():
    model = Decoder()
    for n in (0, 1, 500, 1234):
        zs = [torch.randn(n, 2), torch.randn(n, 3)]
        assert torch.equal(decoded_pixels(model, zs), to_pixels(model.decode(zs)))


def test_images_of_a_broken_generator_are_refused():
    zs = [torch.zeros(3, 2), torch.tensor([[0.0], [float("inf")], [0.0]])]
    with pytest.raises(DivergedSamples, match="images of latents 0 to 2 of 3 are not all finite"):
        decoded_pixels(Decoder(), zs)


def test_many_samples_need_little_more_than_their_pixels():
    """Tensors beside the result: no more than a few pieces, however many samples."""
    largest = 0

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            nonlocal largest
            found = function(*arguments, **(options or {}))
            if isinstance(found, torch.Tensor) and found.is_floating_point():
                largest = max(largest, found.numel())
            return found

    n = 3000
    zs = [torch.randn(n, 2), torch.randn(n, 3)]
    with Counted():
        pixels = decoded_pixels(Decoder(), zs)
    assert pixels.shape == (n, 3, 32, 32)
    assert largest <= 500 * 3 * 32 * 32


def axes_of(monkeypatch, sketch_of):
    drawn = {}
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.update({path.stem: figure}))
    make_figures(sketch_of, device="cpu")
    return drawn


def test_one_line_of_metrics_is_a_point(run, monkeypatch):
    """`run` has two steps and one line."""
    figure = axes_of(monkeypatch, run)["learning"]
    lines = [line for axis in figure.axes for line in axis.get_lines()]
    assert len(lines) == 5
    for line in lines:
        assert line.get_marker() == "o"
        assert list(line.get_markevery()) == [0]
        assert np.isfinite(line.get_ydata()[0])


def test_curves_break_where_a_stage_ends(folder_of_shapes, tmp_path, monkeypatch):
    small = {name: value for name, value in SMALL_RUN.items() if name not in ("chain_steps", "energy_hidden")}
    more = {"model": "two_stage_vae", "steps": 9, "stage_steps": 5, "log_every": 3}
    options = TrainOptions(**small | {"data": str(folder_of_shapes), "device": "cpu"} | more)
    figure = axes_of(monkeypatch, train(tmp_path / "run", options).path)["learning"]
    (loss,) = [line for axis in figure.axes for line in axis.get_lines() if line.get_label() == "loss"]
    steps, values = loss.get_xdata(), loss.get_ydata()
    assert list(steps[np.isfinite(values)]) == [3, 6, 9, 12, 14]
    assert list(np.isfinite(values)) == [True, True, True, False, True, True, False]


def test_the_traverse_says_which_dims_it_shows(options, tmp_path, monkeypatch):
    run = train(tmp_path / "run", dataclasses.replace(options, latent_dims=(2, 20))).path
    titles = [axis.get_title() for axis in axes_of(monkeypatch, run)["traverse"].axes]
    assert titles == ["layer 2: a row per dim, first 10 of 20, -3 to 3", "layer 1: a row per dim, -3 to 3"]
