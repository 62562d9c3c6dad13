"""Tests of the data sets of examples/resnet50: small files of each format are read right, and faults are named.

Every message names the file and the line, or the option; the tables below pair each fault with its message.
"""

import errno
import gc
import io
import json
import os
import pickle
import re
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
torchvision = pytest.importorskip("torchvision")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "resnet50"))

import formats  # noqa: E402
import PIL.Image  # noqa: E402
from data import DATASETS, ArrayImages, DataError, FileImages, carve, fingerprint, load, long_tailed_counts  # noqa: E402


def write_image(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(path)


def refuse(match, *arguments, **options):
    with pytest.raises(DataError) as caught:
        load(*arguments, **options)
    message = str(caught.value)
    assert re.search(match, message), message


# Profiles and splits --------------------------------------------------------------------------------------------------


def test_profiles_have_the_sizes_that_are_published():
    assert sum(long_tailed_counts(5000, 10, 0.01, "exp")) == 12406
    assert sum(long_tailed_counts(500, 100, 0.01, "exp")) == 10847
    assert long_tailed_counts(5000, 10, 0.01, "exp")[::9] == [5000, 50]
    assert long_tailed_counts(100, 5, 0.1, "step") == [100, 100, 10, 10, 10]
    assert long_tailed_counts(7, 1, 0.1, "exp") == [7]


@pytest.mark.parametrize("imb_type", ["exp", "step"])
def test_profile_leaves_no_class_empty(imb_type):
    with pytest.raises(DataError, match=r"--imb-factor .* got 0\.01, which leaves none to class"):
        long_tailed_counts(99, 4, 0.01, imb_type)


def test_carved_part_of_each_class():
    counts = torch.tensor([100, 0, 25, 14, 5, 4, 1])
    target = torch.repeat_interleave(torch.arange(7), counts)[torch.randperm(149)]
    train, val = carve(target, counts, 0.1)
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(149))
    assert target[val].bincount(minlength=7).tolist() == [10, 0, 2, 1, 1, 0, 0]
    assert torch.equal(val, carve(target, counts, 0.1)[1])  # the same images each time
    first = (target == 0).nonzero().flatten()
    assert not torch.equal(val[target[val] == 0], first[:10])  # not simply the first of the class
    assert len(carve(target, counts, 0.0)[1]) == 0


# digits-lt ------------------------------------------------------------------------------------------------------------


def test_digits():
    data = load("digits-lt", None)
    assert data.shots_counts.tolist() == data.class_counts.tolist() == long_tailed_counts(104, 10, 0.01)
    assert (data.val.name, data.test.name, data.notes) == ("val", "test", [])
    assert data.val.images.target.bincount().tolist() == [20] * 10
    assert data.test.images.target.bincount().tolist() == [50] * 10
    assert data.class_names == list("0123456789")
    seen = [split.images.images for split in (data.train, data.val, data.test)]
    assert all(images.dtype == torch.uint8 and images.shape[1:] == (3, 32, 32) for images in seen)
    assert seen[0].max() > 240
    everything = torch.cat(seen).flatten(1)
    assert len(everything.unique(dim=0)) == len(everything)  # no two digits are the same, so no two splits share one
    step = load("digits-lt", None, imb_type="step", imb_factor=0.1)
    assert step.class_counts.tolist() == [104] * 5 + [10] * 5


def test_digits_are_what_they_are_labelled():
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    test = load("digits-lt", None).test.images
    small = torch.nn.functional.avg_pool2d(test.images[:, :1].float(), 4).flatten(1)  # 8x8 again
    nearest = torch.cdist(small, torch.from_numpy(pixels).float() * 255 / 16).argmin(dim=1)
    assert (torch.from_numpy(digits)[nearest] == test.target).float().mean() > 0.99


@pytest.mark.parametrize(
    ("dataset", "options", "match"),
    [
        ("digits", {}, "--dataset must be one of digits-lt, .* got digits"),
        ("digits-lt", {"root": Path()}, "--data does not apply to digits-lt"),
        ("digits-lt", {"val_list": "x.txt"}, "--val-list does not apply to digits-lt"),
        ("digits-lt", {"download": True}, "--download does not apply to digits-lt"),
        ("digits-lt", {"imb_factor": 0.001}, "--imb-factor must leave every class"),
        ("digits-lt", {"imb_factor": 0.0}, r"--imb-factor must be in \(0, 1\], got 0"),
        ("digits-lt", {"imb_factor": float("nan")}, r"--imb-factor must be in \(0, 1\], got nan"),
        ("digits-lt", {"imb_type": "exponential"}, "--imb-type must be one of exp, step, got exponential"),
        ("digits-lt", {"val_fraction": 0.6}, r"--val-fraction must be in \[0, 0.5\], got 0.6"),
        ("imagenet-lt", {"root": Path(), "imb_factor": 0.1}, "--imb-factor does not apply to imagenet-lt"),
        ("folder", {"root": Path(), "imb_type": "step"}, "--imb-type does not apply to folder"),
        ("folder", {"root": Path(), "train_list": "x.txt"}, "--train-list does not apply to folder"),
    ],
)
def test_options_that_do_not_go_together(dataset, options, match):
    refuse(match, dataset, **{"root": None, **options})


@pytest.mark.parametrize("dataset", DATASETS[1:])
def test_root_is_a_folder(dataset, tmp_path):
    refuse(f"{dataset} needs --data", dataset, None)
    refuse(f"--data {tmp_path}/nowhere does not exist", dataset, tmp_path / "nowhere")
    (tmp_path / "file").touch()
    refuse(f"--data {tmp_path}/file is a file", dataset, tmp_path / "file")
    refuse(str(tmp_path), dataset, tmp_path)  # an empty folder: the message names it


# CIFAR ----------------------------------------------------------------------------------------------------------------


def python2_pickle(data, labels):
    """A pickle as Python 2 wrote the original files: byte strings, and dtype("u1", 0, 1)."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    def whole(value):
        return b"J" + struct.pack("<i", value)

    raw = data.tobytes()
    parts = [b"\x80\x02}(", text(b"labels"), b"](", *map(whole, labels), b"e", text(b"data")]
    parts += [b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy\nndarray\n", b"K\x00\x85", text(b"b"), b"\x87R"]
    parts += [b"(K\x01", whole(data.shape[0]), whole(data.shape[1]), b"\x86", b"cnumpy\ndtype\n", text(b"u1")]
    parts += [b"K\x00K\x01\x87R(K\x03", text(b"|"), b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"]
    parts += [b"T", struct.pack("<i", len(raw)), raw, b"tb", b"u."]
    return b"".join(parts)


def random_batch(n_images, n_classes, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n_images, 3072), dtype=np.uint8), [i % n_classes for i in range(n_images)]


def write_cifar10(root, dump=lambda data, labels: pickle.dumps({"data": data, "labels": labels})):
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    batches = {f"data_batch_{i}": random_batch(40, 10, i) for i in range(1, 6)}
    batches["test_batch"] = random_batch(30, 10, 6)
    for name, batch in batches.items():
        (folder / name).write_bytes(dump(*batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"name {i}" for i in range(10)]}))
    return folder, batches


DUMPS = {
    "Python 2": python2_pickle,
    "protocol 2": lambda data, labels: pickle.dumps({"data": data, "labels": labels}, 2),
    "read-only": lambda data, labels: DUMPS["protocol 5"](np.asarray(memoryview(data).toreadonly()), labels),
    "protocol 5": lambda data, labels: pickle.dumps({"data": data, "labels": labels}, 5),
    "keys of bytes": lambda data, labels: pickle.dumps({b"data": data, b"labels": np.array(labels)}),
    "NumPy 1": lambda data, labels: DUMPS["protocol 2"](data, labels).replace(b"numpy._core", b"numpy.core"),
    "big end first": lambda data, labels: DUMPS["protocol 2"](data, np.array(labels, ">i4")),
    "NumPy integers": lambda data, labels: pickle.dumps({"data": data, "labels": list(np.array(labels))}),
}


@pytest.mark.parametrize("dump", DUMPS)
def test_cifar10_is_the_subset_of_ldam(dump, tmp_path):
    _, batches = write_cifar10(tmp_path, DUMPS[dump])
    data = load("cifar10-lt", tmp_path, imb_factor=0.1, val_fraction=0)
    # as in LDAM-DRW's imbalance_cifar.py
    pixels = np.vstack([batches[f"data_batch_{i}"][0] for i in range(1, 6)])
    targets = np.array([label for i in range(1, 6) for label in batches[f"data_batch_{i}"][1]])
    np.random.seed(0)  # noqa: NPY002
    expected, labels = [], []
    for c in range(10):
        index = np.where(targets == c)[0]
        np.random.shuffle(index)  # noqa: NPY002
        n = int(20 * 0.1 ** (c / 9))
        expected.append(pixels[index[:n]])
        labels += [c] * n
    train = data.train.images
    assert isinstance(train, ArrayImages)
    assert np.array_equal(train.images.numpy(), np.vstack(expected).reshape(-1, 3, 32, 32))
    assert train.target.tolist() == labels
    assert train[0].shape == (3, 32, 32)
    assert data.test.name == "test"
    assert np.array_equal(data.test.images.images.flatten(1).numpy(), batches["test_batch"][0])
    assert data.class_names[3] == "name 3"
    assert data.val is None
    assert data.notes == ["no validation split: --val-fraction is 0, so nothing can be chosen on one"]


def test_cifar_carves_validation_from_train(tmp_path):
    write_cifar10(tmp_path)
    data = load("cifar10-lt", tmp_path, imb_factor=0.1, val_fraction=0.25)
    counts = long_tailed_counts(20, 10, 0.1)
    n_val = [max(1, round(n / 4)) if n >= 5 else 0 for n in counts]
    assert data.val.name == "val (25 % of train)"
    assert data.shots_counts.tolist() == counts
    assert data.val.images.target.bincount(minlength=10).tolist() == n_val
    assert data.class_counts.tolist() == [n - v for n, v in zip(counts, n_val, strict=True)]
    assert torch.equal(data.class_counts, data.train.images.target.bincount(minlength=10))
    both = torch.cat([data.train.images.images, data.val.images.images]).flatten(1)
    assert len(both.unique(dim=0)) == len(both) == sum(counts)
    assert "4 of 10 classes have fewer than 5 images" in data.notes[0]


def test_cifar_images_that_repeat_others_are_told(tmp_path):
    folder, batches = write_cifar10(tmp_path)
    assert load("cifar10-lt", tmp_path, imb_factor=1.0, val_fraction=0).notes[:-1] == []
    pixels, labels = batches["data_batch_2"]
    pixels[10] = pixels[0]
    pixels[21] = pixels[0]
    (folder / "data_batch_2").write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    (folder / "data_batch_3").write_bytes((folder / "data_batch_1").read_bytes())
    notes = load("cifar10-lt", tmp_path, imb_factor=1.0, val_fraction=0).notes
    assert notes[0] == "training images that repeat another, pixel by pixel: 42, 1 with another label"


def test_cifar100_uses_fine_labels(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, seed in (("train", 1), ("test", 2)):
        pixels, labels = random_batch(200, 100, seed)
        batch = {"data": pixels, "fine_labels": labels, "coarse_labels": [0] * 200}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [b"n%d" % i for i in range(100)]}))
    data = load("cifar100-lt", tmp_path, imb_factor=0.5)
    assert data.n_classes == 100
    assert data.class_names[99] == "n99"
    assert data.shots_counts.tolist() == [2] + [1] * 99
    assert data.val is None
    assert "no class has 5 training images" in data.notes[0]


class Evil:
    def __reduce__(self):
        return print, ("a pickle ran this",)


def with_batch(**changes):
    pixels, labels = random_batch(40, 10, 1)
    return pickle.dumps({"data": pixels, "labels": labels} | changes)


BAD_BATCHES = {
    "text": (b"<html>", "data_batch_2 is damaged or no pickle"),
    "empty": (b"", "data_batch_2 is damaged or no pickle"),
    "cut": (with_batch()[:5000], "data_batch_2 is damaged or no pickle"),
    "code": (pickle.dumps({"data": Evil()}), "data_batch_2 .* it asks for builtins.print"),
    "objects": (with_batch(data=np.array([None])), "data_batch_2 .* array of O8? is not expected"),
    "list": (pickle.dumps([1]), "data_batch_2 must hold a dict, got list"),
    "keys": (pickle.dumps({"data": np.zeros((1, 3072), np.uint8)}), "data_batch_2 has no 'labels', but 'data'"),
    "shape": (with_batch(data=np.zeros((40, 32, 96), np.uint8)), r"data_batch_2: 'data' must be .* got uint8 \(40, 32"),
    "dtype": (with_batch(data=np.zeros((40, 3072))), "data_batch_2 .*float|data_batch_2 .*f8"),
    "no array": (with_batch(data=[1]), r"data_batch_2: 'data' must be a uint8 array \(N, 3072\), got list"),
    "no image": (with_batch(data=np.zeros((0, 3072), np.uint8), labels=[]), "data_batch_2 holds no image"),
    "number": (with_batch(labels=[0] * 39), "data_batch_2 has 40 images, but 39 labels"),
    "large": (with_batch(labels=[0] * 38 + [10, 11]), r"_2: labels\[38\] is 10, not in \[0, 10\), and 1 more"),
    "negative": (with_batch(labels=[0, -1] + [0] * 38), r"data_batch_2: labels\[1\] is -1"),
    "ragged": (with_batch(labels=[[0], [1, 2]]), "data_batch_2: 'labels' must be a list of integers"),
    "words": (with_batch(labels=["cat"] * 40), "data_batch_2: 'labels' must be a list of integers"),
}


@pytest.mark.parametrize("fault", BAD_BATCHES)
def test_bad_cifar_batch(fault, tmp_path, capsys):
    folder, _ = write_cifar10(tmp_path)
    content, match = BAD_BATCHES[fault]
    (folder / "data_batch_2").write_bytes(content)
    refuse(match, "cifar10-lt", tmp_path, imb_factor=0.1)
    assert capsys.readouterr().out == ""


def test_bad_cifar_folder(tmp_path):
    folder, _ = write_cifar10(tmp_path)
    refuse("--imb-factor must leave", "cifar10-lt", tmp_path)  # 20 images a class at most
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a"]}))
    refuse("batches.meta: 'label_names' must be a list of 10 names", "cifar10-lt", tmp_path)
    (folder / "batches.meta").unlink()
    refuse(r"batches.meta does not exist; --download fetches CIFAR10", "cifar10-lt", tmp_path)
    (folder / "data_batch_5").unlink()
    refuse(r"data_batch_5 does not exist, and 1 more", "cifar10-lt", tmp_path)


def test_cifar_class_without_image(tmp_path):
    folder, _ = write_cifar10(tmp_path)
    for i in range(1, 6):
        (folder / f"data_batch_{i}").write_bytes(with_batch(labels=[i % 9 for i in range(40)]))
    refuse(r"no training image of class 9 \(name 9\)", "cifar10-lt", tmp_path)


def test_cifar_download(tmp_path, monkeypatch):
    root = tmp_path / "new"
    calls = []

    def download(root, download):
        calls.append(root)
        Path(root).mkdir()
        write_cifar10(Path(root))

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", download)
    for _ in range(2):
        load("cifar10-lt", root, imb_factor=0.1, download=True)
    assert calls == [str(root)]  # existing files are not fetched again

    def fail(root, download):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
    refuse("CIFAR10 could not be downloaded to .*: no network", "cifar10-lt", tmp_path, download=True)


# Lists ----------------------------------------------------------------------------------------------------------------


def write_lists(root, prefix="ImageNet_LT", splits=("train", "val", "test")):
    """Three classes of 12, 6 and 2 training images, one of each for val and test."""
    for split in splits:
        labels = [0] * 12 + [1] * 6 + [2] * 2 if split == "train" else [0, 1, 2]
        lines = [f"{split}/my image {i}.jpg {label}" for i, label in enumerate(labels)]
        for i in range(len(labels)):
            write_image(root / split / f"my image {i}.jpg", i)
        (root / f"{prefix}_{split}.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(("dataset", "prefix"), [("imagenet-lt", "ImageNet_LT"), ("places-lt", "Places_LT")])
def test_lists_with_official_splits(dataset, prefix, tmp_path):
    write_lists(tmp_path, prefix)
    data = load(dataset, tmp_path)
    assert (data.train.name, data.val.name, data.test.name) == ("train", "val", "test")
    assert data.shots_counts.tolist() == data.class_counts.tolist() == [12, 6, 2]
    assert data.class_names == ["0", "1", "2"]
    assert data.notes == []
    image = data.train.images[3]
    assert (image.mode, image.size) == ("RGB", (5, 6))
    assert np.array_equal(image, PIL.Image.open(tmp_path / "train" / "my image 3.jpg"))
    assert data.train.images.path(3) == str(tmp_path / "train/my image 3.jpg")
    assert data.train.images.origin(3) == f"{prefix}_train.txt:4"
    part = data.train.images.subset(torch.tensor([13, 3]))
    assert (part.origin(1), part.target.tolist(), len(part)) == (f"{prefix}_train.txt:4", [1, 0], 2)


def test_inaturalist_reports_val_and_carves(tmp_path):
    write_lists(tmp_path, "iNaturalist18", ("train", "val"))
    data = load("inaturalist2018", tmp_path)
    assert (data.val.name, data.test.name) == ("val (10 % of train)", "val (no test split)")
    assert data.test.images.path(0) == str(tmp_path / "val/my image 0.jpg")
    assert data.shots_counts.tolist() == [12, 6, 2]
    assert data.class_counts.tolist() == [11, 5, 2]
    paths = [split.images.path(i) for split in data[:3] for i in range(len(split.images))]
    assert len(set(paths)) == len(paths) == 23
    assert data.notes == ["1 of 3 classes have fewer than 5 images, and none in val (10 % of train)"]


def test_lists_as_they_come(tmp_path):
    """A byte-order mark, CRLF, blank lines, tabs; names that are not ASCII; no newline at the end."""
    write_lists(tmp_path)
    write_image(tmp_path / "é.jpg")
    lines = "\ufeff\r\nval/my image 0.jpg\t0\r\n\r\n  é.jpg 1  \r\nval/my image 2.jpg   2"
    (tmp_path / "ImageNet_LT_val.txt").write_bytes(lines.encode())
    val = load("imagenet-lt", tmp_path).val.images
    assert val.target.tolist() == [0, 1, 2]
    assert (val.path(1), val.origin(1)) == (str(tmp_path / "é.jpg"), "ImageNet_LT_val.txt:4")


@pytest.mark.parametrize("end", ["\r", "\r\n"])
def test_lines_of_a_list_may_end_in_any_way(end, tmp_path):
    write_lists(tmp_path)
    path = tmp_path / "ImageNet_LT_train.txt"
    path.write_bytes(path.read_bytes().replace(b"\n", end.encode()))
    data = load("imagenet-lt", tmp_path)
    assert (data.class_counts.tolist(), data.train.images.origin(3)) == ([12, 6, 2], "ImageNet_LT_train.txt:4")
    path.write_bytes(path.read_bytes() + b"\xe9.jpg 0")
    refuse("ImageNet_LT_train.txt:21: not UTF-8", "imagenet-lt", tmp_path)


def test_other_lists(tmp_path, monkeypatch):
    write_lists(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "ImageNet_LT_val.txt").rename(elsewhere / "mine.txt")
    data = load("imagenet-lt", tmp_path, val_list=elsewhere / "mine.txt")
    assert data.val.images.origin(0) == f"{elsewhere}/mine.txt:1"
    monkeypatch.chdir(elsewhere)
    assert load("imagenet-lt", tmp_path, val_list="mine.txt").val.images.origin(0) == "mine.txt:1"
    refuse("--test-list no.txt does not exist", "imagenet-lt", tmp_path, test_list="no.txt")
    data = load("imagenet-lt", tmp_path)  # without val: carved
    assert data.val.name == "val (10 % of train)"
    assert f"{tmp_path}/ImageNet_LT_val.txt does not exist" in data.notes[0]
    (tmp_path / "ImageNet_LT_test.txt").rename(tmp_path / "ImageNet_LT_val.txt")
    refuse("ImageNet_LT_test.txt does not exist; --test-list names", "imagenet-lt", tmp_path)
    data = load("imagenet-lt", tmp_path, test_list="ImageNet_LT_val.txt")  # so val is not chosen on
    assert (data.val.name, data.test.name) == ("val (10 % of train)", "test")
    (tmp_path / "ImageNet_LT_train.txt").unlink()
    refuse("ImageNet_LT_train.txt does not exist; --train-list names", "imagenet-lt", tmp_path)


def test_images_in_two_lists(tmp_path):
    write_lists(tmp_path)
    with open(tmp_path / "ImageNet_LT_test.txt", "a") as file:
        file.write("./train/my image 0.jpg 0\n")
    note = load("imagenet-lt", tmp_path).notes[0]
    assert note == f"1 image (ImageNet_LT_test.txt:4 {tmp_path}/./train/my image 0.jpg) in train and in test"
    match = r"4 images \(ImageNet_LT_test.txt:1 .*, and 3 more\), in val and in test"
    refuse(match, "imagenet-lt", tmp_path, val_list="ImageNet_LT_test.txt")
    with open(tmp_path / "ImageNet_LT_val.txt", "a") as file:
        file.write("test/my image 1.jpg 1\n")
    refuse(r"1 image \(ImageNet_LT_test.txt:2 .*\), in val and in test", "imagenet-lt", tmp_path)


TWO_LABELS = {  # lines, the list that they are added to, and the message
    "same path": (
        "train/my image 3.jpg 2",
        "train",
        r"_train.txt:21: image .* label 2, .* 0 in .*_train.txt:4$",
    ),
    "other path": (
        "./train/my image 3.jpg 2",
        "train",
        r"_train.txt:21: .* label 2, .* 0 in .*_train.txt:4$",
    ),
    "symbolic link": ("symbolic.jpg 1", "train", r"_train.txt:21: .*/symbolic.jpg .* label 1, .* 0 in .*_train.txt:4$"),
    "hard link": ("hard.jpg 1", "train", r"_train.txt:21: .*/hard.jpg .* label 1, .* label 0 in .*_train.txt:4$"),
    "other split": ("train/my image 3.jpg 2", "test", r"_test.txt:4: .* label 2, but the label 0 in .*_train.txt:4$"),
    "val and test": ("val/my image 1.jpg 2", "test", r"_val.txt:2: .* label 1, but the label 2 in .*_test.txt:4$"),
    "twice": ("val/my image 1.jpg 0\nval/my image 2.jpg 0", "train", r"_val.txt:2: .*_train.txt:21, and 1 more$"),
}


@pytest.mark.parametrize("case", TWO_LABELS)
def test_an_image_with_two_labels_is_refused(case, tmp_path):
    """In one list or in two, by whatever path."""
    write_lists(tmp_path)
    (tmp_path / "symbolic.jpg").symlink_to("train/my image 3.jpg")
    os.link(tmp_path / "train/my image 3.jpg", tmp_path / "hard.jpg")
    lines, split, match = TWO_LABELS[case]
    with open(tmp_path / f"ImageNet_LT_{split}.txt", "a") as file:
        file.write(lines + "\n")
    refuse(match, "imagenet-lt", tmp_path)


def test_repeated_lines_are_told(tmp_path):
    """They count as often as they are listed, because they are trained on as often."""
    write_lists(tmp_path)
    with open(tmp_path / "ImageNet_LT_train.txt", "a") as file:
        file.write("train/my image 13.jpg 1\n./train/my image 13.jpg 1\n")
    data = load("imagenet-lt", tmp_path)
    assert data.class_counts.tolist() == [12, 8, 2]
    again = "ImageNet_LT_train.txt:21 repeats ImageNet_LT_train.txt:14, and 1 more"
    assert data.notes == [f"images that are listed again count again: 2 ({again})"]


BAD_LINES = {
    "no label": (b"train/a.jpg", r"_train.txt:21: expected 'path label', got 'train/a.jpg'"),
    "label alone": (b"7", r"_train.txt:21: expected 'path label', got '7'"),
    "word": (b"train/a.jpg cat", r"_train.txt:21: expected 'path label', got 'train/a.jpg cat'"),
    "fraction": (b"a.jpg 1.0", r"_train.txt:21: expected 'path label'"),
    "underscore": (b"a.jpg 1_0", r"_train.txt:21: expected 'path label'"),
    "other digits": ("a.jpg ٣".encode(), r"_train.txt:21: expected 'path label'"),
    "comma": (b"a.jpg,1", r"_train.txt:21: expected 'path label'"),
    "endless": (b"a" * 1000, r"_train.txt:21: .*a\.\.\.'$"),
    "huge": (b"a.jpg 999999999999999999999999", r"_train.txt:21: expected 'path label'"),
    "negative": (b"a.jpg -1", r"_train.txt:21: label -1 is not in \[0, 1000\)"),
    "large": (b"a.jpg 1000", r"_train.txt:21: label 1000 is not in \[0, 1000\)"),
    "bytes": (b"\n\xe9.jpg 1", r"_train.txt:22: not UTF-8 \(.* 0xe9\)"),
    "gap": (b"train/my image 0.jpg 5", r"_train.txt: no image of class 3, 4, though ImageNet_LT_train.txt:21 has .* 5"),
    "missing": (b"train/no.jpg 1\ntrain/no2.jpg 1", r"_train.txt:21: image /.*/no.jpg does not exist .* and 1 more"),
    "folder": (b"train 1", r"_train.txt:21: image /.*/train is not a file"),
    "NUL": (b"tr\0in 1", r"_train.txt:21: image .* does not exist or cannot be reached"),
}


@pytest.mark.parametrize("fault", BAD_LINES)
def test_bad_line(fault, tmp_path):
    write_lists(tmp_path)
    line, match = BAD_LINES[fault]
    with open(tmp_path / "ImageNet_LT_train.txt", "ab") as file:
        file.write(line + b"\n")
    refuse(match, "imagenet-lt", tmp_path)


def test_bad_lists(tmp_path):
    write_lists(tmp_path)
    (tmp_path / "val/my image 1.jpg").write_bytes(b"")
    refuse(r"^ImageNet_LT_val.txt:2: image .*/val/my image 1.jpg is an empty file$", "imagenet-lt", tmp_path)
    (tmp_path / "ImageNet_LT_test.txt").write_text("test/my image 0.jpg 3\n")
    refuse(
        r"^ImageNet_LT_test.txt:1: label 3 is no class of ImageNet_LT_train.txt, which has 0 to 2$",
        "imagenet-lt",
        tmp_path,
    )
    (tmp_path / "ImageNet_LT_train.txt").write_text("\n\n")
    refuse("ImageNet_LT_train.txt lists no image", "imagenet-lt", tmp_path)


@pytest.mark.parametrize(("dataset", "limit"), [("places-lt", 365), ("inaturalist2018", 8142)])
def test_labels_of_the_real_sets(dataset, limit, tmp_path):
    (tmp_path / "mine.txt").write_text(f"a.jpg {limit - 1}\nb.jpg {limit}\n")
    options = {f"{split}_list": "mine.txt" for split in ("train", "val", "test")}
    refuse(rf"mine.txt:2: label {limit} is not in \[0, {limit}\)", dataset, tmp_path, **options)


# The competition's JSON -----------------------------------------------------------------------------------------------


def competition(split, n_of):
    """Categories 10, 20, ... in no order; images of each in turn."""
    labels = [label for label, n in enumerate(n_of) for _ in range(n)]
    return {
        "categories": [{"id": 10 * (c + 1), "name": f"species {c}"} for c in reversed(range(len(n_of)))],
        "images": [{"id": 100 + i, "file_name": f"{split}2018/{i}.jpg"} for i in range(len(labels))],
        "annotations": [
            {"image_id": 100 + i, "category_id": 10 * (label + 1)} for i, label in reversed(list(enumerate(labels)))
        ],
    }


def write_competition(root, change=lambda train, val: None):
    contents = competition("train", (6, 2)), competition("val", (1, 1))
    change(*contents)
    for split, content in zip(("train", "val"), contents, strict=True):
        for i in range(8):
            write_image(root / f"{split}2018" / f"{i}.jpg", i)
        (root / f"{split}2018.json").write_text(json.dumps(content, indent=1))


def test_competition(tmp_path):
    write_competition(tmp_path)
    data = load("inaturalist2018", tmp_path)
    assert data.class_names == ["species 0", "species 1"]
    assert data.shots_counts.tolist() == [6, 2]
    assert data.test.name == "val (no test split)"
    assert data.test.images.target.tolist() == [0, 1]
    assert data.test.images.origin(1) == "val2018.json: images[1]"
    assert data.test.images.path(1) == str(tmp_path / "val2018/1.jpg")
    named = load("inaturalist2018", tmp_path, train_list="train2018.json", val_list=tmp_path / "val2018.json")
    assert named.shots_counts.tolist() == [6, 2]


BAD_COMPETITIONS = {
    "no images": (lambda train, val: train.pop("images"), "train2018.json must be an object with a list 'images'"),
    "empty": (
        lambda train, val: (train["images"].clear(), train["annotations"].clear()),
        "train2018.json lists no image",
    ),
    "entry": (lambda train, val: train["images"].append(3), r"train2018.json: images\[8\] must be an object"),
    "no name": (lambda train, val: train["images"][5].pop("file_name"), r"train2018.json: images\[5\] has no 'file_"),
    "kind": (
        lambda train, val: train["annotations"][2].update(category_id="10"),
        r"train2018.json: annotations\[2\]: 'category_id' must be int, got '10'",
    ),
    "unknown image": (
        lambda train, val: train["annotations"][3].update(image_id=7),
        r"train2018.json: annotations\[3\]: no image has the id 7",
    ),
    "unknown category": (
        lambda train, val: val["annotations"][1].update(category_id=30),
        r"val2018.json: annotations\[1\]: no category has the id 30",
    ),
    "no annotation": (
        lambda train, val: train["annotations"].__delitem__(slice(2)),
        r"train2018.json: images\[6\] \(.*/6.jpg\) has no annotation, and 1 more",
    ),
    "two annotations": (
        lambda train, val: train["annotations"].append({"image_id": 101, "category_id": 20}),
        r"annotations\[8\]: image 101 has an annotation of another category; train2018.json: images\[1\]$",
    ),
    "same image id": (
        lambda train, val: train["images"].append({"id": 100, "file_name": "x"}),
        r"train2018.json: images\[8\]: another image has the id 100",
    ),
    "same file, other category": (
        lambda train, val: [
            train["images"].append({"id": 7, "file_name": "train2018/../train2018/0.jpg"}),
            train["annotations"].append({"image_id": 7, "category_id": 20}),
        ],
        r"images\[8\]: image .*/0.jpg has the label species 1, but the label species 0 in train2018.json: images\[0\]$",
    ),
    "same category id": (
        lambda train, val: train["categories"].append({"id": 10, "name": "x"}),
        r"train2018.json: categories\[2\]: another category has the id 10",
    ),
    "other categories": (
        lambda train, val: val["categories"][0].update(name="x"),
        "val2018.json: category 20 is 'x', but 'species 1' in train2018.json",
    ),
    "unused category": (
        lambda train, val: [of["categories"].append({"id": 30, "name": "x"}) for of in (train, val)],
        r"train2018.json: no image of class 2 \(x\)",
    ),
    "missing file": (
        lambda train, val: val["images"][1].update(file_name="val2018/no.jpg"),
        r"val2018.json: images\[1\]: image /.*/val2018/no.jpg does not exist",
    ),
    "surrogate": (
        lambda train, val: val["images"][1].update(file_name="\ud800"),
        r"val2018.json: images\[1\]: image .* cannot be reached",
    ),
}


@pytest.mark.parametrize("fault", BAD_COMPETITIONS)
def test_bad_competition(fault, tmp_path):
    change, match = BAD_COMPETITIONS[fault]
    write_competition(tmp_path, change)
    refuse(match, "inaturalist2018", tmp_path)


def test_repeats_in_a_competition_are_told(tmp_path):
    def repeat(train, val):
        train["annotations"] += train["annotations"][:2]
        train["images"].append({"id": 7, "file_name": "train2018/0.jpg"})
        train["annotations"].append({"image_id": 7, "category_id": 10})

    write_competition(tmp_path, repeat)
    data = load("inaturalist2018", tmp_path)
    assert data.shots_counts.tolist() == [7, 2]
    assert data.notes[:2] == [
        "repeated annotations count once: 2 (train2018.json: annotations[8], and 1 more)",
        "images that are listed again count again: 1 (train2018.json: images[8] repeats train2018.json: images[0])",
    ]


def test_bad_json(tmp_path):
    write_competition(tmp_path)
    path = tmp_path / "train2018.json"
    text = path.read_text()
    path.write_text(text.replace('"image_id": 107,', '"image_id": 107', 1))
    line = text[: text.index('"image_id": 107')].count("\n") + 2  # the parser misses the comma here
    refuse(rf"train2018.json:{line}: Expecting ',' delimiter", "inaturalist2018", tmp_path)
    path.write_bytes(b'{\n"a":\n"\xff"}')
    refuse(r"train2018.json:3: not UTF-8", "inaturalist2018", tmp_path)
    path.write_text("[" * 100_000)
    refuse("train2018.json(:1:| cannot be parsed: maximum recursion)", "inaturalist2018", tmp_path)
    path.write_text('{"images": [' + "1" * 10_000 + "]}")
    refuse("train2018.json cannot be parsed", "inaturalist2018", tmp_path)
    path.write_text(text)
    (tmp_path / "val2018.json").unlink()
    refuse("val2018.json does not exist; --val-list", "inaturalist2018", tmp_path)
    options = {"train_list": "train2018.json", "val_list": "val.txt"}
    refuse("lists and JSON do not go together", "inaturalist2018", tmp_path, **options)
    path.unlink()
    refuse("neither iNaturalist18_train.txt nor train2018.json", "inaturalist2018", tmp_path)


# Folders --------------------------------------------------------------------------------------------------------------


def write_folder(root, splits=("train", "val", "test")):
    for split in splits:
        for c, n in (("ant", 6), ("bee", 3)):
            for i in range(n):
                write_image(root / split / c / f"{i}.PNG", list(f"{split}/{c}/{i}".encode()))


def test_folder(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no image")
    for path in (tmp_path / "val" / "ant").iterdir():
        path.unlink()
    (tmp_path / "val" / "ant").rmdir()  # a class may be missing here
    data = load("folder", tmp_path, check_images=True)
    assert data.class_names == ["ant", "bee"]
    assert data.class_counts.tolist() == [6, 3]
    assert data.val.images.target.tolist() == [1, 1, 1]
    assert isinstance(data.train.images, FileImages)
    assert data.train.images.origin(0) == data.train.images.path(0) == str(tmp_path / "train/ant/0.PNG")
    assert (data.val.name, data.test.name) == ("val", "test")
    assert data.notes == ["files without an image's extension are skipped: 1 (1 .txt; train/ant/notes.txt)"]


def test_images_of_a_folder_come_in_the_order_of_torchvision(tmp_path):
    """The validation images are drawn by this order."""
    write_folder(tmp_path)
    for seed, name in enumerate(("b/1", "b/a/1", "b.c/1", "B/1", "10", "9", "é", "z")):
        write_image(tmp_path / "train" / "ant" / f"{name}.png", seed)
    images = load("folder", tmp_path).train.images
    expected = torchvision.datasets.ImageFolder(tmp_path / "train").samples
    assert [(images.path(i), int(images.target[i])) for i in range(len(images))] == expected


@pytest.mark.parametrize("extension", [".jpg", ".JPEG", ".jpe", ".jfif", ".JFIF", ".png", ".Gif", ".webp", ".TIF"])
def test_images_of_every_usual_extension_count(extension, tmp_path):
    write_folder(tmp_path)
    path = tmp_path / "train" / "ant" / f"x{extension}"
    kind = {".jfif": ".jpg", ".jpe": ".jpg"}.get(extension.lower(), extension)
    write_image(tmp_path / f"x{kind}")
    (tmp_path / f"x{kind}").rename(path)
    data = load("folder", tmp_path, check_images=True)
    assert (data.class_counts.tolist(), data.notes) == ([7, 3], [])


HIDDEN, NOT_IMAGE = "hidden and system files and folders", "files without an image's extension"
COPY, NO_CLASS = "copies of an image beside them", "files and folders of no class"
LEFTOVERS = {  # path, and the reason and text of the note
    ".ipynb_checkpoints/0-checkpoint.png": (HIDDEN, "train/.ipynb_checkpoints"),
    "ant/.ipynb_checkpoints/0-checkpoint.png": (HIDDEN, "train/ant/.ipynb_checkpoints"),
    "ant/._0.PNG": (HIDDEN, "train/ant/._0.PNG"),
    "ant/.DS_Store": (HIDDEN, "train/ant/.DS_Store"),
    ".Trash-1000/files/0.png": (HIDDEN, "train/.Trash-1000"),
    "__MACOSX/ant/0.png": (HIDDEN, "train/__MACOSX"),
    "ant/@eaDir/0.PNG/SYNOPHOTO_THUMB_M.jpg": (HIDDEN, "train/ant/@eaDir"),
    "$RECYCLE.BIN/0.png": (HIDDEN, "train/$RECYCLE.BIN"),
    "lost+found/0.png": (HIDDEN, "train/lost+found"),
    "RECYCLER/0.png": (HIDDEN, "train/RECYCLER"),
    "FOUND.000/0.png": (HIDDEN, "train/FOUND.000"),
    "Network Trash Folder/0.png": (HIDDEN, "train/Network Trash Folder"),
    "Temporary Items/0.png": (HIDDEN, "train/Temporary Items"),
    "@tmp/0.png": (HIDDEN, "train/@tmp"),
    "~snapshot/0.png": (HIDDEN, "train/~snapshot"),
    "_gsdata_/0.png": (HIDDEN, "train/_gsdata_"),
    "ant/Thumbs.db": (NOT_IMAGE, "1 .db; train/ant/Thumbs.db"),
    "ant/desktop.ini": (NOT_IMAGE, "1 .ini; train/ant/desktop.ini"),
    "ant/Icon\r": (NOT_IMAGE, r"1 without any; train/ant/Icon\r"),
    "ant/0.PNG.crdownload": (NOT_IMAGE, "1 .crdownload; train/ant/0.PNG.crdownload"),
    "ant/1.HEIC": (NOT_IMAGE, "1 .heic; train/ant/1.HEIC"),
    "ant/sub/1.svg": (NOT_IMAGE, "1 .svg; train/ant/sub/1.svg"),
    os.fsdecode(b"ant/caf\xe9.txt"): (NOT_IMAGE, r"1 .txt; train/ant/caf\xe9.txt"),
    "ant/0 (1).PNG": (COPY, "train/ant/0 (1).PNG"),
    "ant/0(1).PNG": (COPY, "train/ant/0(1).PNG"),
    "ant/0 - Copy.PNG": (COPY, "train/ant/0 - Copy.PNG"),
    "ant/0 - Kopie (2).PNG": (COPY, "train/ant/0 - Kopie (2).PNG"),
    "ant/0-Copy1.PNG": (COPY, "train/ant/0-Copy1.PNG"),
    "ant/Copie de 0.PNG": (COPY, "train/ant/Copie de 0.PNG"),
    "ant/0.sync-conflict-20200101-120000-ABC.PNG": (COPY, "train/ant/0.sync-conflict-20200101-120000-ABC.PNG"),
    "ant/0.png": (COPY, "train/ant/0.png"),
    "ant/0.jpeg": (COPY, "train/ant/0.jpeg"),
    "ant/0 (1).png": (COPY, "train/ant/0 (1).png"),
    "ant/0.PNG.PNG": (COPY, "train/ant/0.PNG.PNG"),
    "ant/0[1].PNG": (COPY, "train/ant/0[1].PNG"),
    "ant/0_1.PNG": (COPY, "train/ant/0_1.PNG"),
    "ant/0.copy.PNG": (COPY, "train/ant/0.copy.PNG"),
    "ant/0\u526f\u672c.PNG": (COPY, "train/ant/0\u526f\u672c.PNG"),
    "0.png": (NO_CLASS, "train/0.png"),
    "labels.csv": (NO_CLASS, "train/labels.csv"),
    "../val/New folder/desktop.ini": (NO_CLASS, "val/New folder"),
}


@pytest.mark.parametrize("name", LEFTOVERS, ids=ascii)
def test_leftovers_are_skipped_and_named(name, tmp_path):
    """Files of file managers, systems, archives, browsers and notebooks leave the counts, the prior, as they are."""
    write_folder(tmp_path)
    path = tmp_path / "train" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((tmp_path / "train" / "ant" / "0.PNG").read_bytes())
    data = load("folder", tmp_path, check_images=True)
    assert (data.class_names, data.class_counts.tolist()) == (["ant", "bee"], [6, 3])
    why, what = LEFTOVERS[name]
    assert f"{why} are skipped: 1 ({what})" in data.notes


def test_lists_of_what_is_skipped_are_short(tmp_path):
    write_folder(tmp_path)
    for i, extension in enumerate("abcdefgg"):
        (tmp_path / "train" / "ant" / f"{i}.{extension}").touch()
        write_image(tmp_path / "val" / ".trash" / f"{i}.png")
        (tmp_path / "test" / "ant" / f".{i}").touch()
    assert load("folder", tmp_path).notes == [
        "hidden and system files and folders are skipped: 9 (test/ant/.0, test/ant/.1, test/ant/.2, and 6 more)",
        "files without an image's extension are skipped: 8 (2 .g, 1 .a, 1 .b, 1 .c, 1 .d, and 2 more; train/ant/0.a, "
        "train/ant/1.b, train/ant/2.c, and 5 more)",
    ]


def test_images_that_are_only_named_like_copies_count(tmp_path):
    """A browser names the second image.jpg that it saves so, and Windows all images that it renames at once."""
    write_folder(tmp_path)
    for name in ("ant/0 (1)", "ant/my 0", "ant/photo (1)", "ant/photo (2)", "ant sub/00", "ant sub/1"):
        write_image(tmp_path / "train" / f"{name}.PNG", 7)
    write_image(tmp_path / "train" / "Ant" / "my photo (1).PNG", 7)  # a copy, but in another folder
    data = load("folder", tmp_path)
    assert (data.class_names, data.class_counts.tolist()) == (["Ant", "ant", "ant sub", "bee"], [1, 10, 2, 3])
    assert data.notes == []


DOUBLED = {
    "folder of itself": (lambda train: (train / "ant/x").symlink_to("."), "ant/x and .*/train/ant are one folder"),
    "parent": (lambda train: (train / "ant/x").symlink_to(".."), "train/ant/x and .*/train are one folder"),
    "root": (lambda train: (train / "ant/x").symlink_to("../.."), "train/ant/x and .* are one folder"),
    "class": (lambda train: (train / "cat").symlink_to("ant"), "train/cat and .*/train/ant are one folder"),
    "class of val": (
        lambda train: (train / "cat").symlink_to("../val/ant"),
        "val/ant/0.PNG: image has the label ant, but the label cat in .*/train/cat/0.PNG, and 5 more$",
    ),
    "image": (lambda train: (train / "ant/x.png").symlink_to("0.PNG"), "x.png and .*/0.PNG are one file, .* twice$"),
    "hard link": (lambda train: os.link(train / "ant/0.PNG", train / "ant/x.png"), "x.png and .*/0.PNG are one file"),
    "two classes": (
        lambda train: (train / "bee/x.png").symlink_to("../ant/0.PNG"),
        "bee/x.png: image has the label bee, but the label ant in .*/ant/0.PNG$",
    ),
    "two splits": (
        lambda train: os.link(train / "ant/0.PNG", train / "../val/bee/x.png"),
        "val/bee/x.png: image has the label bee, but the label ant in .*/train/ant/0.PNG$",
    ),
    "copied class": (
        lambda train: shutil.copytree(train / "ant", train / "ant - Copy"),
        "ant - Copy/0.PNG: image has the label ant - Copy, but the label ant in .*/ant/0.PNG, of the same bytes, and 5",
    ),
    "copied folder": (
        lambda train: [write_image(train / "ant/sub/x.PNG"), shutil.copytree(train / "ant/sub", train / "ant/sub (2)")],
        r"ant/sub \(2\)/x.PNG and .*/train/ant/sub/x.PNG hold the same bytes: the image would count twice$",
    ),
    "copied into itself": (
        lambda train: shutil.copytree(train / "bee", train / "bee/bee"),
        "bee/bee/0.PNG and .*/train/bee/0.PNG hold the same bytes: the image would count twice, and 2 more$",
    ),
    "copied into another class": (
        lambda train: shutil.copytree(train / "ant", train / "bee/ant"),
        "bee/ant/0.PNG: image has the label bee, but the label ant in .*/train/ant/0.PNG, .* and 5 more$",
    ),
    "copied image": (
        lambda train: shutil.copy(train / "ant/5.PNG", train / "bee"),
        "bee/5.PNG: image has the label bee, but the label ant in .*/train/ant/5.PNG, of the same bytes$",
    ),
    "copied image, other case": (
        lambda train: shutil.copy(train / "ant/5.PNG", train / "bee/5.png"),
        "bee/5.png: image has the label bee, but the label ant in .*/train/ant/5.PNG, of the same bytes$",
    ),
    "copied split": (
        lambda train: [shutil.copytree(train, train.parent / "x"), (train.parent / "x").rename(train / "train")],
        "train/train/ant/0.PNG: image has the label train, but the label ant in .*/train/ant/0.PNG, .* and 8 more$",
    ),
    "val inside train": (
        lambda train: shutil.copytree(train.parent / "val", train / "val"),
        "val/ant/0.PNG: image has the label ant, but the label val in .*/train/val/ant/0.PNG, of the same bytes, and 8",
    ),
    "part of a class": (
        lambda train: [
            shutil.copytree(train / "ant", train / "ant copy"),
            (train / "ant copy/0.PNG").unlink(),
            (train / "ant/5.PNG").unlink(),
            write_image(train / "ant copy/1.PNG"),
            write_image(train / "ant copy/9.PNG"),
        ],
        "ant copy/2.PNG: image has the label ant copy, but the label ant in .*/train/ant/2.PNG, .* and 2 more$",
    ),
    "linked and copied": (
        lambda train: [
            os.link(train / "ant/0.PNG", train / "ant/x.PNG"),
            (train / "bee/more").mkdir(),
            shutil.copy(train / "ant/0.PNG", train / "bee/more/x.PNG"),
        ],
        "bee/more/x.PNG: image has the label bee, but the label ant in",
    ),
    "accents": (
        lambda train: [(train / name).mkdir() for name in ("caf\u00e9", "cafe\u0301")],
        "train/caf.* is there twice, its accents encoded in two ways",
    ),
}  # fmt: skip


for name in ("Ant", "ANT", "ant_copy", "ant.bak", "ant~", "ant_backup", "backup"):
    DOUBLED[f"copied class {name}"] = (
        lambda train, name=name: shutil.copytree(train / "ant", train / name),
        "/0.PNG: image has the label .*, but the label .*, of the same bytes, and 5 more$",
    )


@pytest.mark.parametrize("case", DOUBLED)
def test_what_would_count_twice_is_refused(case, tmp_path):
    write_folder(tmp_path)
    change, match = DOUBLED[case]
    change(tmp_path / "train")
    refuse(match, "folder", tmp_path)


def test_images_of_two_splits_of_the_same_bytes_are_shared(tmp_path):
    """They are treated as if one were a link to the other."""
    write_folder(tmp_path)
    shutil.copy(tmp_path / "train/ant/0.PNG", tmp_path / "test/ant/0.PNG")
    assert load("folder", tmp_path).notes == [f"1 image ({tmp_path}/test/ant/0.PNG) in train and in test"]
    shutil.copytree(tmp_path / "test", tmp_path / "val", dirs_exist_ok=True)
    refuse("9 images .*, in val and in test: what is chosen", "folder", tmp_path)


def test_images_of_one_name_and_size_count_where_their_bytes_differ(tmp_path):
    """The bytes differ in the middle, at the end or at the beginning; numbered names begin or end with each other."""
    write_folder(tmp_path)
    whole = bytes(20_000)
    for i, name in enumerate(("ant/x", "bee/x", "ant/sub/x", "ant/x1", "ant/x12", "ant/2", "../val/bee/x")):
        path = tmp_path / "train" / f"{name}.bmp"
        path.parent.mkdir(exist_ok=True)
        place = (0, 10_000, 19_999)[i % 3]
        path.write_bytes(whole[:place] + bytes([i + 1]) + whole[place + 1 :])
    data = load("folder", tmp_path)
    assert (data.class_counts.tolist(), data.notes) == ([11, 4], [])


def test_names_and_sizes_choose_the_files_that_are_read(tmp_path, monkeypatch):
    """No byte is read if names or sizes differ. Otherwise 4 KB are, and the whole files only if these agree."""
    write_folder(tmp_path)

    def write(name, seed, size=20_000):
        path = tmp_path / "train" / f"{name}.bmp"
        path.write_bytes(np.random.default_rng(seed).bytes(size))
        return str(path)

    for i in range(10, 20):
        write(f"ant/{i}", i)
        write(f"bee/{i}", 0, 20_000 + i)
    parts, read_bytes = [], formats.read_bytes

    def read(*part):
        if part[0].endswith(".bmp"):
            parts.append(part)
        return read_bytes(*part)

    monkeypatch.setattr(formats, "read_bytes", read)
    load("folder", tmp_path)
    assert parts == []
    numbered = [write("ant/1", 1), *(str(tmp_path / f"train/ant/{i}.bmp") for i in range(10, 20))]
    named = [write("ant/x", 2), write("bee/x", 3)]
    load("folder", tmp_path)
    assert sorted(parts) == sorted((path, 10_000, 4096) for path in numbered + named)
    parts.clear()
    write("ant/1", 15)
    load("folder", tmp_path)
    whole = {path for path, begin, length in parts if length == -1}
    assert whole == {numbered[0], numbered[6]}


@pytest.mark.parametrize("suffix", [".PNG", ""], ids=["files", "files and folders"])
def test_images_with_one_inode_by_mistake_are_two(suffix, tmp_path, monkeypatch):
    """Some file systems repeat inodes. Sizes and times may be equal too, as for uncompressed images of an archive."""
    write_folder(tmp_path)
    for path in tmp_path.glob("*/*/*.PNG"):
        path.write_bytes(path.read_bytes().ljust(500, b"\0"))
    for path in (tmp_path, *tmp_path.rglob("*")):
        os.utime(path, ns=(1, 1))
    stat = os.stat

    def same_inode(path, **options):
        fields, more = stat(path, **options).__reduce__()[1]
        inode = 1 if str(path).endswith(suffix) else fields[1]
        return os.stat_result((fields[0], inode, *fields[2:]), more)

    monkeypatch.setattr(os, "stat", same_inode)
    data = load("folder", tmp_path)
    assert (data.class_counts.tolist(), data.notes) == ([6, 3], [])


UNREACHABLE = {
    "class": ("cat", "gone", "train/cat is a link to nothing$"),
    "folder": ("ant/more", "gone", "train/ant/more is a link to nothing$"),
    "image": ("ant/x.png", "gone", "train/ant/x.png: image does not exist"),
    "itself": ("ant/x", "x", "train/ant/x cannot be read: Too many levels of symbolic links$"),
}


@pytest.mark.parametrize("case", UNREACHABLE)
def test_links_that_lead_nowhere_are_refused(case, tmp_path):
    """The target may have been a class. A hidden link, such as an editor's lock file, is skipped."""
    write_folder(tmp_path)
    (tmp_path / "train" / ".#lock").symlink_to("user@host.1234")
    load("folder", tmp_path)
    name, to, match = UNREACHABLE[case]
    (tmp_path / "train" / name).symlink_to(to)
    refuse(match, "folder", tmp_path)


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    """Otherwise its images would be left out of the counts silently."""
    write_folder(tmp_path)
    write_image(tmp_path / "train" / "ant" / "sub" / "0.png")
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("sub"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    refuse("^/.*/train/ant/sub cannot be read: Permission denied$", "folder", tmp_path)


def test_accents_that_macos_takes_apart_are_the_same_class(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / "ant").rename(tmp_path / "train" / "cafe\u0301")
    for split in ("val", "test"):
        (tmp_path / split / "ant").rename(tmp_path / split / "caf\u00e9")
    data = load("folder", tmp_path)
    assert (data.class_names, data.test.images.target.tolist()) == (["bee", "caf\u00e9"], [0] * 3 + [1] * 6)


def test_names_that_cannot_be_encoded_can_be_printed_and_written(tmp_path):
    """Latin-1 bytes and a line break in class names, notes and messages are escaped. Paths stay as they are."""
    name = os.fsdecode(b"caf\xe9\n")
    for i, split in enumerate(("train", "val", "test")):
        for j, label in enumerate((name, "bee")):
            write_image(tmp_path / split / label / f"{name}.png", [i, j])
    (tmp_path / "train" / name / name).touch()
    os.link(tmp_path / "train" / name / f"{name}.png", tmp_path / "test" / name / "x.png")
    data = load("folder", tmp_path)
    assert data.class_names == ["bee", r"caf\xe9\n"]
    assert (
        data.notes[0] == r"files without an image's extension are skipped: 1 (1 without any; train/caf\xe9\n/caf\xe9\n)"
    )
    assert data.notes[-1] == rf"1 image ({tmp_path}/test/caf\xe9\n/x.png) in train and in test"
    assert data.train.images.path(1) == str(tmp_path / "train" / name / f"{name}.png")
    assert data.train.images[1].size == (5, 6)
    (tmp_path / "train" / name / f"{name}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"caf\\xe9\\n/caf\\xe9\\n.png cannot be read"):
        data.train.images[1]
    (tmp_path / "val" / name / f"{name}.png").write_bytes(b"")
    refuse(r"caf\\xe9\\n/caf\\xe9\\n.png: image is an empty file$", "folder", tmp_path)


@pytest.mark.parametrize(("held_out", "name"), [("val", "val (no test split)"), ("test", "test")])
def test_folder_with_one_held_out_split(held_out, name, tmp_path):
    write_folder(tmp_path, ("train", held_out))
    data = load("folder", tmp_path)
    assert (data.val.name, data.test.name) == ("val (10 % of train)", name)
    assert data.class_counts.tolist() == [5, 3]
    assert len(data.test.images) == 9


def test_bad_folder(tmp_path):
    refuse(f"{tmp_path}/train is no folder; expected {tmp_path}/train/CLASS/", "folder", tmp_path)
    write_folder(tmp_path, ("train",))
    refuse("neither a folder val nor test", "folder", tmp_path)
    (tmp_path / "test").mkdir()
    refuse(f"{tmp_path}/test has no class folders", "folder", tmp_path)
    (tmp_path / "test" / "ant").mkdir()
    refuse(f"{tmp_path}/test holds no image", "folder", tmp_path)
    write_image(tmp_path / "test" / "cat" / "0.jpg")
    refuse(f"{tmp_path}/test/cat is a class that train does not have", "folder", tmp_path)
    (tmp_path / "train" / "cat").mkdir()
    refuse(f"{tmp_path}/train/cat holds no image", "folder", tmp_path)
    (tmp_path / "train" / "cat" / "0.jpg").touch()
    refuse(f"^{tmp_path}/train/cat/0.jpg: image is an empty file$", "folder", tmp_path)


def test_what_chooses_is_not_what_is_reported(tmp_path):
    """Checked for a list of training images as the reported split, and for a link to another split's folder."""
    write_lists(tmp_path, "iNaturalist18", ("train", "val"))
    match = r"2 images .*, in val \(10 % of train\) and in val \(no test split\): what is chosen on one"
    refuse(match, "inaturalist2018", tmp_path, val_list="iNaturalist18_train.txt")
    write_folder(tmp_path / "folder", ("train", "val"))
    (tmp_path / "folder" / "test").symlink_to("val")
    refuse("9 images .*, in val and in test: what is chosen", "folder", tmp_path / "folder")


def test_one_class_is_no_classification(tmp_path):
    write_lists(tmp_path)
    for split in ("train", "val", "test"):
        (tmp_path / f"ImageNet_LT_{split}.txt").write_text(f"{split}/my image 0.jpg 0\n")
        write_image(tmp_path / "folder" / split / "ant" / "0.jpg")
    refuse("ImageNet_LT_train.txt has one class only", "imagenet-lt", tmp_path)
    refuse("folder/train has one class only", "folder", tmp_path / "folder")


def test_fingerprint_is_of_labels_and_images_wherever_they_lie(tmp_path):
    write_lists(tmp_path / "a")
    write_lists(tmp_path / "b")
    first = fingerprint(load("imagenet-lt", tmp_path / "a"))
    assert fingerprint(load("imagenet-lt", tmp_path / "b")) == first
    path = tmp_path / "b" / "ImageNet_LT_test.txt"
    lines = path.read_text()
    for changed in (lines.replace("0.jpg 0", "0.jpg 1"), lines.replace("test/my image 0", "val/../train/my image 0")):
        path.write_text(changed)
        assert fingerprint(load("imagenet-lt", tmp_path / "b")) != first
    digits = load("digits-lt", None)
    assert fingerprint(digits) == fingerprint(load("digits-lt", None))
    digits.test.images.images[3, 0, 9, 9] += 1
    assert fingerprint(digits) != fingerprint(load("digits-lt", None))


# Image files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_lists, write_competition, write_folder])
def test_counting_opens_no_image(write, tmp_path, monkeypatch):
    write(tmp_path)
    dataset = {write_lists: "imagenet-lt", write_competition: "inaturalist2018", write_folder: "folder"}[write]

    def refuse_to_open(*args, **kwargs):
        raise AssertionError("an image was opened")

    monkeypatch.setattr(PIL.Image, "open", refuse_to_open)
    data = load(dataset, tmp_path)
    with pytest.raises(DataError, match="an image was opened"):
        data.train.images[0]


def test_every_image_is_decoded_when_asked(tmp_path):
    write_lists(tmp_path)
    assert load("imagenet-lt", tmp_path, check_images=True).n_classes == 3
    whole = (tmp_path / "val/my image 1.jpg").read_bytes()
    (tmp_path / "val/my image 1.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "test/my image 2.jpg").write_bytes(b"no image")
    load("imagenet-lt", tmp_path)  # without decoding nothing is found
    refuse(
        r"^ImageNet_LT_val.txt:2: image .*/val/my image 1.jpg cannot be read \(.*[Tt]runcated.*\), and 1 more$",
        "imagenet-lt",
        tmp_path,
        check_images=True,
    )


def test_worker_names_an_image_that_it_cannot_read(tmp_path, monkeypatch):
    # Otherwise the loader waits 5 s for its worker when it is deleted.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    write_lists(tmp_path)
    images = load("imagenet-lt", tmp_path).train.images
    (tmp_path / "train/my image 1.jpg").write_bytes(b"no image")
    loader = torch.utils.data.DataLoader(images, batch_size=2, num_workers=1, collate_fn=len)
    with pytest.raises(DataError, match=r"ImageNet_LT_train.txt:2: image .*my image 1.jpg cannot be read") as raised:
        list(loader)
    del raised
    gc.collect()  # deletes the iterator, which its own error refers to


@pytest.mark.parametrize(("kind", "mode"), [(np.uint16, "I;16"), (np.int32, "I"), (np.float32, "F")])
def test_images_that_would_become_white_are_refused(kind, mode, tmp_path):
    write_folder(tmp_path)
    PIL.Image.fromarray((np.arange(64) * 1000).reshape(8, 8).astype(kind)).save(tmp_path / "x.tiff")
    (tmp_path / "x.tiff").rename(tmp_path / "train" / "ant" / "0.PNG")
    with pytest.raises(DataError, match=rf"ant/0.PNG: .* mode {mode} has more than 8 bits a channel"):
        load("folder", tmp_path).train.images[0]


def test_grey_and_palette_images_become_rgb(tmp_path):
    write_folder(tmp_path)
    for i, mode in enumerate(("L", "P", "CMYK", "RGBA")):
        buffer = io.BytesIO()
        PIL.Image.new(mode, (4, 4)).save(buffer, "TIFF")
        (tmp_path / "train" / "ant" / f"{i}.PNG").write_bytes(buffer.getvalue())
    images = load("folder", tmp_path).train.images
    assert {images[i].mode for i in range(len(images))} == {"RGB"}
