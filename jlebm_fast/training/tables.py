"""Images in tables: the columns of images, of class labels and of splits, and Parquet files."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..errors import ImageError
from .splits import SPLIT_WORDS, Chosen, Parts, chosen, split_word

IMAGE_COLUMNS = ("image", "img", "png", "jpg")
LABEL_COLUMNS = ("label", "labels", "class")  # the first that is there, whatever it holds
# taken where they hold integers, one of them alone in a table: they are also called so for other reasons
OTHER_LABEL_COLUMNS = ("fine_label", "digit", "target", "targets", "cls", "classes", "y")
SPLIT_COLUMN = "split"
ROWS_AT_ONCE = 1000


class Encoded(NamedTuple):
    """One image before decoding: where it came from, its file or bytes or pixels, and its class or None."""

    origin: str
    content: Any
    label: int | None


class Found(NamedTuple):
    """The images of a source before decoding, in its order; `held_out` is None where it has none."""

    train: list[Encoded]
    held_out: list[Encoded] | None
    notes: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()


class Said(NamedTuple):
    """What the split column of a table says of one image: the value, and where it stands."""

    value: Any
    column: str
    origin: str


def read_parquet(root: pathlib.Path, files: Chosen) -> Found:
    """The images of Parquet files, still encoded; where their names speak of nothing held out, split by a column.

    Raises:
        ImageError: a file is damaged, has no column of images, or a row has none; the column of splits has other values
            too, or nothing to train on.
    """
    import datasets
    import pyarrow.lib
    import pyarrow.parquet

    columns: dict[str, None] = {}
    notes = dict.fromkeys(files.notes)
    said: list[Said | None] = []  # of the images read so far, None where a table has no column of splits

    def images(part: list[Parts]) -> Iterator[Encoded]:
        for file in (root.joinpath(*parts) for parts in part):
            try:
                # not what folders called key=value add as columns: they are no part of the file
                table = datasets.Dataset(pyarrow.parquet.read_table(file, partitioning=None))
            except (OSError, pyarrow.lib.ArrowException) as error:
                raise ImageError(f'cannot read Parquet file "{file}": {first_line(error)}') from error
            columns.update(dict.fromkeys(table.column_names))
            label, why = _label_column(table)
            if why:
                notes[why] = None
            said.extend(_said_of_splits(table, str(file)))
            yield from rows(table, str(file), label, file.parent)

    train = list(images(files.train))
    if files.held_out is not None:
        return Found(train, list(images(files.held_out)), tuple(notes), tuple(columns))
    source = root if len(files.train) != 1 else root.joinpath(*files.train[0])
    found = _by_column(str(source), train, said)
    return Found(found.train, found.held_out, (*notes, *found.notes), tuple(columns))


def _said_of_splits(table: Any, origin: str) -> list[Said | None]:
    """What its column of splits says of each row; a class label's name is what it says."""
    column = next((name for name in table.column_names if name.lower() == SPLIT_COLUMN), None)
    if column is None:
        return [None] * len(table)
    values = table.data.column(column).to_pylist()
    names = getattr(table.features[column], "names", None)
    if names is not None:
        values = [names[value] if value is not None and 0 <= value < len(names) else value for value in values]
    return [Said(value, column, f"row {i} of {origin}") for i, value in enumerate(values)]


def _by_column(source: str, images: list[Encoded], said: list[Said | None]) -> Chosen:
    """The images by what the column of splits says of each: all to train on where it tells none from another.

    Raises:
        ImageError: some of its values are names of splits and some are not, or there is nothing to train on.
    """
    splits = [split_word(s.value.strip()) if s is not None and isinstance(s.value, str) else None for s in said]
    other = next((s for s, split in zip(said, splits, strict=True) if s is not None and split is None), None)
    named = next((s for s, split in zip(said, splits, strict=True) if split is not None), None)
    if other is not None and named is not None:
        raise ImageError(
            f'column "{other.column}" must have the name of a split in every row, {", ".join(SPLIT_WORDS)}, got '
            f"{other.value!r} in {other.origin} beside {named.value!r} in {named.origin}: write one of these names "
            "there, or rename the column if it is no split"
        )
    if other is not None:
        return Chosen(images, None, (f'not split by the column "{other.column}": {other.value!r} is no split',))
    if len(set(splits)) < 2 or not set(splits) - {"train", None}:
        return Chosen(images, None, ())
    by_split: dict[str | None, list[Encoded]] = {}
    for image, split in zip(images, splits, strict=True):
        by_split.setdefault(split, []).append(image)
    found = chosen(source, by_split, "image")
    return found._replace(notes=(f'split by the column "{named.column}"', *found.notes))


def _label_column(table: Any) -> tuple[str | None, str]:
    """The column of class labels, or None and, where there are several that could be, why it is none of them."""
    names = {name.lower(): name for name in table.column_names}
    known = next((name for name in LABEL_COLUMNS if name in table.column_names), None)
    known = known or next((names[name] for name in LABEL_COLUMNS if name in names), None)
    if known is not None:
        return known, ""
    import pyarrow.types

    schema = table.data.schema
    others = [names[name] for name in OTHER_LABEL_COLUMNS if name in names]
    others = [name for name in others if pyarrow.types.is_integer(schema.field(name).type)]
    if len(others) > 1:
        return None, f'no class labels: {" and ".join(others)} could both be; call one of the columns "label"'
    return (others[0] if others else None), ""


def rows(table: Any, origin: str, label_column: str | None, folder: pathlib.Path | None = None) -> Iterator[Encoded]:
    """Rows of a `datasets.Dataset`, images still encoded; files that it names lie beside it, in `folder`, or here."""
    import datasets

    column = next((name for name, kind in table.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        names = {name.lower(): name for name in reversed(table.column_names)} | {n: n for n in table.column_names}
        column = next((names[name] for name in IMAGE_COLUMNS if name in names), None)
    if column is None:
        raise ImageError(
            f"{origin} has no image column, named {', '.join(IMAGE_COLUMNS[:-1])} or {IMAGE_COLUMNS[-1]}; its columns "
            f"are {', '.join(table.column_names)}"
        )
    kind = table.features[column]
    if isinstance(kind, datasets.Image):
        table = table.cast_column(column, datasets.Image(decode=False))
    for i, (content, label) in enumerate(_values(table, column, label_column)):
        name = f"row {i} of {origin}"
        if isinstance(content, dict):
            if content.get("bytes") is not None:
                content = content["bytes"]
            elif content.get("path") is not None:
                content = _named_file(content["path"], name, folder)
                name = f'"{content}" ({name})'
            else:
                content = None
        if content is None:
            raise ImageError(f'row {i} of {origin} has no image in column "{column}"')
        if label is not None and not (isinstance(label, int) and label < 2**63):
            raise ImageError(
                f'column "{label_column}" of {origin} must hold integers, got {label!r} in row {i}: number the '
                "classes, or leave the column out"
            )
        label = None if label is None or label < 0 else label
        yield Encoded(name, content, label)


def _values(table: Any, column: str, label_column: str | None) -> Iterator[tuple[Any, Any]]:
    """The image and the label of each row; whole pieces of a table become Python's objects faster than single rows."""
    columns = [column] if label_column is None else [column, label_column]
    for piece in table.select_columns(columns).with_format("arrow").iter(ROWS_AT_ONCE):
        labels = [None] * len(piece) if label_column is None else piece[label_column].to_pylist()
        yield from zip(piece[column].to_pylist(), labels, strict=True)


def _named_file(path: str, origin: str, folder: pathlib.Path | None) -> str:
    """The image file that a row has instead of an image."""
    places = [folder, pathlib.Path.cwd()] if folder is not None and not os.path.isabs(path) else [pathlib.Path()]
    for place in places:
        if os.path.isfile(place / path):
            return str(place / path)
    looked = "" if os.path.isabs(path) else ", looked for in " + " and ".join(f'"{p.absolute()}"' for p in places)
    raise ImageError(
        f'{origin} has no image but the path "{path}", and there is no such file{looked}: put it there, or write the '
        "images' bytes into the table"
    )


def first_line(error: Exception) -> str:
    """Of what it says, or its name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
