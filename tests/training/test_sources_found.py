"""What of a source is found: its splits, its classes, the order of its images, and what is said of all that."""

import dataclasses
import io
import os

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from shapes import in_source_order, shape_pixels, write_folder

from jlebm_fast.errors import ImageError
from jlebm_fast.training.sources import load_images, source_order

TRAIN, TEST = 50, 200  # brightness that tells of which split an image is


def flat(value, size=16):
    return np.full((size, size), value, np.uint8)


def write_images(folder, n, value):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.fromarray(flat(value)).save(folder / f"{i}.png")


def write_table(path, n, value, **columns):
    buffer = io.BytesIO()
    Image.fromarray(flat(value)).save(buffer, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"image": [buffer.getvalue()] * n} | columns), path)


def require_split(images, n_train, n_held_out):
    assert (len(images.train), len(images.held_out)) == (n_train, n_held_out), images.summary
    assert (images.train == TRAIN).all()
    assert (images.held_out == TEST).all()


SPLIT_NAMES = [
    ("training", "testing"),
    ("Train", "Test"),
    ("TRAIN", "VALIDATION"),
    ("split=train", "split=test"),
    ("mnist_train", "t10k"),
    ("mnist_train-images", "t10k-images"),
    ("mnistTrain", "mnistTest"),
    *(("train", name) for name in ("dev", "eval", "valid", "val", "validation", "evaluation")),
]


@pytest.mark.parametrize(("train", "test"), SPLIT_NAMES)
@pytest.mark.parametrize("around", [".", "mnist_png"])
def test_folders_of_splits_with_classes_below(tmp_path, around, train, test):
    for name in ("0", "1"):
        write_images(tmp_path / around / train / name, 4, TRAIN)
        write_images(tmp_path / around / test / name, 3, TEST)
    images = load_images(str(tmp_path))
    require_split(images, 8, 6)
    assert sorted(images.train_labels.tolist()) == [0] * 4 + [1] * 4
    assert sorted(images.held_out_labels.tolist()) == [0] * 3 + [1] * 3


@pytest.mark.parametrize(("train", "test"), SPLIT_NAMES)
@pytest.mark.parametrize("file", ["{}.parquet", "{}/0.parquet", "data/{}-00000-of-00001.parquet"])
def test_tables_of_splits(tmp_path, file, train, test):
    write_table(tmp_path / file.format(train), 5, TRAIN)
    write_table(tmp_path / file.format(test), 3, TEST)
    require_split(load_images(str(tmp_path)), 5, 3)


def test_classes_may_lie_above_the_splits(tmp_path):
    for name in ("cat", "dog"):
        write_images(tmp_path / name / "train", 4, TRAIN)
        write_images(tmp_path / name / "test", 3, TEST)
    images = load_images(str(tmp_path))
    require_split(images, 8, 6)
    assert sorted(images.train_labels.tolist()) == [0] * 4 + [1] * 4


def test_classes_may_lie_below_a_folder_around_them(tmp_path):
    for name in ("cat", "dog"):
        write_images(tmp_path / "photos" / name, 10, TRAIN)
    assert set(load_images(str(tmp_path)).train_labels.tolist()) == {0, 1}


def test_beside_folders_called_train_and_test_others_are_neither(tmp_path):
    for name, n, value in (("train", 5, TRAIN), ("test", 3, TEST), ("train_raw", 4, 99), ("test_raw", 4, 98)):
        write_images(tmp_path / name, n, value)
    images = load_images(str(tmp_path))
    require_split(images, 5, 3)
    assert images.notes == ("left out: 8 images of no split",)


def test_a_class_may_have_a_word_of_a_split_in_its_name(tmp_path):
    for name in ("bullet_train", "car", "plane"):
        write_images(tmp_path / name, 10, TRAIN)
    images = load_images(str(tmp_path))
    assert len(images.train) + len(images.held_out) == 30
    assert set(images.train_labels.tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("train", "car"), r'cannot tell whether "train" in .* are splits or classes beside "car": rename them if'),
        (("a_train", "a_test", "b"), r'cannot tell whether "a_test", "a_train" in .* beside "b"'),
        (("test", "car"), r'has held-out images in "test" but no folder "train": give both, or rename "test" if'),
        (("test",), r'has held-out images in "test" but no folder "train"'),
    ],
)
def test_folders_that_may_be_splits_or_not_are_asked_about(tmp_path, names, words):
    for name in names:
        write_images(tmp_path / name, 3, TRAIN)
    with pytest.raises(ImageError, match=words):
        load_images(str(tmp_path))


def test_an_empty_held_out_folder_is_no_reason_to_hold_out_others(tmp_path):
    write_images(tmp_path / "train", 10, TRAIN)
    (tmp_path / "test").mkdir()
    with pytest.raises(ImageError, match=r'no images in folder ".*test": fill it, or remove it'):
        load_images(str(tmp_path))


def test_tables_that_contradict_themselves_or_are_all_held_out(tmp_path):
    write_table(tmp_path / "test" / "train.parquet", 5, TRAIN)
    write_table(tmp_path / "other" / "0.parquet", 5, TRAIN)
    with pytest.raises(ImageError, match=r'cannot tell the split of ".*train.parquet": its path speaks of test and tr'):
        load_images(str(tmp_path))
    write_table(tmp_path / "only" / "test-0.parquet", 5, TEST)
    with pytest.raises(ImageError, match=r'has held-out images, of the split "test", but none to train on: add a spl'):
        load_images(str(tmp_path / "only"))
    assert len(load_images(str(tmp_path / "only" / "test-0.parquet")).train) == 4  # asked for by its own name


@pytest.mark.parametrize("kind", ["table", "folder"])
def test_extra_images_are_left_out_and_that_is_said(tmp_path, kind):
    def write(split, n, value):
        if kind == "table":
            write_table(tmp_path / f"{split}-00000-of-00001.parquet", n, value)
        else:
            write_images(tmp_path / split, n, value)

    write("extra", 9, 99)
    alone = load_images(str(tmp_path))
    assert (len(alone.train), len(alone.held_out), alone.notes) == (8, 1, ())
    write("train", 5, TRAIN)
    write("test", 3, TEST)
    images = load_images(str(tmp_path))
    require_split(images, 5, 3)
    counted = "1 Parquet file" if kind == "table" else "9 images"
    assert images.summary.endswith(f'; left out: {counted} of the split "extra"')
    write("val", 2, 98)
    assert load_images(str(tmp_path)).held_out.unique().tolist() == [TEST]
    assert 'of the split "validation"' in load_images(str(tmp_path)).summary


def test_what_lies_beside_the_splits_is_left_out_and_that_is_said(tmp_path):
    for name, n, value in (("train", 5, TRAIN), ("test", 3, TEST), ("ground_truth", 2, 99), (".", 1, 99)):
        write_images(tmp_path / name, n, value)
    images = load_images(str(tmp_path))
    require_split(images, 5, 3)
    assert images.summary.endswith("; left out: 3 images of no split")
    write_table(tmp_path / "0.parquet", 9, TRAIN)
    assert load_images(str(tmp_path)).summary.endswith("; left out: 11 image files beside the Parquet files")


def test_one_line_says_what_was_understood(tmp_path):
    write_folder(tmp_path / "a" / "train", 8)
    write_folder(tmp_path / "a" / "test", 4)
    said = f"8 training and 4 held-out images of 16 x 16 x 1, 2 classes, from {tmp_path / 'a'}"
    assert load_images(str(tmp_path / "a")).summary == said
    write_folder(tmp_path / "b", 20, colour=True, classes=False)
    said = "18 training and 2 held-out images of 16 x 16 x 3, held out from the training images, no class labels, from "
    assert load_images(str(tmp_path / "b")).summary == said + str(tmp_path / "b")


@pytest.mark.parametrize(
    ("sizes", "image_size", "said"),
    [
        ([(300, 300)], None, "64 x 64 x 1 (shrunk from 300 x 300)"),
        ([(300, 200)], None, "64 x 64 x 1 (cut to squares and shrunk from 300 x 200)"),
        ([(200, 40)], None, "64 x 64 x 1 (cut to squares and enlarged from 200 x 40)"),
        ([(200, 64)], None, "64 x 64 x 1 (cut to squares from 200 x 64)"),
        ([(28, 28)], None, "32 x 32 x 1 (edges repeated from 28 x 28)"),
        ([(8, 8)], 16, "16 x 16 x 1 (enlarged from 8 x 8)"),
        ([(20, 30), (300, 40), (10, 9)], 32, "32 x 32 x 1 (brought to one size from 10 x 9 to 300 x 40)"),
        ([(32, 32)], None, "32 x 32 x 1,"),
    ],
)
def test_a_change_of_size_is_said(tmp_path, sizes, image_size, said):
    for i in range(3):
        Image.new("L", sizes[i % len(sizes)], i).save(tmp_path / f"{i}.png")
    assert f"held-out images of {said}" in load_images(str(tmp_path), image_size).summary


def test_links_to_folders_are_followed_and_loops_are_not(tmp_path):
    write_images(tmp_path / "elsewhere" / "dogs", 10, TRAIN)
    write_images(tmp_path / "shown" / "cats", 10, TRAIN)
    (tmp_path / "shown" / "dogs").symlink_to(tmp_path / "elsewhere" / "dogs")
    (tmp_path / "elsewhere" / "dogs" / "back").symlink_to(tmp_path / "shown")
    (tmp_path / "shown" / "cats" / "self").symlink_to(".")
    images = load_images(str(tmp_path / "shown"))
    assert len(images.train) + len(images.held_out) == 20
    assert set(images.train_labels.tolist()) == {0, 1}


def test_two_links_to_one_folder_are_two_folders(tmp_path):
    write_images(tmp_path / "elsewhere", 10, TRAIN)
    (tmp_path / "shown").mkdir()
    for name in ("a", "b"):
        (tmp_path / "shown" / name).symlink_to(tmp_path / "elsewhere")
    images = load_images(str(tmp_path / "shown"))
    assert len(images.train) + len(images.held_out) == 20


def test_what_is_hidden_is_not_read(tmp_path):
    root = tmp_path / ".cache" / "shapes"  # what is asked for by its path may be hidden
    write_folder(root, 20)
    write_images(root / ".ipynb_checkpoints", 3, TRAIN)
    (root / "bars" / "._000.png").write_bytes(b"a resource fork")
    write_table(root / ".hidden.parquet", 3, TRAIN)
    images = load_images(str(root))
    assert len(images.train) + len(images.held_out) == 20
    assert set(images.train_labels.tolist()) == {0, 1}
    with pytest.raises(ImageError, match=r"no images in folder .* hidden files and folders are not read"):
        load_images(str(write_folder(tmp_path / "b" / ".x", 4).parent))


@pytest.mark.parametrize(
    "columns",
    [
        {name: "numbers"}
        for name in ("label", "Label", "LABELS", "class", "Class", "fine_label", "digit", "target", "Target", "cls")
    ]
    + [{"label": "numbers", "digit": "other"}, {"fine_label": "numbers", "coarse_label": "other"}]
    + [{"digit": "numbers", "target": "words"}],
)
def test_labels_under_their_usual_names(tmp_path, columns):
    values = {"numbers": list(range(8)), "other": [5] * 8, "words": ["a dog"] * 8}
    for split in ("train", "test"):
        table = {name: values[kind] for name, kind in columns.items()}
        write_table(tmp_path / f"{split}.parquet", 8, TRAIN, **table)
    images = load_images(str(tmp_path))
    assert in_source_order(images.train_labels).tolist() == list(range(8))
    assert images.columns == ("image", *columns)


def test_labels_that_cannot_be_told_are_none_and_the_columns_are_named(tmp_path):
    write_table(tmp_path / "a.parquet", 20, TRAIN, digit=[1] * 20, target=[2] * 20)
    images = load_images(str(tmp_path / "a.parquet"))
    assert images.summary.endswith('; no class labels: digit and target could both be; call one of the columns "label"')
    write_table(tmp_path / "b.parquet", 20, TRAIN, number=[1] * 20)
    words = (
        r"no class labels, or not on every image; its columns are image, number: give each image an integer in a col"
    )
    with pytest.raises(ImageError, match=words):
        load_images(str(tmp_path / "b.parquet")).require_classes()


def test_an_image_column_in_capitals(tmp_path):
    datasets.Dataset.from_dict({"Image": [flat(TRAIN).tolist()] * 10}).to_parquet(tmp_path / "a.parquet")
    assert load_images(str(tmp_path)).train.unique().tolist() == [TRAIN]


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_cameras_orientation_is_obeyed(tmp_path, suffix):
    upright = np.zeros((32, 32), np.uint8)
    upright[:16, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    stored = Image.fromarray(np.rot90(upright).copy())
    for i in range(2):
        stored.save(tmp_path / f"{i}.{suffix}", exif=exif, quality=100)
    seen = load_images(str(tmp_path)).train[0, 0].float()
    assert (seen - torch.from_numpy(upright)).abs().max() < 40


def test_exif_that_nobody_can_read_says_nothing(tmp_path):
    for i in range(2):
        Image.fromarray(shape_pixels(0)).save(tmp_path / f"{i}.png", exif=b"Exif\0\0not a header at all")
    assert np.array_equal(load_images(str(tmp_path)).train[0, 0].numpy(), shape_pixels(0))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "1"])
def test_what_is_transparent_is_white(tmp_path, mode):
    hidden, channels = (0, 80, 0), 1 if mode in ("LA", "L", "1") else 3
    for i in range(2):
        image = Image.new("RGBA", (16, 16), (*hidden, 0))
        image.paste((100, 100, 100, 255), (0, 0, 16, 8))
        if mode in ("RGBA", "LA"):
            image.convert(mode).save(tmp_path / f"{i}.png")
        elif mode == "1":
            image = Image.new("1", (16, 16), 0)
            image.save(tmp_path / f"{i}.png", transparency=0)
        else:
            image = image.convert("RGB")
            image = image.quantize(8, dither=Image.Dither.NONE) if mode == "P" else image.convert(mode)
            image.save(tmp_path / f"{i}.png", transparency=hidden if mode == "RGB" else image.getpixel((0, 15)))
    seen = load_images(str(tmp_path)).train[0]
    assert seen.shape[0] == channels
    assert (seen[:, 8:] == 255).all()
    if mode != "1":
        assert (seen[:, :8].float() - 100).abs().max() < 10


def test_half_transparent_is_between(tmp_path):
    for i in range(2):
        Image.new("RGBA", (16, 16), (55, 55, 55, 128)).save(tmp_path / f"{i}.png")
    assert load_images(str(tmp_path)).train.unique().tolist() == [155]


def test_the_first_images_are_of_all_classes(tmp_path):
    for split, n in (("train", 300), ("test", 200)):
        write_table(tmp_path / f"{split}.parquet", n, TRAIN, label=[10 * i // n for i in range(n)])
    images = load_images(str(tmp_path))
    for labels in (images.train_labels, images.held_out_labels):
        assert len(labels[:100].unique()) == 10
    assert in_source_order(images.train_labels).tolist() == [10 * i // 300 for i in range(300)]


def test_labels_go_with_their_images(folder_of_shapes):
    images = load_images(str(folder_of_shapes))
    for pixels, labels in ((images.train, images.train_labels), (images.held_out, images.held_out_labels)):
        assert torch.equal(pixels[:, 0, 0].amax(dim=1) == 255, labels == 0)


def test_the_order_is_a_permutation_of_the_number_alone():
    assert source_order(5).tolist() == [4, 0, 1, 2, 3]
    assert sorted(source_order(1000).tolist()) == list(range(1000))
    assert torch.equal(source_order(1000), source_order(1000))


def test_the_fingerprint_is_of_held_out_images_and_labels_too():
    images = load_images("digits")
    assert images.fingerprint() == load_images("digits").fingerprint()
    others = [
        dataclasses.replace(images, train=images.train.flip(0)),
        dataclasses.replace(images, held_out=images.held_out.flip(0)),
        dataclasses.replace(images, held_out_labels=images.held_out_labels.flip(0)),
        dataclasses.replace(images, train_labels=images.train_labels.flip(0)),
        dataclasses.replace(images, held_out_labels=None),
    ]
    assert len({other.fingerprint() for other in [images, *others]}) == 6
    for in_order in (False, True):
        images.require_fingerprint(images.fingerprint(), "runs/a", in_order=in_order)
        with pytest.raises(
            ImageError, match=r'^the images of "digits" are not those that "runs/a" was trained on: put'
        ):
            others[0].require_fingerprint(images.fingerprint(), "runs/a", in_order=in_order)
        for other in others[1:]:
            with pytest.raises(ImageError, match=r'^the held-out images or the labels of "digits" are not those that'):
                other.require_fingerprint(images.fingerprint(), "runs/a", in_order=in_order)


def test_a_run_of_a_version_with_the_source_s_order_can_be_measured_but_not_gone_on_with():
    images, kept_by_run = load_images("digits"), "121740fea182926c"  # what version 0.1 wrote for these
    images.require_fingerprint(kept_by_run, "runs/a", in_order=False)
    with pytest.raises(ImageError, match=r'"runs/a" was begun by an earlier version .* another order: it can be evalu'):
        images.require_fingerprint(kept_by_run, "runs/a", in_order=True)
    with pytest.raises(ImageError, match=r'^the images of "digits" are not those that "runs/a" was trained on'):
        images.require_fingerprint("0" * 16, "runs/a", in_order=False)


def test_a_table_that_names_image_files(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "set", 20, classes=False)
    rows = [{"bytes": None, "path": f"{i:03d}.png"} for i in range(20)]
    pyarrow.parquet.write_table(pyarrow.table({"image": rows}), folder / "all.parquet")
    monkeypatch.chdir(tmp_path)
    images = load_images("set/all.parquet")
    assert len(images.train) == 18
    (folder / "003.png").unlink()
    words = (
        rf'row 3 of .*all.parquet has no image but the path "003.png", .* looked for in ".*set" and "{tmp_path}": put'
    )
    with pytest.raises(ImageError, match=words):
        load_images("set/all.parquet")
    (folder / "003.png").write_bytes(b"junk")
    with pytest.raises(
        ImageError, match=r'cannot read image ".*003.png" \(row 3 of .*all.parquet\): its content is in'
    ):
        load_images("set/all.parquet")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path, 4)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("bars"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ImageError, match=r'cannot read folder ".*bars": Permission denied: make it readable'):
        load_images(str(tmp_path))


def test_the_hub_s_other_splits_are_left_out_and_that_is_said(monkeypatch):
    def table(n, value):
        return datasets.Dataset.from_dict(
            {"image": [Image.fromarray(flat(value))] * n, "label": [0] * n},
            features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(2)}),
        )

    loaded = {"train": table(5, TRAIN), "test": table(3, TEST), "extra": table(9, 99)}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: loaded)
    images = load_images("svhn")
    require_split(images, 5, 3)
    assert images.notes == ('left out: 9 images of the split "extra"',)
    assert images.columns == ("image", "label")
