"""Every model with every prior it can have: it learns, samples, infers, and goes on bit for bit from its state."""

import copy

import pytest
import torch
from learning import generator_of, images_of, learn

from jlebm_fast.models import MODELS, LearningStep, ModelConfig, NonFiniteLoss, build, resolve_prior, used_fields

SMALL = {
    "latent_dims": (2, 3),
    "width": 4,
    "energy_hidden": 8,
    "chain_steps": 3,
    "posterior_steps": 4,
    "conditional_hidden": 12,
    "mixture_components": 2,
    "stage_steps": 4,
}
# One case for each name with its own prior, and each second-stage prior on the deterministic autoencoder.
CASES = [(name, entry.priors[0]) for name, entry in MODELS.items()] + [("lebm", "gaussian"), ("rae", "nce")]


def small_model(name, prior, **changes):
    torch.manual_seed(0)
    config = ModelConfig(**SMALL | {"prior": prior, "nce_stages": MODELS[name].nce_stages} | changes)
    return build(name, config, 16, 1, 6)


def learn_all_stages(model, optimisers, first_stage=4):
    """A few steps of each stage, numbered through as in a run."""
    history, index = [], 0
    for stage, steps in enumerate(model.stages(first_stage)):
        history += learn(model, steps, optimisers=optimisers, stage=stage, first=index)
        index += steps
    return history


@pytest.mark.parametrize(("name", "prior"), CASES)
def test_learning_lowers_the_loss(name, prior):
    model = small_model(name, prior)
    losses = [metrics["loss"].item() for metrics in learn(model, 80)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize(("name", "prior"), CASES)
def test_samples_latents_and_reconstructions_have_their_shapes(name, prior):
    model = small_model(name, prior)
    learn_all_stages(model, model.optimisers(learn.__kwdefaults__["rates"]))
    zs = model.sample_prior(7, generator_of(1))
    assert [tuple(z.shape) for z in zs] == [(7, 2), (7, 3)]
    assert not any(z.requires_grad for z in zs)
    assert all(torch.equal(a, b) for a, b in zip(zs, model.sample_prior(7, generator_of(1)), strict=True))
    assert not torch.equal(zs[0], model.sample_prior(7, generator_of(2))[0])
    assert model.decode(zs).shape == (7, 1, 16, 16)
    encoded = model.encode(images_of(), generator_of(1))
    assert [tuple(z.shape) for z in encoded] == [(6, 2), (6, 3)]
    assert not any(z.requires_grad for z in encoded)
    assert model.reconstruct(images_of(), generator_of(1)).shape == (6, 1, 16, 16)
    assert model.sample_prior(0, generator_of(1))[0].shape == (0, 2)
    if prior != "vae":
        assert torch.isfinite(model.log_prior(zs)).all()
        assert model.log_prior(zs).shape == (7,)


@pytest.mark.parametrize(("name", "prior"), CASES)
def test_state_is_all_that_learning_depends_on(name, prior):
    """Half the steps, then a new model with the state of the first: the same bits as without the break."""
    whole = small_model(name, prior)
    rates = learn.__kwdefaults__["rates"]
    steps = [
        (stage, index) for index, stage in enumerate(s for s, count in enumerate(whole.stages(4)) for _ in range(count))
    ]
    optimisers = whole.optimisers(rates)
    for position, (stage, index) in enumerate(steps):
        if position == len(steps) // 2:
            state, optimiser_state = copy.deepcopy(
                (whole.state_dict(), {k: o.state_dict() for k, o in optimisers.items()})
            )
            torch.manual_seed(99)
            resumed = build(name, whole.config, 16, 1, 6)
            resumed.load_state_dict(state)
            resumed_optimisers = resumed.optimisers(rates)
            for key, optimiser in resumed_optimisers.items():
                optimiser.load_state_dict(optimiser_state[key])
        learn(whole, 1, optimisers=optimisers, stage=stage, first=index)
        if position >= len(steps) // 2:
            torch.randn(3)  # the global random state must not matter
            learn(resumed, 1, optimisers=resumed_optimisers, stage=stage, first=index)
    assert resumed.state_dict().keys() == whole.state_dict().keys()
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@pytest.mark.parametrize("name", MODELS)
def test_nan_in_the_images_changes_no_parameter(name):
    model = small_model(name, resolve_prior(name, "auto"))
    before = {key: p.clone() for key, p in model.named_parameters()}
    with pytest.raises(NonFiniteLoss, match=r"loss of .* is nan"):
        learn(model, 1, images_of() * float("nan"))
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())


def test_the_first_stage_is_the_same_whatever_comes_after_it():
    def after(prior):
        model = small_model("joint", prior)
        learn(model, 5)
        return {k: v for k, v in model.state_dict().items() if k.startswith(("generator", "encoder"))}

    expected = after("gaussian")
    for prior in ("nce", "gmm", "vae"):
        found = after(prior)
        assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_warm_starts_go_on_where_they_ended():
    model = small_model("abp", "gaussian", latent_dims=(5,))
    began, seen = model.warm_starts.z.clone(), []
    chain = model.posterior_chain

    def watched(images, start, noise):
        end = chain(images, start, noise)
        seen.append((start[0].clone(), end[0]))
        return end

    model.posterior_chain = watched
    learn(model, 3)
    assert torch.equal(seen[0][0], began)
    assert torch.equal(seen[1][0], seen[0][1])
    assert torch.equal(seen[2][0], seen[1][1])
    assert torch.equal(model.warm_starts.z, seen[2][1])


@pytest.mark.parametrize("name", ["vlae", "lvae", "biva", "lebm", "cg_ebm", "sri"])
def test_one_layer_is_enough_and_four_are_not_too_many(name):
    prior = resolve_prior(name, "auto")
    for dims in ((4,), (2, 2, 2, 3)):
        model = small_model(name, prior, latent_dims=dims)
        losses = [metrics["loss"].item() for metrics in learn(model, 20)]
        assert losses[-1] < losses[0]
        assert [z.shape[1] for z in model.sample_prior(3)] == list(dims)


def test_learning_is_the_union_of_its_rows():
    """The noise of rows 3, 4, 5 does not depend on who else is in the batch: what lets ranks share one."""
    whole = LearningStep({}, seed=4, index=9).normal("posterior", 6, (2, 3))
    part = LearningStep({}, seed=4, index=9, first_row=3).normal("posterior", 3, (2, 3))
    assert all(torch.equal(a[3:], b) for a, b in zip(whole, part, strict=True))
    other = LearningStep({}, seed=4, index=10).normal("posterior", 6, (2, 3))
    assert not torch.equal(whole[0], other[0])
    assert not torch.equal(whole[0], LearningStep({}, seed=4, index=9).normal("prior start", 6, (2, 3))[0])


def test_names_priors_and_fields():
    assert resolve_prior("rae", "auto") == "gmm"
    with pytest.raises(ValueError, match="model abp takes prior gaussian, got ebm"):
        resolve_prior("abp", "ebm")
    with pytest.raises(ValueError, match="model must be one of"):
        resolve_prior("gan", "auto")
    assert "energy_hidden" not in used_fields("vlae", "gaussian")
    assert {"posterior_steps", "energy_hidden"} <= used_fields("lebm", "ebm")
    fields = set(ModelConfig.__dataclass_fields__)
    used = set().union(*(used_fields(name, prior) for name, entry in MODELS.items() for prior in entry.priors))
    assert used == fields  # every option does something somewhere
    with pytest.raises(ValueError, match="at least 2 dims in each latent layer"):
        small_model("biva", "gaussian", latent_dims=(1, 3))
