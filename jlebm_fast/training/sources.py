"""Where training images come from: scikit-learn's digits, named sets of the hub, Parquet files, folders of images."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .decoding import decode_images
from .errors import ImageError

# Name on the command line: (repository on the hub, configuration, column of class labels)
HUB_SOURCES = {
    "mnist": ("ylecun/mnist", None, "label"),
    "fashion_mnist": ("zalando-datasets/fashion_mnist", None, "label"),
    "svhn": ("ufldl-stanford/svhn", "cropped_digits", "label"),
    "cifar10": ("uoft-cs/cifar10", None, "label"),
    "celeba": ("flwrlabs/celeba", None, None),
}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
HELD_OUT_SPLITS = ("test", "validation", "valid", "val")
HELD_OUT_FRACTION = 0.1  # of a source that comes without a held-out split
MAX_CLASSES = 100_000  # a label beyond is some other number: a classifier of so many classes fills the memory


@dataclasses.dataclass(frozen=True)
class Images:
    """Training and held-out images of one size.

    name              what the user asked for
    train, held_out   uint8 [n, channels, size, size]
    train_labels, held_out_labels   int64 [n], or None where the source has no class labels
    """

    name: str
    train: Tensor
    held_out: Tensor
    train_labels: Tensor | None
    held_out_labels: Tensor | None

    @property
    def channels(self) -> int:
        return self.train.shape[1]

    @property
    def size(self) -> int:
        return self.train.shape[-1]

    def require_classes(self) -> None:
        """What a classifier needs to learn from these images, and a Fréchet distance in its features.

        Raises:
            ImageError: an image has no class label, a label is no class number, or there is one image alone.
        """
        if self.train_labels is None or self.held_out_labels is None:
            raise ImageError(f'"{self.name}" has no class labels, or not on every image')
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
        """Hash of the training images in their order; a resumed run must see the same."""
        digest = hashlib.sha256(repr(tuple(self.train.shape)).encode())
        digest.update(self.train.numpy())
        return digest.hexdigest()[:16]


class Encoded(NamedTuple):
    """One image before decoding: where it came from, its file or bytes or pixels, and its class or None."""

    origin: str
    content: Any
    label: int | None


def to_network(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 pixels as float32 in [-1, 1] on `device`."""
    return images.to(device).float().div_(127.5).sub_(1.0)


def to_pixels(images: Tensor) -> Tensor:
    """float32 in [-1, 1] as uint8 pixels on the CPU."""
    return images.detach().add(1.0).mul(127.5).round_().clamp_(0, 255).to("cpu", torch.uint8)


def load_images(source: str, image_size: int | None = None, *, held_out_only: bool = False) -> Images:
    """Reads a whole source into memory as uint8, one size for all images.

    Arguments:
        source: "digits", a name in `HUB_SOURCES`, or the path of a Parquet file, of a folder with Parquet files, or
            of a folder with images (class subfolders become labels; subfolders "train" and "test" become the splits).
            A label below 0 is none, as the hub has it.
        image_size: pixels a side, a power of two; None takes the smallest of 16, 32, 64 that holds the images.
        held_out_only: decode no training images, for figures of a finished run; `train` is empty then.

    Raises:
        ImageError: the source is missing, empty, broken, or its images differ in size and `image_size` is None.

    Example:
        >>> images = load_images("digits")
        >>> tuple(images.train.shape), images.channels
        ((1617, 1, 16, 16), 1)
    """
    if source == "digits":
        splits = _digits()
    elif source in HUB_SOURCES:
        splits = _hub(source)
    else:
        splits = _path(source)
    train = splits.get("train", [])
    held_out = next((splits[name] for name in HELD_OUT_SPLITS if splits.get(name)), None)
    if not train:
        raise ImageError(f'no training images in "{source}"')
    if held_out is None:
        train, held_out = _hold_out(train)
    if held_out_only:
        train = []
    pixels = torch.from_numpy(decode_images([image[:2] for image in [*train, *held_out]], image_size))
    labels = [_labels(part) for part in (train, held_out)]
    return Images(source, pixels[: len(train)].contiguous(), pixels[len(train) :].contiguous(), *labels)


def _hold_out(images: Sequence[Encoded]) -> tuple[list[Encoded], list[Encoded]]:
    """A fixed tenth of the images, the same for every seed of a run."""
    if len(images) < 2:
        raise ImageError(f"found {len(images)} image, need at least 2: one to train on and one to hold out")
    order = np.random.default_rng(0).permutation(len(images))
    n_held_out = max(1, round(HELD_OUT_FRACTION * len(images)))
    held_out = set(order[:n_held_out].tolist())
    train = [image for i, image in enumerate(images) if i not in held_out]
    return train, [images[i] for i in sorted(held_out)]


def _labels(images: Sequence[Encoded]) -> Tensor | None:
    if any(image.label is None for image in images):
        return None
    return torch.tensor([image.label for image in images], dtype=torch.int64)


def _digits() -> dict[str, list[Encoded]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return {
        "train": [Encoded(f"digit {i}", p, int(t)) for i, (p, t) in enumerate(zip(pixels, digits.target, strict=True))]
    }


def _hub(name: str) -> dict[str, list[Encoded]]:
    import datasets

    repository, configuration, label_column = HUB_SOURCES[name]
    try:
        loaded = datasets.load_dataset(repository, configuration)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ImageError(
            f'cannot download "{name}" ({repository}) from the hub: {reason}; '
            "with a copy at hand, pass its folder as --data PATH"
        ) from error
    splits = {split: table for split, table in loaded.items() if split in ("train", *HELD_OUT_SPLITS)}
    return {split: list(_rows(table, f"{name} {split}", label_column)) for split, table in splits.items()}


def _path(source: str) -> dict[str, list[Encoded]]:
    path = pathlib.Path(source)
    if not path.exists():
        names = ", ".join(["digits", *HUB_SOURCES])
        # a run keeps the path as it was given: its figures may be asked for from another folder
        where = "" if path.is_absolute() else f' in "{pathlib.Path.cwd()}"'
        raise ImageError(f'no such file or folder: "{source}"{where} (--data takes {names}, or a path)')
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise ImageError(f'"{source}" is neither a Parquet file nor a folder')
        return _parquet({"train": [path]})
    # a folder may be called so too, and its files are found by themselves
    parquet_files = sorted(f for f in path.rglob("*") if f.suffix.lower() == ".parquet" and f.is_file())
    if parquet_files:
        by_split: dict[str, list[pathlib.Path]] = {}
        for file in parquet_files:
            by_split.setdefault(_split_of(file, path), []).append(file)
        return _parquet(by_split)
    return _folder(path)


def _split_of(file: pathlib.Path, root: pathlib.Path) -> str:
    """The split that a Parquet file's folders or name speak of, as the hub names them: train-00000-of-00001.parquet."""
    relative = file.relative_to(root)
    words = [*relative.parts[:-1], *relative.stem.replace("_", "-").split("-")]
    return next((name for name in HELD_OUT_SPLITS if name in words), "train")


def _parquet(by_split: dict[str, list[pathlib.Path]]) -> dict[str, list[Encoded]]:
    import datasets
    import pyarrow.lib
    import pyarrow.parquet

    splits = {}
    for split, files in by_split.items():
        splits[split] = []
        for file in files:
            try:
                table = datasets.Dataset(pyarrow.parquet.read_table(file))
            except (OSError, pyarrow.lib.ArrowException) as error:
                raise ImageError(f'cannot read Parquet file "{file}": {_first_line(error)}') from error
            label = next((name for name in ("label", "labels", "class") if name in table.column_names), None)
            splits[split] += _rows(table, str(file), label)
    return splits


def _rows(table: Any, origin: str, label_column: str | None) -> Iterator[Encoded]:
    """Rows of a `datasets.Dataset`, images still encoded."""
    import datasets

    column = next((name for name, kind in table.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        column = next((name for name in ("image", "img", "png", "jpg") if name in table.column_names), None)
    if column is None:
        raise ImageError(
            f"{origin} has no image column, named image, img, png or jpg; its columns are "
            f"{', '.join(table.column_names)}"
        )
    kind = table.features[column]
    if isinstance(kind, datasets.Image):
        table = table.cast_column(column, datasets.Image(decode=False))
    columns = [column] if label_column is None else [column, label_column]
    for i, row in enumerate(table.select_columns(columns)):
        content = row[column]
        if isinstance(content, dict):
            content = content["bytes"] if content.get("bytes") is not None else content.get("path")
        if content is None:
            raise ImageError(f'row {i} of {origin} has no image in column "{column}"')
        label = row[label_column] if label_column is not None else None
        if label is not None and not (isinstance(label, int) and label < 2**63):
            raise ImageError(
                f'column "{label_column}" of {origin} must hold integers, got {label!r} in row {i}: number the '
                "classes, or leave the column out"
            )
        label = None if label is None or label < 0 else label
        yield Encoded(f"row {i} of {origin}", content, label)


def _folder(path: pathlib.Path) -> dict[str, list[Encoded]]:
    held_out = next((name for name in HELD_OUT_SPLITS if (path / name).is_dir()), None)
    if held_out is not None and not (path / "train").is_dir():
        raise ImageError(
            f'"{path}" has held-out images in "{held_out}" but no folder "train": give both, or rename "{held_out}" if '
            "it is to be trained on"
        )
    if (path / "train").is_dir():
        folders = {"train": path / "train"} | ({held_out: path / held_out} if held_out else {})
    else:
        folders = {"train": path}
    files = {split: _image_files(folder) for split, folder in folders.items()}
    classes = sorted({f.parent.name for split, folder in folders.items() for f in files[split] if f.parent != folder})
    class_index = {name: i for i, name in enumerate(classes)}
    # Labels only where the tree says classes clearly: each image directly inside a class folder.
    labelled = all(f.parent.parent == folder for split, folder in folders.items() for f in files[split])
    return {
        split: [Encoded(str(f), f, class_index[f.parent.name] if labelled else None) for f in files[split]]
        for split in folders
    }


def _image_files(folder: pathlib.Path) -> list[pathlib.Path]:
    # a link that leads nowhere is a missing image, to be named when it is read
    found = (f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
    files = sorted(f for f in found if f.is_file() or (f.is_symlink() and not f.exists()))
    if not files:
        raise ImageError(
            f'no images in folder "{folder}": expected Parquet files or {", ".join(sorted(IMAGE_SUFFIXES))}'
        )
    return files


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
