"""The rungs for other samplers: the noise field, one step, an energy and its gradient."""

import numpy as np
import pytest
import torch
from reference import published_loop
from torch import nn

import jlebm_fast as jf


def normal(*shape, seed=41):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_noise_is_addressed_not_streamed(backend):
    options = {"device": backend.device, "backend": backend.name}
    whole = jf.langevin_noise(5, 6, 40, 10, **options)
    assert torch.equal(jf.langevin_noise(5, 6, 13, 10, first_chain=27, **options), whole[:, 27:])
    assert torch.equal(jf.langevin_noise(5, 2, 40, 10, first_step=4, **options), whole[4:])
    assert torch.equal(jf.langevin_noise(5, 6, 40, 7, **options), whole[:, :, :7])
    assert not torch.isclose(jf.langevin_noise(5, 6, 40, 10, stream=1, **options), whole).any()
    assert not torch.isclose(jf.langevin_noise(6, 6, 40, 10, **options), whole).any()


def test_noise_is_the_oracle_in_every_bit(backend):
    key = 0xDEADBEEFCAFEF00D
    ours = jf.langevin_noise(key, 7, 101, 19, device=backend.device, backend=backend.name)
    assert torch.equal(ours.cpu(), jf.langevin_noise(key, 7, 101, 19, backend="eager"))


def test_a_loop_of_steps_is_the_chain(backend):
    torch.manual_seed(1)
    f = jf.EnergyMLP((2, 3), 16, 2, activation="gelu").to(backend.device)
    z = [layer.to(backend.device) for layer in (normal(8, 2), normal(8, 3))]
    expected = jf.FastLangevin(f, n_steps=5, backend=backend.name)(z, noise_key=9)
    for k in range(5):
        _, grad = jf.energy_and_grad(f, z, backend=backend.name)
        z = jf.langevin_step(z, grad, noise_key=9, step=k, backend=backend.name)
    assert isinstance(z, list)
    for a, b in zip(z, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_step_options(backend):
    z, grad, eps = (normal(8, 3, seed=i).to(backend.device) for i in (1, 2, 3))
    s = torch.linspace(0.1, 0.8, 8).to(backend.device)
    ours = jf.langevin_step(
        z,
        grad,
        step_size=s,
        noise_scale=0.5,
        prior=jf.GaussianPrior(mean=1.0, std=2.0),
        maximize=False,
        mask=torch.tensor([True, False, False]).to(backend.device),
        noise=eps,
        backend=backend.name,
    )
    s = s[:, None]
    expected = z + s * s / 2 * (-grad + (1 - z) / 4) + s * 0.5 * eps
    expected[:, 0] = z[:, 0]
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_energy_and_gradient_of_any_energy(backend):
    z = normal(8, 3).to(backend.device)
    value, grad = jf.energy_and_grad(lambda z: -(z**4).sum(1), z, backend=backend.name)
    torch.testing.assert_close(value, -(z**4).sum(1))
    torch.testing.assert_close(grad, -4 * z**3)
    net = nn.Sequential(nn.Linear(3, 7), nn.SiLU(), nn.Linear(7, 1)).to(backend.device)
    value, grad = jf.energy_and_grad(net, z[..., None, None].flatten(1), backend=backend.name)
    leaf = z.clone().requires_grad_()
    torch.testing.assert_close(value, net(z).detach().squeeze(1))
    torch.testing.assert_close(grad, torch.autograd.grad(net(leaf).sum(), leaf)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["gelu_tanh", "mish", "silu"])
def test_slopes_are_right_far_out(backend, activation):
    f = jf.EnergyMLP(1, 1, 1, activation=activation).to(backend.device)
    with torch.no_grad():
        for p in f.parameters():
            p.fill_(1.0 if p.dim() == 2 else 0.0)
    z = torch.tensor([1e3, 1e4, 1e6, 1e12, -1e3, -1e4, -1e6, -1e12], device=backend.device)[:, None]
    _, grad = jf.energy_and_grad(f, z, backend=backend.name)
    torch.testing.assert_close(grad, (z > 0).float(), rtol=0, atol=1e-6)


Z = torch.zeros(5, 16)
ARGS = {"e_l_steps": 3, "e_l_step_size": 0.4}


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: jf.langevin_step(Z, Z, prior=3), "prior must be a GaussianPrior or None, got int"),
        (lambda: jf.langevin_step(Z, Z, maximize="no"), "maximize must be True or False, got 'no'"),
        (lambda: jf.mala(lambda z: z.sum(1), Z, n_steps=1, maximize=None), "maximize must be True or False, got None"),
        (
            lambda: jf.compat.langevin_prior(Z, lambda zs: zs[0].sum(1), ARGS),
            "zs_init must be a list of latent layers [chains, d_l], got [5, 16] float32 on cpu",
        ),
        (
            lambda: jf.compat.langevin_prior([Z], lambda zs: zs[0].sum(1), {**ARGS, "e_l_steps": 3.5}),
            "e_l_steps must be an integer, got 3.5",
        ),
        (
            lambda: jf.compat.sample_langevin_prior_z(Z, lambda z: z.sum(1), {**ARGS, "e_l_step_size": None}),
            "e_l_step_size must be a number, got None",
        ),
        (lambda: jf.langevin_step(Z, Z, step=-1), "step must be an integer in [0, 2**32), got -1"),
        (
            lambda: jf.langevin_noise(1, 1, 2**32 + 1, 0),
            "chains must be at most 2**32, as many as a noise field tells apart, got 4294967297",
        ),
        (
            lambda: jf.langevin_noise(1, 2**32 + 1, 1, 0),
            "n_steps must be at most 2**32, as many as a noise field tells apart, got 4294967297",
        ),
        (
            lambda: jf.langevin_step(Z, Z[0]),
            "grad must be [chains, dim] or [chains, dim, 1, 1], float32 or float64, or a "
            "list of layers, got [16] float32 on cpu",
        ),
        (
            lambda: jf.langevin_step(Z, Z, noise=Z[None]),
            "noise must be [chains, dim] or [chains, dim, 1, 1], float32 or "
            "float64, or a list of layers, got [1, 5, 16] float32 on cpu",
        ),
        (
            lambda: jf.langevin_step(Z, Z, noise=[Z, Z[:4]]),
            "noise[1] must be [5, dim] or [5, dim, 1, 1] float32 on cpu like noise[0], got [4, 16] float32 on cpu",
        ),
        (
            lambda: jf.langevin_step(Z, Z, noise=3),
            "noise must be a tensor [chains, dim] or a list of layers [chains, d_l], got int",
        ),
        (
            lambda: jf.langevin_step(Z, Z, noise=Z[:4]),
            "noise must be [5, 16] float32 on cpu, got [4, 16] float32 on cpu",
        ),
        (lambda: jf.energy_and_grad(3, Z), "energy must be a module or a callable, got int"),
        (lambda: jf.langevin_noise(-1, 1, 2, 3), "key must be an integer in [0, 2**64), got -1"),
        (
            lambda: jf.langevin_noise(torch.zeros(1), 1, 2, 3),
            "key as a tensor must be [1] int64, got [1] float32 on cpu",
        ),
    ],
)
def test_the_argument_that_is_wrong_is_named(call, sentence):
    with pytest.raises(ValueError, match="got") as raised:
        call()
    assert str(raised.value) == sentence


def test_integers_of_numpy_place_a_chain():
    f, z = jf.EnergyMLP(6, 5, 2), normal(4, 6)
    options = {"noise_key": 3, "first_step": 2, "first_chain": 4, "thin": 2}
    expected, told = jf.FastLangevin(f, n_steps=6).sample(z, return_info=True, **options)
    numpys = {name: np.int64(value) for name, value in options.items()}
    found, info = jf.FastLangevin(f, n_steps=np.int32(6)).sample(z, return_info=True, **numpys)
    assert torch.equal(found, expected)
    assert torch.equal(info.energy, told.energy)
    with pytest.raises(ValueError, match=r"first_step must be an integer in \[0, 2\*\*32\), got -1"):
        jf.FastLangevin(f, n_steps=6)(z, first_step=np.int64(-1))


def test_integers_of_numpy_address_noise():
    assert torch.equal(
        jf.langevin_noise(np.uint64(1 << 63), np.int64(2), np.int64(3), np.int64(4), first_step=np.int64(5)),
        jf.langevin_noise(1 << 63, 2, 3, 4, first_step=5),
    )
    assert torch.equal(
        jf.langevin_step(Z, Z, noise_key=np.int64(3), step=np.int64(2), first_chain=np.int64(1)),
        jf.langevin_step(Z, Z, noise_key=3, step=2, first_chain=1),
    )


def test_a_device_that_torch_does_not_know_is_named():
    with pytest.raises(ValueError, match="device must be a device of torch, got 'nope'"):
        jf.langevin_noise(1, 2, 3, 4, device="nope")


def outside_what_was_made_in_inference_mode(tensor):
    """What torch refuses of an inference tensor: to be written, and to be saved for a backward."""
    weight = torch.ones(tensor.shape[-1], dtype=tensor.dtype, requires_grad=True)
    (weight * tensor.add_(1)).sum().backward()
    return weight.grad


def test_noise_made_in_inference_mode_can_be_used_outside(backend):
    with torch.inference_mode():
        noise = jf.langevin_noise(3, 4, 6, 5, device=backend.device, backend=backend.name)
    assert torch.equal(noise, jf.langevin_noise(3, 4, 6, 5, device=backend.device, backend=backend.name))
    z = jf.FastLangevin(jf.EnergyMLP(5, 8, 1).to(backend.device), n_steps=4, backend=backend.name).sample(
        noise[0], noise=noise, return_info=True
    )[0]
    assert not z.is_inference()
    assert outside_what_was_made_in_inference_mode(noise.cpu()).shape == (5,)


def test_one_chain_may_have_a_scalar_for_its_energy():
    def squeezed(z):
        return z.square().sum(dim=1, keepdim=True).squeeze()

    z = normal(1, 3)
    value, grad = jf.energy_and_grad(squeezed, z)
    assert value.shape == (1,)
    torch.testing.assert_close(grad, 2 * z)
    assert jf.FastLangevin(squeezed, n_steps=3, maximize=False)(z).shape == (1, 3)
    for chains in (0, 2):
        with pytest.raises(ValueError, match=r"energy must return one value per chain, .* got \[\]"):
            jf.energy_and_grad(lambda z: z.sum(), normal(chains, 3))


def test_compat_joint_prior(caplog):
    import argparse

    torch.manual_seed(2)
    f = jf.EnergyMLP((2, 3), 16, 2, activation="gelu")
    zs = [normal(8, 2), normal(8, 3)]
    args = argparse.Namespace(e_l_steps=12, e_l_step_size=0.4)
    torch.manual_seed(3)
    out = jf.compat.langevin_prior(zs, f, args)
    torch.manual_seed(3)
    expected = jf.FastLangevin(f, n_steps=12)(zs)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    with caplog.at_level("INFO"):
        torch.manual_seed(3)
        again = jf.compat.langevin_prior(zs, f, vars(args), should_print=True)
    assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))
    assert [r.message.split(":")[0] for r in caplog.records] == [f"Langevin prior {k:3d}/ 12" for k in (1, 6, 11, 12)]
    still = jf.compat.langevin_prior(zs, f, {**vars(args), "e_l_with_noise": False})
    exact = published_loop(lambda z: f(z.float()), torch.cat(zs, 1), 0.4, torch.zeros(12, 8, 5))
    torch.testing.assert_close(torch.cat(still, 1), exact, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="args must have e_l_steps, got Namespace without it"):
        jf.compat.langevin_prior(zs, f, argparse.Namespace(e_l_step_size=0.4))


@pytest.mark.parametrize("form", ["identity", "tanh", "sigmoid", "softplus"])
def test_compat_latent_prior(form, capsys):
    torch.manual_seed(4)
    net = nn.Sequential(nn.Flatten(), nn.Linear(5, 16), nn.GELU(), nn.Linear(16, 1))
    z = normal(8, 5, 1, 1)
    args = {"e_l_steps": 9, "e_l_step_size": 0.4, "e_prior_sig": 0.7, "e_l_with_noise": False, "e_energy_form": form}
    out, grad_norm = jf.compat.sample_langevin_prior_z(z, net, args, verbose=True)
    energy = {
        "identity": lambda e: e,
        "tanh": lambda e: torch.tanh(-e),
        "sigmoid": torch.sigmoid,
        "softplus": nn.functional.softplus,
    }[form]
    steps = [
        published_loop(lambda z: -energy(net(z)), z[..., 0, 0], 0.4, torch.zeros(n, 8, 5), std=0.7) for n in (8, 9)
    ]
    torch.testing.assert_close(out[..., 0, 0], steps[1], rtol=0, atol=1e-5)
    leaf = steps[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(energy(net(leaf)).sum(), leaf)
    torch.testing.assert_close(grad_norm, grad.norm(dim=1).mean(), rtol=1e-4, atol=1e-6)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"Langevin prior {k:3d}/  9" for k in (1, 6, 9)]
    with pytest.raises(ValueError, match="e_energy_form must be identity"):
        jf.compat.sample_langevin_prior_z(z, net, {**args, "e_energy_form": "exp"})
