"""mlp_langevin_chain in both regimes: every field of an update."""

import pytest
import torch
from chains import REGIMES, check, drawn
from reference import plain_update, random_mlp, steps


def variants(chains, dim, n_steps):
    rows = {
        "plain": {},
        "flat": {"prior_precision": None},
        "prior per chain": {"prior_mean": drawn(chains, dim, seed=1), "prior_precision": drawn(chains, dim).abs()},
        "schedule": {"step_coefficients": steps(n_steps) * torch.linspace(1.5, 0.2, n_steps)[:, None]},
        "chain coefficients": {"chain_coefficients": drawn(chains, 3, seed=3).abs()},
        "frozen": {"frozen": drawn(dim, seed=4) > 0},
        "frozen per chain": {"frozen": drawn(chains, dim, seed=4) > 0},
        "noise": {"noise": drawn(n_steps, chains, dim, seed=5)},
        "no noise": {"step_coefficients": steps(n_steps, noise_scale=0.0)},
        "offsets": {"first_step": (1 << 32) - 2, "first_chain": (1 << 32) - 2, "noise_key": (1 << 64) - 3},
    }
    rows["everything"] = (
        rows["prior per chain"] | rows["chain coefficients"] | rows["frozen per chain"] | rows["offsets"]
    )
    return rows


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("name", list(variants(1, 1, 1)))
def test_update_fields(name, regime):
    update = plain_update(3, 5, **variants(18, 5, 3)[name])
    check(drawn(18, 5, seed=8), random_mlp((5, 12, 9, 1), "gelu"), update, 3, regime=regime)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dim", [17, 70])
def test_dimensions_around_the_tiles(dim, regime):
    mlp = random_mlp((dim, 20, 3), "leaky_relu", "logit", chains=17, context=True)
    check(drawn(17, dim), mlp, plain_update(2, dim, frozen=drawn(dim) > 1), 2, regime=regime)


@pytest.mark.parametrize("regime", REGIMES)
def test_posterior_step(regime):
    update = plain_update(1, 5, extra_grad=drawn(18, 5, seed=6))
    check(drawn(18, 5), random_mlp((5, 12, 1), "gelu"), update, 1, regime=regime)
