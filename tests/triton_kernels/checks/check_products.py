"""Chains whose products are three-way tf32, tf32 and bf16, of nets as published and of awkward ones, in both regimes:
as good as plain torch with operands rounded alike."""

import pytest
import torch
from mlp_host import assert_as_good_as_torch, cast, coefficients, make_mlp, plain_chain, typical_rms

from jlebm_fast import precision
from jlebm_fast.backends import eager
from jlebm_fast.backends import triton as backend
from jlebm_fast.backends.triton_kernels import tiles
from jlebm_fast.problem import Record, Update

NETS = {
    "HS": ([16, 50, 50, 50, 50, 1], "leaky_relu", "identity"),
    "FID": ([50, 100, 100, 1], "leaky_relu", "identity"),
    "LEBM": ([100, 200, 200, 1], "gelu", "identity"),
    "awkward": ([33, 17, 130, 64, 5], ["silu", "gelu", "elu"], "logsumexp"),
}


@pytest.mark.parametrize("regime", ["resident", "streamed"])
@pytest.mark.parametrize("name", precision.NAMES)
@pytest.mark.parametrize("net", NETS)
def test_chain(net, name, regime):
    widths, activations, head = NETS[net]
    chains, n_steps = 21, 2
    mlp = make_mlp(widths, activations, head=head, chains=chains, context=net == "awkward", seed=31)
    z = torch.randn(chains, widths[0], generator=torch.Generator().manual_seed(32))
    update = Update(coefficients(n_steps), prior_precision=torch.ones(widths[0]), noise_key=33)
    with precision.using(name):
        products = tiles.dot_precision(name, backend._chip(0))
        if regime == "resident" and tiles.choose(mlp.spec, chains, products, backend._chip(0)).regime != regime:
            return  # its weights do not fit the chip
        with tiles.override(regime=regime):
            got = backend.mlp_langevin_chain(z, mlp, update, n_steps, Record(diagnostics=True))
    exact = eager.mlp_langevin_chain(
        z.double(), cast(mlp, torch.float64), cast(update, torch.float64), n_steps, Record(diagnostics=True)
    )
    assert_as_good_as_torch(got.z, plain_chain(z, mlp, update, n_steps, name), exact.z, "z")
    assert torch.equal(got.first_bad_step, exact.first_bad_step)
    for field in ("energy", "grad_norm", "displacement"):
        error = typical_rms(getattr(got, field).T, getattr(exact, field).T)
        assert error <= {"fp32": 3e-6, "tf32": 3e-3, "bf16": 3e-2}[name], (field, error)
