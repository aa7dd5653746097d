"""Which images of a folder are for training, which are held out, and which class folder each lies in."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..errors import ImageError

# What names of files and folders call the splits: the words of the hub, and of the files that MNIST comes in.
SPLIT_WORDS = {
    "train": ("train", "training", "trainset"),
    "test": ("test", "testing", "testset", "t10k", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
    "extra": ("extra",),  # SVHN's easier images: part of no published training set
}
HELD_OUT_SPLITS = ("test", "validation")  # the first that is there is held out
SPLIT_OF_WORD = {word: split for split, words in SPLIT_WORDS.items() for word in words}
WORD = re.compile(r"t10k|[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+|[^\W\d_]+", re.ASCII)

Parts = tuple[str, ...]  # of a path below the folder that was asked for


class Chosen(NamedTuple):
    """What of a source is trained on, what is held out (None where nothing is), and a note on what is neither."""

    train: list[Any]
    held_out: list[Any] | None
    notes: tuple[str, ...]


def split_word(name: str) -> str | None:
    """The split that a name is, in any case: "Testing" and "split=test" are "test".

    Example:
        >>> split_word("Testing"), split_word("split=dev"), split_word("test_tube")
        ('test', 'validation', None)
    """
    return SPLIT_OF_WORD.get(name.lower().removeprefix("split="))


def split_in(name: str) -> str | None:
    """The one split that a name has a word of; None where it speaks of none, or of several.

    Example:
        >>> split_in("mnist_train"), split_in("TestSet-00"), split_in("train-test"), split_in("train_extra")
        ('train', 'test', None, 'extra')
    """
    found = {SPLIT_OF_WORD[word] for word in (w.lower() for w in WORD.findall(name)) if word in SPLIT_OF_WORD}
    if split_word(name) is not None:
        return split_word(name)
    if "extra" in found:
        return "extra"
    return found.pop() if len(found) == 1 else None


def chosen(source: str, by_split: dict[str | None, Sequence[Any]], unit: str) -> Chosen:
    """What to train on and what to hold out, where each split is known; None are those whose names speak of none.

    Arguments:
        by_split: sequences of whatever is counted in `unit`: "image" or "Parquet file".

    Raises:
        ImageError: there are held-out images and none to train on.
    """
    left = {split: found for split, found in by_split.items() if len(found)}
    held_out_split = next((split for split in HELD_OUT_SPLITS if split in left), None)
    train_split = next((split for split in ("train", None, "extra") if split in left), "")
    if train_split == "":
        if held_out_split is None:
            raise ImageError(f'no training images in "{source}"')
        raise ImageError(
            f'"{source}" has held-out images, of the split "{held_out_split}", but none to train on: add a split '
            f'"train", or pass what is to be trained on by its own path'
        )
    train, held_out = left.pop(train_split), left.pop(held_out_split, None)
    out = []
    for split, found in left.items():
        what = f'the split "{split}"' if split else "no split"
        out.append(f"{len(found)} {unit}{'s' if len(found) != 1 else ''} of {what}")
    return Chosen(train, held_out, (f"left out: {', '.join(out)}",) if out else ())


def walk(root: str) -> tuple[list[Parts], list[Parts]]:
    """Every file and every folder below a folder, as the parts of its path below it, through links to folders.

    What is hidden, with a name that begins with a dot, is left out: thumbnails, copies of editors, not images.

    Raises:
        ImageError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise ImageError(
            f'cannot read folder "{error.filename}": {error.strerror}: make it readable, or move it away'
        ) from error

    found: tuple[list[Parts], list[Parts]] = ([], [])
    above = {root: frozenset([os.path.realpath(root)])}  # real paths of a folder and those it was reached through
    for folder, names, files in os.walk(root, followlinks=True, onerror=refuse):
        behind = above.pop(folder)
        kept = []
        for name in names:
            path = os.path.join(folder, name)
            # a folder that is no link cannot lead back to one above it
            real = os.path.realpath(path) if os.path.islink(path) else path
            if not name.startswith(".") and real not in behind:
                kept.append(name)
                above[path] = behind | {os.path.realpath(path)}
        names[:] = kept
        relative = os.path.relpath(folder, root)
        parts = () if relative == os.curdir else tuple(relative.split(os.sep))
        found[0].extend((*parts, name) for name in files if not name.startswith("."))
        found[1].extend((*parts, name) for name in kept)
    return sorted(found[0]), sorted(found[1])


def _shared(folders: Sequence[Parts]) -> int:
    """How many folders, from the first on, all of these share."""
    first, last = min(folders), max(folders)
    return next((i for i, pair in enumerate(zip(first, last)) if pair[0] != pair[1]), min(len(first), len(last)))


def split_tables(source: str, files: Sequence[Parts]) -> dict[str | None, list[Parts]]:
    """Table files by the split that their folders or names speak of: train-00000-of-00001, split=test/0.

    Raises:
        ImageError: a file's folder speaks of one split and its name of another.
    """
    shared = _shared([file[:-1] for file in files])
    by_split: dict[str | None, list[Parts]] = {}
    for file in files:
        names = [*file[:-1], os.path.splitext(file[-1])[0]]
        found = {split_in(name) for name in names[shared:]} - {None}
        if "extra" in found:
            found = {"extra"}
        if len(found) > 1:
            raise ImageError(
                f'cannot tell the split of "{os.path.join(source, *file)}": its path speaks of '
                f"{' and '.join(sorted(found))}; rename it"
            )
        if not found:  # folders that all files lie in tell no file from another, and count where nothing else does
            found = {next((split_in(name) for name in reversed(names[:shared]) if split_in(name)), None)}
        by_split.setdefault(found.pop(), []).append(file)
    return by_split


class Tree(NamedTuple):
    """Image files of a folder by their split, and the class folder of each, or None where the tree has no classes."""

    by_split: dict[str | None, list[Parts]]
    class_of: dict[Parts, str | None]


def split_images(source: str, files: Sequence[Parts], folders: Sequence[Parts]) -> Tree:
    """Image files by the folder of their split, which may lie above or below their class folder.

    A folder is a split if its name is one (`split_word`), or if all folders beside it have names with a word of one.

    Arguments:
        files: the images.
        folders: all folders, with images or without.

    Raises:
        ImageError: folders may be splits or classes, the held-out one is empty, or there is none to train on.
    """
    with_images = [file[:-1] for file in files]
    shared = _shared(with_images)
    depth, split_of = _split_depth(source, with_images, shared)
    by_split: dict[str | None, list[Parts]] = {}
    class_of: dict[Parts, str | None] = {}
    # folders around all of it say nothing of a class, unless nothing else does
    above = shared if depth is None or depth > shared else depth
    if depth is None and any(len(folder) == shared for folder in with_images):
        above = 0
    for file, folder in zip(files, with_images, strict=True):
        split = split_of(folder[depth]) if depth is not None and len(folder) > depth else None
        by_split.setdefault(split, []).append(file)
        classes = [name for i, name in enumerate(folder) if i >= above and i != depth]
        class_of[file] = classes[0] if len(classes) == 1 else None
    if depth is not None and not by_split.keys() & {*HELD_OUT_SPLITS}:
        empty = next((f for f in folders if len(f) == depth + 1 and split_word(f[-1]) in HELD_OUT_SPLITS), None)
        if empty is not None:
            raise ImageError(f'no images in folder "{os.path.join(source, *empty)}": fill it, or remove it')
    return Tree(by_split, class_of)


def _split_depth(source: str, folders: Sequence[Parts], shared: int) -> tuple[int | None, Callable[[str], str | None]]:
    """How deep the folders of the splits lie, None where there are none, and what tells the split of such a name."""
    for depth in range(max(map(len, folders))):
        names = sorted({folder[depth] for folder in folders if len(folder) > depth})
        are = {name: split for name in names if (split := split_word(name))}
        splits = set(are.values())
        if "train" in splits and splits & {*HELD_OUT_SPLITS}:
            return depth, split_word  # beside these "train_raw" is something else
        if depth > shared:  # below folders that differ, perhaps classes: two of them say more than one
            continue
        speak = {name: split for name in names if (split := split_in(name))}
        others = [name for name in names if name not in speak]
        two = "train" in speak.values() and {*speak.values()} & {*HELD_OUT_SPLITS}
        if two and not others:
            return depth, split_in
        held_out = next((name for name, split in are.items() if split in HELD_OUT_SPLITS), None)
        if held_out is not None and "extra" not in splits:
            raise ImageError(
                f'"{source}" has held-out images in "{held_out}" but no folder "train": give both, or rename '
                f'"{held_out}" if it is to be trained on, or pass its own path'
            )
        if (two or "train" in splits) and others:
            named = ", ".join(f'"{name}"' for name in (speak if two else are))
            raise ImageError(
                f'cannot tell whether {named} in "{source}" are splits or classes beside "{others[0]}": rename them if '
                f'they are classes, else move "{others[0]}" away'
            )
        if splits - {"extra"}:
            return depth, split_in
    return None, split_in
