"""The joint model: its learning step does what the paper's equations say."""

import pytest
import torch
from learning import generator_of, images_of, learn

from jlebm_fast.models import JointEBM, LearningRates, LearningStep, ModelConfig, NonFiniteLoss, Posterior

RATES = LearningRates(autoencoder=1e-3, energy=1e-3)
SMALL = {"latent_dims": (2, 3), "width": 4, "energy_hidden": 8, "chain_steps": 3}


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    return JointEBM(ModelConfig(**SMALL | changes), image_size=16, image_channels=1)


def test_learning_lowers_the_loss_and_separates_the_energies():
    history = learn(small_model(), 200, rates=RATES)
    first, last = history[0], history[-1]
    assert last["reconstruction"] < 0.5 * first["reconstruction"]
    gap = [
        sum((h["energy_posterior"] - h["energy_prior"]).item() for h in part) for part in (history[:50], history[-50:])
    ]
    assert gap[1] > gap[0]


def test_the_loss_is_the_paper_s():
    model = small_model(reconstruction_weight=2.5)
    (metrics,) = learn(model, 1)
    expected = 2.5 * metrics["reconstruction"] + metrics["kl"] - metrics["energy_posterior"]
    torch.testing.assert_close(metrics["loss"], expected)


class Still:
    def sample(self, z, **noise):
        return z


def test_energy_ascends_on_posterior_samples_against_prior_samples():
    model, images = small_model(), images_of()
    optimisers = model.optimisers(RATES)
    with torch.no_grad():
        z_posterior = model.encoder(images).sample(model.standard_normal(6, generator_of(5)))
        z_prior = model.standard_normal(6, generator_of(6))
    gap = model.energy(z_posterior).mean() - model.energy(z_prior).mean()
    model.prior_chain = Still
    FixedStart = type("Step", (LearningStep,), {"prior_start": lambda *_: z_prior})
    certain = [torch.full_like(z, -60.0) for z in z_posterior]  # log-variances: q is a point
    model.encoder.forward = lambda _: Posterior(z_posterior, certain)
    # The autoencoder has nothing to learn from here; only f moves, up its own objective.
    optimisers["autoencoder"] = torch.optim.SGD(model.generator.parameters(), lr=0.0)
    learn(model, 20, images, optimisers=optimisers, step=FixedStart)
    assert model.energy(z_posterior).mean() - model.energy(z_prior).mean() > gap


def test_zero_energy_is_the_ladder_autoencoder():
    with_energy, without = small_model(), small_model(prior="gaussian")
    without.load_state_dict({k: v for k, v in with_energy.state_dict().items() if not k.startswith("energy")})
    with torch.no_grad():
        for parameter in with_energy.energy.parameters():
            parameter.zero_()
    for model in (with_energy, without):
        (metrics,) = learn(model, 1)
    assert "energy_prior" not in metrics
    for name in ("generator", "encoder"):
        pairs = zip(getattr(with_energy, name).parameters(), getattr(without, name).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_non_finite_loss_changes_nothing():
    model = small_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(NonFiniteLoss, match="loss of generator and encoder is nan"):
        learn(model, 1, images_of() * float("nan"))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_prior_samples_follow_the_generator_and_leave_no_gradients():
    model = small_model()
    a, b = model.sample_prior(50, generator_of(1)), model.sample_prior(50, generator_of(1))
    c = model.sample_prior(50, generator_of(2))
    assert all(torch.equal(u, v) for u, v in zip(a, b, strict=True))
    assert not torch.equal(a[0], c[0])
    assert [z.shape for z in a] == [(50, 2), (50, 3)]
    assert all(p.grad is None for p in model.parameters())
    assert not a[0].requires_grad


def test_a_masked_chain_moves_one_layer_only():
    model = small_model()
    zs = model.standard_normal(20, generator_of(1))
    moved = model.prior_chain().sample(zs, generator=generator_of(2), mask=model.frozen_layers({1}))
    assert torch.equal(moved[0], zs[0])
    assert (moved[1] != zs[1]).all()


def test_decoding_in_pieces_is_decoding_at_once():
    model = small_model()
    zs = model.standard_normal(7, generator_of(1))
    torch.testing.assert_close(model.decode(zs, batch=3), model.decode(zs))
    images = images_of(7)
    torch.testing.assert_close(model.infer(images, batch=3).mean, model.infer(images).mean)
    assert model.reconstruct(images).shape == images.shape


def test_wrong_configurations_are_named():
    with pytest.raises(ValueError, match="prior"):
        small_model(prior="laplace")
    with pytest.raises(ValueError, match="reconstruction_weight"):
        small_model(reconstruction_weight=0.0)
    with pytest.raises(ValueError, match="n_steps"):
        small_model(chain_steps=-1)
    with pytest.raises(ValueError, match="Gaussian prior"):
        small_model(prior="gaussian").prior_chain()


@pytest.mark.parametrize(
    "changes", [{"spectral_norm": True, "energy_depth": 4}, {"latent_dims": (5,), "combine": "concat"}]
)
def test_variants_learn(changes):
    losses = [metrics["loss"] for metrics in learn(small_model(**changes), 30)]
    assert losses[-1] < losses[0]
