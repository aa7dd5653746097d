"""MLP energies whose weights fit one program: loaded once, kept in registers and shared memory for all steps.

    a_l = W_l h_{l-1} + b_l, h_l = phi_l(a_l), f = out_scale * head(W_out h_L + b_out)
    delta_L = (W_out^T head') * phi_L'(a_L), delta_l = (W_{l+1}^T delta_{l+1}) * phi_l'(a_l), grad f = W_1^T delta_1

One program owns BLOCK_CHAINS chains for all steps. Features are the rows of every `tl.dot`, so that the program's warps
share a layer's features and none of them needs all weights; chains are its columns. Widths are padded with zeros to
powers of two: a padded feature is phi(0), finite, and meets only zero weights. Layers are unrolled when the kernel is
compiled, so it has at most a few of them (tiles.py); wider and deeper nets run in streamed.py. A tile of weights
[out, in] serves both directions, as it is and transposed. Nothing is written inside the loop but what is recorded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate, many_logits_head, one_logit_head
from .update import noise_of_step, step_coefficients, updated

# features that one sum of three-way tf32 runs over
MOST_INNER = tl.constexpr(32)


@triton.jit
def tf32(tile):
    """float32 rounded to 10 bits of mantissa, halves away from zero; the tensor core by itself would cut."""
    bits = tile.to(tl.int32, bitcast=True)
    # the carry of a NaN's full mantissa would leave the exponent
    return tl.where(tile == tile, ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True), tile)


@triton.jit
def operand(tile, PRECISION: tl.constexpr):
    """A tile as an operand of `product`."""
    if PRECISION == "tf32":
        tile = tf32(tile)
    elif PRECISION == "bf16":
        tile = tile.to(tl.bfloat16)
    elif PRECISION == "bf16 emulated":
        # the interpreter's tl.dot knows no bfloat16, and its conversion cuts: round the upper 16 bits to nearest even
        bits = tile.to(tl.int32, bitcast=True)
        tile = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return tile


@triton.jit
def short_sums(weights, right):
    """weights @ right by three-way tf32, each sum of the large parts in two: the tensor core cuts its sums off, by more
    the longer they are, while the addition here rounds. Zeros in place of every other eight features halve a sum.
    """
    big, right_big = tf32(weights), tf32(right)
    result = tl.dot(weights - big, right_big, input_precision="tf32", out_dtype=tl.float32)
    result = tl.dot(big, right - right_big, result, input_precision="tf32", out_dtype=tl.float32)
    first = (tl.arange(0, right.shape[0]) & 8)[:, None] == 0
    # with 0 in place of this 1 the compiler would fold the additions into the tensor core's
    for half in tl.static_range(2):
        part = tl.where(first if half == 0 else first == 0, right_big, 0.0)
        result += tl.dot(big, part, input_precision="tf32", max_num_imprecise_acc=1, out_dtype=tl.float32)
    return result


@triton.jit
def product(weights, right, PRECISION: tl.constexpr):
    """weights @ right in float32 [features, chains] at the precision asked for; `weights` is an operand already."""
    if PRECISION == "bf16" or PRECISION == "bf16 emulated":
        result = tl.dot(weights, operand(right, PRECISION), out_dtype=tl.float32)
    elif PRECISION == "tf32x3" and right.shape[0] > MOST_INNER:
        result = short_sums(weights, right)
    else:
        result = tl.dot(weights, operand(right, PRECISION), input_precision=PRECISION, out_dtype=tl.float32)
    return result


@triton.jit
def load_tile(pointer, OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A weight [OUT, IN] as a tile of float32 [ROWS, COLUMNS], padded with zeros."""
    out = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    return tl.load(pointer + (out * IN + column), mask=(out < OUT) & (column < IN), other=0.0)


@triton.jit
def load_weights(net, WIDTHS: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr):
    """All weights as tiles [out, in], those of a single logit as a row."""
    tiles = ()
    for layer in tl.static_range(len(WIDTHS) - 1):
        if layer == len(WIDTHS) - 2 and WIDTHS[-1] == 1:
            column = tl.arange(0, PADDED[-2])
            tile = tl.load(net.weights[layer] + column, mask=column < WIDTHS[-2], other=0.0)
            tiles = tiles + (tile,)
        else:
            tile = load_tile(
                net.weights[layer],
                tl.constexpr(WIDTHS[layer + 1]),
                tl.constexpr(WIDTHS[layer]),
                tl.constexpr(PADDED[layer + 1]),
                tl.constexpr(PADDED[layer]),
            )
            tiles = tiles + (operand(tile, PRECISION),)
    return tiles


@triton.jit
def bias_column(pointer, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    feature = tl.arange(0, PADDED)
    return tl.load(pointer + feature, mask=feature < WIDTH, other=0.0)[:, None]


@triton.jit
def energy_and_grad(
    z,
    tiles,
    net,
    out_scale,
    chain,
    is_chain,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    ACTIVATIONS: tl.constexpr,
    PARAMETERS: tl.constexpr,
    HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """f [chains] and grad f [PADDED[0], chains] at z [PADDED[0], chains]."""
    h = z
    slopes = ()
    for layer in tl.static_range(len(ACTIVATIONS)):
        a = product(tiles[layer], h, PRECISION)
        if net.biases[layer] is not None:
            a += bias_column(net.biases[layer], tl.constexpr(WIDTHS[layer + 1]), tl.constexpr(PADDED[layer + 1]))
        if layer == 0 and net.context is not None:
            feature = tl.arange(0, PADDED[1])[:, None]
            inside = is_chain[None, :] & (feature < WIDTHS[1])
            a += tl.load(net.context + (chain[None, :] * WIDTHS[1] + feature), mask=inside, other=0.0)
        h, slope = activate(a, tl.constexpr(ACTIVATIONS[layer]), PARAMETERS[layer])
        slopes = slopes + (slope,)

    if WIDTHS[-1] == 1:
        logit = tl.sum(h * tiles[len(ACTIVATIONS)][:, None], axis=0)
        if net.biases[len(ACTIVATIONS)] is not None:
            logit += tl.load(net.biases[len(ACTIVATIONS)])
        energy, slope = one_logit_head(logit, HEAD)
        delta = tiles[len(ACTIVATIONS)][:, None] * (slope * out_scale)[None, :]
    else:
        logits = product(tiles[len(ACTIVATIONS)], h, PRECISION)
        if net.biases[len(ACTIVATIONS)] is not None:
            logits += bias_column(net.biases[len(ACTIVATIONS)], tl.constexpr(WIDTHS[-1]), tl.constexpr(PADDED[-1]))
        if HEAD == "logit":
            chosen = tl.load(net.logit + chain, mask=is_chain, other=0)
        else:
            chosen = chain
        energy, slope = many_logits_head(logits, chosen, HEAD, WIDTHS[-1])
        delta = product(tl.trans(tiles[len(ACTIVATIONS)]), slope * out_scale, PRECISION)
    for i in tl.static_range(len(ACTIVATIONS)):
        delta *= slopes[len(ACTIVATIONS) - 1 - i]
        delta = product(tl.trans(tiles[len(ACTIVATIONS) - 1 - i]), delta, PRECISION)
    return energy * out_scale, delta


@triton.jit(do_not_specialize=["chains"])
def mlp_energy_grad(
    z_ptr,  # float32 [chains, dim]
    energy_ptr,  # float32 [chains]
    grad_ptr,  # float32 [chains, dim]
    net,
    out_scale,
    chains,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    ACTIVATIONS: tl.constexpr,
    PARAMETERS: tl.constexpr,
    HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_CHAINS: tl.constexpr,
):
    chain = tl.program_id(0).to(tl.int64) * BLOCK_CHAINS + tl.arange(0, BLOCK_CHAINS)
    d = tl.arange(0, PADDED[0])
    is_chain = chain < chains
    inside = (d < WIDTHS[0])[:, None] & is_chain[None, :]
    at = chain[None, :] * WIDTHS[0] + d[:, None]
    tiles = load_weights(net, WIDTHS, PADDED, PRECISION)
    z = tl.load(z_ptr + at, mask=inside, other=0.0)
    energy, grad = energy_and_grad(
        z, tiles, net, out_scale, chain, is_chain, WIDTHS, PADDED, ACTIVATIONS, PARAMETERS, HEAD, PRECISION
    )
    tl.store(energy_ptr + chain, energy, mask=is_chain)
    tl.store(grad_ptr + at, grad, mask=inside)


@triton.jit(do_not_specialize=["key_low", "key_high", "first_step", "first_chain", "chains", "n_steps", "thin"])
def mlp_langevin_chain(
    z_ptr,  # float32 [chains, dim]
    out_ptr,  # float32 [chains, dim]
    net,
    out_scale,
    update,
    strides,
    key_low,
    key_high,
    first_step,
    first_chain,
    record,
    chains,
    n_steps,
    thin,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    ACTIVATIONS: tl.constexpr,
    PARAMETERS: tl.constexpr,
    HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_CHAINS: tl.constexpr,
):
    chain = tl.program_id(0).to(tl.int64) * BLOCK_CHAINS + tl.arange(0, BLOCK_CHAINS)
    d = tl.arange(0, PADDED[0])
    is_chain = chain < chains
    inside = (d < WIDTHS[0])[:, None] & is_chain[None, :]
    at = chain[None, :] * WIDTHS[0] + d[:, None]
    n_chains = tl.full((), chains, tl.int64)
    words = (key_low, key_high, first_step, first_chain)
    tiles = load_weights(net, WIDTHS, PADDED, PRECISION)
    z = tl.load(z_ptr + at, mask=inside, other=0.0)
    first_bad = tl.full((BLOCK_CHAINS,), -1, tl.int64)
    for k in range(n_steps):
        step = tl.full((), k, tl.int64)
        energy, grad = energy_and_grad(
            z, tiles, net, out_scale, chain, is_chain, WIDTHS, PADDED, ACTIVATIONS, PARAMETERS, HEAD, PRECISION
        )
        eps = noise_of_step(
            update.noise, update.key, words, step, chain, 0, at, inside, n_chains, WIDTHS[0], PADDED[0] // 4
        )
        coefficients = step_coefficients(update.coefficients, update.chain_coefficients, step, chain, is_chain)
        moved = updated(z, grad, eps, coefficients, update, strides, chain, d, at, inside)
        if record.first_bad_step is not None:
            bad = tl.max(tl.where(tl.abs(moved) < float("inf"), 0, 1), axis=0)
            first_bad = tl.where((bad != 0) & (first_bad < 0), step, first_bad)
        if record.energy is not None or record.trajectory is not None:
            if (k + 1) % thin == 0:
                kept = tl.full((), (k + 1) // thin - 1, tl.int64)
                if record.energy is not None:
                    used = grad
                    if update.extra_grad is not None:
                        used += tl.load(update.extra_grad + at, mask=inside, other=0.0)
                    length = moved - z
                    kept_at = kept * n_chains + chain
                    tl.store(record.energy + kept_at, energy, mask=is_chain)
                    tl.store(record.grad_norm + kept_at, tl.sqrt(tl.sum(used * used, axis=0)), mask=is_chain)
                    tl.store(record.displacement + kept_at, tl.sqrt(tl.sum(length * length, axis=0)), mask=is_chain)
                if record.trajectory is not None:
                    tl.store(record.trajectory + (kept * n_chains * WIDTHS[0] + at), moved, mask=inside)
        z = moved
    tl.store(out_ptr + at, z, mask=inside)
    if record.first_bad_step is not None:
        tl.store(record.first_bad_step + chain, first_bad, mask=is_chain)
