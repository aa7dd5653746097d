"""The Inception-based FID through torch-fidelity, where its weights are at hand."""

from __future__ import annotations

import pathlib
import pickle
from types import ModuleType

import torch
from torch import Tensor

from ..errors import RunError

FIRST_WEIGHT = "Conv2d_1a_3x3.conv.weight"  # of the net's first layer, as torch-fidelity calls it


class _Pixels(torch.utils.data.Dataset):
    """uint8 images as torch-fidelity takes them: [3, height, width]."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> Tensor:
        return self.pixels[i].expand(3, -1, -1)


def inception_fid(samples: Tensor, reference: Tensor, weights: pathlib.Path, device: torch.device) -> float:
    """FID of uint8 samples [n, c, s, s] against uint8 reference images, in the features of the Inception net.

    Arguments:
        weights: torch-fidelity's file of the net, `weights-inception-2015-12-05-6726825d.pth`.

    Raises:
        RunError: as `require_inception`.

    Source: Heusel et al., NeurIPS 2017; Obukhov et al., torch-fidelity.
    """
    found = require_inception(weights).calculate_metrics(
        input1=_Pixels(samples),
        input2=_Pixels(reference),
        fid=True,
        cuda=device.type == "cuda",
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        verbose=False,
    )
    return float(found["frechet_inception_distance"])


def require_inception(weights: pathlib.Path) -> ModuleType:
    """torch-fidelity, once it and the weights are found to be there: to be asked before hours of work.

    Raises:
        RunError: torch-fidelity or the weights are missing, and the message says how to get them; or the file is
            another one.
    """
    if not weights.is_file():
        raise RunError(
            f'no Inception weights at "{weights}": --inception-weights takes the file '
            "weights-inception-2015-12-05-6726825d.pth of torch-fidelity's releases"
        )
    try:
        import torch_fidelity
    except ModuleNotFoundError as error:
        raise RunError(
            f"the Inception FID needs torch-fidelity and torchvision ({error}): pip install torch-fidelity"
        ) from error
    except (ImportError, RuntimeError) as error:  # a torchvision built for another torch
        first = str(error).strip().splitlines()[0]
        raise RunError(f"torch-fidelity does not work here: {first}") from error
    try:
        # with weights_only a file from a stranger runs no code
        found = torch.load(weights, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, EOFError, OSError) as error:
        raise RunError(f'"{weights}" is cut off or no file of Inception weights') from error
    if not isinstance(found, dict) or FIRST_WEIGHT not in found:
        raise RunError(f'"{weights}" holds other weights than those of the Inception net: it has no {FIRST_WEIGHT}')
    return torch_fidelity
