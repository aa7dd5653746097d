"""What both ways of reading a module's forward have in common: every torch call of it is seen, and named by its layer.

`tracing.py` follows entries through it to the parameters behind, `following.py` which layer a tensor is affine in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..energy import EnergyLinear

# fmt: off
REARRANGING = frozenset((
    "cat", "concat", "concatenate", "hstack", "column_stack", "stack", "view", "reshape", "squeeze", "unsqueeze",
    "flatten", "unflatten", "getitem", "narrow", "split", "chunk", "tensor_split", "unbind", "permute", "transpose",
    "t", "T", "mT", "swapaxes", "swapdims", "movedim", "select", "index_select", "view_as", "reshape_as", "ravel",
))
JOINING = frozenset(("cat", "concat", "concatenate", "hstack", "column_stack", "stack", "vstack"))
ADDING = frozenset(("add", "radd", "iadd", "sub", "rsub", "isub", "subtract"))
KEEPING = frozenset((
    "contiguous", "clone", "to", "double", "type", "type_as", "detach", "requires_grad", "alias",
))
READING = frozenset(("item", "bool", "float", "int", "tolist", "numpy", "array", "index", "equal", "allclose",
                     "is_nonzero"))
# what a tensor is, without what it holds
METADATA = frozenset((
    "shape", "size", "dim", "ndim", "ndimension", "dtype", "device", "numel", "nelement", "len", "stride", "layout",
    "is_contiguous", "is_cuda", "is_cpu", "is_floating_point", "is_complex", "element_size", "itemsize", "get_device",
    "storage_offset", "requires_grad", "is_leaf", "grad_fn", "grad", "is_sparse", "is_quantized", "is_meta", "names",
    "is_nested", "is_neg", "is_conj", "is_inference", "type", "output_nr",
))
HOOKING = frozenset(("register_hook", "register_post_accumulate_grad_hook"))
DRAWING = frozenset((
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli",
    "multinomial", "poisson", "binomial", "uniform", "exponential", "cauchy", "log_normal", "geometric", "random",
    "gumbel_softmax",
))
DROPOUTS = frozenset(("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout",
                      "feature_alpha_dropout"))
# fmt: on
_DEEPEST_CHECK = 6  # calls between a distribution's look at its argument and torch

L = TypeVar("L")


class ForwardObserver(TorchFunctionMode, Generic[L]):
    """Sees every torch call while a module runs; keeps a label of some tensors, and knows which layer is running."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.labels: dict[int, tuple[Tensor, L, int]] = {}
        self.refused: str | None = None
        self.stack: list[tuple[str, nn.Module]] = []
        self._hooks = []
        for path, module in net.named_modules():
            if isinstance(module, EnergyLinear):  # its own forward is never run, and a hook on it refused
                continue
            self._hooks.append(
                module.register_forward_pre_hook(lambda m, _, path=path: self.stack.append((path, m)), prepend=True)
            )
            self._hooks.append(module.register_forward_hook(lambda *_: (self.stack.pop(), None)[1]))

    def remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def put(self, tensor: Tensor, label: L) -> None:
        # the tensor is kept alive, or its id could be given to another
        self.labels[id(tensor)] = (tensor, label, tensor._version)

    def get(self, tensor: object) -> L | None:
        found = self.labels.get(id(tensor)) if isinstance(tensor, Tensor) else None
        return None if found is None else found[1]

    def unseen_write(self, leaves: list) -> bool:
        """Whether any of these was written into through another view since it was labelled."""
        found = [self.labels.get(id(leaf)) for leaf in leaves if isinstance(leaf, Tensor)]
        return any(entry is not None and entry[0]._version != entry[2] for entry in found)

    def misuse(self, name: str, labelled: bool, unknown: bool, result: object, n_outputs: int) -> str | None:
        """Why a call on labelled tensors leaves the trace: it reads their values or writes where no label follows."""
        if not labelled:
            return None
        if name in HOOKING:
            return "forward hooks into a gradient"
        if name == "data":
            return "forward takes tensors out of autograd's sight"
        if n_outputs == 0 and result is None and name not in METADATA:
            return "forward writes in place"
        if n_outputs == 0 and (name not in METADATA or unknown):
            return "forward reads values of z"
        return None

    def where(self) -> str:
        path, module = self.stack[-1] if self.stack else ("", self.net)
        return f"layer '{path}' ({type(module).__name__})" if path else f"the forward of {type(module).__name__}"


class InFloat64(TorchFunctionMode):
    """While a float64 copy runs, a cast to float32 keeps what is in float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return args[0] if func is Tensor.float and args[0].dtype is torch.float64 else func(*args, **(kwargs or {}))


def draws(name: str, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """What would draw random numbers; None of everything else."""
    if name in DROPOUTS:
        training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
        p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        return f"active dropout (p = {p}, training mode)" if training and p > 0 else None
    return f"a random draw ({name})" if name in DRAWING else None


_VALIDATING = torch.distributions.Distribution._validate_sample.__code__


def validates_a_sample() -> bool:
    """Whether the torch call under way is of a distribution that looks whether its argument is in its support."""
    frame = sys._getframe(2)
    for _ in range(_DEEPEST_CHECK):
        if frame is None or frame.f_code is _VALIDATING:
            break
        frame = frame.f_back
    else:
        return False
    return frame is not None


def activation_of(name: str, args: tuple, kwargs: dict[str, Any]) -> tuple[str, float] | None:
    """(catalogue name, parameter) of a torch call, or None where it is no activation we know."""

    def option(keyword: str, position: int, default: float) -> float:
        return kwargs.get(keyword, args[position] if len(args) > position else default)

    if name in ("relu", "silu", "mish", "tanh", "sigmoid"):
        return name, 0.0
    if name == "leaky_relu":
        return name, float(option("negative_slope", 1, 0.01))
    if name == "celu" and option("alpha", 1, 1.0) == 1.0:
        return "elu", 1.0
    if name == "elu" and option("scale", 2, 1.0) in (1.0, False) and option("input_scale", 3, 1.0) == 1.0:
        return name, float(option("alpha", 1, 1.0))
    if name == "softplus" and option("threshold", 2, 20.0) == 20.0:
        return name, float(option("beta", 1, 1.0))
    if name == "gelu":
        return ("gelu" if option("approximate", 1, "none") == "none" else "gelu_tanh"), 0.0
    return None


def name_of(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        name = func.__self__.__name__
    return name.strip("_")
