"""Where training images come from: scikit-learn's digits, named sets of the hub, Parquet files, folders of images."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import ImageError
from .decoding import decode_images
from .splits import Chosen, Parts, chosen, split_images, split_tables, split_word, walk
from .tables import Encoded, Found, first_line, read_parquet, rows

# Name on the command line: (repository on the hub, configuration, column of class labels)
HUB_SOURCES = {
    "mnist": ("ylecun/mnist", None, "label"),
    "fashion_mnist": ("zalando-datasets/fashion_mnist", None, "label"),
    "svhn": ("ufldl-stanford/svhn", "cropped_digits", "label"),
    "cifar10": ("uoft-cs/cifar10", None, "label"),
    "celeba": ("flwrlabs/celeba", None, None),
}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
HELD_OUT_FRACTION = 0.1  # of a source that comes without a held-out split
ORDER_SEED = 1  # of `source_order`
MAX_CLASSES = 100_000  # a label beyond is some other number: a classifier of so many classes fills the memory


@dataclasses.dataclass(frozen=True)
class Images:
    """Training and held-out images of one size, each in the order of `source_order`: any first n are a fair sample.

    name              what the user asked for
    train, held_out   uint8 [n, channels, size, size]
    train_labels, held_out_labels   int64 [n], or None where the source has no class labels
    columns           of the tables that they were read from; empty where there were none
    split_off         the source had no held-out images: they are a tenth of its training ones
    resized           words on how they were brought to one size; empty where they had it
    notes             what else `summary` tells: what was left out, and why there are no labels
    """

    name: str
    train: Tensor
    held_out: Tensor
    train_labels: Tensor | None
    held_out_labels: Tensor | None
    columns: tuple[str, ...] = ()
    split_off: bool = False
    resized: str = ""
    notes: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        return self.train.shape[1]

    @property
    def size(self) -> int:
        return self.train.shape[-1]

    @property
    def summary(self) -> str:
        """One line on what was understood, for the user to see whether it was what they meant.

        Example:
            >>> print(load_images("digits").summary)  # doctest: +NORMALIZE_WHITESPACE
            1617 training and 180 held-out images of 16 x 16 x 1 (enlarged from 8 x 8), held out from the training
            images, 10 classes, from digits
        """
        counts = f"{len(self.train)} training and {len(self.held_out)} held-out images"
        shape = f" of {self.size} x {self.size} x {self.channels}" + (f" ({self.resized})" if self.resized else "")
        split = ", held out from the training images" if self.split_off else ""
        if self.train_labels is None or self.held_out_labels is None:
            classes = "no class labels"
        else:
            n = len(torch.cat([self.train_labels, self.held_out_labels]).unique())
            classes = f"{n} class{'es' if n != 1 else ''}"
        return "; ".join([f"{counts}{shape}{split}, {classes}, from {self.name}", *self.notes])

    def require_classes(self) -> None:
        """What a classifier needs to learn from these images, and a Fréchet distance in its features.

        Raises:
            ImageError: an image has no class label, a label is no class number, or there is one image alone.
        """
        if self.train_labels is None or self.held_out_labels is None:
            seen = ""
            if self.columns:
                seen = f'; its columns are {", ".join(self.columns)}: give each image an integer in a column "label"'
            raise ImageError(f'"{self.name}" has no class labels, or not on every image{seen}')
        largest = int(self.train_labels.max())
        if largest >= MAX_CLASSES:
            raise ImageError(
                f'"{self.name}" has the class label {largest}: class labels must be numbers from 0 to {MAX_CLASSES - 1}'
            )
        for part, images in (("training", self.train), ("held-out", self.held_out)):
            if len(images) < 2:
                raise ImageError(
                    f'"{self.name}" has {len(images)} {part} image, a Fréchet distance needs at least 2 of them'
                )

    def fingerprint(self) -> str:
        """Hash of the training images in their order, "-", and hash of held-out images and all labels.

        A resumed run must see the same, and so must what measures a finished one.
        """
        return f"{_hash(self.train)}-{_hash(self.held_out, self.train_labels, self.held_out_labels)}"

    def require_fingerprint(self, fingerprint: str, run: object, *, in_order: bool) -> None:
        """That these are the images of a run, by the fingerprint that its folder keeps.

        Runs of versions that took images in the order of their source, without `source_order`, kept a hash of the
        training images alone. Such a run can be measured and drawn, but not gone on with: its batches were others.

        Arguments:
            run: its folder, for the message.
            in_order: the order of the training images matters, since training goes on.

        Raises:
            ImageError: the images are others, or of such an order.
        """
        if fingerprint == self.fingerprint():
            return
        was_of_source = "-" not in fingerprint and fingerprint == _hash(
            self.train[source_order(len(self.train)).argsort()]
        )
        if was_of_source and not in_order:
            return
        if was_of_source:
            raise ImageError(
                f'"{run}" was begun by an earlier version of jlebm_fast, which took the images in another order: it '
                "can be evaluated and drawn, but not gone on with; train another run, or go on with that version"
            )
        same_training = fingerprint.partition("-")[0] == _hash(self.train)
        which = "held-out images or the labels" if same_training else "images"
        raise ImageError(
            f'the {which} of "{self.name}" are not those that "{run}" was trained on: put them back as they were, or '
            "train another run"
        )


def to_network(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 pixels as float32 in [-1, 1] on `device`."""
    return images.to(device).float().div_(127.5).sub_(1.0)


def to_pixels(images: Tensor) -> Tensor:
    """float32 in [-1, 1] as uint8 pixels on the CPU."""
    return images.detach().add(1.0).mul(127.5).round_().clamp_(0, 255).to("cpu", torch.uint8)


def source_order(n: int) -> Tensor:
    """Which of the n images of a source comes first, second, …: a permutation that depends on n alone.

    Sources are often sorted by class; what takes the first few images of them would see the first classes only.
    """
    return torch.from_numpy(np.random.default_rng(ORDER_SEED).permutation(n))


def load_images(source: str, image_size: int | None = None, *, held_out_only: bool = False) -> Images:
    """Reads a whole source into memory as uint8, one size for all images.

    Training and held-out images come in the order of `source_order`, not in that of the source.

    Arguments:
        source: "digits", a name in `HUB_SOURCES`, or the path of a Parquet file, of a folder with Parquet files, or
            of a folder with images (class subfolders become labels). Files and folders with names of splits become
            the splits (`splits.SPLIT_WORDS`), or else values of a Parquet column "split" do; what is hidden is not
            read. A label below 0 is none, as the hub has it.
        image_size: pixels a side, a power of two; None takes the smallest of 16, 32, 64 that holds the images, and
            shrinks larger ones to the last.
        held_out_only: decode no training images, for figures of a finished run; `train` is empty then.

    Raises:
        ImageError: the source is missing, empty, broken, or its images differ in size and `image_size` is None.

    Example:
        >>> images = load_images("digits")
        >>> tuple(images.train.shape), images.channels
        ((1617, 1, 16, 16), 1)
    """
    if source == "digits":
        found = _digits()
    elif source in HUB_SOURCES:
        found = _hub(source)
    else:
        found = _path(source)
    train, held_out = found.train, found.held_out
    if held_out is None:
        train, held_out = _hold_out(train)
    if held_out_only:
        train = []
    decoded = decode_images([image[:2] for image in [*train, *held_out]], image_size)
    pixels = torch.from_numpy(decoded.pixels)
    orders = [source_order(len(part)) for part in (train, held_out)]
    labels = [_labels(part, order) for part, order in zip((train, held_out), orders, strict=True)]
    return Images(
        source,
        pixels[: len(train)][orders[0]],
        pixels[len(train) :][orders[1]],
        *labels,
        columns=found.columns,
        split_off=found.held_out is None,
        resized=decoded.resized,
        notes=found.notes,
    )


def _hash(*tensors: Tensor | None) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr(None if tensor is None else tuple(tensor.shape)).encode())
        if tensor is not None:
            digest.update(tensor.numpy())
    return digest.hexdigest()[:16]


def _hold_out(images: Sequence[Encoded]) -> tuple[list[Encoded], list[Encoded]]:
    """A fixed tenth of the images, the same for every seed of a run."""
    if len(images) < 2:
        raise ImageError(f"found {len(images)} image, need at least 2: one to train on and one to hold out")
    order = np.random.default_rng(0).permutation(len(images))
    n_held_out = max(1, round(HELD_OUT_FRACTION * len(images)))
    held_out = set(order[:n_held_out].tolist())
    train = [image for i, image in enumerate(images) if i not in held_out]
    return train, [images[i] for i in sorted(held_out)]


def _labels(images: Sequence[Encoded], order: Tensor) -> Tensor | None:
    if any(image.label is None for image in images):
        return None
    return torch.tensor([image.label for image in images], dtype=torch.int64)[order]


def _digits() -> Found:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return Found(
        [Encoded(f"digit {i}", p, int(t)) for i, (p, t) in enumerate(zip(pixels, digits.target, strict=True))], None
    )


def _hub(name: str) -> Found:
    import datasets

    repository, configuration, label_column = HUB_SOURCES[name]
    try:
        loaded = datasets.load_dataset(repository, configuration)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise ImageError(
            f'cannot download "{name}" ({repository}) from the hub: {first_line(error)}; '
            "with a copy at hand, pass its folder as --data PATH"
        ) from error
    picked = chosen(
        name, {split_word(split): Named(f"{name} {split}", table) for split, table in loaded.items()}, "image"
    )
    parts = [
        part if part is None else list(rows(part.table, part.origin, label_column))
        for part in (picked.train, picked.held_out)
    ]
    return Found(*parts, picked.notes, tuple(picked.train.table.column_names))


class Named(NamedTuple):
    """A `datasets.Dataset` and what messages call it."""

    origin: str
    table: Any

    def __len__(self) -> int:
        return len(self.table)


def _path(source: str) -> Found:
    path = pathlib.Path(source)
    if not path.exists():
        names = ", ".join(["digits", *HUB_SOURCES])
        # a run keeps the path as it was given: its figures may be asked for from another folder
        where = "" if path.is_absolute() else f' in "{pathlib.Path.cwd()}"'
        raise ImageError(f'no such file or folder: "{source}"{where} (--data takes {names}, or a path)')
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise ImageError(f'"{source}" is neither a Parquet file nor a folder')
        return read_parquet(path.parent, Chosen([(path.name,)], None, ()))
    files, folders = walk(source)
    parquet_files = [f for f in files if _suffix(f) == ".parquet" and path.joinpath(*f).is_file()]
    # a link that leads nowhere is a missing image, to be named when it is read
    images = [f for f in files if _suffix(f) in IMAGE_SUFFIXES and _is_file_or_lost(os.path.join(source, *f))]
    if parquet_files:
        found = read_parquet(path, chosen(source, split_tables(source, parquet_files), "Parquet file"))
        if images:
            found = found._replace(
                notes=(
                    *found.notes,
                    f"left out: {len(images)} image file{'s' if len(images) != 1 else ''} beside the Parquet files",
                )
            )
        return found
    if not images:
        raise ImageError(
            f'no images in folder "{source}": expected Parquet files or {", ".join(sorted(IMAGE_SUFFIXES))}; hidden '
            "files and folders are not read"
        )
    return _folder(source, images, folders)


def _suffix(file: Parts) -> str:
    return os.path.splitext(file[-1])[1].lower()


def _is_file_or_lost(path: str) -> bool:
    return os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))


def _folder(source: str, images: list[Parts], folders: list[Parts]) -> Found:
    tree = split_images(source, images, folders)
    files = chosen(source, tree.by_split, "image")
    used = [*files.train, *(files.held_out or [])]
    # Labels only where the tree says classes clearly: each image directly inside a class folder.
    labelled = all(tree.class_of[file] is not None for file in used)
    class_index = {name: i for i, name in enumerate(sorted({tree.class_of[f] for f in used}))} if labelled else {}

    def encoded(part: list[Parts]) -> list[Encoded]:
        paths = [os.path.join(source, *file) for file in part]
        return [Encoded(p, p, class_index.get(tree.class_of[f])) for p, f in zip(paths, part, strict=True)]

    return Found(encoded(files.train), None if files.held_out is None else encoded(files.held_out), files.notes)
