"""EnergyMLP's forward and backward by the CUDA kernels' host build: derivatives in everything, against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from host_build import on_host

import jlebm_fast as jf
from jlebm_fast import fused_energy, precision
from jlebm_fast.backends import eager

KINDS = {
    "HS": {"latent_dims": (2, 2, 2, 10), "hidden": 50, "depth": 4},
    "LEBM": {"latent_dims": 100, "hidden": 200, "depth": 2, "activation": "gelu"},
    "awkward": {"latent_dims": (2, 3), "hidden": (17, 9, 12), "depth": 3, "activation": "mish"},
    "conditional": {"latent_dims": 6, "hidden": 12, "depth": 2, "context_dim": 3, "spectral_norm": True},
}


def normal(*shape, seed=81):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _on_a_device(monkeypatch):
    monkeypatch.setattr(fused_energy, "native_pass", lambda z, mlp: fused_energy.pass_of(on_host()))
    # the CPU's own measure of when the native pass pays
    monkeypatch.setattr(fused_energy, "_FEWEST_LAYERS_FOR_PARAMETERS", 0)


def gradients(f, z, context, function=None):
    z = z.clone().requires_grad_()
    context = None if context is None else context.clone().requires_grad_()
    value = f(z, context) if function is None else function(z, f.mlp(z, context))
    leaves = [z, *([] if context is None else [context]), *f.parameters()]
    return [value, *torch.autograd.grad((value * value).sum(), leaves)]


def plain(z, mlp):
    return eager.mlp_forward(z, mlp)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chains", [1, 9, 40])
def test_first_derivatives_in_everything(kind, chains):
    torch.manual_seed(3)
    f = jf.EnergyMLP(**KINDS[kind])
    z = normal(chains, f.spec.dim)
    context = normal(chains, f.context_dim, seed=82) if f.context_dim else None
    ours, ordinary = gradients(f, z, context), gradients(f, z, context, plain)
    double = copy.deepcopy(f).double()
    exact = gradients(double, z.double(), None if context is None else context.double(), plain)
    assert "_Energy" in type(ours[0].grad_fn).__name__
    for a, b, c in zip(ours, ordinary, exact, strict=True):
        assert a.shape == c.shape
        error, allowed = ((t.double() - c).abs().max().item() for t in (a, b))
        assert error <= 4 * allowed + 2e-6 * max(1.0, c.abs().max().item())


def test_derivatives_in_z_alone_and_values_alone():
    f, z = jf.EnergyMLP(**KINDS["awkward"]).requires_grad_(False), normal(20, 5)
    with torch.no_grad():
        torch.testing.assert_close(f(z), plain(z, f.mlp(z)), rtol=1e-5, atol=1e-5)
    at = z.clone().requires_grad_()
    (grad,) = torch.autograd.grad(f(at).square().sum(), at)
    (exact,) = torch.autograd.grad(plain(at, f.mlp(at)).square().sum(), at)
    torch.testing.assert_close(grad, exact, rtol=1e-4, atol=1e-5)


def test_second_derivatives():
    f, z = jf.EnergyMLP(**KINDS["awkward"]), normal(7, 5).requires_grad_()
    (grad,) = torch.autograd.grad(f(z).sum(), z, create_graph=True)
    (exact,) = torch.autograd.grad(plain(z, f.mlp(z)).sum(), z, create_graph=True)
    second, second_exact = (torch.autograd.grad(g.square().sum(), list(f.parameters())[:-1]) for g in (grad, exact))
    for a, b in zip(second, second_exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_precision_is_torchs_own():
    f, z = jf.EnergyMLP(**KINDS["HS"]), normal(20, 16)
    exact = gradients(copy.deepcopy(f).double(), z.double(), None, plain)
    with precision.using("bf16"):
        rounded = gradients(f, z, None)
    for a, b in zip(rounded, exact, strict=True):
        error = (a.double() - b).norm() / b.norm().clamp(min=1e-6)
        assert 1e-5 < error < 0.1 or b.norm() == 0
