"""The CUDA kernels on a device: parity, bits of the noise, laws, invariances, graphs, streams, bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from mlp_host import cast, coefficients, make_mlp, plain_chain, plain_energy_grad, rms, typical_rms

import jlebm_fast as jf
from jlebm_fast import backends, precision
from jlebm_fast.backends import eager
from jlebm_fast.problem import MLP, Record, Update

SHAPES = {"HS": [16, 50, 50, 50, 50, 1], "FID": [50, 100, 100, 1], "LEBM": [100, 200, 200, 1]}
KEY = 0x0123456789ABCDEF
# seeds of 5000 starts from which no unit of the leaky nets comes closer to its kink than 8e-6: no slope hangs on
# float32's rounding
NO_KINK = {"HS": 23, "FID": 33, "LEBM": 2}


def to(record, device):
    """An MLP or Update on another device."""

    def one(value):
        if isinstance(value, tuple):
            return tuple(one(v) for v in value)
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return record._replace(**{f: one(v) for f, v in record._asdict().items() if f != "spec"})


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n_steps", "chains", "dim"), [(3, 7, 10), (2, 1, 1), (1, 1000, 100), (60, 100, 16)])
def test_noise_is_that_of_the_cpu(chip, n_steps, chains, dim):
    where = {"first_step": 2**32 - 2, "first_chain": 2**32 - 5, "stream": 1}
    got = chip.kernels.langevin_noise(KEY, n_steps, chains, dim, device=chip.device, **where)
    assert torch.equal(got.cpu(), eager.langevin_noise(KEY, n_steps, chains, dim, **where))


def test_noise_beyond_32_bit_indices(chip, device_only):
    """4.3 billion normals: the last ones stand where they belong."""
    chains, dim = (1 << 30) + 3, 4
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of free device memory")
    got = chip.kernels.langevin_noise(KEY, 1, chains, dim, device=chip.device)[0, -3:].cpu()
    assert torch.equal(got, eager.langevin_noise(KEY, 1, 3, dim, first_chain=chains - 3)[0])


@pytest.mark.parametrize("dim", [1, 16, 50, 100])
def test_step(chip, dim):
    chains = 33
    z, grad, extra = (normal(chains, dim, seed=i) for i in range(3))
    update = Update(
        torch.tensor([[0.08, 0.07, 0.4]]), 1 + 0.1 * normal(chains, 3, seed=4), normal(dim, seed=5),
        1 + normal(chains, dim, seed=6).abs(), normal(dim, seed=7) > 1, None, KEY, 3, 9, extra,
    )  # fmt: skip
    got = chip.kernels.langevin_step(z.to(chip.device), grad.to(chip.device), to(update, chip.device)).cpu()
    exact = eager.langevin_step(z.double(), grad.double(), cast(update, torch.float64))
    plain = eager.langevin_step(z, grad, update)
    assert rms(got, exact) <= 2 * rms(plain, exact) + 1e-6
    assert torch.equal(got[:, update.frozen], z[:, update.frozen])


@pytest.mark.parametrize("name", precision.NAMES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chains", [1, 9, 100, 5000])
def test_energy_and_gradient(chip, name, shape, chains):
    chains = chip.scaled(chains)
    mlp = make_mlp(SHAPES[shape], "gelu" if shape == "LEBM" else "leaky_relu", seed=1)
    z = normal(chains, mlp.spec.dim, seed=NO_KINK[shape])
    with precision.using(name):
        got = chip.kernels.mlp_energy_grad(z.to(chip.device), to(mlp, chip.device))
    plain, exact = plain_energy_grad(z, mlp, name), eager.mlp_energy_grad(z.double(), cast(mlp, torch.float64))
    for ours, theirs, oracle in zip(got, plain, exact, strict=True):
        error = rms if name == "fp32" else typical_rms
        assert error(ours.cpu(), oracle) <= 2 * error(theirs, oracle) + 1e-6


@pytest.mark.parametrize("name", precision.NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_chain(chip, name, shape):
    chains, n_steps = chip.scaled(300), 4
    mlp = make_mlp(SHAPES[shape], "gelu" if shape == "LEBM" else "leaky_relu", seed=3)
    z, noise = normal(chains, mlp.spec.dim, seed=4), normal(n_steps, chains, mlp.spec.dim, seed=5)
    update = Update(coefficients(n_steps), prior_precision=torch.ones(mlp.spec.dim), noise=noise)
    with precision.using(name):
        got = chip.kernels.mlp_langevin_chain(
            z.to(chip.device), to(mlp, chip.device), to(update, chip.device), n_steps, Record(True, True)
        )
    exact = plain_exact(z, mlp, update, n_steps)
    assert rms(got.z.cpu(), exact) <= 2 * rms(plain_chain(z, mlp, update, n_steps, name), exact) + 1e-6
    assert torch.equal(got.trajectory[-1], got.z)
    assert got.first_bad_step.eq(-1).all()


def plain_exact(z, mlp, update, n_steps):
    return eager.mlp_langevin_chain(
        z.double(), cast(mlp, torch.float64), cast(update, torch.float64), n_steps, Record()
    ).z


@pytest.mark.parametrize("units", [1000, 2400])
def test_wide_net(chip, units):
    """WIDE's weights do not fit a multiprocessor; at 2400 units, in chips of 227 KB, their slopes neither."""
    units = 3 * units // 10 if chip.rehearsal else units
    mlp = make_mlp([20 if chip.rehearsal else 100, units, units, 1], "gelu", seed=6)
    z = normal(chip.scaled(1200), mlp.spec.dim, seed=7)  # more batches of 8 than multiprocessors
    got = chip.kernels.mlp_energy_grad(z.to(chip.device), to(mlp, chip.device))
    plain, exact = eager.mlp_energy_grad(z, mlp), eager.mlp_energy_grad(z.double(), cast(mlp, torch.float64))
    for ours, theirs, oracle in zip(got, plain, exact, strict=True):
        assert rms(ours.cpu(), oracle) <= 2 * rms(theirs, oracle) + 1e-6


def test_parts_are_the_whole(chip):
    """Chains in two halves and steps in two halves give every bit of one call."""
    chains, n_steps = 100, 6
    mlp = to(make_mlp([16, 50, 50, 1], "silu", seed=8), chip.device)
    z = normal(chains, 16, seed=9).to(chip.device)
    rows = coefficients(n_steps).to(chip.device)

    def run(z, first_step, n, first_chain):
        update = Update(
            rows[first_step : first_step + n], noise_key=KEY, first_step=first_step, first_chain=first_chain
        )
        return chip.kernels.mlp_langevin_chain(z, mlp, update, n, Record()).z

    whole = run(z, 0, n_steps, 0)
    assert torch.equal(whole, torch.cat([run(z[:40], 0, n_steps, 0), run(z[40:], 0, n_steps, 40)]))
    assert torch.equal(whole, run(run(z, 0, 2, 0), 2, 4, 0))


@pytest.mark.parametrize("name", precision.NAMES)
def test_law_of_a_linear_energy(chip, name):
    """f(z) = w z: after K steps mean and variance are those of v <- (1 - s²/2)² v + s², at a level of 5 sigma."""
    chains, dim, n_steps, s = chip.scaled(200_000), 2, 5, 0.4
    eye = torch.eye(dim)
    w = torch.tensor([[0.5, -1.0]])
    spec = make_mlp([dim, dim, 1], "identity").spec
    mlp = to(MLP(spec, (eye, w), (None, None)), chip.device)
    rows = torch.tensor([[s * s / 2, s * s / 2, s]]).repeat(n_steps, 1)
    update = to(Update(rows, prior_precision=torch.ones(dim), noise_key=77), chip.device)
    with precision.using(name):
        z = chip.kernels.mlp_langevin_chain(
            torch.zeros(chains, dim, device=chip.device), mlp, update, n_steps, Record()
        ).z
    mean, variance = torch.zeros(dim, dtype=torch.float64), 0.0
    for _ in range(n_steps):
        mean = mean + s * s / 2 * (w[0].double() - mean)
        variance = (1 - s * s / 2) ** 2 * variance + s * s
    z = z.double().cpu()
    assert ((z.mean(0) - mean).abs() < 5 * (variance / chains) ** 0.5).all()
    assert ((z.var(0) / variance - 1).abs() < 5 * (2 / chains) ** 0.5).all()


def test_bad_numbers_stay_in_their_chain(chip):
    mlp = to(make_mlp([10, 20, 1], "tanh", seed=10), chip.device)
    z = normal(20, 10, seed=11).to(chip.device)
    broken = z.clone()
    broken[7, 3] = float("nan")
    update = to(Update(coefficients(3), prior_precision=torch.ones(10), noise_key=KEY), chip.device)
    good = chip.kernels.mlp_langevin_chain(z, mlp, update, 3, Record(True))
    got = chip.kernels.mlp_langevin_chain(broken, mlp, update, 3, Record(True))
    others = torch.arange(20) != 7
    assert torch.equal(got.z[others], good.z[others])
    assert got.first_bad_step.tolist() == [0 if i == 7 else -1 for i in range(20)]


def test_fuzz(chip):
    """Random sizes, activations, heads and precisions; seed fixed."""
    g = torch.Generator().manual_seed(2024)

    def pick(*options):
        return options[int(torch.randint(0, len(options), (1,), generator=g))]

    for trial in range(4 if chip.rehearsal else 60):
        depth, dim = pick(1, 2, 3, 4), pick(2, 5, 16, 33, 50, 100)
        head = pick("identity", "tanh", "sigmoid", "softplus", "logsumexp", "logit")
        widths = [dim, *[pick(7, 16, 50, 100, 200) for _ in range(depth)], pick(2, 5) if head[0] == "l" else 1]
        chains, name = chip.scaled(pick(1, 7, 8, 9, 33, 100, 1000)), pick(*precision.NAMES)
        mlp = make_mlp(
            widths, pick("leaky_relu", "gelu", "silu", "softplus", "elu"), head=head, chains=chains, seed=trial
        )
        z = normal(chains, dim, seed=trial)
        with precision.using(name):
            got = chip.kernels.mlp_energy_grad(z.to(chip.device), to(mlp, chip.device))
        plain, exact = plain_energy_grad(z, mlp, name), eager.mlp_energy_grad(z.double(), cast(mlp, torch.float64))
        for ours, theirs, oracle in zip(got, plain, exact, strict=True):
            # a mean over few numbers may be lucky for torch: four times
            assert rms(ours.cpu(), oracle) <= 4 * rms(theirs, oracle) + 1e-6, (trial, widths, head, chains, name)


def test_key_in_device_memory(chip):
    key = torch.tensor([5], dtype=torch.int64, device=chip.device)
    first = chip.kernels.langevin_noise(key, 1, 3, 8, device=chip.device)
    assert torch.equal(first.cpu(), eager.langevin_noise(5, 1, 3, 8))
    chip.kernels.advance_noise_key(key)
    assert int(key) % 2**64 == (5 + 0x9E3779B97F4A7C15) % 2**64
    with pytest.raises(ValueError, match="noise_key must be an integer, or \\[1\\] int64"):
        chip.kernels.langevin_noise(key.to("meta"), 1, 3, 8, device=chip.device)


@pytest.mark.parametrize("shape", [(50, 16), (50, 50), (1, 50), (200, 100), (1000, 1000)])
def test_spectral_norms(chip, shape):
    shape = tuple(chip.scaled(n) for n in shape)
    pairs = [(normal(*shape, seed=i), torch.nn.functional.normalize(normal(shape[0]), dim=0)) for i in range(3)]
    there = [tuple(t.to(chip.device) for t in pair) for pair in pairs]
    for (weight, _), (u, v, sigma, normalised) in zip(pairs, chip.kernels.top_singulars(there, 1e-4), strict=True):
        exact = torch.linalg.matrix_norm(weight.double(), 2)
        torch.testing.assert_close(sigma.cpu().double(), exact.reshape(1), rtol=1e-5, atol=0)
        torch.testing.assert_close(normalised.cpu().double(), weight.double() / exact, rtol=1e-5, atol=1e-7)
        assert float(u.cpu() @ weight @ v.cpu()) == pytest.approx(float(exact), rel=1e-5)


def normed_net():
    """A net of the field's own kind: recognised, with torch's spectral norm on every layer."""
    layers = [torch.nn.Linear(16, 50), torch.nn.Linear(50, 50), torch.nn.Linear(50, 1)]
    first, second, last = (torch.nn.utils.parametrizations.spectral_norm(layer) for layer in layers)
    return torch.nn.Sequential(first, torch.nn.LeakyReLU(0.2), second, torch.nn.LeakyReLU(0.2), last)


ENERGIES = {
    "plain": lambda: jf.EnergyMLP(16, 50, 2),
    "spectral norm": lambda: jf.EnergyMLP(16, 50, 2, spectral_norm=True),
    "recognised, spectral norm": normed_net,
}


@pytest.mark.parametrize("kind", ENERGIES)
def test_replays_of_a_graph_draw_fresh_noise(chip, device_only, kind):
    torch.manual_seed(0)
    energy = ENERGIES[kind]().cuda()
    sampler = jf.FastLangevin(energy, n_steps=5, backend="cuda")
    z, key = torch.zeros(100, 16, device="cuda"), torch.tensor([9], dtype=torch.int64, device="cuda")
    expected = [sampler.sample(z, noise_key=(9 + i * 0x9E3779B97F4A7C15) % 2**64) for i in range(2)]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        sampler.sample(z, noise_key=key)
        chip.kernels.advance_noise_key(key.clone())  # a kernel's first launch loads it
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        end = sampler.sample(z, noise_key=key)
        chip.kernels.advance_noise_key(key)
    for want in expected:
        graph.replay()
        # where the power iterations start differs between the calls, so the last bits of the weights do
        torch.testing.assert_close(end, want, rtol=0, atol=0 if kind == "plain" else 1e-5)


def test_a_captured_call_without_a_key_draws_one_at_every_replay(chip, device_only):
    """As a user writes it: torch's generator of the device is in charge, and its seed gives the replays again."""
    sampler = jf.FastLangevin(jf.EnergyMLP(16, 50, 2).cuda(), n_steps=5)
    z, side = torch.zeros(100, 16, device="cuda"), torch.cuda.Stream()
    with torch.cuda.stream(side):
        sampler(z)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        end = sampler(z)
    runs = []
    for _ in range(2):
        torch.cuda.manual_seed(3)
        for _ in range(2):
            graph.replay()
            runs.append(end.clone())
    assert not torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
    assert torch.equal(runs[1], runs[3])


@pytest.mark.parametrize("spectral_norm", [False, True])
@pytest.mark.parametrize("chains", [9, 100, 5000])
def test_training_gradients(device_only, chains, spectral_norm):
    """Forward and backward of EnergyMLP on the device, against float64."""
    # through sigma = u W v a gradient inherits the error of u and v: their residual of 1e-4 over the relative gap
    # between the two largest singular values, which differs from seed to seed
    allowed = 5e-3 if spectral_norm else 1e-4
    torch.manual_seed(0)
    f = jf.EnergyMLP((2, 2, 2, 10), 50, 4, spectral_norm=spectral_norm).cuda()
    z = normal(chains, 16).cuda()
    value = f(z)
    assert "_Energy" in type(value.grad_fn).__name__
    got = torch.autograd.grad(value.mean(), list(f.parameters()))
    double = copy.deepcopy(f).double()
    exact = torch.autograd.grad(double(z.double()).mean(), list(double.parameters()))
    for ours, oracle in zip(got, exact, strict=True):
        assert (ours.double() - oracle).norm() <= allowed * oracle.norm() + 1e-6


def posterior(likelihood, **options):
    sampler = jf.FastLangevin(jf.EnergyMLP(16, 50, 2).cuda().requires_grad_(False), n_steps=5, step_size=0.1)
    return sampler.sample(torch.zeros(100, 16, device="cuda"), noise_key=4, log_likelihood=likelihood, **options)


def test_captured_posterior_chains(chip, device_only):
    """Replayed or step by step, one after the other and on two streams: the same chain."""
    torch.manual_seed(1)
    decoder = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 30)).cuda()

    def likelihood(z):
        return -decoder(z).square().sum()

    torch.manual_seed(2)
    expected = posterior(likelihood, capture=False)
    for _ in range(3):
        torch.manual_seed(2)
        torch.testing.assert_close(posterior(likelihood), expected, rtol=0, atol=1e-5)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.manual_seed(2)
        other = posterior(likelihood)
    side.synchronize()
    torch.testing.assert_close(other, expected, rtol=0, atol=1e-5)


def test_a_step_that_no_graph_can_capture(chip, device_only):
    """It says so, and the process goes on: streams, random numbers, other captures."""

    def looks(z):
        return -z.square().sum() if float(z.sum()) < 1e9 else z.sum()

    drawing = torch.cuda.CUDAGraph()
    with torch.cuda.graph(drawing):
        drawn = torch.randn(1000, device="cuda")
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="pass capture=False"):
        posterior(looks)
    assert torch.cuda.current_stream() == stream
    assert torch.isfinite(torch.randn(1000, device="cuda")).all()
    # a graph from before draws on, from the generator that the seed governs
    torch.manual_seed(1)
    drawing.replay()
    first = drawn.clone()
    torch.manual_seed(1)
    drawing.replay()
    assert torch.equal(drawn, first)
    torch.cuda.empty_cache()
    assert torch.isfinite(posterior(looks, capture=False)).all()
    assert torch.isfinite(posterior(lambda z: -z.square().sum())).all()


def test_follows_the_current_stream(chip, device_only):
    """Work before it on the same stream is seen, although nothing is synchronised."""
    z, grad = torch.zeros(1 << 20, 4, device="cuda"), torch.zeros(1 << 20, 4, device="cuda")
    update = Update(torch.tensor([[1.0, 0.0, 0.0]], device="cuda"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        grad.fill_(2.0)
        out = chip.kernels.langevin_step(z, grad, update)
    stream.synchronize()
    assert bool((out == 2).all())


@pytest.mark.parametrize("kind", ENERGIES)
def test_nothing_synchronises(chip, device_only, kind):
    energy = ENERGIES[kind]().cuda()
    sampler = jf.FastLangevin(energy, n_steps=5, backend="cuda")
    z = torch.zeros(100, 16, device="cuda")
    sampler(z)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler(z)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_key_on_the_device_is_read_there(device_only):
    """Also where the device is called "cuda", without a number: nobody waits for the key."""
    key = torch.tensor([5], dtype=torch.int64, device="cuda")
    expected = jf.langevin_noise(5, 1, 3, 8, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = jf.langevin_noise(key, 1, 3, 8, device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, expected)


def test_constants_made_on_a_busy_stream_serve_another(device_only):
    """A sampler keeps its coefficients and prior from the first call, whichever stream that is on."""
    energy, z = jf.EnergyMLP(16, 50, 2).cuda(), torch.zeros(100, 16, device="cuda")
    first, second = (jf.FastLangevin(energy, n_steps=5, prior=jf.GaussianPrior(0.5, 2.0)) for _ in range(2))
    expected = first(z, noise_key=1)
    second._constants.clear()  # samplers of the same numbers share them
    torch.cuda.synchronize()
    busy, other = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(50_000_000)
        second(z, noise_key=1)
    with torch.cuda.stream(other):
        got = second(z, noise_key=1)
    torch.cuda.synchronize()
    assert torch.equal(got, expected)


def test_bad_input(device_only):
    with pytest.raises(ValueError, match="it runs on CUDA tensors, got cpu"):
        jf.langevin_noise(1, 1, 2, 3, backend="cuda")
    reason = backends.reason_against("cuda", "langevin_step", device=torch.device("cuda"), dtype=torch.float64)
    assert "float64 runs on backend 'eager'" in reason
    text = jf.FastLangevin(jf.EnergyMLP(16, 50, 2).cuda()).explain(torch.zeros(3, 16, device="cuda"))
    assert "backend   cuda (resident" in text
