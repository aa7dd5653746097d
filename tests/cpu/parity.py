"""Random problems for the CPU kernels, the float64 oracle, and the accuracy rule.

error(kernel) <= 2 * error(plain torch in float32) + 1e-6, both against the oracle in float64
"""

from __future__ import annotations

import itertools

import torch

from jlebm_fast.backends import _native, cpu, eager
from jlebm_fast.problem import ACTIVATIONS, MLP, MLPSpec, Record, Update

PARAMETER = {"leaky_relu": 0.2, "elu": 0.9, "softplus": 1.3}


def random_mlp(
    widths, activation="leaky_relu", head="identity", seed=0, chains=None, context=False, out_scale=1.0, parameter=None
):
    g = torch.Generator().manual_seed(seed)
    parameter = PARAMETER.get(activation, 0.0) if parameter is None else parameter
    n_hidden = len(widths) - 2
    spec = MLPSpec(tuple(widths), (activation,) * n_hidden, (parameter,) * n_hidden, head, out_scale)
    weights = tuple(torch.randn(b, a, generator=g) * (1.5 / a) ** 0.5 for a, b in itertools.pairwise(widths))
    biases = tuple(torch.randn(b, generator=g) * 0.3 for b in widths[1:])
    context_bias = torch.randn(chains, widths[1], generator=g) if context else None
    logit = torch.randint(0, widths[-1], (chains,), generator=g) if head == "logit" else None
    return MLP(spec, weights, biases, context_bias, logit)


def double(record):
    """The same record in float64."""
    changed = {}
    for name, value in record._asdict().items():
        if isinstance(value, tuple):
            changed[name] = tuple(v.double() if isinstance(v, torch.Tensor) else v for v in value)
        elif isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            changed[name] = value.double()
    return record._replace(**changed)


def step_coefficients(n_steps, s=0.3, noise_scale=1.0, sign=1.0):
    return torch.tensor([[sign * s * s / 2, s * s / 2, s * noise_scale]]).repeat(n_steps, 1)


def assert_close(ours, plain, oracle, what):
    if oracle.numel() == 0:
        assert ours.shape == oracle.shape
        return
    error = (ours.double() - oracle).abs().max().item()
    allowed = 2 * (plain.double() - oracle).abs().max().item() + 1e-6 * max(1.0, oracle.abs().max().item())
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def check_activation(name, a, value_tolerance=4e-7, slope_tolerance=6e-7):
    """phi and phi' of the kernel against float64, wherever phi is a float32."""
    parameter = PARAMETER.get(name, 0.0)
    h, d = torch.empty_like(a), torch.empty_like(a)
    _native.load().cpu_mlp_activation(
        activation=ACTIVATIONS.index(name), param=parameter, n=a.numel(), a=a.data_ptr(), h=h.data_ptr(),
        d=d.data_ptr(), n_threads=2,
    )  # fmt: skip
    exact = a.double()
    value, slope = eager.activation(name, parameter, exact), eager.activation_slope(name, parameter, exact)
    for ours, expected, error, allowed in (
        (h, value, (h - value).abs(), value_tolerance * (1 + value.abs())),
        (d, slope, (d - slope).abs(), torch.full_like(slope, slope_tolerance)),
    ):
        wrong = ~(error <= allowed)
        assert not wrong.any(), (name, a[wrong][:3], ours[wrong][:3], expected[wrong][:3])


def far_out():
    """Every order of magnitude of float32, of both signs."""
    a = torch.cat([torch.logspace(-38, 38, 305, dtype=torch.float64).float(), torch.tensor([3.4e38])])
    return torch.cat([a, -a])


def check_energy_grad(z, mlp):
    for ours, plain, oracle, what in zip(
        cpu.mlp_energy_grad(z, mlp),
        eager.mlp_energy_grad(z, mlp),
        eager.mlp_energy_grad(z.double(), double(mlp)),
        ("energy", "gradient"),
        strict=True,
    ):
        assert_close(ours, plain, oracle, what)


def check_energy_layers(z, mlp):
    """f, grad f and the gradients of mean(f^2) in all parameters from h_l and delta_l, against autograd in float64.

    The mean, as in a loss, has the scale of one chain, for which the rule is made: a sum of as many terms of either
    sign adds up the roundings of all and cancels to what it likes, ours and plain torch's by turns.
    """
    energy, hidden, delta, grad = cpu.mlp_energy_layers(z, mlp, layers=True, grad=True)

    def through_autograd(z, mlp):
        parameters = [p.clone().requires_grad_() for p in (*mlp.weights, *mlp.biases)]
        n = len(mlp.weights)
        value = eager.mlp_forward(z, mlp._replace(weights=parameters[:n], biases=parameters[n:]))[0]
        return torch.autograd.grad(value.square().mean(), parameters, allow_unused=True)

    widths = mlp.spec.widths
    scaled = (delta * (2 * energy / len(z))).split_with_sizes(widths[1:])
    below = [z.t(), *hidden.split_with_sizes(widths[1:-1])]
    ours = [*(d @ h.t() for d, h in zip(scaled, below, strict=True)), *(d.sum(1) for d in scaled)]
    plain, oracle = through_autograd(z, mlp), through_autograd(z.double(), double(mlp))
    for i, (a, b, c) in enumerate(zip(ours, plain, oracle, strict=True)):
        assert_close(a, b, c, f"gradient of parameter {i}")
    plain, oracle = eager.mlp_energy_grad(z, mlp), eager.mlp_energy_grad(z.double(), double(mlp))
    assert_close(energy, plain[0], oracle[0], "energy of the layers")
    assert_close(grad, plain[1], oracle[1], "gradient of the layers")
    assert torch.equal(cpu.mlp_energy_layers(z, mlp, layers=False, grad=False)[0], energy)


def check_chain(z, mlp, update, n_steps, record=Record(diagnostics=True, trajectory=True)):
    before = z.clone()
    ours = cpu.mlp_langevin_chain(z, mlp, update, n_steps, record)
    assert torch.equal(z, before), "the input was changed"
    # noise from outside in the oracle: the float32 normals themselves, so that only the arithmetic differs
    noise = update.noise
    if noise is None:
        noise = eager.langevin_noise(
            update.noise_key, n_steps, *z.shape, first_step=update.first_step, first_chain=update.first_chain
        )
    given = update._replace(noise=noise)
    plain = eager.mlp_langevin_chain(z, mlp, given, n_steps, record)
    oracle = eager.mlp_langevin_chain(z.double(), double(mlp), double(given), n_steps, record)
    for name in ("z", "energy", "grad_norm", "displacement", "trajectory"):
        if getattr(oracle, name) is not None:
            assert_close(getattr(ours, name), getattr(plain, name), getattr(oracle, name), name)
    if oracle.first_bad_step is not None:
        assert torch.equal(ours.first_bad_step, oracle.first_bad_step)
    return ours


def main():
    """A short pass over every activation and head, for the target that JLEBM_CPU_TARGET names."""
    g = torch.Generator().manual_seed(1)
    z = torch.randn(37, 10, generator=g)
    for activation in ACTIVATIONS:
        check_activation(activation, far_out())
        check_energy_grad(z, random_mlp((10, 23, 17, 1), activation))
        check_energy_layers(z, random_mlp((10, 23, 17, 1), activation))
        check_chain(z, random_mlp((10, 23, 17, 1), activation), Update(step_coefficients(5), noise_key=3), 5)
    for head in ("tanh", "sigmoid", "softplus"):
        check_energy_grad(z, random_mlp((10, 8, 1), "silu", head, out_scale=-2.0))
        check_energy_layers(z, random_mlp((10, 8, 1), "silu", head, out_scale=-2.0))
    for head in ("logsumexp", "logit"):
        check_energy_grad(z, random_mlp((10, 9, 5), "gelu", head, chains=37, context=True))
        check_energy_layers(z, random_mlp((10, 9, 5), "gelu", head, chains=37, context=True))


if __name__ == "__main__":
    main()
