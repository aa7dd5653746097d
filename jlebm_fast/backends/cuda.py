"""The four operations on NVIDIA GPUs: CUDA kernels (csrc/cuda), one launch each, compute capability 8.0 and newer.

    resident   the weights stay in a multiprocessor's shared memory for the whole chain
    streamed   of larger ones the layers that fit stay there too, the others are streamed from L2 in every step
    lean       the same for many chains of wide nets, and on chips of little shared memory: phi' of the layers waits in
               device memory, so that more chains have room in a block

Two more are used only by who asks for them, in the environment (JLEBM_CUDA_TRY=cluster,warpgroup) or by
`cuda_tried.trying`, since they have not yet been run on a GPU. They are then choices among the others, by estimated
time:

    cluster    few chains of a net whose weights do not fit, on compute capability 9.0 and 10: the units of each layer
               are shared out among the blocks of a cluster. The same z in every bit
    warpgroup  many chains in bf16 on compute capability 9.0: all but weights and phi' stays in registers. The noise is
               the same in every bit, sums of products may be rounded otherwise than where fewer chains are in a call

Matrix products run in "fp32" (three tf32 products each, float32 accuracy), "tf32" or "bf16" (`precision.py`). Launches
go to torch's current stream of the tensors' device, never synchronise, and may be captured in a CUDA graph: give the
noise key as an int64 tensor on the device and advance it there (`advance_noise_key`), so that each replay draws fresh
noise.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from .. import precision
from ..checks import describe
from ..modes import on_device_of
from ..problem import MAX_HIDDEN_LAYERS, MLP, ChainResult, MLPSpec, Record, Update
from . import _native
from .cuda_tried import TRIED, tried
from .native_fields import Addresses, mlp_fields, shape_fields, update_fields

NAME = "cuda"
READS_KEY_TENSORS = True
TAKES_PRECISION = True

MOST_WEIGHTS = MAX_HIDDEN_LAYERS + 1  # of one launch of `top_singulars`

Launch = Callable[[torch.device, "Tensor | None"], tuple]


class Kernels:
    """The operations of a compiled module, on tensors where its kernels run.

    native   jlebm_fast._C, or the same kernels built for the host
    launch   (device, workspace) -> (device, stream, precision, workspace, its bytes, multiprocessors, shared bytes,
             whether warpgroups are a choice, whether clusters are)
    """

    def __init__(self, native: ModuleType, launch: Launch) -> None:
        self.native = native
        self.launch = launch
        self._plans: dict[tuple, tuple[int, str]] = {}

    def plan(self, op: str, spec: MLPSpec, chains: int, energies: bool, device: torch.device) -> tuple[int, str]:
        """(bytes of workspace, regime in words)."""
        return self._plan(op, spec, chains, energies, self.launch(device, None))

    def _plan(self, op: str, spec: MLPSpec, chains: int, energies: bool, launch: tuple) -> tuple[int, str]:
        key = (op, spec, chains, energies, launch[0], launch[2], launch[5:])
        found = self._plans.get(key)
        if found is None:
            found = self._plans[key] = self.native.cuda_mlp_plan(
                op=op, chains=chains, mlp=shape_fields(spec), energies=energies, launch=launch
            )
        return found

    def _with_workspace(self, op: str, mlp: MLP, chains: int, energies: bool, device: torch.device) -> tuple:
        """(launch, workspace); torch's allocator reuses the memory in the order of the stream, so it may be let go."""
        launch = self.launch(device, None)
        n_bytes = self._plan(op, mlp.spec, chains, energies, launch)[0]
        if n_bytes == 0:
            return launch, None
        workspace = torch.empty(n_bytes, dtype=torch.uint8, device=device)
        return self.launch(device, workspace), workspace

    def _enqueue(self, kernel: str, tensor: Tensor, **fields: object) -> None:
        """One call of the compiled module on the tensor's device; torch makes it the current one, and gives back what
        was without making a context on a GPU that has none."""
        with on_device_of(tensor):
            getattr(self.native, kernel)(**fields)

    def langevin_noise(
        self,
        noise_key: int | Tensor,
        n_steps: int,
        chains: int,
        dim: int,
        *,
        first_step: int = 0,
        first_chain: int = 0,
        stream: int = 0,
        device: torch.device | str = "cuda",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """The noise field eps [n_steps, chains, dim] of the noise contract."""
        out = torch.empty((n_steps, chains, dim), dtype=dtype, device=device)
        if out.numel():
            number, at = _key_fields(noise_key, out.device)
            self._enqueue(
                "cuda_langevin_noise",
                out,
                noise_key=number,
                noise_key_at=at,
                first_step=first_step,
                first_chain=first_chain,
                stream=stream,
                n_steps=n_steps,
                chains=chains,
                dim=dim,
                out=out.data_ptr(),
                launch=self.launch(out.device, None),
            )
        return out

    def langevin_step(self, z: Tensor, grad: Tensor, update: Update) -> Tensor:
        """One update of z [chains, dim] with a given gradient [chains, dim]."""
        out = torch.empty_like(z)
        if out.numel():
            number, at = _key_fields(update.noise_key, z.device)
            address = Addresses()
            self._enqueue(
                "cuda_langevin_step",
                z,
                chains=z.shape[0],
                dim=z.shape[1],
                z=address(z),
                grad=address(grad),
                update=update_fields(update, address, number),
                noise_key_at=at,
                out=out.data_ptr(),
                launch=self.launch(z.device, None),
            )
        return out

    def mlp_energy_grad(self, z: Tensor, mlp: MLP) -> tuple[Tensor, Tensor]:
        """f(z) [chains] and its gradient [chains, dim]."""
        return self.mlp_energy_layers(z, mlp, layers=False)[:2]

    def mlp_energy_layers(
        self, z: Tensor, mlp: MLP, *, layers: bool = True
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """f(z) [chains], its gradient [chains, dim], and of each hidden layer h_l and df/da_l [chains, H_l]: what the
        gradients in the parameters are made of, dW_l = (df/da_l)ᵀ h_{l−1}.
        """
        chains = z.shape[0]
        energy, grad = z.new_empty(chains), torch.empty_like(z)
        widths = mlp.spec.widths[1:-1] if layers else ()
        hidden, delta = ([z.new_empty(chains, width) for width in widths] for _ in range(2))
        if chains:
            launch, _workspace = self._with_workspace("mlp_energy_grad", mlp, chains, True, z.device)
            address = Addresses()
            self._enqueue(
                "cuda_mlp_energy_grad",
                z,
                chains=chains,
                z=address(z),
                mlp=mlp_fields(mlp, address),
                energy=energy.data_ptr(),
                grad=grad.data_ptr(),
                hidden=[h.data_ptr() for h in hidden],
                delta=[d.data_ptr() for d in delta],
                launch=launch,
            )
        return energy, grad, hidden, delta

    def mlp_langevin_chain(self, z: Tensor, mlp: MLP, update: Update, n_steps: int, record: Record) -> ChainResult:
        """n_steps updates with the MLP's own gradient."""
        chains, dim = z.shape
        n_kept = n_steps // record.thin
        energy = grad_norm = displacement = first_bad_step = trajectory = None
        if record.diagnostics:
            energy, grad_norm, displacement = (z.new_empty(n_kept, chains) for _ in range(3))
            first_bad_step = torch.full((chains,), -1, dtype=torch.int64, device=z.device)
        if record.trajectory:
            trajectory = z.new_empty(n_kept, chains, dim)
        result = ChainResult(torch.empty_like(z), energy, grad_norm, displacement, first_bad_step, trajectory)
        if chains == 0:
            return result
        number, at = _key_fields(update.noise_key, z.device)
        # an empty record (n_kept = 0) has no address, and then nothing is kept
        energies = record.diagnostics and n_kept > 0
        launch, _workspace = self._with_workspace("mlp_langevin_chain", mlp, chains, energies, z.device)
        address = Addresses()
        self._enqueue(
            "cuda_mlp_langevin_chain",
            z,
            chains=chains,
            n_steps=n_steps,
            z=address(z),
            mlp=mlp_fields(mlp, address),
            update=update_fields(update, address, number),
            noise_key_at=at,
            record=(record.thin, *[0 if t is None else t.data_ptr() for t in result[1:]]),
            out=result.z.data_ptr(),
            launch=launch,
        )
        return result

    def top_singulars(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        tolerance: float,
        keep: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """(u [out], v [in], sigma [1], W / sigma) of weights W [out, in], each with a u to start from (`spectral.py`).

        keep: buffers (u, v), contiguous, that are overwritten with the vectors where sigma is finite and not zero.
        """
        address, found = Addresses(), []
        device = pairs[0][0].device
        for weight, _ in pairs:
            n_out, n_in = weight.shape
            vectors = torch.empty(n_out + n_in + 1, dtype=torch.float32, device=device).split((n_out, n_in, 1))
            found.append((*vectors, torch.empty((n_out, n_in), dtype=torch.float32, device=device)))
        rows = []
        for i, ((weight, start), outputs) in enumerate(zip(pairs, found, strict=True)):
            kept = (0, 0) if keep is None else tuple(buffer.data_ptr() for buffer in keep[i])
            rows.append((*weight.shape, address(weight), address(start), *[t.data_ptr() for t in outputs], *kept))
        launch = self.launch(device, None)
        for first in range(0, len(rows), MOST_WEIGHTS):
            self._enqueue(
                "cuda_spectral_norms",
                pairs[0][0],
                weights=rows[first : first + MOST_WEIGHTS],
                tolerance=tolerance,
                launch=launch,
            )
        return found

    def spectral_unsupported_reason(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> str | None:
        """Why `top_singulars` cannot serve weights of these shapes; None if it can."""
        launch = self.launch(device, None)
        for n_out, n_in in shapes:
            reason = self.native.cuda_spectral_unsupported_reason(n_out=n_out, n_in=n_in, launch=launch)
            if reason:
                return reason
        return None

    def advance_noise_key(self, noise_key: Tensor) -> None:
        """Move an int64 key [1] on its device to the next one, in stream order: what a CUDA graph appends so that its
        next replay draws fresh noise.
        """
        _, at = _key_fields(noise_key, noise_key.device)
        self._enqueue("cuda_advance_noise_key", noise_key, noise_key=at, launch=self.launch(noise_key.device, None))


def _key_fields(noise_key: int | Tensor, device: torch.device) -> tuple[int, int]:
    """(key, 0) of a number, (0, address) of a tensor that stands where the kernel reads it."""
    if not isinstance(noise_key, Tensor):
        return noise_key, 0
    if noise_key.device != device or noise_key.dtype != torch.int64 or noise_key.numel() != 1:
        raise ValueError(f"noise_key must be an integer, or [1] int64 on {device} like z, got {describe(noise_key)}")
    return 0, noise_key.data_ptr()


# --- this process's devices -------------------------------------------------------------------------------------------


def unavailable_reason() -> str | None:
    """Why no call can be served, with the remedy: module, torch, driver, device, in this order."""
    reason = _native.unavailable_reason()
    if reason is not None:
        return reason
    return missing_reason(_native.load(), torch.version.cuda, torch.version.hip)


def missing_reason(native: ModuleType, torch_cuda: str | None, torch_hip: str | None) -> str | None:
    """The same, of a compiled module and the versions of CUDA and HIP that torch was built with."""
    if not native.cuda:
        return (
            "the compiled module was built without CUDA (no nvcc that works was found, or JLEBM_CUDA=off); put the "
            "CUDA toolkit's nvcc on PATH and rebuild with `JLEBM_CUDA=on pip install -e .`, or use backend 'triton' or "
            "'eager' on GPUs"
        )
    if torch_cuda is None:
        have = "is built for ROCm" if torch_hip else "is a build for the CPU"
        remedy = "use backend 'triton' or 'eager'" if torch_hip else "install a CUDA wheel of torch (pytorch.org)"
        return f"torch {torch.__version__} {have}, so no tensor can be on a CUDA device; {remedy}"
    reason = native.cuda_driver_reason(native.cuda_driver_version(), native.cuda_runtime_version)
    if reason:
        return reason
    if torch.cuda.device_count() == 0:
        return "torch sees no GPU; look at nvidia-smi and at CUDA_VISIBLE_DEVICES, or use backend 'cpu' or 'eager'"
    return None


def unsupported_reason(
    op: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    spec: MLPSpec | None = None,
    update: Update | None = None,
) -> str | None:
    if device.type != "cuda":
        return f"it runs on CUDA tensors, got {device}"
    if dtype != torch.float32:
        return f"it computes in float32, got {str(dtype).removeprefix('torch.')}; float64 runs on backend 'eager'"
    index = torch.cuda.current_device() if device.index is None else device.index
    return _device_reason(index, spec, precision.current() if spec is not None else "fp32")


@functools.cache
def _device_reason(index: int, spec: MLPSpec | None, name: str) -> str | None:
    native = _native.load()
    _, capability, multiprocessors, max_shared_bytes, *_ = _device_facts(index)
    reason = native.cuda_capability_reason(capability, native.cuda_archs)
    if not reason and spec is not None:
        launch = (index, 0, precision.NAMES.index(name), 0, 0, multiprocessors, max_shared_bytes, False, False)
        reason = native.cuda_mlp_unsupported_reason(mlp=shape_fields(spec), launch=launch)
    return reason or None


@functools.cache
def _device_facts(index: int) -> tuple[str, int, int, int, bool, bool]:
    """(name, compute capability as 90, multiprocessors, shared memory of a block, whether the kernels of each of TRIED
    run there).
    """
    return _native.load().cuda_device(index)


def runs_here(regime: str) -> bool:
    """Whether the kernels of a regime of `cuda_tried.TRIED` are in this build and run on the current device."""
    return _device_facts(torch.cuda.current_device())[4 + TRIED.index(regime)]


def _launch(device: torch.device, workspace: Tensor | None) -> tuple:
    index = torch.cuda.current_device() if device.index is None else device.index
    return (
        index,
        torch._C._cuda_getCurrentRawStream(index),  # without an object around it
        precision.NAMES.index(precision.current()),
        0 if workspace is None else workspace.data_ptr(),
        0 if workspace is None else workspace.numel(),
        *_device_facts(index)[2:4],
        *tried(_device_facts(index)),
    )


@functools.cache
def _kernels() -> Kernels:
    return Kernels(_native.load(), _launch)


def regime(op: str, spec: MLPSpec | None, chains: int = 100, name: str | None = None) -> str:
    """Where weights and activations are kept, at the precision of this name or the present one. explain() names no
    number of chains: 100 are the batch of the papers.
    """
    if spec is None:
        return "one launch"
    device = torch.device("cuda", torch.cuda.current_device())
    with contextlib.nullcontext() if name is None else precision.using(name):
        return f"{_kernels().plan(op, spec, chains, False, device)[1]}, for {chains:,} chains"


def build() -> str:
    """Toolkit and architectures of this build, driver of this machine."""
    native = _native.load()
    toolkit, driver = (
        f"{v // 1000}.{v % 1000 // 10}" for v in (native.cuda_runtime_version, native.cuda_driver_version())
    )
    return f"CUDA {toolkit}, architectures {native.cuda_archs}; the driver supports CUDA {driver}"


def langevin_noise(*arguments: object, **options: object) -> Tensor:
    """See `Kernels.langevin_noise`."""
    return _kernels().langevin_noise(*arguments, **options)


def langevin_step(z: Tensor, grad: Tensor, update: Update) -> Tensor:
    """See `Kernels.langevin_step`."""
    return _kernels().langevin_step(z, grad, update)


def mlp_energy_grad(z: Tensor, mlp: MLP) -> tuple[Tensor, Tensor]:
    """See `Kernels.mlp_energy_grad`."""
    return _kernels().mlp_energy_grad(z, mlp)


def mlp_energy_layers(z: Tensor, mlp: MLP, *, layers: bool = True) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """See `Kernels.mlp_energy_layers`."""
    return _kernels().mlp_energy_layers(z, mlp, layers=layers)


def mlp_langevin_chain(z: Tensor, mlp: MLP, update: Update, n_steps: int, record: Record) -> ChainResult:
    """See `Kernels.mlp_langevin_chain`."""
    return _kernels().mlp_langevin_chain(z, mlp, update, n_steps, record)


def top_singulars(*arguments: object) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """See `Kernels.top_singulars`."""
    return _kernels().top_singulars(*arguments)


def spectral_unsupported_reason(shapes: Sequence[tuple[int, int]], device: torch.device) -> str | None:
    """See `Kernels.spectral_unsupported_reason`; also a device that runs none of these kernels."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _device_reason(index, None, "fp32") or _kernels().spectral_unsupported_reason(shapes, device)


def advance_noise_key(noise_key: Tensor) -> None:
    """See `Kernels.advance_noise_key`."""
    _kernels().advance_noise_key(noise_key)
