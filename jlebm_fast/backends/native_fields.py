"""Records as the compiled module takes them: tensors as addresses, in the order of csrc/bindings_records.h."""

from __future__ import annotations

from torch import Tensor

from ..checks import TENSOR_CLASSES, in_memory
from ..problem import MLP, MLPSpec, Update


class Addresses(list):
    """Addresses of tensors as integers, 0 for None; holds what it had to copy, alive for as long as it lives itself."""

    def __call__(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        if type(tensor) in TENSOR_CLASSES and tensor.is_contiguous() and not tensor.is_neg():  # nearly all of them
            address = tensor.data_ptr()
            if address:
                return address
        readable = in_memory(tensor)
        if readable is not tensor:
            self.append(readable)
        return readable.data_ptr()


def mlp_fields(mlp: MLP, address: Addresses) -> tuple:
    return (
        *mlp.spec.native_fields,
        [address(weight) for weight in mlp.weights],
        [address(bias) for bias in mlp.biases],
        0 if mlp.context_bias is None else address(mlp.context_bias),
        0 if mlp.logit is None else address(mlp.logit),
    )


def update_fields(update: Update, address: Addresses, noise_key: int | None = None) -> tuple:
    """An Update as native kernels take it; noise_key replaces its own, which may be a tensor."""
    # most of it is absent in most calls, and asking for what is absent costs as much as asking for what is there
    steps, chains, mean, precision, frozen, noise, own_key, first_step, first_chain, extra_grad = update
    return (
        address(steps),
        0 if chains is None else address(chains),
        *((0, 0) if mean is None else (address(mean), _chain_stride(mean))),
        *((0, 0) if precision is None else (address(precision), _chain_stride(precision))),
        *((0, 0) if frozen is None else (address(frozen), _chain_stride(frozen))),
        0 if noise is None else address(noise),
        0 if extra_grad is None else address(extra_grad),
        own_key if noise_key is None else noise_key,
        first_step,
        first_chain,
    )


def _chain_stride(per_dim_or_chain: Tensor) -> int:
    """Elements from one chain's row to the next; 0 for one row that all chains share."""
    return per_dim_or_chain.shape[1] if per_dim_or_chain.dim() == 2 else 0


def shape_fields(spec: MLPSpec) -> tuple:
    """An MLP's fields without parameters, for questions about sizes."""
    nothing = [None] * (spec.n_hidden + 1)
    address = Addresses()
    fields = mlp_fields(MLP(spec, (), tuple(nothing)), address)
    return (*fields[:5], [0] * (spec.n_hidden + 1), *fields[6:])
