"""Image sources: what is read, what it becomes, and what is refused."""

import io

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from shapes import in_source_order, shape_pixels, write_folder

from jlebm_fast.errors import ImageError
from jlebm_fast.training.sources import load_images, to_network, to_pixels


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path, n, image_type="image", label=True):
    if image_type == "image":
        column, kind = [{"bytes": png(shape_pixels(i)), "path": None} for i in range(n)], datasets.Image()
    else:
        column, kind = [png(shape_pixels(i)) for i in range(n)], datasets.Value("binary")
    columns, features = {"image": column}, {"image": kind}
    if label:
        columns["label"], features["label"] = [i % 2 for i in range(n)], datasets.ClassLabel(2)
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)


def test_digits_need_no_download():
    images = load_images("digits")
    assert images.train.shape == (1617, 1, 16, 16)
    assert images.held_out.shape == (180, 1, 16, 16)
    assert images.train.dtype == torch.uint8
    assert set(images.held_out_labels.tolist()) == set(range(10))
    assert images.fingerprint() == load_images("digits").fingerprint()


def test_a_folder_with_class_subfolders(folder_of_shapes):
    images = load_images(str(folder_of_shapes))
    assert images.train.shape == (36, 1, 16, 16)
    assert images.held_out.shape == (4, 1, 16, 16)
    # bars (class 0) touch the top row, squares (class 1) never do
    touches = images.train[:, 0, 0, :].amax(dim=1) == 255
    assert torch.equal(touches, images.train_labels == 0)


def test_a_folder_with_splits_and_no_classes(tmp_path):
    write_folder(tmp_path / "train", 6, classes=False)
    write_folder(tmp_path / "test", 4, classes=False)
    images = load_images(str(tmp_path))
    assert (len(images.train), len(images.held_out)) == (6, 4)
    assert images.train_labels is None
    assert np.array_equal(in_source_order(images.train)[3, 0].numpy(), shape_pixels(3))


def test_held_out_only_is_the_held_out_part(folder_of_shapes):
    whole, part = load_images(str(folder_of_shapes)), load_images(str(folder_of_shapes), held_out_only=True)
    assert torch.equal(whole.held_out, part.held_out)
    assert len(part.train) == 0


@pytest.mark.parametrize("image_type", ["image", "binary"])
def test_parquet_files_with_hub_names(tmp_path, image_type):
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", 5, image_type)
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", 3, image_type)
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", 2, image_type)
    images = load_images(str(tmp_path))
    assert (len(images.train), len(images.held_out)) == (8, 2)
    assert in_source_order(images.train_labels).tolist() == [0, 1, 0, 1, 0, 0, 1, 0]
    assert np.array_equal(in_source_order(images.train)[4, 0].numpy(), shape_pixels(4))
    assert np.array_equal(in_source_order(images.held_out)[1, 0].numpy(), shape_pixels(1))


def test_one_parquet_file_without_labels(tmp_path):
    write_parquet(tmp_path / "all.parquet", 20, label=False)
    images = load_images(str(tmp_path / "all.parquet"))
    assert (len(images.train), len(images.held_out)) == (18, 2)
    assert images.train_labels is None


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(8, 8, 16), (28, 28, 32), (32, 32, 32), (20, 40, 64), (218, 178, 64), (300, 90, 64)],
)
def test_sizes_chosen_by_themselves(tmp_path, height, width, expected):
    for i in range(2):
        Image.fromarray(np.full((height, width), 100 + i, np.uint8)).save(tmp_path / f"{i}.png")
    images = load_images(str(tmp_path))
    assert images.train.shape == (1, 1, expected, expected)
    assert images.train.unique().tolist() == [100 + (images.train[0, 0, 0, 0] == 101).item()]


def test_small_images_are_centred_with_their_edges_repeated(tmp_path):
    pixels = np.arange(28 * 28, dtype=np.uint16).reshape(28, 28).astype(np.uint8)
    for i in range(2):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    image = load_images(str(tmp_path)).train[0, 0].numpy()
    assert np.array_equal(image, np.pad(pixels, 2, mode="edge"))


def test_colour_and_grey_become_colour(tmp_path):
    write_folder(tmp_path, 4, classes=False)
    Image.fromarray(np.full((16, 16, 3), (10, 20, 30), np.uint8)).save(tmp_path / "colour.png")
    images = load_images(str(tmp_path))
    assert images.channels == 3


def test_pixels_survive_the_network_range():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    scaled = to_network(pixels)
    assert (scaled.min().item(), scaled.max().item()) == (-1.0, 1.0)
    assert torch.equal(to_pixels(scaled), pixels)


def test_mixed_sizes_need_a_decision(tmp_path):
    write_folder(tmp_path, 4, classes=False)
    Image.fromarray(shape_pixels(0, 20)).save(tmp_path / "zz_other.png")
    with pytest.raises(ImageError, match=r"16x16 in .*20x20 in .*zz_other.png; pass --image-size"):
        load_images(str(tmp_path))
    assert load_images(str(tmp_path), image_size=16).size == 16


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.png", b"", "empty image file"),
        ("broken.png", png(shape_pixels(0))[:60], "cannot read image"),
        ("text.jpg", b"not an image at all", "cannot read image"),
    ],
)
def test_unreadable_images_are_named(tmp_path, name, content, message):
    write_folder(tmp_path, 3, classes=False)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=message) as caught:
        load_images(str(tmp_path))
    assert name in str(caught.value)


def test_sixteen_bit_images_are_refused(tmp_path):
    for i in range(2):
        Image.fromarray(np.full((16, 16), 40_000, np.uint16)).save(tmp_path / f"{i}.png")
    with pytest.raises(ImageError, match="8 bits per channel"):
        load_images(str(tmp_path))


def test_other_bad_sources_are_named(tmp_path):
    with pytest.raises(ImageError, match="no such file or folder"):
        load_images(str(tmp_path / "nowhere"))
    with pytest.raises(ImageError, match="no images in folder"):
        load_images(str(tmp_path))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ImageError, match="neither a Parquet file nor a folder"):
        load_images(str(tmp_path / "notes.txt"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 garbage")
    with pytest.raises(ImageError, match="cannot read Parquet file"):
        load_images(str(tmp_path))
    datasets.Dataset.from_dict({"number": [1, 2]}).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(ImageError, match="no image column, named image, img, png or jpg; its columns are number"):
        load_images(str(tmp_path))


def test_a_broken_image_inside_parquet_is_named(tmp_path):
    rows = [png(shape_pixels(0)), b"junk", png(shape_pixels(1))]
    datasets.Dataset.from_dict({"image": rows}).to_parquet(tmp_path / "train.parquet")
    words = r"cannot read image row 1 of .*train.parquet: its content is in no image format"
    with pytest.raises(ImageError, match=words):
        load_images(str(tmp_path))


def test_one_image_cannot_be_split(tmp_path):
    write_folder(tmp_path, 1, classes=False)
    with pytest.raises(ImageError, match="at least 2"):
        load_images(str(tmp_path))


def write_labelled(path, labels, kind="int64"):
    columns = {"image": [png(shape_pixels(i)) for i in range(len(labels))], "label": pyarrow.array(labels, kind)}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_a_negative_label_is_none_and_an_endless_one_is_refused(tmp_path):
    write_labelled(tmp_path / "train.parquet", [-1, *[i % 2 for i in range(19)]])
    images = load_images(str(tmp_path))
    assert images.train_labels is None or images.held_out_labels is None
    write_labelled(tmp_path / "train.parquet", [2**63, *[i % 2 for i in range(19)]], "uint64")
    with pytest.raises(ImageError, match=r'column "label" of .* must hold integers, got 9223372036854775808 in row 0'):
        load_images(str(tmp_path))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 1] * 20, None),
        ([0, -1] * 20, "has no class labels, or not on every image"),
        ([0, 10**10] * 20, "has the class label 10000000000: class labels must be numbers from 0 to 99999"),
        ([0, 1, 0], "has 1 held-out image, a Fréchet distance needs at least 2"),
        ([0, 1], "has 1 training image, a Fréchet distance needs at least 2"),
    ],
)
def test_what_a_classifier_can_learn_from(tmp_path, labels, words):
    write_labelled(tmp_path / "train.parquet", labels)
    images = load_images(str(tmp_path))
    if words is None:
        images.require_classes()
        return
    with pytest.raises(ImageError, match=words):
        images.require_classes()


def test_an_image_column_of_numbers_is_refused(tmp_path):
    for value in (3, 0.5, True):
        datasets.Dataset.from_dict({"image": [value] * 4}).to_parquet(tmp_path / "train.parquet")
        with pytest.raises(
            ImageError, match=rf"row 0 of .* must be an image file's bytes or path, or pixels, got {value}"
        ):
            load_images(str(tmp_path))


def test_a_folder_called_like_a_parquet_file_is_read_once(tmp_path):
    write_parquet(tmp_path / "all.parquet" / "part-0.parquet", 10)
    write_parquet(tmp_path / "more" / "part-1.PARQUET", 10)
    images = load_images(str(tmp_path))
    assert len(images.train) + len(images.held_out) == 20


def test_held_out_images_are_never_trained_on(tmp_path):
    write_folder(tmp_path / "test", 6)
    write_folder(tmp_path / "photos", 6)
    with pytest.raises(ImageError, match=r'has held-out images in "test" but no folder "train": give both, or rename'):
        load_images(str(tmp_path))


def test_a_link_that_leads_nowhere_is_a_missing_image(tmp_path):
    write_folder(tmp_path, 6, classes=False)
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(ImageError, match=r"cannot read image .*gone.png: No such file or directory$"):
        load_images(str(tmp_path))


def test_a_relative_path_is_named_with_the_folder_it_is_looked_for_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImageError, match=f'no such file or folder: "photos" in "{tmp_path}"'):
        load_images("photos")


def write_split_column(path, values, column="split"):
    """One image for each value, bright where it is to be held out."""
    bright = [str(value).lower().startswith(("t10k", "test")) for value in values]
    pictures = [png(np.full((16, 16), 200 if held_out else 50, np.uint8)) for held_out in bright]
    pyarrow.parquet.write_table(pyarrow.table({"image": pictures, column: values}), path)


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("TRAIN", "Testing"), ("training", "t10k")])
@pytest.mark.parametrize(("file", "column"), [("a", "split"), ("a", "Split"), ("train", "split")])
def test_a_column_of_splits(tmp_path, file, column, train, test):
    path = tmp_path / f"{file}.parquet"
    write_split_column(path, [train, test, train, train, test], column)
    for source in (path, tmp_path):
        images = load_images(str(source))
        assert (len(images.train), len(images.held_out)) == (3, 2)
        assert (images.train.unique().tolist(), images.held_out.unique().tolist()) == ([50], [200])
        assert images.summary.endswith(f'; split by the column "{column}"')
        assert "held out from the training images" not in images.summary


def test_a_column_of_splits_by_the_names_of_class_labels(tmp_path):
    table = {"image": [Image.fromarray(shape_pixels(i)) for i in range(3)], "split": [0, 1, 0]}
    kinds = {"image": datasets.Image(), "split": datasets.ClassLabel(names=["train", "test"])}
    datasets.Dataset.from_dict(table, features=datasets.Features(kinds)).to_parquet(tmp_path / "a.parquet")
    assert np.array_equal(load_images(str(tmp_path)).held_out[0, 0].numpy(), shape_pixels(1))


@pytest.mark.parametrize(
    ("values", "n_train", "note"),
    [
        (["fold 1", "fold 2"] * 5, 9, ("not split by the column \"split\": 'fold 1' is no split",)),
        (["train"] * 10, 9, ()),
        (["test"] * 10, 9, ()),
        (["train"] * 5 + ["test"] * 3 + ["val"] * 2, 5, ("split by", 'left out: 2 images of the split "validation"')),
    ],
)
def test_what_a_column_of_splits_does_not_tell(tmp_path, values, n_train, note):
    write_split_column(tmp_path / "a.parquet", values)
    images = load_images(str(tmp_path / "a.parquet"))
    assert len(images.train) == n_train
    assert all(n.startswith(start) for n, start in zip(images.notes, note, strict=True))


@pytest.mark.parametrize("other", ["holdout", None, ""])
def test_a_column_of_splits_and_of_something_else_is_refused(tmp_path, other):
    write_split_column(tmp_path / "a.parquet", ["train", "test", other])
    words = (
        'column "split" must have the name of a split in every row, train, test, validation, extra, got '
        rf"{other!r} in row 2 of .*a.parquet beside \'train\' in row 0 of .*a.parquet: write one of these names there"
    )
    with pytest.raises(ImageError, match=words):
        load_images(str(tmp_path))


def test_names_of_files_come_before_a_column_of_splits(tmp_path):
    write_split_column(tmp_path / "train.parquet", ["train", "test", "no split"])
    write_split_column(tmp_path / "test.parquet", ["test"])
    images = load_images(str(tmp_path))
    assert (len(images.train), len(images.held_out), images.notes) == (3, 1, ())
