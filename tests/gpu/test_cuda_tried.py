"""The CUDA regimes that are used only by who asks for them, on a device."""

from __future__ import annotations

import pytest
import torch
from mlp_host import coefficients, make_mlp, plain_chain, rms
from test_cuda import KEY, SHAPES, normal, plain_exact, to

from jlebm_fast import precision
from jlebm_fast.backends import cuda, cuda_tried
from jlebm_fast.problem import Record, Update


@pytest.mark.parametrize("shape", SHAPES)
def test_chain_by_warpgroups(chip, device_only, shape):
    """Many chains in bf16 on compute capability 9.0: against float64, and against the resident regime."""
    if not cuda.runs_here("warpgroup"):
        pytest.skip("needs compute capability 9.0 and a build for it")
    chains, n_steps = 20_003, 4
    mlp = make_mlp(SHAPES[shape], "gelu" if shape == "LEBM" else "leaky_relu", seed=3)
    z, noise = normal(chains, mlp.spec.dim, seed=4), normal(n_steps, chains, mlp.spec.dim, seed=5)
    update = Update(coefficients(n_steps), prior_precision=torch.ones(mlp.spec.dim), noise_key=KEY)
    given = update._replace(noise=noise, noise_key=0)

    def run(update, record=Record()):
        place = (z.to(chip.device), to(mlp, chip.device), to(update, chip.device), n_steps, record)
        return chip.kernels.mlp_langevin_chain(*place)

    with precision.using("bf16"):
        resident = run(update)
        with cuda_tried.trying("warpgroup"):
            assert cuda.regime("mlp_langevin_chain", mlp.spec, chains).startswith("warpgroup")
            got, with_given = run(update), run(given, Record(True, True))
    exact = plain_exact(z, mlp, given, n_steps)
    assert rms(with_given.z.cpu(), exact) <= 2 * rms(plain_chain(z, mlp, given, n_steps, "bf16"), exact) + 1e-6
    assert torch.equal(with_given.trajectory[-1], with_given.z)
    assert with_given.first_bad_step.eq(-1).all()
    # the same noise; the sums of a product may be rounded otherwise
    assert rms(got.z, resident.z) <= 0.1 * rms(with_given.z.cpu(), exact)


@pytest.mark.parametrize("name", precision.NAMES)
@pytest.mark.parametrize(
    ("widths", "chains"),
    [([100, 200, 200, 1], 100), ([100, 200, 200, 1], 1003), ([100, 1000, 1000, 1], 100), ([100, 1000, 1000, 1], 1003)],
)
def test_chain_by_clusters(chip, device_only, widths, chains, name):
    """The same bits as without clusters, in every record, again and again, and in a graph."""
    if not cuda.runs_here("cluster"):
        pytest.skip("needs compute capability 9.0 or 10 and a build for it")
    mlp, n_steps, record = make_mlp(widths, "gelu", seed=3), 60, Record(True, True, thin=20)
    z, mlp = normal(chains, mlp.spec.dim, seed=4).to(chip.device), to(mlp, chip.device)
    update = Update(coefficients(n_steps), prior_precision=torch.ones(mlp.spec.dim), noise_key=KEY)
    update = to(update, chip.device)

    def run():
        return chip.kernels.mlp_langevin_chain(z, mlp, update, n_steps, record)

    with precision.using(name):
        expected = run()
        with cuda_tried.trying("cluster"):
            if not cuda.regime("mlp_langevin_chain", mlp.spec, chains).startswith("cluster"):
                pytest.skip("another regime is the plan's choice")
            results = [run() for _ in range(5)]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = run()
            graph.replay()
    for got in (*results, captured):
        for field, a, b in zip(expected._fields, expected, got, strict=True):
            assert torch.equal(a, b), field
