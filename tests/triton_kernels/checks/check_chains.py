"""mlp_langevin_chain in both regimes: record, invariances, bad values."""

import pytest
import torch
from chains import EVERYTHING, REGIMES, check, drawn, run
from reference import plain_update, random_mlp, steps

from jlebm_fast.backends import eager
from jlebm_fast.backends import triton as backend
from jlebm_fast.backends.triton_kernels import tiles
from jlebm_fast.problem import Record


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("thin", [2, 3, 5])
def test_thinning(thin, regime):
    z, mlp, update = drawn(3, 4), random_mlp((4, 6, 1), "tanh"), plain_update(4, 4)
    for record in (Record(True, True, thin), Record(True, False, thin), Record(False, True, thin)):
        check(z, mlp, update, 4, record, regime)


@pytest.mark.parametrize("regime", REGIMES)
def test_no_steps_and_no_chains(regime):
    z, mlp = drawn(3, 4), random_mlp((4, 6, 1))
    still = run(z, mlp, plain_update(0, 4), 0, regime=regime)
    assert torch.equal(still.z, z)
    assert still.z.data_ptr() != z.data_ptr()
    assert still.energy.shape == (0, 3)
    assert still.first_bad_step.tolist() == [-1] * 3
    none = run(z[:0], mlp, plain_update(2, 4), 2, regime=regime)
    assert none.z.shape == (0, 4)
    assert none.trajectory.shape == (2, 0, 4)


@pytest.mark.parametrize("regime", REGIMES)
def test_split_in_chains_and_in_steps(regime):
    z, mlp, update = drawn(21, 4), random_mlp((4, 6, 5, 1), "silu"), plain_update(4, 4, first_step=7, first_chain=3)
    whole = run(z, mlp, update, 4, regime=regime)
    # the same rows at other places of other blocks
    parts = [
        run(z[a:b], mlp, update._replace(first_chain=3 + a), 4, regime=regime).z for a, b in ((0, 2), (2, 19), (19, 21))
    ]
    assert torch.allclose(torch.cat(parts), whole.z, rtol=0, atol=1e-6)
    half = run(z, mlp, update._replace(step_coefficients=steps(2)), 2, regime=regime).z
    rest = update._replace(step_coefficients=steps(2), first_step=9)
    assert torch.equal(run(half, mlp, rest, 2, regime=regime).z, whole.z)


@pytest.mark.parametrize("regime", REGIMES)
def test_bad_values_stay_in_their_chain_and_are_named(regime):
    z, mlp = drawn(20, 5), random_mlp((5, 12, 1), "gelu")
    noise = drawn(4, 20, 5, seed=2)
    noise[1, 3, 4], noise[2, 17, 0] = float("nan"), float("inf")
    z[9, 1] = float("nan")
    update = plain_update(4, 5, noise=noise)
    bad = run(z, mlp, update, 4, regime=regime)
    expected = [-1] * 20
    expected[3], expected[9], expected[17] = 1, 0, 2
    assert bad.first_bad_step.tolist() == expected
    assert torch.equal(bad.first_bad_step, eager.mlp_langevin_chain(z, mlp, update, 4, EVERYTHING).first_bad_step)
    sound = [i for i in range(20) if expected[i] < 0]
    clean = run(z.nan_to_num(0.0), mlp, update._replace(noise=noise.nan_to_num(0.0, 0.0, 0.0)), 4, regime=regime)
    assert torch.equal(bad.z[sound], clean.z[sound])


@pytest.mark.parametrize("regime", REGIMES)
def test_key_tensor_and_more_blocks_than_programs(regime, monkeypatch):
    few = tiles.Chip("interpreter", 0, 232448, 1)
    monkeypatch.setattr(backend, "_chip", lambda index: few)
    z, mlp, update = drawn(83, 4), random_mlp((4, 6, 1), "tanh"), plain_update(2, 4)
    with tiles.override(block_chains=16):
        check(z, mlp, update, 2, regime=regime)
        ours = run(z, mlp, update._replace(noise_key=torch.tensor([99])), 2, regime=regime)
    expected = eager.mlp_langevin_chain(z, mlp, update, 2, EVERYTHING)
    assert torch.allclose(ours.z, expected.z, rtol=0, atol=1e-5)


@pytest.mark.parametrize("regime", REGIMES)
def test_parameters_are_read_at_every_call(regime):
    z, mlp, update = drawn(3, 4), random_mlp((4, 6, 1), "tanh"), plain_update(2, 4)
    before = run(z, mlp, update, 2, regime=regime).z
    mlp.weights[0].mul_(1.5)
    assert not torch.equal(before, run(z, mlp, update, 2, regime=regime).z)
    check(z, mlp, update, 2, regime=regime)


@pytest.mark.parametrize("regime", REGIMES)
def test_input_is_left_alone(regime):
    z, mlp = drawn(3, 4), random_mlp((4, 6, 1), "tanh")
    before = z.clone()
    run(z, mlp, plain_update(2, 4), 2, regime=regime)
    assert torch.equal(z, before)
