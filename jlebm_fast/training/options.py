"""What `jlebm train` can be told, with its defaults: the content of a run's config.json."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jlebm_fast.models import MODELS, LearningRates, ModelConfig, resolve_prior, used_fields

from ..errors import RunError
from ..models.ladder import MAX_CHANNELS

# Options that may change when a run goes on: they move its end, what it writes when, or where it reads and computes.
# That --data leads to the same images is seen from their fingerprint. Another device has other roundings.
RESUMABLE_CHANGES = {"steps", "epochs", "log_every", "checkpoint_every", "data", "device"}


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Images, model, learning."""

    data: str = "digits"
    """Images: digits (bundled with scikit-learn), mnist, fashion_mnist, svhn, cifar10, celeba (downloaded), or the path
    of a Parquet file or of a folder with Parquet files or images; docs/training.md says how folders are read."""

    image_size: int = 0
    """Pixels a side, a power of two; 0 takes the smallest of 16, 32, 64 that holds the images, and shrinks larger ones
    to 64."""

    latent_dims: tuple[int, ...] = ModelConfig.latent_dims
    """Dims of each latent layer, bottom (fine detail) to top (global form)."""

    model: Literal[
        "joint", "lebm", "cg", "cg_ebm", "abp", "sri", "vlae", "lvae", "biva", "two_stage_vae", "rae", "ncp_vae",
        "multi_ncp",
    ] = "joint"  # fmt: skip
    """joint: joint energy prior, ladder encoder. lebm: the same without encoder, posterior by chains. cg: conditional
    Gaussians between layers. cg_ebm: these, tilted by one energy per layer. Baselines: abp, sri (chains, no energy),
    vlae, lvae, biva (variational), two_stage_vae, rae, ncp_vae, multi_ncp (a prior learned after the autoencoder)."""

    prior: Literal["auto", "ebm", "gaussian", "nce", "gmm", "vae"] = "auto"
    """auto: the model's own. ebm: p(z) ∝ exp(f(z)) N(0, I). gaussian: f = 0. Learned after joint, vlae or rae, on their
    latents: nce (classifiers against N(0, I)), gmm (Gaussian mixture), vae (a second, small VAE)."""

    width: int = ModelConfig.width
    """Channels of the largest feature map of generator and encoder; doubled at each smaller one."""

    combine: Literal["add", "concat"] = "add"
    """How a lower latent layer meets the features from above."""

    reconstruction_weight: float = ModelConfig.reconstruction_weight
    """1/(2σ²) of the observation model, for pixels in [-1, 1]."""

    energy_hidden: int = ModelConfig.energy_hidden
    """Units of each hidden layer of f."""

    energy_depth: int = ModelConfig.energy_depth
    """Hidden layers of f."""

    energy_activation: Literal["leaky_relu", "relu", "gelu", "silu", "mish", "tanh", "softplus", "elu"] = "leaky_relu"
    """Activation of f."""

    spectral_norm: bool = False
    """Divide each weight matrix of f by its largest singular value."""

    chain_steps: int = ModelConfig.chain_steps
    """Langevin steps of the prior chain, started at N(0, I)."""

    step_size: float = ModelConfig.step_size
    """s of the Langevin step: drift s²/2, noise s."""

    posterior_steps: int = ModelConfig.posterior_steps
    """Langevin steps of the posterior chain, in models without an encoder (lebm, cg_ebm, abp, sri)."""

    posterior_step_size: float = ModelConfig.posterior_step_size
    """s of the posterior chain's step."""

    conditional_hidden: int = ModelConfig.conditional_hidden
    """Units of the nets of conditional Gaussians (cg, cg_ebm, sri, lvae, biva)."""

    nce_stages: int = 0
    """Classifiers of the nce prior; 0: one for ncp_vae, three for multi_ncp."""

    nce_sampler: Literal["chain", "resampling"] = "chain"
    """Sampling of the nce prior: the Langevin chain, or importance resampling of N(0, I)."""

    mixture_components: int = ModelConfig.mixture_components
    """Components of the gmm prior."""

    stage_steps: int = 0
    """Learning steps of each stage after the first; 0 for as many as the first."""

    steps: int = 2500
    """Learning steps, one batch each."""

    epochs: int = 0
    """Passes over the images, instead of --steps; 0 leaves it to --steps."""

    batch_size: int = 100
    """Images, and prior chains, per learning step; under torchrun of all ranks together."""

    autoencoder_lr: float = 1e-3
    """Adam's learning rate of generator and encoder."""

    energy_lr: float = 1e-4
    """Adam's learning rate of f."""

    energy_weight_decay: float = 0.0
    """Decoupled weight decay of f, in units of its learning rate: holds f and the encoder back from drifting off
    together, which no other term of the objective prevents."""

    lr_schedule: Literal["epoch", "constant", "cosine"] = "epoch"
    """epoch: times --lr-decay after each epoch. cosine: falls to zero over the run, or over each of its stages."""

    lr_decay: float = 0.998
    """Factor on all learning rates after each epoch, for --lr-schedule epoch."""

    warmup_steps: int = 0
    """Steps over which the learning rates rise from zero; 0 for none."""

    clip_norm: float = 0.0
    """Longest gradient of an optimiser, Euclidean norm; longer ones are scaled down to it. 0 leaves all as they are."""

    ema_decay: float = 0.0
    """Decay per step of an exponential moving average of the parameters, which is then what the run samples from
    (0.999 remembers about 1,000 steps); min(decay, (1 + t) / (10 + t)) after t steps; 0 for none."""

    chains: Literal["short-run", "persistent"] = "short-run"
    """Where the prior chains of a learning step start. short-run: at N(0, I). persistent: where earlier ones ended."""

    replay_batches: int = 100
    """Ends of prior chains that --chains persistent keeps, in batches."""

    refresh_fraction: float = 0.05
    """Share of the prior chains that start at N(0, I) all the same, for --chains persistent."""

    seed: int = 0
    """Everything random follows from it: same seed, machine and thread count, same run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""

    log_every: int = 50
    """Steps between lines of metrics.jsonl."""

    checkpoint_every: int = 500
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "width", "energy_hidden", "energy_depth", "chain_steps", "posterior_steps")
        for name in (*positive, "conditional_hidden", "mixture_components"):
            self._require(name, "a positive integer", getattr(self, name) >= 1)
        self._require("width", f"at most {MAX_CHANNELS}, which no feature map goes beyond", self.width <= MAX_CHANNELS)
        for name in ("nce_stages", "stage_steps"):
            self._require(name, "a positive integer, or 0 for the default", getattr(self, name) >= 0)
        for name in ("log_every", "checkpoint_every"):
            self._require(name, "a positive integer", getattr(self, name) >= 1)
        for name in (
            "autoencoder_lr",
            "energy_lr",
            "step_size",
            "reconstruction_weight",
            "posterior_step_size",
        ):
            self._require(name, "positive and finite", 0 < getattr(self, name) < float("inf"))
        self._require("lr_decay", "in (0, 1], a factor per epoch", 0 < self.lr_decay <= 1)
        self._require(
            "energy_weight_decay", "between 0 and 1 / --energy-lr", 0 <= self.energy_weight_decay * self.energy_lr <= 1
        )
        self._require("epochs", "positive, or 0 for --steps", self.epochs >= 0)
        self._require("warmup_steps", "positive, or 0 for none", self.warmup_steps >= 0)
        self._require("clip_norm", "positive and finite, or 0 for none", 0 <= self.clip_norm < float("inf"))
        self._require("ema_decay", "in [0, 1)", 0 <= self.ema_decay < 1)
        self._require("replay_batches", "a positive integer", self.replay_batches >= 1)
        self._require("refresh_fraction", "in [0, 1]", 0 <= self.refresh_fraction <= 1)
        require_seed(self.seed)
        self._require(
            "latent_dims", "one or more positive integers", bool(self.latent_dims) and min(self.latent_dims) > 0
        )

        try:
            prior = resolve_prior(self.model, self.prior)
        except ValueError as error:
            raise RunError(f"--prior {self.prior} with --model {self.model}: {error}") from error
        self._refuse_idle_options(prior)

    def _refuse_idle_options(self, prior: str) -> None:
        """An option that the model never reads would be believed to act."""
        unused = {field.name for field in dataclasses.fields(ModelConfig)} - used_fields(self.model, prior)
        if "energy_hidden" in unused:
            unused |= {"energy_lr", "energy_weight_decay"}
        for field in dataclasses.fields(self):
            if field.name in unused and getattr(self, field.name) != field.default:
                option = "--" + field.name.replace("_", "-")
                raise RunError(f"{option} does nothing with --model {self.model} and prior {prior}: leave it out")
        for name, needed, value in (
            ("replay_batches", "chains", "persistent"),
            ("refresh_fraction", "chains", "persistent"),
            ("lr_decay", "lr_schedule", "epoch"),
        ):
            if getattr(self, needed) != value and getattr(self, name) != getattr(TrainOptions, name):
                option, other = ("--" + n.replace("_", "-") for n in (name, needed))
                raise RunError(
                    f"{option} does nothing with {other} {getattr(self, needed)}: leave it out, or say {other} {value}"
                )

    def _require(self, name: str, expected: str, holds: bool) -> None:
        if not holds:
            raise RunError(f"--{name.replace('_', '-')} must be {expected}, got {getattr(self, name)}")

    def model_config(self) -> ModelConfig:
        """The part that the model is built from."""
        names = [field.name for field in dataclasses.fields(ModelConfig)]
        values = {name: getattr(self, name) for name in names}
        values["prior"] = self.resolved_prior
        values["nce_stages"] = self.nce_stages or MODELS[self.model].nce_stages
        return ModelConfig(**values)

    @property
    def resolved_prior(self) -> str:
        """The prior that the run has, where --prior may say "auto"."""
        return resolve_prior(self.model, self.prior)

    def learning_rates(self) -> LearningRates:
        return LearningRates(self.autoencoder_lr, self.energy_lr, self.energy_weight_decay)

    def resumable_changes(self) -> set[str]:
        """Options that may change when the run goes on."""
        # The end decides every rate of a cosine, and with several stages where the next one begins.
        fixed = self.lr_schedule == "cosine" or self.resolved_prior in ("nce", "gmm", "vae")
        ends = {"steps", "epochs"} if fixed else set()
        return RESUMABLE_CHANGES - ends

    def total_steps(self, steps_per_epoch: int) -> int:
        return self.epochs * steps_per_epoch if self.epochs else self.steps


def require_seed(seed: int) -> None:
    """
    Raises:
        RunError: no seed of torch's generators, which take negative ones for others.
    """
    if not 0 <= seed < 2**63:
        raise RunError(f"--seed must be between 0 and 2^63 - 1, got {seed}")
