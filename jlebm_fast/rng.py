"""torch.Generator in, one 64-bit noise key out: the only place where a generator is advanced."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import describe, traced, whole
from .modes import capturing, under_a_mode, watched

KEY_RANGE = 1 << 64
# steps and chains of the noise field are counted in 32 bits, and wrap
COUNTER_RANGE = 1 << 32
# streams of the noise field (csrc/README.md, "the noise contract"): of Langevin steps, of starts, of accept and reject
LANGEVIN, INITIAL_Z, ACCEPT_REJECT = 0, 1, 2
_CPU = torch.device("cpu")


def draw_noise_key(generator: torch.Generator | None = None, device: torch.device = _CPU) -> int:
    """Draw 64 bits from `generator`, or from torch's global CPU generator, to address the noise of a call on `device`.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> draw_noise_key(g) == draw_noise_key(g.manual_seed(0))
        True
    """
    source = _CPU
    if generator is not None:
        source = check_generator(generator).device
        if source.type not in ("cpu", device.type):
            wanted = "cpu" if device.type == "cpu" else f"cpu or {device.type}"
            raise ValueError(f"generator must be a torch.Generator on {wanted}, got one on {source}")
    if source == _CPU and not watched():
        return draw_unwatched(generator)
    return _drawn(torch.empty(2, dtype=torch.int64, device=source), generator)


def draw_unwatched(generator: torch.Generator | None) -> int:
    """`draw_noise_key` from a generator on the CPU, or None, where nobody looks on."""
    try:
        words, values = _spare.pop()
    except IndexError:
        with torch.inference_mode(False):  # what is made inside it could not be written outside
            words = torch.empty(2, dtype=torch.int64, device=_CPU)
        values = memoryview(words.numpy())
    words.random_(0, 1 << 32, generator=generator)
    low, high = values
    _spare.append((words, values))
    return low | (high << 32)


def _drawn(words: Tensor, generator: torch.Generator | None) -> int:
    # torch.randint(0, 2**32, (2,)) by its parts, which cost half as much
    words.random_(0, 1 << 32, generator=generator)
    if torch._is_functional_tensor(words):  # of torch.func.functionalize: its values lie in a tensor behind it
        torch._sync(words)
        words = torch._from_functional_tensor(words)
    low, high = words.tolist()
    return low | (high << 32)


# memory that keys are drawn in, and Python's own view of it, read without a call of torch; what a thread uses is not in
# the list
_spare: list[tuple[Tensor, memoryview]] = []


def draw_key_in_graph(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """64 bits drawn on `device` while a CUDA graph is captured: an int64 tensor [1] that every replay draws anew.

    From torch's generator of that device, which every graph advances, or from one that the caller has registered with
    the graph (`torch.cuda.CUDAGraph.register_generator_state`).
    """
    if generator is not None and check_generator(generator).device.type != device.type:
        raise ValueError(
            f"generator must be a torch.Generator on {device.type} or None while a CUDA graph is captured, got one on "
            f"{generator.device}: the replays would repeat its one draw; or pass noise_key, a tensor on {device.type}"
        )
    return torch.empty(1, dtype=torch.int64, device=device).random_(-(1 << 63), None, generator=generator)


def noise_key_of(
    noise_key: int | Tensor | None, generator: torch.Generator | None, device: torch.device
) -> int | Tensor:
    """The key of a call: the given one, or one drawn; while a graph is traced or captured, drawn at every run of it."""
    if noise_key is None:
        if torch.compiler.is_compiling() or under_a_mode():
            if generator is None:
                return torch.ops.jlebm_fast.draw_noise_key.default()
        elif capturing(device):
            return draw_key_in_graph(generator, device)
        return draw_noise_key(generator, device)
    check_sources(None, noise_key, generator)
    return check_noise_key(noise_key)


def check_sources(noise: object, noise_key: object, generator: object) -> None:
    """That at most one says where the noise comes from."""
    if noise is not None and (noise_key is not None or generator is not None):
        raise ValueError("noise replaces the noise field: give either noise, or a generator or noise_key")
    if noise_key is not None and generator is not None:
        raise ValueError("give either a generator or a noise_key, not both")


def check_generator(generator: torch.Generator) -> torch.Generator:
    if not isinstance(generator, torch.Generator):
        raise ValueError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    return generator


def check_noise_key(noise_key: int | Tensor, name: str = "noise_key") -> int | Tensor:
    """`noise_key`: an unsigned 64-bit integer, or its bits in an int64 tensor of one element. name: what the caller of
    the package knows it by."""
    if isinstance(noise_key, Tensor):
        if noise_key.dtype == torch.int64 and noise_key.numel() == 1:
            return noise_key
        raise ValueError(f"{name} as a tensor must be [1] int64, got {describe(noise_key)}")
    noise_key = whole(noise_key)
    wrong = not isinstance(noise_key, int) or isinstance(noise_key, bool) or not 0 <= noise_key < KEY_RANGE
    if wrong and not traced(noise_key):
        raise ValueError(f"{name} must be an integer in [0, 2**64), got {noise_key!r}")
    return noise_key


def key_tensor(noise_key: int | Tensor) -> Tensor:
    """The 64 bits of a key as an int64 tensor [1], on the CPU unless it is a tensor elsewhere already."""
    if isinstance(noise_key, Tensor):
        return noise_key.reshape(1)
    signed = noise_key - KEY_RANGE if noise_key >= KEY_RANGE // 2 else noise_key
    return torch.tensor([signed], dtype=torch.int64, device=_CPU)


def key_number(noise_key: int | Tensor) -> int:
    """The key as an unsigned integer; waits for the device where it is a tensor on one."""
    return int(noise_key) % KEY_RANGE if isinstance(noise_key, Tensor) else noise_key
