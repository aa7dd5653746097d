"""MLP energies too wide or too deep to be resident: weights read from L2 tile by tile, activations in a scratch buffer.

    a_l = W_l h_{l-1} + b_l, h_l = phi_l(a_l), f = out_scale * head(W_out h_L + b_out)
    delta_L = (W_out^T head') * phi_L'(a_L), delta_l = (W_{l+1}^T delta_{l+1}) * phi_l'(a_l), grad f = W_1^T delta_1

One program owns BLOCK_CHAINS chains for all steps, block after block of chains if there are more blocks than programs.
Layers are a loop at run time, so one compiled kernel serves every depth, and width is a loop over tiles of BLOCK_OUT
outputs and BLOCK_IN inputs. The weights come packed (packing.py): row r of layer l in row first_row(l) + r of a
[rows, STRIDE] buffer, widths padded with zeros to whole tiles, so that no product needs a mask. The weights of a single
logit are no matrix: they come as they are, in float32, and are summed up and spread out without a product.

    layers   int64 [L + 1, 6]: padded inputs, padded outputs, first row, index of the activation in KINDS, inputs,
             outputs
    scratch  float32 [programs, 3 + L, BLOCK_CHAINS, STRIDE]: z, two buffers for h and delta, phi' of each layer

A stage ends with a barrier where the next one reads what other threads of the program wrote.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate, many_logits_head, one_logit_head
from .resident import product
from .update import noise_of_step, step_coefficients, updated


@triton.jit
def product_tile(
    weights,  # first element of the layer in the packed buffer
    source,  # [BLOCK_CHAINS, STRIDE] in the scratch buffer
    first,  # first feature of the result
    n_inner,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_CHAINS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """BLOCK_OUT features of W h, or of W^T delta, float32 [BLOCK_OUT, BLOCK_CHAINS]."""
    feature = first + tl.arange(0, BLOCK_OUT)
    inner = tl.arange(0, BLOCK_IN)
    columns = tl.arange(0, BLOCK_CHAINS)[None, :] * STRIDE
    total = tl.zeros((BLOCK_OUT, BLOCK_CHAINS), tl.float32)
    for k in range(0, n_inner, BLOCK_IN):
        right = tl.load(source + ((k + inner)[:, None] + columns))
        if TRANSPOSED:
            tile = tl.trans(tl.load(weights + ((k + inner)[:, None] * STRIDE + feature[None, :])))
        else:
            tile = tl.load(weights + (feature[:, None] * STRIDE + (k + inner)[None, :]))
        total += product(tile, right, PRECISION)
    return total


@triton.jit
def energy_and_grad(
    scratch,  # of this program; z stands in its first buffer, grad f is left in its third
    net,
    packed,
    packed_biases,
    layers,
    parameters,
    out_scale,
    chain,
    is_chain,
    N_HIDDEN: tl.constexpr,
    WIDTH_1: tl.constexpr,
    N_LOGITS: tl.constexpr,
    KINDS: tl.constexpr,
    HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_CHAINS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDED_LOGITS: tl.constexpr,
):
    """f [BLOCK_CHAINS]; every thread of the program has passed a barrier after the last write."""
    BUFFER: tl.constexpr = BLOCK_CHAINS * STRIDE
    rows = tl.arange(0, BLOCK_OUT)[:, None]
    columns = tl.arange(0, BLOCK_CHAINS)[None, :] * STRIDE
    # layers whose product is one of matrices
    N_LAYERS: tl.constexpr = N_HIDDEN if N_LOGITS == 1 else N_HIDDEN + 1
    for layer in range(N_LAYERS):
        n_in = tl.load(layers + layer * 6)
        n_out = tl.load(layers + layer * 6 + 1)
        first_row = tl.load(layers + layer * 6 + 2)
        source = scratch + tl.where(layer == 0, 0, 2 - layer % 2) * BUFFER
        target = scratch + (1 + layer % 2) * BUFFER
        for first in range(0, n_out.to(tl.int32), BLOCK_OUT):
            h = product_tile(
                packed + first_row * STRIDE,
                source,
                first,
                n_in.to(tl.int32),
                False,
                PRECISION,
                BLOCK_CHAINS,
                BLOCK_OUT,
                BLOCK_IN,
                STRIDE,
            )
            h += tl.load(packed_biases + (first_row + first + rows))
            if net.context is not None:
                if layer == 0:
                    inside = is_chain[None, :] & (first + rows < WIDTH_1)
                    h += tl.load(net.context + (chain[None, :] * WIDTH_1 + first + rows), mask=inside, other=0.0)
            if layer < N_HIDDEN:
                kind = tl.load(layers + layer * 6 + 3)
                parameter = tl.load(parameters + layer)
                a = h
                h, slope = activate(a, tl.constexpr(KINDS[0]), parameter)
                for other in tl.static_range(1, len(KINDS)):
                    other_h, other_slope = activate(a, tl.constexpr(KINDS[other]), parameter)
                    h, slope = tl.where(kind == other, other_h, h), tl.where(kind == other, other_slope, slope)
                tl.store(scratch + ((3 + layer) * BUFFER + first + rows + columns), slope)
            tl.store(target + (first + rows + columns), h)
        tl.debug_barrier()

    if N_LOGITS == 1:
        last = scratch + (2 - N_HIDDEN % 2) * BUFFER
        width = tl.load(layers + N_HIDDEN * 6 + 4)
        padded = tl.load(layers + N_HIDDEN * 6).to(tl.int32)
        logit = tl.load(packed_biases + tl.load(layers + N_HIDDEN * 6 + 2)) + tl.zeros((BLOCK_CHAINS,), tl.float32)
        for first in range(0, padded, BLOCK_OUT):
            weight = tl.load(net.weights[0] + first + rows, mask=first + rows < width, other=0.0)
            logit += tl.sum(weight * tl.load(last + (first + rows + columns)), axis=0)
        energy, slope = one_logit_head(logit, HEAD)
        tl.debug_barrier()
        for first in range(0, padded, BLOCK_OUT):
            weight = tl.load(net.weights[0] + first + rows, mask=first + rows < width, other=0.0)
            delta = tl.load(scratch + ((2 + N_HIDDEN) * BUFFER + first + rows + columns))
            delta *= weight * (slope * out_scale)[None, :]
            tl.store(last + (first + rows + columns), delta)
        tl.debug_barrier()
    else:
        logit_rows = tl.arange(0, PADDED_LOGITS)[:, None]
        at = (1 + N_HIDDEN % 2) * BUFFER + logit_rows + columns
        is_logit = (logit_rows < N_LOGITS) & (columns >= 0)
        logits = tl.load(scratch + at, mask=is_logit, other=0.0)
        if HEAD == "logit":
            chosen = tl.load(net.logit + chain, mask=is_chain, other=0)
        else:
            chosen = chain
        energy, slopes = many_logits_head(logits, chosen, HEAD, N_LOGITS)
        slopes *= out_scale
        tl.debug_barrier()
        tl.store(scratch + at, slopes, mask=is_logit)
        tl.debug_barrier()

    for i in range(N_HIDDEN + 1 - N_LAYERS, N_HIDDEN + 1):
        layer = N_HIDDEN - i
        n_in = tl.load(layers + layer * 6)
        n_out = tl.load(layers + layer * 6 + 1)
        first_row = tl.load(layers + layer * 6 + 2)
        source = scratch + (1 + (N_HIDDEN + i) % 2) * BUFFER
        target = scratch + (2 - (N_HIDDEN + i) % 2) * BUFFER
        for first in range(0, n_in.to(tl.int32), BLOCK_OUT):
            delta = product_tile(
                packed + first_row * STRIDE,
                source,
                first,
                n_out.to(tl.int32),
                True,
                PRECISION,
                BLOCK_CHAINS,
                BLOCK_OUT,
                BLOCK_IN,
                STRIDE,
            )
            if layer > 0:
                delta *= tl.load(scratch + ((2 + layer) * BUFFER + first + rows + columns))
            tl.store(target + (first + rows + columns), delta)
        tl.debug_barrier()
    return energy * out_scale


@triton.jit
def load_state(
    scratch,
    z_ptr,
    chain,
    is_chain,
    DIM: tl.constexpr,
    BLOCK_CHAINS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """z of these chains into the first buffer of the scratch, zeros beside it up to the last tile of any product."""
    columns = tl.arange(0, BLOCK_CHAINS)[None, :] * STRIDE
    for first in range(0, STRIDE, BLOCK_OUT):
        d = first + tl.arange(0, BLOCK_OUT)[:, None]
        z = tl.load(z_ptr + (chain[None, :] * DIM + d), mask=is_chain[None, :] & (d < DIM), other=0.0)
        tl.store(scratch + (d + columns), z)
    tl.debug_barrier()


@triton.jit
def store_state(
    scratch,
    out_ptr,
    chain,
    is_chain,
    DIM: tl.constexpr,
    BLOCK_CHAINS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """One buffer of the scratch out to rows [chains, DIM]."""
    columns = tl.arange(0, BLOCK_CHAINS)[None, :] * STRIDE
    for first in range(0, DIM, BLOCK_OUT):
        d = first + tl.arange(0, BLOCK_OUT)[:, None]
        z = tl.load(scratch + (d + columns))
        tl.store(out_ptr + (chain[None, :] * DIM + d), z, mask=is_chain[None, :] & (d < DIM))
    tl.debug_barrier()


@triton.jit(do_not_specialize=["chains"])
def mlp_energy_grad(
    z_ptr,  # float32 [chains, DIM]
    energy_ptr,  # float32 [chains]
    grad_ptr,  # float32 [chains, DIM]
    scratch_ptr,
    net,
    packed,
    packed_biases,
    layers,
    parameters,
    out_scale,
    chains,
    DIM: tl.constexpr,
    N_HIDDEN: tl.constexpr,
    WIDTH_1: tl.constexpr,
    N_LOGITS: tl.constexpr,
    KINDS: tl.constexpr,
    HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_CHAINS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDED_LOGITS: tl.constexpr,
):
    scratch = scratch_ptr + tl.program_id(0).to(tl.int64) * ((3 + N_HIDDEN) * BLOCK_CHAINS * STRIDE)
    for block in range(tl.program_id(0), tl.cdiv(chains, BLOCK_CHAINS), tl.num_programs(0)):
        chain = tl.full((), block, tl.int64) * BLOCK_CHAINS + tl.arange(0, BLOCK_CHAINS)
        is_chain = chain < chains
        load_state(scratch, z_ptr, chain, is_chain, DIM, BLOCK_CHAINS, BLOCK_OUT, STRIDE)
        energy = energy_and_grad(
            scratch,
            net,
            packed,
            packed_biases,
            layers,
            parameters,
            out_scale,
            chain,
            is_chain,
            N_HIDDEN,
            WIDTH_1,
            N_LOGITS,
            KINDS,
            HEAD,
            PRECISION,
            BLOCK_CHAINS,
            BLOCK_OUT,
            BLOCK_IN,
            STRIDE,
            PADDED_LOGITS,
        )
        tl.store(energy_ptr + chain, energy, mask=is_chain)
        grad = scratch + 2 * BLOCK_CHAINS * STRIDE
        store_state(grad, grad_ptr, chain, is_chain, DIM, BLOCK_CHAINS, BLOCK_OUT, STRIDE)


@triton.jit(do_not_specialize=["key_low", "key_high", "first_step", "first_chain", "chains", "n_steps", "thin"])
def mlp_langevin_chain(
    z_ptr,  # float32 [chains, DIM]
    out_ptr,  # float32 [chains, DIM]
    scratch_ptr,
    net,
    packed,
    packed_biases,
    layers,
    parameters,
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
    DIM: tl.constexpr,
    N_HIDDEN: tl.constexpr,
    WIDTH_1: tl.constexpr,
    N_LOGITS: tl.constexpr,
    KINDS: tl.constexpr,
    HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_CHAINS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDED_LOGITS: tl.constexpr,
):
    scratch = scratch_ptr + tl.program_id(0).to(tl.int64) * ((3 + N_HIDDEN) * BLOCK_CHAINS * STRIDE)
    columns = tl.arange(0, BLOCK_CHAINS)[None, :] * STRIDE
    n_chains = tl.full((), chains, tl.int64)
    words = (key_low, key_high, first_step, first_chain)
    for block in range(tl.program_id(0), tl.cdiv(chains, BLOCK_CHAINS), tl.num_programs(0)):
        chain = tl.full((), block, tl.int64) * BLOCK_CHAINS + tl.arange(0, BLOCK_CHAINS)
        is_chain = chain < chains
        load_state(scratch, z_ptr, chain, is_chain, DIM, BLOCK_CHAINS, BLOCK_OUT, STRIDE)
        first_bad = tl.full((BLOCK_CHAINS,), -1, tl.int64)
        for k in range(n_steps):
            step = tl.full((), k, tl.int64)
            energy = energy_and_grad(
                scratch,
                net,
                packed,
                packed_biases,
                layers,
                parameters,
                out_scale,
                chain,
                is_chain,
                N_HIDDEN,
                WIDTH_1,
                N_LOGITS,
                KINDS,
                HEAD,
                PRECISION,
                BLOCK_CHAINS,
                BLOCK_OUT,
                BLOCK_IN,
                STRIDE,
                PADDED_LOGITS,
            )
            kept = tl.full((), (k + 1) // thin - 1, tl.int64)
            coefficients = step_coefficients(update.coefficients, update.chain_coefficients, step, chain, is_chain)
            bad = tl.zeros((BLOCK_CHAINS,), tl.int32)
            grad_square = tl.zeros((BLOCK_CHAINS,), tl.float32)
            length_square = tl.zeros((BLOCK_CHAINS,), tl.float32)
            for first in range(0, DIM, BLOCK_OUT):
                d = first + tl.arange(0, BLOCK_OUT)
                inside = (d < DIM)[:, None] & is_chain[None, :]
                at = chain[None, :] * DIM + d[:, None]
                in_scratch = d[:, None] + columns
                z = tl.load(scratch + in_scratch)
                grad = tl.load(scratch + (2 * BLOCK_CHAINS * STRIDE + in_scratch))
                eps = noise_of_step(
                    update.noise,
                    update.key,
                    words,
                    step,
                    chain,
                    first // 4,
                    at,
                    inside,
                    n_chains,
                    DIM,
                    BLOCK_OUT // 4,
                )
                moved = updated(z, grad, eps, coefficients, update, strides, chain, d, at, inside)
                tl.store(scratch + in_scratch, moved)
                if record.first_bad_step is not None:
                    bad = tl.maximum(bad, tl.max(tl.where(tl.abs(moved) < float("inf"), 0, 1), axis=0))
                if record.energy is not None:
                    if update.extra_grad is not None:
                        grad += tl.load(update.extra_grad + at, mask=inside, other=0.0)
                    grad_square += tl.sum(grad * grad, axis=0)
                    length_square += tl.sum((moved - z) * (moved - z), axis=0)
                if record.trajectory is not None:
                    if (k + 1) % thin == 0:
                        tl.store(record.trajectory + (kept * n_chains * DIM + at), moved, mask=inside)
            if record.first_bad_step is not None:
                first_bad = tl.where((bad != 0) & (first_bad < 0), step, first_bad)
            if record.energy is not None:
                if (k + 1) % thin == 0:
                    kept_at = kept * n_chains + chain
                    tl.store(record.energy + kept_at, energy, mask=is_chain)
                    tl.store(record.grad_norm + kept_at, tl.sqrt(grad_square), mask=is_chain)
                    tl.store(record.displacement + kept_at, tl.sqrt(length_square), mask=is_chain)
            tl.debug_barrier()
        store_state(scratch, out_ptr, chain, is_chain, DIM, BLOCK_CHAINS, BLOCK_OUT, STRIDE)
        if record.first_bad_step is not None:
            tl.store(record.first_bad_step + chain, first_bad, mask=is_chain)
