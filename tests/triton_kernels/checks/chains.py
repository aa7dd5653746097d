"""Chains of one backend in one regime, against the oracle."""

import torch
from reference import assert_accurate, moved

from jlebm_fast import precision
from jlebm_fast.backends import eager
from jlebm_fast.backends import triton as backend
from jlebm_fast.backends.triton_kernels import tiles
from jlebm_fast.problem import Record

REGIMES = ("resident", "streamed")
EVERYTHING = Record(diagnostics=True, trajectory=True)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(z, mlp, update, n_steps, record=EVERYTHING, regime="resident"):
    with tiles.override(regime=regime), precision.using("fp32"):
        return backend.mlp_langevin_chain(z, mlp, update, n_steps, record)


def check(z, mlp, update, n_steps, record=EVERYTHING, regime="resident"):
    ours = run(z, mlp, update, n_steps, record, regime)
    plain = eager.mlp_langevin_chain(z, mlp, update, n_steps, record)
    exact = eager.mlp_langevin_chain(
        z.double(), moved(mlp, dtype=torch.float64), moved(update, dtype=torch.float64), n_steps, record
    )
    for name, got, ordinary, true in zip(ours._fields, ours, plain, exact, strict=True):
        assert (got is None) == (true is None), name
        if name == "first_bad_step":
            assert got is None or torch.equal(got, true)
        elif got is not None:
            assert_accurate(got, ordinary, true, name)
