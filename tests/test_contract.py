"""One contract for all backends: the same signatures, the same sentence for the same mistake, whatever is installed."""

import inspect
import re

import pytest
import torch
from reference import moved, plain_update, random_mlp

import jlebm_fast as jf
from jlebm_fast import backends, ops
from jlebm_fast.backends import eager

DIMS = (2, 2, 2, 10)
MODULES = [name for name in backends.NAMES if backends.load(name) is not None]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("op", [*backends.OPS, "unavailable_reason", "unsupported_reason", "regime", "build"])
def test_signatures_are_those_of_the_oracle(name, op):
    def parameters(module):
        return {p.name: p for p in inspect.signature(getattr(module, op)).parameters.values()}

    ours, oracles = parameters(backends.load(name)), parameters(eager)
    if any(p.kind is p.VAR_POSITIONAL for p in ours.values()):
        return  # hands its arguments on as they come
    assert list(ours)[: len(oracles)] == list(oracles)
    for parameter, oracle in zip(ours.values(), oracles.values(), strict=False):
        assert parameter.kind == oracle.kind
        assert parameter.default == oracle.default or parameter.name == "device"
    # whatever a backend adds must have a default
    assert all(p.default is not p.empty for p in list(ours.values())[len(oracles) :])


def elsewhere(*shape, dtype=torch.float32):
    """A tensor on a device that is not the CPU, on any machine."""
    return torch.empty(*shape, dtype=dtype, device="meta")


class GeneratorElsewhere(torch.Generator):
    """Stands in for one of another device on machines that have no other."""

    device = torch.device("meta")


def z16(chains=3):
    return torch.zeros(chains, 16)


def sampler(name, **options):
    torch.manual_seed(1)
    return jf.FastLangevin(jf.EnergyMLP(DIMS, 8, 2), n_steps=6, backend=name, **options)


def conditional(name):
    f = jf.EnergyMLP(16, 8, 2, context_dim=2, out_features=3, head="logsumexp")
    return jf.FastLangevin(f, n_steps=6, backend=name)


# what is called with a backend's name, and the sentence it must raise
MISTAKES = {
    "z elsewhere": (
        lambda b: sampler(b)(elsewhere(3, 16)),
        "z must be [chains, 16] float32 on cpu, got [3, 16] float32 on meta",
    ),
    "one layer elsewhere": (
        lambda b: sampler(b)([torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 2), elsewhere(3, 10)]),
        "z[3] must be [3, dim] or [3, dim, 1, 1] float32 on cpu like z[0], got [3, 10] float32 on meta",
    ),
    "z of integers": (
        lambda b: sampler(b)(torch.zeros(3, 16, dtype=torch.int64)),
        "z must be [chains, dim] or [chains, dim, 1, 1], float32 or float64, or a list of layers, "
        "got [3, 16] int64 on cpu",
    ),
    "z in half precision": (
        lambda b: sampler(b)(z16().bfloat16()),
        "z must be [chains, dim] or [chains, dim, 1, 1], float32 or float64, or a list of layers, "
        "got [3, 16] bfloat16 on cpu",
    ),
    "z in double precision": (
        lambda b: sampler(b)(z16().double()),
        "z must be [chains, 16] float32 on cpu, got [3, 16] float64 on cpu",
    ),
    "z of another width": (
        lambda b: sampler(b)(torch.zeros(100, 12)),
        "z must be [chains, 16] float32 on cpu, got [100, 12] float32 on cpu",
    ),
    "generator elsewhere": (
        lambda b: sampler(b)(z16(), generator=GeneratorElsewhere()),
        "generator must be a torch.Generator on cpu, got one on meta",
    ),
    "a seed for a generator": (
        lambda b: sampler(b)(z16(), generator=7),
        "generator must be a torch.Generator or None, got int",
    ),
    "a number for a likelihood": (
        lambda b: sampler(b)(z16(), log_likelihood=3),
        "log_likelihood must be a callable or None, got int",
    ),
    "noise of another shape": (
        lambda b: sampler(b)(z16(), noise=torch.zeros(5, 3, 16)),
        "noise must be [6, 3, 16] float32 on cpu, got [5, 3, 16] float32 on cpu",
    ),
    "noise elsewhere": (
        lambda b: sampler(b)(z16(), noise=elsewhere(6, 3, 16)),
        "noise must be [6, 3, 16] float32 on cpu, got [6, 3, 16] float32 on meta",
    ),
    "noise of another type": (
        lambda b: sampler(b)(z16(), noise=torch.zeros(6, 3, 16).double()),
        "noise must be [6, 3, 16] float32 on cpu, got [6, 3, 16] float64 on cpu",
    ),
    "mask elsewhere": (
        lambda b: sampler(b)(z16(), mask=elsewhere(16, dtype=torch.bool)),
        "mask must be a bool tensor [16] or [3, 16] on cpu, or one bool per layer (True freezes), "
        "got [16] bool on meta",
    ),
    "too few step sizes": (
        lambda b: sampler(b, step_size=[0.4] * 5),
        "step_size as a sequence must have n_steps = 6 entries, got 5 (one value per chain is given as a tensor)",
    ),
    "step sizes of other chains": (
        lambda b: sampler(b, step_size=torch.full((4,), 0.4))(z16()),
        "step_size as a tensor must be [3] (one per chain) on cpu, got [4] float32 on cpu",
    ),
    "step sizes elsewhere": (
        lambda b: sampler(b, noise_scale=torch.ones(3))(elsewhere(3, 16)),
        "noise_scale as a tensor must be [3] (one per chain) on meta, got [3] float32 on cpu",
    ),
    "prior of another shape": (
        lambda b: sampler(b, prior=jf.GaussianPrior(mean=torch.zeros(5)))(z16()),
        "mean of the prior must be a float or a tensor [16], [3, 1] or [3, 16] on cpu, got [5] float32 on cpu",
    ),
    "context elsewhere": (
        lambda b: conditional(b)(z16(), context=elsewhere(3, 2)),
        "context must be [3, 2] or [2] float32 on cpu, got [3, 2] float32 on meta",
    ),
    "y elsewhere": (
        lambda b: conditional(b)(z16(), context=torch.zeros(2), y=elsewhere(3, dtype=torch.int64)),
        "y must be an int or int64 [3] on cpu with entries in [0, 3), got [3] int64 on meta",
    ),
    "y out of range": (
        lambda b: conditional(b)(z16(), context=torch.zeros(2), y=torch.tensor([0, 7, 1])),
        "y must be an int or int64 [3] on cpu with entries in [0, 3), got [3] int64 on cpu from 0 to 7",
    ),
    "key as a float tensor": (
        lambda b: sampler(b)(z16(), noise_key=torch.zeros(1)),
        "noise_key as a tensor must be [1] int64, got [1] float32 on cpu",
    ),
    "gradient of another shape": (
        lambda b: jf.langevin_step(z16(), torch.zeros(3, 15), backend=b),
        "grad must have the layers of z, widths (16,), got (15,)",
    ),
    "gradient elsewhere": (
        lambda b: jf.langevin_step(z16(), elsewhere(3, 16), noise_key=1, backend=b),
        "grad must be [3, 16] float32 on cpu, got [3, 16] float32 on meta",
    ),
    "energy of a foreign z": (
        lambda b: jf.energy_and_grad(jf.EnergyMLP(16, 8, 1), torch.zeros(3, 4), backend=b),
        "z must be [chains, 16] float32 on cpu, got [3, 4] float32 on cpu",
    ),
    "noise without a size": (
        lambda b: jf.langevin_noise(1, -1, 3, 4, backend=b),
        "n_steps must be an integer >= 0, got -1",
    ),
    "noise in half precision": (
        lambda b: jf.langevin_noise(1, 1, 3, 4, dtype=torch.float16, backend=b),
        "dtype must be float32 or float64, got torch.float16",
    ),
}


@pytest.mark.parametrize("name", [*backends.NAMES, "auto"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_same_sentence_on_every_backend(mistake, name):
    call, sentence = MISTAKES[mistake]
    with pytest.raises(ValueError, match=re.escape(sentence)) as raised:
        call(name)
    assert str(raised.value) == sentence


WRONG_RECORDS = {
    "weight elsewhere": lambda z, m, u: (z, m._replace(weights=(elsewhere(12, 6), *m.weights[1:])), u),
    "bias of another shape": lambda z, m, u: (z, m._replace(biases=(torch.zeros(11), *m.biases[1:])), u),
    "context bias of other chains": lambda z, m, u: (z, m._replace(context_bias=torch.zeros(4, 12)), u),
    "coefficients elsewhere": lambda z, m, u: (z, m, u._replace(step_coefficients=elsewhere(4, 3))),
    "coefficients of other chains": lambda z, m, u: (z, m, u._replace(chain_coefficients=torch.ones(4, 3))),
    "extra gradient of another type": lambda z, m, u: (z, m, u._replace(extra_grad=z.double())),
    "precision elsewhere": lambda z, m, u: (z, m, u._replace(prior_precision=elsewhere(6))),
    "frozen elsewhere": lambda z, m, u: (z, m, u._replace(frozen=elsewhere(6, dtype=torch.bool))),
    "logit that is no index": lambda z, m, u: (
        z,
        random_mlp((6, 12, 3), "gelu", "logit", chains=5)._replace(logit=torch.zeros(5)),
        u,
    ),
}


@pytest.mark.parametrize("mistake", WRONG_RECORDS)
def test_wrong_records_give_one_sentence(mistake):
    z, mlp, update = WRONG_RECORDS[mistake](torch.zeros(5, 6), random_mlp((6, 12, 1)), plain_update(4, 6))
    sentences = set()
    for name in backends.NAMES:
        with pytest.raises(ValueError, match=r"must be .* got ") as raised:
            ops.mlp_langevin_chain(z, mlp, update, 4, backend=name)
        sentences.add(str(raised.value))
    assert len(sentences) == 1, sentences


def test_strided_input_is_no_mistake(backend):
    """What is not contiguous gives the same bits as its contiguous copy, in every argument."""

    def strided(t):
        return t.t().contiguous().t() if t is not None and t.dim() == 2 else t

    z, mlp = (
        torch.randn(6, 9, generator=torch.Generator().manual_seed(1)),
        random_mlp((9, 12, 5, 1), chains=6, context=True),
    )
    update = plain_update(
        1,
        9,
        prior_mean=z.flip(0),
        prior_precision=z.abs() + 1,
        frozen=z > 1,
        chain_coefficients=z[:, :3].exp(),
        extra_grad=-z,
    )
    wild_mlp = mlp._replace(weights=tuple(map(strided, mlp.weights)), context_bias=strided(mlp.context_bias))
    wild = type(update)(*[strided(v) if isinstance(v, torch.Tensor) else v for v in update])
    results = [
        ops.mlp_langevin_chain(
            a.to(backend.device), moved(m, backend.device), moved(u, backend.device), 1, backend=backend.name
        ).z
        for a, m, u in ((z, mlp, update), (strided(z), wild_mlp, wild))
    ]
    assert not wild.prior_mean.is_contiguous()
    assert torch.equal(*results)
