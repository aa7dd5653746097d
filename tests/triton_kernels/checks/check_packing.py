"""How the weights of a streamed net are packed, and that nothing hangs on torch's default dtype."""

import pytest
import torch
from chains import drawn, run
from reference import plain_update, random_mlp

from jlebm_fast.backends.triton_kernels import launch, tiles
from jlebm_fast.problem import Record

CHIP = tiles.Chip("interpreter", 0, 232448, 132)


def packed(mlp, precision, block_out=32, block_in=16):
    energy, grad = torch.empty(3), torch.empty(3, mlp.spec.dim)
    chosen = tiles.Tiles("streamed", 16, 4, block_out, block_in, 3)
    call = launch.energy_grad_call(torch.zeros(3, mlp.spec.dim), mlp, energy, grad, chosen, precision, CHIP)
    (before,) = call.before  # one launch for all layers
    before.run()
    return before.arguments[:2]


@pytest.mark.parametrize("n_logits", [1, 3])
def test_weights_stand_among_zeros(n_logits):
    mlp = random_mlp((70, 40, 33, n_logits), "gelu", "identity" if n_logits == 1 else "logsumexp")
    mlp = mlp._replace(biases=(mlp.biases[0], None, mlp.biases[2]))
    matrix, column = packed(mlp, "ieee")
    padded = (64, 64, 1 if n_logits == 1 else 32)
    assert matrix.shape == (sum(padded), 96)
    first = 0
    for weight, bias, rows in zip(mlp.weights, mlp.biases, padded, strict=True):
        expected, expected_bias = torch.zeros(rows, 96), torch.zeros(rows)
        expected[: weight.shape[0], : weight.shape[1]] = weight
        if bias is not None:
            expected_bias[: len(bias)] = bias
        assert torch.equal(matrix[first : first + rows], expected)
        assert torch.equal(column[first : first + rows], expected_bias)
        first += rows


def test_weights_come_as_operands():
    mlp = random_mlp((20, 30, 1))
    for precision, bits in (("tf32", 13), ("bf16 emulated", 16)):
        matrix, _ = packed(mlp, precision)
        weight = matrix[:30, :20].contiguous()
        assert (weight.view(torch.int32) & ((1 << bits) - 1)).eq(0).all()
        assert (weight - mlp.weights[0]).abs().max() <= mlp.weights[0].abs().max() * 2.0 ** (bits - 24)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(dtype):
    z, mlp, update = drawn(18, 7), random_mlp((7, 20, 17, 1), "gelu"), plain_update(2, 7)
    before = run(z, mlp, update, 2, Record(True, True), "streamed")
    try:
        torch.set_default_dtype(dtype)
        after = run(z, mlp, update, 2, Record(True, True), "streamed")
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(before.z, after.z)
    assert torch.equal(before.energy, after.energy)


def test_tables_are_kept_for_good():
    """A captured graph holds their addresses."""
    specs = [random_mlp((3, width, 1)).spec for width in range(1, 300)]
    there = [launch._tables(spec, 16, torch.device("cpu")) for spec in specs]
    again = [launch._tables(spec, 16, torch.device("cpu")) for spec in specs]
    assert all(a is b for a, b in zip(there, again, strict=True))
