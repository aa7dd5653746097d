"""What `jlebm train` can be told about learning: chains, rates, clipping, averaging, and the guard."""

import dataclasses
import math

import pytest
import torch
from test_loop import SMALL, assert_same_run

from jlebm_fast.errors import RunError
from jlebm_fast.models import JointEBM, NonFiniteLoss
from jlebm_fast.training.checkpoints import load_checkpoint
from jlebm_fast.training.loop import train
from jlebm_fast.training.options import TrainOptions
from jlebm_fast.training.run_folder import open_run
from jlebm_fast.training.trainer import Trainer


@pytest.fixture
def options(folder_of_shapes):
    return lambda **changes: dataclasses.replace(SMALL, data=str(folder_of_shapes), **{"steps": 12, **changes})


def parameters(run):
    return load_checkpoint(run.checkpoint)["model"]


def test_options_that_are_off_change_nothing(options, tmp_path):
    plain = train(tmp_path / "plain", options())
    # a clip that no gradient reaches, a buffer whose chains all start anew
    other = train(tmp_path / "other", options(clip_norm=1e30, chains="persistent", refresh_fraction=1.0))
    assert all(torch.equal(a, parameters(other)[name]) for name, a in parameters(plain).items())


@pytest.mark.parametrize(
    "changes",
    [
        {"chains": "persistent", "replay_batches": 3},
        {"ema_decay": 0.9, "clip_norm": 0.5},
        {"lr_schedule": "cosine", "warmup_steps": 5},
    ],
)
def test_runs_with_options_go_on_bit_for_bit(options, tmp_path, changes, monkeypatch):
    whole = train(tmp_path / "whole", options(**changes))
    plain = train(tmp_path / "plain", options())
    assert any(not torch.equal(a, parameters(whole)[name]) for name, a in parameters(plain).items())
    advance = Trainer.advance

    def mortal_advance(trainer):
        if trainer.step == 9:
            raise KeyboardInterrupt
        return advance(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", mortal_advance)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", options(**changes))
    assert_same_run(whole, train(tmp_path / "run", options(**changes), resume=True))


def test_the_checkpoint_holds_the_chains(options, tmp_path):
    run = train(tmp_path / "run", options(chains="persistent", replay_batches=3))
    assert load_checkpoint(run.checkpoint)["replay"].shape == (3, 8, 5)


def test_a_run_that_averages_samples_from_the_average(options, tmp_path):
    run = train(tmp_path / "run", options(ema_decay=0.95))
    state, (_, _, model) = load_checkpoint(run.checkpoint), open_run(run.path, "cpu")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state["average"][name])
    assert any(not torch.equal(state["model"][name], value) for name, value in state["average"].items())


def test_a_second_stage_learns_of_the_average(options, tmp_path):
    """What it has seen of images is what the averaged encoder makes of them, and what is sampled is decoded by the
    averaged generator. This second stage has no parameters: all of them are the average's."""
    changes = {"energy_hidden": TrainOptions.energy_hidden, "chain_steps": TrainOptions.chain_steps}
    changes |= {"model": "rae", "prior": "gmm", "mixture_components": 2}
    run = train(tmp_path / "run", options(ema_decay=0.95, **changes))
    state = load_checkpoint(run.checkpoint)
    for name, value in state["average"].items():
        torch.testing.assert_close(state["model"][name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_the_average_forgets_the_random_start(options, tmp_path, monkeypatch, decay):
    """Against the recursion a_t = d_t a_{t-1} + (1 - d_t) θ_t in float64, d_t = min(decay, (1 + t) / (10 + t))."""
    seen, advance = [], Trainer.advance

    def noted_advance(trainer):
        if not seen:
            seen.append({n: p.detach().double().clone() for n, p in trainer.model.named_parameters()})
        values = advance(trainer)
        seen.append({n: p.detach().double().clone() for n, p in trainer.model.named_parameters()})
        return values

    monkeypatch.setattr(Trainer, "advance", noted_advance)
    run = train(tmp_path / "run", options(ema_decay=decay, autoencoder_lr=0.01))
    expected, decays = seen[0], [min(decay, (1 + t) / (10 + t)) for t in range(1, 13)]
    for d, now in zip(decays, seen[1:], strict=True):
        expected = {name: d * a + (1 - d) * now[name] for name, a in expected.items()}
    found = load_checkpoint(run.checkpoint)["average"]
    assert all(torch.allclose(found[name].double(), a, rtol=1e-5, atol=1e-7) for name, a in expected.items())
    assert math.prod(decays) < 1e-4  # what is left of the random start


def test_clipping_bounds_the_gradient_that_the_optimiser_sees(options, tmp_path, monkeypatch):
    norms, step = [], torch.optim.Adam.step

    def noted_step(optimiser, closure=None):
        if type(optimiser) is not torch.optim.Adam:  # the energy's is a kind of Adam too
            return step(optimiser, closure)
        gradients = [p.grad for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        return step(optimiser, closure)

    monkeypatch.setattr(torch.optim.Adam, "step", noted_step)
    train(tmp_path / "free", options(steps=3))
    free, norms[:] = list(norms), []
    train(tmp_path / "clipped", options(steps=3, clip_norm=0.5))
    assert min(free) > 0.5
    assert norms == pytest.approx([0.5] * 3, rel=1e-4)


def test_learning_rates_reach_the_optimisers(options, tmp_path, monkeypatch):
    rates, advance = [], Trainer.advance

    def noted_advance(trainer):
        values = advance(trainer)
        rates.append([opt.param_groups[0]["lr"] for opt in trainer.optimisers.values()])
        return values

    monkeypatch.setattr(Trainer, "advance", noted_advance)
    train(tmp_path / "run", options(steps=4, lr_schedule="cosine", warmup_steps=2))
    expected = [0.5 * (1 + math.cos(math.pi * t / 4)) * min(1, (t + 1) / 2) for t in range(4)]
    assert [r[0] for r in rates] == pytest.approx([1e-3 * factor for factor in expected])
    assert [r[1] for r in rates] == pytest.approx([1e-4 * factor for factor in expected])


def test_the_guard_names_the_langevin_step(options, tmp_path, monkeypatch):
    """A step size of 1e12 leaves float32 within a few Langevin steps: which one is said, and nothing is lost."""
    options = options(step_size=1e12, chain_steps=20, checkpoint_every=1)
    with pytest.raises(RunError) as caught:
        train(tmp_path / "run", options)
    words = str(caught.value)
    assert words.startswith("training diverged at step 1: loss of the energy is ")
    assert "because the prior chain left the finite numbers at Langevin step 2 of 20 (8 of 8 chains did)" in words
    assert "a smaller --step-size or fewer --chain-steps usually helps" in words
    _, _, model = open_run(tmp_path / "run", "cpu")
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_bad_gradient_changes_no_parameter(options, tmp_path, monkeypatch):
    """Its loss is finite: the guard must see the gradient, and name the step it belongs to."""
    seen, update = {}, JointEBM.update

    def poisoned_update(model, batch, step):
        if step.index == 5:
            seen["model"], seen["before"] = model, {n: p.detach().clone() for n, p in model.named_parameters()}
            weight = next(model.generator.parameters()).flatten()[0]
            # zero, with a gradient that is not a number
            step.descend("autoencoder", (weight - weight.detach()).abs().sqrt(), "loss of generator and encoder")
        return update(model, batch, step)

    monkeypatch.setattr(JointEBM, "update", poisoned_update)
    with pytest.raises(RunError, match=r"diverged at step 6: the gradient of loss of generator and encoder has norm"):
        train(tmp_path / "run", options(checkpoint_every=5))
    assert load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")["step"] == 5
    assert all(torch.equal(p, seen["before"][name]) for name, p in seen["model"].named_parameters())


@pytest.mark.parametrize(
    ("model", "step", "reason", "words"),
    [
        ("joint", 0, ", because the prior chain left the", "a smaller --step-size or fewer --chain-steps"),
        ("joint", 7, ", because the prior chain left the", "--step-size, fewer --chain-steps or a smaller --energy-lr"),
        ("joint", 7, "", "a smaller --energy-lr or a smaller --autoencoder-lr"),
        ("vlae", 7, "", "with a smaller --autoencoder-lr usually"),
        ("vlae", 0, "", "with a smaller --reconstruction-weight usually"),
        ("lebm", 0, ", because the posterior chain left", "a smaller --posterior-step-size or fewer --posterior-steps"),
        (
            "lebm",
            0,
            "",
            "--step-size, fewer --chain-steps, a smaller --posterior-step-size, fewer --posterior-steps or",
        ),
    ],
)
def test_the_advice_names_what_can_be_the_cause(folder_of_shapes, tmp_path, monkeypatch, model, step, reason, words):
    """In the first step no learning rate has acted yet."""
    advance = Trainer.advance

    def diverging_advance(trainer):
        if trainer.step == step:
            raise NonFiniteLoss(f"loss is nan{reason}")
        return advance(trainer)

    monkeypatch.setattr(Trainer, "advance", diverging_advance)
    options = TrainOptions(model=model, data=str(folder_of_shapes), width=4, batch_size=8, steps=9, device="cpu")
    with pytest.raises(RunError) as caught:
        train(tmp_path / "run", options)
    assert words in str(caught.value)
    assert ("-lr" in str(caught.value)) == (step > 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ema_decay": 1.0}, r"--ema-decay must be in \[0, 1\), got 1.0"),
        ({"width": 513}, "--width must be at most 512, which no feature map goes beyond, got 513"),
        ({"lr_schedule": "epoch", "lr_decay": 1.5}, r"--lr-decay must be in \(0, 1\], a factor per epoch, got 1.5"),
        ({"clip_norm": -1.0}, "--clip-norm must be positive and finite, or 0 for none, got -1.0"),
        ({"clip_norm": float("nan")}, "--clip-norm must be"),
        ({"refresh_fraction": 1.5}, r"--refresh-fraction must be in \[0, 1\], got 1.5"),
        ({"replay_batches": 0}, "--replay-batches must be a positive integer, got 0"),
        ({"warmup_steps": -1}, "--warmup-steps must be positive, or 0 for none, got -1"),
        (
            {"chains": "persistent", "prior": "gaussian", "energy_hidden": 100, "chain_steps": 60},
            "--chains persistent needs a model with an energy prior",
        ),
    ],
)
def test_wrong_options_are_one_sentence(options, tmp_path, changes, words):
    with pytest.raises(RunError, match=words):
        train(tmp_path / "run", options(**changes))
    assert not (tmp_path / "run").exists()


def test_the_end_of_a_cosine_cannot_move(options):
    assert "steps" in options().resumable_changes()
    assert "steps" not in options(lr_schedule="cosine").resumable_changes()


@pytest.mark.parametrize("model", ["lebm", "cg_ebm"])
def test_persistent_chains_serve_every_model_with_a_prior_chain(folder_of_shapes, tmp_path, model):
    changes = {"chains": "persistent", "replay_batches": 2, "posterior_steps": 2, "model": model, "steps": 5}
    options = dataclasses.replace(SMALL, data=str(folder_of_shapes), **changes)
    replay = load_checkpoint(train(tmp_path / "run", options).checkpoint)["replay"]
    assert replay.shape == (2, 8, 5)
    assert torch.isfinite(replay).all()
