"""The published problems by name, as records: sizes, dynamics and where they come from.

HS, FID   joint latent prior on SVHN (hierarchical sampling, generation): Cui, Wu, Han, ICCV 2023
LEBM      latent energy prior on SVHN: Pang et al., NeurIPS 2020;  WIDE its CelebA net with 1000 units
LONG      the long-run stability chain of the ICCV paper: HS with 2,500 steps
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor, nn

from jlebm_fast.problem import MLP, MLPSpec

_SLOPE = 0.2  # of every LeakyReLU in the published energies


@dataclasses.dataclass(frozen=True)
class Case:
    """One published problem.

    name            short name, as on the command line
    latent_dims     sizes of the latent layers, laid side by side
    hidden, depth   width and number of the energy's hidden layers
    activation      "leaky_relu" (slope 0.2) or "gelu" (exact erf)
    spectral_norm   whether the published energy divides each weight by its largest singular value
    n_steps         Langevin steps of one prior chain
    step_size       s: drift s²/2, noise s
    batch           chains of one training step
    """

    name: str
    latent_dims: tuple[int, ...]
    hidden: int
    depth: int
    activation: str
    spectral_norm: bool
    n_steps: int
    step_size: float
    batch: int

    @property
    def dim(self) -> int:
        return sum(self.latent_dims)

    @property
    def spec(self) -> MLPSpec:
        slope = _SLOPE if self.activation == "leaky_relu" else 0.0
        return MLPSpec(
            widths=(self.dim, *[self.hidden] * self.depth, 1),
            activations=(self.activation,) * self.depth,
            activation_params=(slope,) * self.depth,
        )

    def flops(self, chains: int) -> int:
        """Floating-point operations of one whole run: multiply-adds count two, noise and update count nothing."""
        return self.spec.flops_per_chain_step * chains * self.n_steps

    def initial(self, chains: int, seed: int = 0) -> list[Tensor]:
        """Starts z ~ N(0, I): one [chains, d] float32 tensor per latent layer."""
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(chains, d, generator=generator) for d in self.latent_dims]

    def network(self, seed: int = 0) -> nn.Sequential:
        """The energy with random weights as a plain `Sequential`; weights divided by σ_max where the case says so."""
        generator = torch.Generator().manual_seed(seed)
        layers: list[nn.Module] = []
        widths = self.spec.widths
        for i, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
            linear = nn.Linear(n_in, n_out)
            with torch.no_grad():
                bound = n_in**-0.5  # torch's own initialisation, from a generator of ours
                linear.weight.uniform_(-bound, bound, generator=generator)
                linear.bias.uniform_(-bound, bound, generator=generator)
                if self.spectral_norm:
                    linear.weight /= torch.linalg.matrix_norm(linear.weight.double(), 2).float()
            layers.append(linear)
            if i < self.depth:
                layers.append(nn.LeakyReLU(_SLOPE) if self.activation == "leaky_relu" else nn.GELU())
        return nn.Sequential(*layers)


def mlp_of(network: nn.Sequential, spec: MLPSpec) -> MLP:
    """The record of a network that `Case.network` made: its weights and biases, detached."""
    linears = [layer for layer in network if isinstance(layer, nn.Linear)]
    return MLP(spec, tuple(layer.weight.detach() for layer in linears), tuple(layer.bias.detach() for layer in linears))


HS = Case("HS", (2, 2, 2, 10), 50, 4, "leaky_relu", True, n_steps=60, step_size=0.4, batch=100)
FID = Case("FID", (10, 10, 10, 10, 10), 100, 2, "leaky_relu", True, n_steps=100, step_size=0.3, batch=100)
LEBM = Case("LEBM", (100,), 200, 2, "gelu", False, n_steps=60, step_size=0.4, batch=100)
WIDE = Case("WIDE", (100,), 1000, 2, "gelu", False, n_steps=60, step_size=0.4, batch=400)
LONG = dataclasses.replace(HS, name="LONG", n_steps=2500)

CASES = {case.name: case for case in (HS, FID, LEBM, WIDE, LONG)}
