"""langevin_step: every field of an update, in every bit that of the oracle."""

import pytest
import torch
from reference import plain_update, steps

from jlebm_fast.backends import eager
from jlebm_fast.backends import triton as backend
from jlebm_fast.problem import Update


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def variants(chains, dim):
    rows = {
        "plain": {},
        "flat": {"prior_precision": None},
        "mean": {"prior_mean": drawn(dim, seed=1)},
        "mean per chain": {"prior_mean": drawn(chains, dim, seed=1)},
        "precision per chain": {"prior_precision": drawn(chains, dim, seed=2).abs()},
        "both per chain": {"prior_mean": drawn(chains, dim, seed=1), "prior_precision": drawn(chains, dim).abs()},
        "chain coefficients": {"chain_coefficients": drawn(chains, 3, seed=3)},
        "frozen": {"frozen": drawn(dim, seed=4) > 0},
        "frozen per chain": {"frozen": drawn(chains, dim, seed=4) > 0},
        "noise": {"noise": drawn(1, chains, dim, seed=5)},
        "likelihood": {"extra_grad": drawn(chains, dim, seed=6)},
        "offsets": {"first_step": (1 << 32) - 1, "first_chain": (1 << 32) - 2, "noise_key": (1 << 64) - 3},
        "key tensor": {"noise_key": torch.tensor([-3])},
        "not contiguous": {
            "prior_mean": drawn(dim, chains).T,
            "noise": drawn(1, dim, chains).transpose(1, 2),
            "extra_grad": drawn(dim, chains).T,
            "frozen": (drawn(dim, chains) > 0).T,
            "chain_coefficients": drawn(3, chains).T,
        },
    }
    rows["everything"] = (
        rows["both per chain"]
        | rows["chain coefficients"]
        | rows["frozen per chain"]
        | rows["likelihood"]
        | rows["offsets"]
    )
    return rows


NAMES = list(variants(1, 1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("chains", "dim"), [(33, 17), (5, 70)])
def test_update_fields(name, chains, dim):
    update = plain_update(1, dim, **variants(chains, dim)[name])
    z, grad = drawn(chains, dim, seed=8), drawn(chains, dim, seed=9)
    plain = update
    if isinstance(update.noise_key, torch.Tensor):
        plain = update._replace(noise_key=int(update.noise_key) % (1 << 64))
    assert torch.equal(backend.langevin_step(z, grad, update), eager.langevin_step(z, grad, plain))


@pytest.mark.parametrize("chains", [1, 31, 32, 33])
@pytest.mark.parametrize("dim", [1, 15, 16, 17, 64, 65])
def test_sizes_around_the_tiles(chains, dim):
    update = plain_update(1, dim)
    z, grad = drawn(chains, dim, seed=8), drawn(chains, dim, seed=9)
    assert torch.equal(backend.langevin_step(z, grad, update), eager.langevin_step(z, grad, update))


def test_bad_values_stay_where_they_are():
    z, grad = drawn(40, 20), drawn(40, 20, seed=1)
    grad[7, 3], z[9, 4], grad[11, 5] = float("nan"), float("inf"), float("-inf")
    ours, plain = (b.langevin_step(z, grad, plain_update(1, 20)) for b in (backend, eager))
    assert torch.equal(ours.isnan(), plain.isnan())
    assert torch.equal(ours.nan_to_num(7.0), plain.nan_to_num(7.0))
    assert (~ours.isfinite()).sum() == 3


def test_z_and_gradient_are_left_alone():
    z, grad = drawn(4, 5), drawn(4, 5, seed=1)
    before = z.clone(), grad.clone()
    backend.langevin_step(z, grad, plain_update(1, 5))
    assert torch.equal(z, before[0])
    assert torch.equal(grad, before[1])


def test_no_chains():
    update = Update(steps(1), prior_precision=torch.ones(5))
    assert backend.langevin_step(torch.zeros(0, 5), torch.zeros(0, 5), update).shape == (0, 5)
