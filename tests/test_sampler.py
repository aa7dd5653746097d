"""FastLangevin: structures, noise, masks, records, posterior chains, promises about state, messages."""

import dataclasses

import pytest
import torch
from reference import published_loop
from torch import nn

import jlebm_fast as jf

DIMS = (2, 2, 2, 10)


def normal(*shape, seed=11, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layers(chains=12, dtype=torch.float32):
    return [normal(chains, d, seed=d + i, dtype=dtype) for i, d in enumerate(DIMS)]


@pytest.fixture
def f(backend):
    torch.manual_seed(5)
    return jf.EnergyMLP(DIMS, hidden=20, depth=3, activation="gelu").to(backend.device)


def on(z, backend):
    return [layer.to(backend.device) for layer in z] if isinstance(z, list) else z.to(backend.device)


def test_chain_equals_the_published_loop_with_the_same_noise(f, backend):
    z, noise = on(normal(12, 16), backend), on(normal(60, 12, 16, seed=12), backend)
    ours = jf.FastLangevin(f, backend=backend.name).sample(z, noise=noise)
    exact = published_loop(f.double(), z.double(), 0.4, noise.double())
    assert (ours.double() - exact).abs().max() < 2e-5


@pytest.mark.parametrize("maximize", [True, False])
def test_dialects(backend, maximize):
    """MOL: prior std 0.5 and noise × 0.5; LEBM: an energy, minimised."""
    torch.manual_seed(6)
    net = jf.EnergyMLP(5, 16, 2, activation="silu").to(backend.device)
    z, noise = on(normal(7, 5), backend), on(normal(20, 7, 5, seed=13), backend)
    prior = jf.GaussianPrior(mean=0.3, std=0.5)
    sampler = jf.FastLangevin(
        net, n_steps=20, step_size=0.5, noise_scale=0.5, prior=prior, maximize=maximize, backend=backend.name
    )
    ours, info = sampler.sample(z, noise=noise, return_info=True)
    net.double()
    sign = 1.0 if maximize else -1.0
    exact = published_loop(lambda z: sign * net(z), z.double(), 0.5, noise.double(), noise_scale=0.5, mean=0.3, std=0.5)
    assert (ours.double() - exact).abs().max() < 2e-5
    # the energy is what the user's net returns, whatever its sign means
    torch.testing.assert_close(info.energy[0], net(z.double()).float(), rtol=1e-5, atol=1e-6)


def test_structures_come_back_as_they_came(f, backend):
    prior = jf.FastLangevin(f, n_steps=3, backend=backend.name)
    z = on(layers(), backend)
    as_list = prior(z, noise_key=1)
    as_tuple = prior(tuple(z), noise_key=1)
    as_tensor = prior(torch.cat(z, 1), noise_key=1)
    as_image = prior(torch.cat(z, 1)[..., None, None], noise_key=1)
    assert isinstance(as_list, list)
    assert isinstance(as_tuple, tuple)
    assert [layer.shape for layer in as_list] == [layer.shape for layer in z]
    assert all(layer.is_contiguous() for layer in as_list)
    assert as_image.shape == (12, 16, 1, 1)
    for other in (torch.cat(as_list, 1), torch.cat(as_tuple, 1), as_image[..., 0, 0]):
        assert torch.equal(other, as_tensor)


def test_input_and_parameters_are_untouched(f, backend):
    z = [layer.requires_grad_() for layer in on(layers(), backend)]
    before = [layer.detach().clone() for layer in z]
    f(z).sum().backward()
    grads = {name: p.grad.clone() for name, p in f.named_parameters()}
    for energy in (f, lambda z: f(z)):
        out = jf.FastLangevin(energy, n_steps=4, backend=backend.name)(z)
        assert not any(layer.requires_grad for layer in out)
        assert all(torch.equal(a, b) for a, b in zip(z, before, strict=True))
        assert all(torch.equal(p.grad, grads[name]) for name, p in f.named_parameters())
        assert f.training


def test_zero_chains_and_zero_steps(f, backend):
    z = on(normal(12, 16), backend)
    for energy in (f, lambda z: f(z)):
        empty, info = jf.FastLangevin(energy, n_steps=5, backend=backend.name).sample(z[:0], return_info=True)
        assert empty.shape == (0, 16)
        assert info.energy.shape == (5, 0)
        same = jf.FastLangevin(energy, n_steps=0, backend=backend.name)(z)
        assert torch.equal(same, z)
        assert same.data_ptr() != z.data_ptr()


def test_the_generator_decides(f, backend):
    prior, z = jf.FastLangevin(f, n_steps=4, backend=backend.name), on(normal(12, 16), backend)
    g = torch.Generator()
    first = prior(z, generator=g.manual_seed(3))
    assert torch.equal(first, prior(z, generator=g.manual_seed(3)))
    assert not torch.equal(first, prior(z, generator=g))
    torch.manual_seed(3)
    assert torch.equal(first, prior(z))
    torch.manual_seed(3)
    prior(z, noise=on(normal(4, 12, 16), backend))
    assert torch.equal(first, prior(z)), "noise from outside must not advance the generator"


def test_any_energy_and_recognised_energy_share_noise(f, backend):
    z = on(normal(12, 16), backend)
    a = jf.FastLangevin(f, n_steps=20, backend=backend.name)(z, noise_key=5)
    b = jf.FastLangevin(lambda z: f(z), n_steps=20, backend=backend.name)(z, noise_key=5)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("recognised", [True, False])
def test_parts_of_a_chain_make_the_whole(f, backend, recognised):
    z = on(normal(12, 16), backend)
    energy = f if recognised else (lambda z: f(z))

    def run(z, n_steps, **place):
        return jf.FastLangevin(energy, n_steps=n_steps, backend=backend.name)(z, noise_key=5, **place)

    whole = run(z, 9)
    torch.testing.assert_close(run(run(z, 4), 5, first_step=4), whole, rtol=0, atol=1e-5)
    halves = torch.cat([run(z[:7], 9), run(z[7:], 9, first_chain=7)])
    torch.testing.assert_close(halves, whole, rtol=0, atol=1e-5)


MASKS = {
    "bool per layer": [True, False, True, False],
    "tensor per layer": [
        torch.tensor([True, True]),
        torch.zeros(12, 2).bool(),
        torch.ones(2).bool(),
        torch.zeros(10).bool(),
    ],
    "per dimension": torch.tensor([True, True, False, False, True, True] + [False] * 10),
    "per chain": torch.tensor([True, True, False, False, True, True] + [False] * 10).repeat(12, 1),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("recognised", [True, False])
def test_masks_freeze(f, backend, mask, recognised):
    z = on(layers(), backend)
    mask = (
        mask.to(backend.device)
        if isinstance(mask, torch.Tensor)
        else [m if isinstance(m, bool) else m.to(backend.device) for m in mask]
    )
    out = jf.FastLangevin(f if recognised else (lambda z: f(z)), n_steps=4, backend=backend.name)(z, mask=mask)
    assert torch.equal(out[0], z[0])
    assert torch.equal(out[2], z[2])
    assert not torch.isclose(out[1], z[1]).any()
    assert not torch.isclose(out[3], z[3]).any()


@pytest.mark.parametrize("recognised", [True, False])
@pytest.mark.parametrize("posterior", [True, False])
def test_info_is_the_same_however_the_chain_runs(f, backend, recognised, posterior):
    z = on(normal(12, 16), backend)
    energy = f if recognised else (lambda z: f(z))
    likelihood = {"log_likelihood": lambda z: -((z[:, :3] - 1) ** 2).sum(1)} if posterior else {}
    options = {"noise_key": 4, "return_info": True, "return_trajectory": True}
    sampler = jf.FastLangevin(energy, n_steps=7, maximize=False, backend=backend.name)
    end, info = sampler.sample(z, thin=3, **options, **likelihood)
    _, every = sampler.sample(z, **options, **likelihood)
    assert info.energy.shape == info.grad_norm.shape == info.displacement.shape == (2, 12)
    assert info.trajectory.shape == (2, 12, 16)
    assert torch.equal(info.first_bad_step.cpu(), torch.full((12,), -1))
    torch.testing.assert_close(info.energy, every.energy[[2, 5]])
    points = torch.cat([z[None], every.trajectory])
    assert torch.equal(points[-1], end)
    for k in range(7):
        value, grad = jf.energy_and_grad(f, points[k])
        grad = -grad
        if posterior:
            grad = grad - torch.cat([2 * (points[k][:, :3] - 1), points[k][:, 3:] * 0], 1)
        torch.testing.assert_close(every.energy[k], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(every.grad_norm[k], grad.norm(dim=1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(every.displacement[k], (points[k + 1] - points[k]).norm(dim=1), rtol=1e-4, atol=1e-5)


def test_posterior_chain_equals_the_loop(f, backend):
    z, noise = on(layers(), backend), on(normal(20, 12, 16, seed=12), backend)
    target = normal(12, 10, seed=20).to(backend.device)

    def log_likelihood(z):
        assert isinstance(z, list)
        return -((z[3] - target.to(z[3].dtype)) ** 2).sum() / (2 * 0.3**2)

    ours = jf.FastLangevin(f, n_steps=20, step_size=0.1, backend=backend.name)(
        z, noise=noise, log_likelihood=log_likelihood
    )
    f.double()
    exact = published_loop(
        lambda z: f(z) - ((z[:, 6:] - target) ** 2).sum(1) / (2 * 0.3**2), torch.cat(z, 1).double(), 0.1, noise.double()
    )
    assert (torch.cat(ours, 1).double() - exact).abs().max() < 2e-5


def test_the_drop_in_training_loop(backend):
    """An optimiser step between two calls changes the samples, and training moves f where it should."""
    torch.manual_seed(7)
    f = jf.EnergyMLP(DIMS, 20, 2, spectral_norm=True).to(backend.device)
    prior = jf.FastLangevin(f, n_steps=10, backend=backend.name)
    opt = torch.optim.SGD(f.parameters(), lr=0.5)
    z0 = on(layers(200), backend)
    z_pos = [layer + 1.0 for layer in z0]
    before = prior(z0, noise_key=1)
    gaps = []
    for _ in range(20):
        z_neg = prior(z0)
        opt.zero_grad()
        loss = f(z_neg).mean() - f(z_pos).mean()
        loss.backward()
        opt.step()
        gaps.append(-loss.item())
    after = prior(z0, noise_key=1)
    assert not torch.isclose(torch.cat(before, 1), torch.cat(after, 1), atol=1e-4).all()
    assert torch.cat(after, 1).mean() > torch.cat(before, 1).mean() + 0.01
    assert gaps[-1] > gaps[0]
    # the sampler holds nothing of its own: a fresh one gives the same
    assert torch.equal(
        torch.cat(after, 1), torch.cat(jf.FastLangevin(f, n_steps=10, backend=backend.name)(z0, noise_key=1), 1)
    )


@pytest.mark.parametrize(
    "context", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)]
)
@pytest.mark.parametrize("recognised", [True, False])
def test_modes_around_the_call_change_nothing(f, backend, context, recognised):
    z = on(normal(12, 16), backend)
    sampler = jf.FastLangevin(f if recognised else (lambda z: f(z)), n_steps=5, backend=backend.name)
    options = {"noise_key": 1, "log_likelihood": lambda z: -z.square().sum()}
    plain = sampler(z, **options)
    with context():
        inside = sampler(z.clone(), **options)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("energy", ["norm", "wide", "recognised", "callable"])
def test_a_default_device_changes_nothing(backend, energy):
    """torch.set_default_device names the device of what a script makes, not of a chain on tensors it has."""
    torch.manual_seed(9)
    f = jf.EnergyMLP(DIMS, 600 if energy == "wide" else 20, 2, spectral_norm=energy == "norm").to(backend.device)
    if energy == "recognised":
        f = nn.Sequential(nn.utils.spectral_norm(nn.Linear(16, 8)), nn.GELU(), nn.Linear(8, 1)).to(backend.device)
    z = on(normal(12, 16), backend)
    elsewhere = torch.device("meta")

    def run():
        net = (lambda z: f(z)) if energy == "callable" else f
        sampler = jf.FastLangevin(net, n_steps=4, step_size=[0.4] * 4, backend=backend.name)
        torch.manual_seed(3)
        return sampler.sample(z, return_info=True, return_trajectory=True, thin=2)

    expected = run()
    with elsewhere:
        ours = run()
    for a, b in zip((ours[0], *ours[1]), (expected[0], *expected[1]), strict=True):
        assert a.device == z.device
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    with elsewhere:
        stepped = jf.langevin_step(z, z, noise_key=1, backend=backend.name)
        assert jf.langevin_noise(1, 1, 2, 3, device=backend.device, backend=backend.name).device == z.device
    assert torch.equal(stepped, jf.langevin_step(z, z, noise_key=1, backend=backend.name))


def test_double_precision_runs_on_eager(f, backend):
    f.double()
    z = on(normal(12, 16, dtype=torch.float64), backend)
    sampler = jf.FastLangevin(f, n_steps=5, backend=backend.name)
    if backend.name == "eager":
        assert sampler(z).dtype == torch.float64
    else:
        with pytest.raises(ValueError, match=f"backend '{backend.name}' cannot run mlp_langevin_chain: .*float64"):
            sampler(z)
    assert jf.FastLangevin(f, n_steps=5)(z).dtype == torch.float64


def test_per_chain_and_per_step_schedules(f, backend):
    z, noise = on(normal(12, 16), backend), on(normal(6, 12, 16, seed=12), backend)
    s = torch.linspace(0.1, 0.6, 12).to(backend.device)
    scale = [1.0, 0.5, 0.0, 1.0, 2.0, 1.0]
    ours = jf.FastLangevin(f, n_steps=6, step_size=s, noise_scale=scale, backend=backend.name)(z, noise=noise)
    scaled = noise * torch.tensor(scale).to(backend.device)[:, None, None]
    exact = published_loop(f.double(), z.double(), s.double()[:, None], scaled.double())
    assert (ours.double() - exact).abs().max() < 2e-5


def test_nan_stays_in_its_chain_for_any_energy(f, backend):
    z = on(normal(12, 16), backend)
    z[3, 0] = float("nan")
    out, info = jf.FastLangevin(lambda z: f(z), n_steps=5, backend=backend.name).sample(z, return_info=True)
    assert torch.isfinite(out[[i for i in range(12) if i != 3]]).all()
    assert info.first_bad_step.tolist() == [-1] * 3 + [0] + [-1] * 8


def test_context_and_chosen_logit(backend):
    torch.manual_seed(8)
    f = jf.EnergyMLP(5, 16, 2, activation="gelu", out_features=4, head="logsumexp", context_dim=3).to(backend.device)
    z, c, noise = (on(normal(*shape), backend) for shape in ((9, 5), (9, 3), (8, 9, 5)))
    y = torch.arange(9, device=backend.device) % 4
    sampler = jf.FastLangevin(f, n_steps=8, backend=backend.name)
    free, info = sampler.sample(z, context=c, noise=noise, return_info=True)
    chosen = sampler(z, context=c, y=y, noise=noise)
    torch.testing.assert_close(info.energy[0], f(z, c))
    f.double()
    for ours, options in ((free, {}), (chosen, {"y": y})):
        exact = published_loop(lambda z, o=options: f(z, c.double(), **o), z.double(), 0.4, noise.double())
        assert (ours.double() - exact).abs().max() < 2e-5
    f.float()
    same = jf.FastLangevin(lambda z, context, y: f(z, context, y), n_steps=8, backend=backend.name)
    torch.testing.assert_close(same(z, context=c, y=y, noise=noise), chosen, rtol=0, atol=1e-5)


BAD = {
    "width": (
        lambda p: p(torch.zeros(100, 12)),
        r"z must be \[chains, 16\] float32 on cpu, got \[100, 12\] float32 on cpu",
    ),
    "dtype": (
        lambda p: p(torch.zeros(3, 16).double()),
        r"z must be \[chains, 16\] float32 on cpu, got \[3, 16\] float64",
    ),
    "integer": (lambda p: p(torch.zeros(3, 16).long()), r"z must be .* got \[3, 16\] int64 on cpu"),
    "three dimensions": (lambda p: p(torch.zeros(3, 16, 1)), r"or a list of layers, got \[3, 16, 1\] float32 on cpu"),
    "layers": (lambda p: p([torch.zeros(3, 8)] * 2), r"z must be layers of widths \(2, 2, 2, 10\), got \(8, 8\)"),
    "layers of two batches": (lambda p: p([torch.zeros(3, 2), torch.zeros(4, 2)]), r"z\[1\] must be \[3, dim\]"),
    "one dimension": (lambda p: p([torch.zeros(16)]), r"z\[0\] must be \[chains, dim\] or .* got \[16\] float32"),
    "sparse": (lambda p: p(torch.zeros(3, 16).to_sparse()), r"got \[3, 16\] float32 on cpu \(sparse_coo\)"),
    "nested": (
        lambda p: p(torch.nested.nested_tensor([torch.zeros(16)] * 3, layout=torch.jagged)),
        "z must be .* got a nested tensor float32 on cpu",
    ),
    "no tensor": (lambda p: p("z"), "z must be a tensor .* got str"),
    "empty list": (lambda p: p([]), "z must be a tensor"),
    "noise": (lambda p: p(torch.zeros(3, 16), noise=torch.zeros(3, 16)), r"noise must be \[6, 3, 16\] float32 on cpu"),
    "noise list": (lambda p: p(layers(3), noise=[torch.zeros(6, 3, 2)]), "noise must have 4 entries, one per layer"),
    "mask": (lambda p: p(torch.zeros(3, 16), mask=torch.zeros(16)), r"mask must be a bool tensor \[16\] or \[3, 16\]"),
    "mask list": (lambda p: p(layers(3), mask=[True]), "mask must have 4 entries, one per layer of z, got 1"),
    "two sources": (
        lambda p: p(layers(3), noise_key=1, generator=torch.Generator()),
        "either a generator or a noise_key",
    ),
    "generator": (lambda p: p(layers(3), generator=3), "generator must be a torch.Generator or None, got int"),
    "key": (lambda p: p(layers(3), noise_key=2**64), r"noise_key must be an integer in \[0, 2\*\*64\)"),
    "thin": (lambda p: p(layers(3), thin=0), "thin must be an integer >= 1, got 0"),
    "first_step": (lambda p: p(layers(3), first_step=-1), "first_step must be an integer in"),
    "context": (lambda p: p(layers(3), context=torch.zeros(3, 2)), "context_dim = 0"),
    "likelihood": (
        lambda p: p(layers(3), log_likelihood=lambda z: z[0]),
        r"log_likelihood must return \[3\] or a scalar",
    ),
    "constant": (lambda p: p(layers(3), log_likelihood=lambda z: torch.zeros(3)), "without a gradient in z"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jf.FastLangevin(jf.EnergyMLP(DIMS, 20, 2), n_steps=6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_steps": -1}, "n_steps must be an integer >= 0"),
        ({"n_steps": 2.0}, "n_steps must be an integer >= 0"),
        ({"backend": "gpu"}, "backend must be 'auto' or one of 'cuda', 'triton', 'cpu', 'eager', got 'gpu'"),
        ({"precision": "fp16"}, "precision must be one of"),
        ({"prior": 1.0}, "prior must be a GaussianPrior or None, got float"),
        ({"maximize": 1}, "maximize must be True or False"),
        ({"noise_scale": [1.0]}, "noise_scale as a sequence must have n_steps = 60 entries, got 1"),
    ],
)
def test_bad_configuration_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        jf.FastLangevin(jf.EnergyMLP(2, 3, 1), **options)


def test_energies_of_the_wrong_shape_are_named():
    z = torch.zeros(5, 3)
    for energy, message in (
        (
            lambda z: z.sum(),
            r"energy must return one value per chain, \[5\], \[5, 1\] or \[5, 1, 1, 1\], got \[\] float32",
        ),
        (lambda z: z, r"got \[5, 3\] float32 on cpu; several logits need a head"),
        (lambda z: torch.zeros(5), "energy returned a tensor without a gradient in z"),
        (lambda z: torch.zeros(5, requires_grad=True), "the output of energy does not depend on z"),
    ):
        with pytest.raises(ValueError, match=message):
            jf.FastLangevin(energy, n_steps=2)(z)
    with pytest.raises(ValueError, match="energy must be a module or a callable, got float"):
        jf.FastLangevin(1.0)


def test_configuration_is_frozen_and_copies_with_replace():
    prior = jf.FastLangevin(jf.EnergyMLP(2, 3, 1), n_steps=5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        prior.n_steps = 6
    longer = dataclasses.replace(prior, n_steps=6)
    assert (prior.n_steps, longer.n_steps) == (5, 6)
    assert longer.sample(torch.zeros(1, 2), return_info=True)[1].energy.shape == (6, 1)


def test_explain_names_path_backend_and_reasons():
    f = jf.EnergyMLP(DIMS, 20, 2)
    text = jf.FastLangevin(f, backend="eager").explain(layers(3))
    assert "energy    EnergyMLP: 16 -> 20 -> 20 -> 1, leaky_relu(0.2), head identity" in text
    assert "backend   eager" in text
    assert "not cuda: backend='eager' was asked for" in text
    net = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 1))
    text = jf.FastLangevin(net).explain(torch.zeros(3, 16))
    assert "not recognised" in text
    assert "layer_norm" in text
    assert "layer '1' (LayerNorm)" in text
    assert "langevin_step, 60 times" in text
    assert "not cuda: " in text
