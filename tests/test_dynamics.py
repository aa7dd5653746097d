"""Step sizes, noise scales and priors become the coefficients of the papers' update."""

import numpy as np
import pytest
import torch

import jlebm_fast as jf
from jlebm_fast import dynamics

S = torch.tensor([0.1, 0.4, 0.7, 0.2, 0.0], dtype=torch.float64)
SCALE = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.5], dtype=torch.float64)


def coefficients(step_size, noise_scale, n_steps, chains):
    """[n_steps, chains, 3] as the operations combine them."""
    step_size = dynamics.check_schedule("step_size", step_size, n_steps)
    noise_scale = dynamics.check_schedule("noise_scale", noise_scale, n_steps)
    rows = dynamics.step_rows(step_size, noise_scale, n_steps)
    factors = dynamics.chain_coefficients(step_size, noise_scale, torch.zeros(chains, 2, dtype=torch.float64))
    return rows[:, None] * (torch.ones(chains, 3) if factors is None else factors)[None]


@pytest.mark.parametrize("step_form", ["float", "per step", "per chain"])
@pytest.mark.parametrize("scale_form", ["float", "per step", "per chain"])
def test_every_pair_of_forms(step_form, scale_form):
    forms = {"float": lambda v: float(v[1]), "per step": lambda v: v.tolist(), "per chain": lambda v: v}
    spread = {
        "float": lambda v: v[1].expand(5, 5),
        "per step": lambda v: v[:, None].expand(5, 5),
        "per chain": lambda v: v[None].expand(5, 5),
    }
    s, scale = spread[step_form](S), spread[scale_form](SCALE)
    expected = torch.stack([s * s / 2, s * s / 2, s * scale], dim=-1)
    got = coefficients(forms[step_form](S), forms[scale_form](SCALE), 5, 5)
    torch.testing.assert_close(got, expected, rtol=1e-15, atol=0)


def test_coefficients_are_rounded_once():
    prior = jf.FastLangevin(jf.EnergyMLP(2, 3, 1), n_steps=1, step_size=0.1)
    row = prior._constant_terms(torch.zeros(1, 2))[0][0]
    assert row[0] == torch.tensor(0.1 * 0.1 / 2, dtype=torch.float64).float()
    assert row[0] != torch.tensor(0.1) * torch.tensor(0.1) / 2 or row[2] == torch.tensor(0.1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0.1, 0.2], "step_size as a sequence must have n_steps = 3 entries, got 2"),
        (-0.1, "step_size must be finite and not negative"),
        (float("nan"), "step_size must be finite"),
        ("0.1", "step_size must be a float, a sequence of 3"),
        (torch.zeros(2, 2), r"got \[2, 2\] float32 on cpu"),
        (torch.tensor([0.1, -1.0]), "in every chain"),
        (torch.tensor([1, 2]), r"floating point tensor \[chains\]"),
        ([0.1, None, 0.1], r"step_size\[1\] must be a float, got None"),
        (["0.1"] * 3, r"step_size\[0\] must be a float, got '0.1'"),
        (1j, "step_size must be a float, a sequence of 3 or a tensor .*, got 1j"),
        (np.array("a"), "step_size must be a float, a sequence of 3 or a tensor .*, got array"),
    ],
)
def test_bad_step_sizes(value, message):
    with pytest.raises(ValueError, match=message):
        jf.FastLangevin(jf.EnergyMLP(2, 3, 1), n_steps=3, step_size=value)


@pytest.mark.parametrize("value", [np.array(0.4), np.float32(0.4), torch.tensor(0.4), 0.4])
def test_one_number_in_any_wrapping_is_a_float(value):
    step_size = jf.FastLangevin(jf.EnergyMLP(2, 3, 1), n_steps=3, step_size=value).step_size
    assert type(step_size) is float
    assert step_size == pytest.approx(0.4)


def test_arrays_are_sequences():
    step_size = jf.FastLangevin(jf.EnergyMLP(2, 3, 1), n_steps=3, step_size=np.array([0.1, 0.2, 0.3])).step_size
    assert step_size == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("name", ["step_size", "noise_scale", "mean", "std"])
def test_a_configuration_keeps_its_values_when_the_tensor_changes(name):
    value = torch.full((5, 1) if name in ("mean", "std") else (5,), 0.4)
    options = {"prior": jf.GaussianPrior(**{name: value})} if name in ("mean", "std") else {name: value}
    sampler = jf.FastLangevin(jf.EnergyMLP(2, 3, 1), n_steps=3, **options)
    before = sampler(torch.zeros(5, 2), noise_key=1)
    value.mul_(-2.0)
    assert torch.equal(sampler(torch.zeros(5, 2), noise_key=1), before)


def test_a_prior_keeps_the_device_and_dtype_of_its_tensors(backend):
    prior = jf.GaussianPrior(mean=torch.ones(3, dtype=torch.float64, device=backend.device).requires_grad_(), std=2)
    assert (prior.mean.dtype, prior.mean.device.type) == (torch.float64, torch.device(backend.device).type)
    mean, precision = prior.terms(torch.zeros(4, 3, device=backend.device))
    assert torch.equal(mean, torch.ones(3, device=backend.device))
    assert torch.equal(precision, torch.full((3,), 0.25, device=backend.device))


def test_per_chain_step_size_must_fit_z():
    prior = jf.FastLangevin(jf.EnergyMLP(2, 3, 1), n_steps=3, step_size=torch.full((4,), 0.1))
    with pytest.raises(ValueError, match=r"step_size as a tensor must be \[5\] \(one per chain\) on cpu, got \[4\]"):
        prior(torch.zeros(5, 2))


def test_prior_terms():
    z = torch.zeros(4, 3)
    mean, precision = jf.GaussianPrior(std=0.5).terms(z)
    assert mean is None
    assert torch.equal(precision, torch.full((3,), 4.0))
    mean, precision = jf.GaussianPrior(mean=torch.arange(3.0), std=torch.arange(1.0, 5.0)[:, None]).terms(z)
    assert torch.equal(mean, torch.arange(3.0))
    assert torch.equal(precision, (1 / torch.arange(1.0, 5.0, dtype=torch.float64) ** 2).float()[:, None].expand(4, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"std": 0.0}, "std of the prior must be positive"),
        ({"std": torch.tensor([1.0, -1.0])}, "std of the prior must be positive"),
        ({"mean": float("inf")}, "mean of the prior must be finite"),
        ({"std": torch.tensor([1.0, float("nan")])}, "std of the prior must be finite"),
        ({"mean": torch.tensor([1j])}, r"mean of the prior must be a float or a tensor, got \[1\] complex64 on cpu"),
        ({"mean": "zero"}, "mean of the prior must be a float or a tensor, got str"),
    ],
)
def test_bad_priors(options, message):
    with pytest.raises(ValueError, match=message):
        jf.GaussianPrior(**options)


def test_prior_must_fit_z():
    prior = jf.FastLangevin(jf.EnergyMLP(3, 3, 1), prior=jf.GaussianPrior(mean=torch.zeros(4)))
    with pytest.raises(ValueError, match=r"mean of the prior must be a float or a tensor \[3\], \[5, 1\] or \[5, 3\]"):
        prior(torch.zeros(5, 3))
