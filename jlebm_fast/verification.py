"""A certificate for the user's own energy: every available backend against the float64 oracle and exact laws."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import backends, dynamics, ops
from .backends import eager
from .checks import describe
from .energy_source import conditions, is_plain_energy_mlp
from .functional import energy_and_grad
from .latents import LatentLayout, flatten_latents
from .modes import chain_mode, device_of
from .problem import MLP, MLPSpec, Record, Update
from .recognition.probing import Conditions
from .recognition.recognised import converged_buffers, effective_weights
from .sampler import FastLangevin, Latents
from .stepwise import AnyEnergy

# fixed before looking: parity as in the tests, laws at one false alarm in ten thousand per number
_PARITY_FACTOR, _PARITY_FLOOR = 2.0, 1e-6
_GRADIENT_TOLERANCE = 1e-4
_NORM_TOLERANCE = 1e-3
_LAW_LEVEL = 1e-4
_LAW_COORDINATES = 1 << 16
_CHAINS = 64
_FAR = (4.0, 10.0, 30.0, 100.0, 300.0, 1000.0)  # standard deviations
_NOISE_KEY = 0x6A6C65626D5F6A66


class Check(NamedTuple):
    """One line of the certificate: what was checked, on which backend, the outcome, and the numbers behind it."""

    name: str
    backend: str
    passed: bool
    detail: str


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What `verify` found.

    explanation   `FastLangevin.explain` of the checked call
    checks        one Check per line
    missing       (backend, reason) for every backend that was not tried
    """

    explanation: str
    checks: tuple[Check, ...]
    missing: tuple[tuple[str, str], ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        lines = [self.explanation]
        for check in self.checks:
            lines.append(f"{'ok  ' if check.passed else 'FAIL'} {check.backend:7} {check.name}: {check.detail}")
        lines += [f"not tried: {name}: {reason}" for name, reason in self.missing]
        return "\n".join([*lines, "certificate: passed" if self.passed else "certificate: FAILED"])


def verify(
    energy: nn.Module | Callable[..., Tensor] | FastLangevin,
    z: Latents | None = None,
    *,
    context: Tensor | None = None,
    y: Tensor | int | None = None,
    show: bool = True,
) -> Certificate:
    """Check an energy and every available backend: value and gradient, whole chains, noise bits and laws.

        gradient   value and ∇ against torch.autograd through the energy's own forward
        far        the same of an energy that is run as an MLP, up to a thousand standard deviations from 0
        parity     a step, and a fused chain, with the same noise: error <= 2 · error of plain torch + 1e-6, both
                   against float64
        norm       each spectral norm that the chains divide by against an exact singular value decomposition
        noise      eps equal to the oracle in every bit
        law        f = 0: z_k is Gaussian, v ← (1 − s²/2)² v + s²; mean, variance and Kolmogorov-Smirnov

    Args:
        energy: EnergyMLP, module or callable, or a FastLangevin, whose settings then hold for the chains
        z: latents to start from, in the structure that the energy takes; an EnergyMLP needs none
        context, y: condition and chosen logit, for an energy that needs them
        show: print the certificate

    Returns:
        Certificate(explanation, checks, missing), with .passed

    Raises:
        ValueError: z is missing for an energy that does not tell its latents' widths.

    Example:
        >>> from jlebm_fast import EnergyMLP
        >>> certificate = verify(EnergyMLP((2, 10), 50, 2), show=False)
        >>> certificate.passed
        True

    Source: layout of the checks after Geweke, "Getting it right", JASA 2004, for samplers with known laws.
    """
    sampler = energy if isinstance(energy, FastLangevin) else FastLangevin(energy)
    net = sampler._source.net
    if z is None:
        if not is_plain_energy_mlp(net):
            raise ValueError("z must be given: latents in the structure that the energy takes, [chains, dim] or a list")
        weight = net.layers[0].weight
        per_chain = [len(v) for v in (sampler.step_size, sampler.noise_scale) if isinstance(v, Tensor)]
        prior = () if sampler.prior is None else (sampler.prior.mean, sampler.prior.std)
        per_chain += [len(v) for v in prior if isinstance(v, Tensor) and v.dim() == 2]
        generator = torch.Generator("cpu").manual_seed(0)
        z = torch.randn(per_chain[0] if per_chain else _CHAINS, net.spec.dim, generator=generator, device="cpu")
        z = z.to(weight.device, weight.dtype)
    with chain_mode(device_of(z)):
        flat, layout = flatten_latents(z)
        if not flat.shape[0]:
            raise ValueError(f"z must have at least one chain to verify anything on, got {describe(flat)}")
        tried, missing = [], []
        for name in backends.NAMES:
            reason = backends.reason_against(name, "langevin_step", device=flat.device, dtype=flat.dtype)
            if reason is None:
                tried.append(name)
            else:
                missing.append((name, reason))
        checks = []
        for name in tried:
            checks += [
                _gradient_check(sampler, z, flat, layout, name, context, y),
                *_far_check(sampler, flat, layout, name, context, y),
                *_parity_checks(sampler, flat, layout, name, context, y),
                _noise_check(flat, name),
                *_law_checks(sampler, flat, name),
            ]
        checks += _norm_checks(sampler, layout, conditions(flat, context, y), tried[0])
        certificate = Certificate(sampler.explain(z, context=context, y=y), tuple(checks), tuple(missing))
    if show:
        print(certificate)
    return certificate


def _gradient_check(
    sampler: FastLangevin,
    z: Latents,
    flat: Tensor,
    layout: LatentLayout,
    name: str,
    context: Tensor | None,
    y: Tensor | int | None,
) -> Check:
    value, grad = energy_and_grad(sampler.energy, z, context=context, y=y, backend=name)
    expected_value, expected_grad = _own_energy(sampler, flat, layout, context, y)(flat.clone())
    error = max(_error(value, expected_value), _error(flatten_latents(grad)[0], expected_grad))
    return Check(
        "gradient", name, error <= _GRADIENT_TOLERANCE, f"{error:.1e} from autograd (<= {_GRADIENT_TOLERANCE:.0e})"
    )


def _own_energy(
    sampler: FastLangevin, flat: Tensor, layout: LatentLayout, context: Tensor | None, y: Tensor | int | None
) -> AnyEnergy:
    """The energy's own forward, for autograd. A chain divides by the converged spectral norm (spectral.py), so that is
    what it is compared with."""
    converged: dict[str, Tensor] = {}
    if not is_plain_energy_mlp(sampler._source.net):
        converged = converged_buffers(sampler._source.norms(layout, conditions(flat, context, y)))
    return AnyEnergy(sampler._source.callable(converged), layout, context, y, 1.0)


def _far_check(
    sampler: FastLangevin,
    flat: Tensor,
    layout: LatentLayout,
    name: str,
    context: Tensor | None,
    y: Tensor | int | None,
) -> list[Check]:
    """What is run for the energy where a chain starts has to be the energy wherever a chain may come to."""
    mlp, quadratic = sampler._source.mlp(flat, layout, context, y, 1.0, sampler.n_steps)
    if mlp is None:
        return []
    own = _own_energy(sampler, flat, layout, context, y)
    generator, dim = torch.Generator("cpu").manual_seed(1), flat.shape[1]
    towards = torch.randn(flat.shape, generator=generator, device="cpu")
    towards[1::2] *= torch.nn.functional.one_hot(torch.arange(len(towards[1::2])) % dim, dim)  # one coordinate alone
    worst = 0.0
    for size in _FAR:
        for z in (size * towards, -size * towards):
            z = z.to(flat.device, flat.dtype)
            value, grad = ops.mlp_energy_grad(z, mlp, backend=name)
            if quadratic is not None:
                value, grad = value + quadratic.value(z), grad + quadratic.gradient(z)
            expected_value, expected_grad = own(z)
            # where its own is infinite, as an activation that is written out may be, the other may be right
            finite = expected_value.isfinite() & expected_grad.isfinite().all(1)
            error = max(_error(value[finite], expected_value[finite]), _error(grad[finite], expected_grad[finite]))
            worst = error if not error <= worst else worst  # and stays NaN
    return [
        Check(
            "far", name, worst <= _GRADIENT_TOLERANCE, f"{worst:.1e} from autograd, |z_i| to {_FAR[-1]:.0f} "
            f"(<= {_GRADIENT_TOLERANCE:.0e})",
        )
    ]  # fmt: skip


def _norm_checks(sampler: FastLangevin, layout: LatentLayout, given: Conditions, name: str) -> list[Check]:
    """σ_max of each weight that a spectral norm has divided, which is to be 1."""
    net = sampler._source.net
    with torch.no_grad():
        if is_plain_energy_mlp(net):
            weights = [layer.effective_weight() for layer in net.layers if layer.spectral_norm]
        else:
            weights = effective_weights(sampler._source.norms(layout, given))
        if not weights:
            return []
        error = max(float((torch.linalg.matrix_norm(w.flatten(1).double(), 2) - 1).abs()) for w in weights)
    # written so that NaN fails
    detail = f"{len(weights)} norms, {error:.1e} from exact (<= {_NORM_TOLERANCE:.0e})"
    return [Check("norm", name, error <= _NORM_TOLERANCE, detail)]


def _error(value: Tensor, expected: Tensor) -> float:
    """Difference per chain, relative to the largest entry where that exceeds 1: its 95 % quantile over chains.

    Not the largest: where an activation's kink lies within float32's rounding, any implementation may take either side.
    """
    if not expected.numel():
        return 0.0
    per_chain = (value - expected).abs().double().view(expected.shape[0], -1).amax(dim=1)
    return float(torch.quantile(per_chain, 0.95) / expected.abs().max().clamp(min=1.0))


def _double(record: MLP | Update) -> MLP | Update:
    """The record with every floating point tensor in float64."""

    def convert(value: object) -> object:
        if isinstance(value, tuple) and value and not isinstance(value, MLPSpec):
            return tuple(convert(entry) for entry in value)
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return type(record)(*(convert(value) for value in record))


def _parity_checks(
    sampler: FastLangevin,
    flat: Tensor,
    layout: LatentLayout,
    name: str,
    context: Tensor | None,
    y: Tensor | int | None,
) -> list[Check]:
    if name == "eager":
        return []
    update = sampler._update(flat, layout, None, None, None, _NOISE_KEY, 0, 0)
    checks = []
    if sampler.n_steps:
        first = update._replace(step_coefficients=update.step_coefficients[:1])
        grad = flat.flip(0).contiguous()
        exact = eager.langevin_step(flat.double(), grad.double(), _double(first))
        plain, fused = eager.langevin_step(flat, grad, first), ops.langevin_step(flat, grad, first, backend=name)
        checks.append(_parity("langevin_step", name, fused, plain, exact))
    sign = 1.0 if sampler.maximize else -1.0
    mlp, quadratic = sampler._source.mlp(flat, layout, context, y, sign, sampler.n_steps)
    if mlp is None:
        return checks
    if quadratic is not None:
        update = quadratic.joined(update)
    reason = backends.reason_against(name, "mlp_langevin_chain", device=flat.device, dtype=flat.dtype, spec=mlp.spec)
    if reason is not None:
        return [*checks, Check("parity", name, True, f"chains of this energy do not run here: {reason}")]
    n_steps = sampler.n_steps
    exact = eager.mlp_langevin_chain(flat.double(), _double(mlp), _double(update), n_steps, Record()).z
    plain = eager.mlp_langevin_chain(flat, mlp, update, n_steps, Record()).z
    fused = ops.mlp_langevin_chain(flat, mlp, update, n_steps, backend=name).z
    return [*checks, _parity(f"mlp_langevin_chain, {n_steps} steps", name, fused, plain, exact)]


def _parity(what: str, name: str, fused: Tensor, plain: Tensor, exact: Tensor) -> Check:
    bound = _PARITY_FACTOR * _error(plain.double(), exact) + _PARITY_FLOOR
    error = _error(fused.double(), exact)
    return Check("parity", name, error <= bound, f"{what}: {error:.1e} from float64 (<= {bound:.1e})")


def _noise_check(flat: Tensor, name: str) -> Check:
    shape = (3, min(flat.shape[0], 64) + 1, flat.shape[1])
    options = {"first_step": 7, "first_chain": 5, "device": flat.device, "dtype": flat.dtype}
    equal = torch.equal(
        ops.langevin_noise(_NOISE_KEY, *shape, backend=name, **options),
        eager.langevin_noise(_NOISE_KEY, *shape, **options),
    )
    return Check("noise", name, equal, "equal to the oracle in every bit" if equal else "bits differ from the oracle")


def _law_checks(sampler: FastLangevin, flat: Tensor, name: str) -> list[Check]:
    """Chains with f = 0 and the sampler's steps, from 0: mean 0 and a variance known exactly."""
    if any(isinstance(schedule, Tensor) for schedule in (sampler.step_size, sampler.noise_scale)):
        return [Check("law", name, True, "not applied: step sizes differ per chain")]
    dim = flat.shape[1]
    z = flat.new_zeros(_LAW_COORDINATES // dim + 1, dim)
    table = dynamics.step_rows(sampler.step_size, sampler.noise_scale, sampler.n_steps)
    rows, coefficients = table.tolist(), table.to(z.device, z.dtype)
    update = Update(coefficients, prior_precision=z.new_ones(dim), noise_key=_NOISE_KEY)
    zeros = (z.new_zeros(1, dim), z.new_zeros(1, 1))
    mlp = MLP(MLPSpec((dim, 1, 1), ("identity",), (0.0,)), zeros, (None, None))
    if backends.reason_against(name, "mlp_langevin_chain", device=z.device, dtype=z.dtype, spec=mlp.spec) is not None:
        return []
    sample = ops.mlp_langevin_chain(z, mlp, update, sampler.n_steps, backend=name).z.double()
    variance = 0.0
    for _, c_prior, c_noise in rows:
        variance = (1 - c_prior) ** 2 * variance + c_noise**2
    if variance == 0.0:
        return [
            Check("law", name, bool((sample == 0).all()), "without noise the chain stays where f and prior leave it")
        ]
    scaled = sample / math.sqrt(variance)
    n = scaled.numel()
    mean_p = _two_sided(float(scaled.mean()) * math.sqrt(n))
    variance_p = _two_sided((float(scaled.square().mean()) - 1) * math.sqrt(n / 2))
    ks_p = _kolmogorov_p(scaled.flatten())
    p = min(mean_p, variance_p, ks_p)
    return [
        Check(
            "law",
            name,
            p >= _LAW_LEVEL,
            f"f = 0, {n} coordinates: p = {mean_p:.2g} (mean), {variance_p:.2g} (variance), {ks_p:.2g} "
            f"(Kolmogorov-Smirnov), level {_LAW_LEVEL:.0e}",
        )
    ]


def _two_sided(score: float) -> float:
    """P(|N(0, 1)| >= |score|)."""
    return math.erfc(abs(score) / math.sqrt(2))


def _kolmogorov_p(sample: Tensor) -> float:
    """Asymptotic p-value of the Kolmogorov-Smirnov distance between a sample and N(0, 1)."""
    ordered = sample.sort().values
    n = ordered.numel()
    cdf = 0.5 * torch.erfc(-ordered / math.sqrt(2))
    steps = torch.arange(n + 1, device=ordered.device, dtype=ordered.dtype) / n
    distance = float(torch.maximum((steps[1:] - cdf).abs().max(), (cdf - steps[:-1]).abs().max()))
    x = distance * (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n))
    if x < 0.2:
        return 1.0  # the series converges slowly there, and its sum is 1
    return min(1.0, max(0.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 101))))
