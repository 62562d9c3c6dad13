"""The data sets: their files on disk, the checks before training starts, and the role of each split.

    digits-lt        scikit-learn's handwritten digits as 32x32 images; nothing is read from disk
    cifar10-lt       ROOT/cifar-10-batches-py/{data_batch_1 to 5, test_batch, batches.meta}
    cifar100-lt      ROOT/cifar-100-python/{train, test, meta}
    imagenet-lt      ROOT/ImageNet_LT_{train,val,test}.txt and the images that they list
    places-lt        ROOT/Places_LT_{train,val,test}.txt and the images that they list
    inaturalist2018  ROOT/iNaturalist18_{train,val}.txt, or the competition's {train,val}2018.json
    folder           ROOT/{train,val,test}/CLASS/**/*.jpg and so on; val or test may be missing

A list has one line `path label` for each image; the path is relative to ROOT. Class counts come from the labels alone:
without `check_images` no image is decoded before training, but each file must exist and not be empty. The class counts
become the prior, so a file has one class and, in folders, counts once, however many links lead to it. Files of the same
name and bytes in two folders are treated as one file. Folders may hold more than images. These entries are skipped and
listed in `notes`: hidden files, other extensions, and copies beside an image whose names begin or end with its name.

Results are reported on "test", or on "val" if a data set has no test split. Tau and the best epoch are chosen on
another split: on the official "val" if there are both, otherwise on a part of every training class.
"""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from cifar import CIFARS, read_cifar
from formats import (
    SPLITS,
    ArrayImages,
    DataError,
    FileImages,
    Images,
    and_more,
    check_decoding,
    find_repeats,
    is_json,
    printable,
    read_folder,
    read_listings,
)
from torch import Tensor
from torchvision.transforms.v2 import functional

from fused_la import count_classes

MADE_LONG_TAILED = ("digits-lt", "cifar10-lt", "cifar100-lt")  # balanced sets that are subsampled to a long tail
LISTED = {  # prefix of the lists' names, number of classes, official splits
    "imagenet-lt": ("ImageNet_LT", 1000, ("train", "val", "test")),
    "places-lt": ("Places_LT", 365, ("train", "val", "test")),
    "inaturalist2018": ("iNaturalist18", 8142, ("train", "val")),
}
DATASETS = (*MADE_LONG_TAILED, *LISTED, "folder")
IMB_TYPES = ("exp", "step")
IMB_TYPE, IMB_FACTOR, VAL_FRACTION = "exp", 0.01, 0.1  # defaults of `load`


class Split(NamedTuple):
    name: str  # as reports print it
    images: Images


class Data(NamedTuple):
    train: Split
    val: Split | None  # tau and the best epoch are chosen on it
    test: Split  # results are reported on it
    n_classes: int
    class_names: list[str]
    shots_counts: Tensor  # (C,) in the data set's own training split; defines many, medium and few
    class_counts: Tensor  # (C,) in `train`, for the prior: without the images that became `val`
    notes: list[str]


class SourceSplits(NamedTuple):
    """The splits that a data set comes with, before `assign_splits` gives each its role."""

    train: Images
    val: Images | None
    test: Images | None
    class_names: list[str]
    notes: list[str]


def load(
    dataset: str,
    root: Path | None,
    *,
    train_list: str | Path | None = None,
    val_list: str | Path | None = None,
    test_list: str | Path | None = None,
    imb_type: str = IMB_TYPE,
    imb_factor: float = IMB_FACTOR,
    val_fraction: float | None = None,
    check_images: bool = False,
    download: bool = False,
) -> Data:
    """Read a data set's labels, and check everything that can be checked without decoding an image.

    Args:
        dataset: one of DATASETS.
        root: its folder; None for digits-lt, which has none.
        train_list, val_list, test_list: list files (.json: the competition's format) in place of the usual ones,
            relative to `root`, or to the current folder if `root` has no such file.
        imb_type, imb_factor: the profile of digits-lt and the CIFAR sets, see `long_tailed_counts`.
        val_fraction: the part of each training class that becomes `val`, in [0, 0.5]. A class of 5 images or more gives
            at least one, a smaller class none. None is VAL_FRACTION; refused if `val` and `test` both exist.
        check_images: decode every image first.
        download: fetch a CIFAR set that is not there.

    Raises:
        DataError: something is missing, damaged or contradicts itself, or an option does not go with the data set.
    """
    if dataset not in DATASETS:
        raise DataError(f"--dataset must be one of {', '.join(DATASETS)}, got {dataset}")
    if imb_type not in IMB_TYPES:
        raise DataError(f"--imb-type must be one of {', '.join(IMB_TYPES)}, got {imb_type}")
    if not 0 < imb_factor <= 1:
        raise DataError(f"--imb-factor must be in (0, 1], got {imb_factor:g}")
    if val_fraction is not None and not 0 <= val_fraction <= 0.5:
        raise DataError(f"--val-fraction must be in [0, 0.5], got {val_fraction:g}")
    lists = {
        name: Path(path)
        for name, path in zip(SPLITS, (train_list, val_list, test_list), strict=True)
        if path is not None
    }
    for option, is_given, applies in (
        ("--data", root is not None, dataset != "digits-lt"),
        *((f"--{name}-list", name in lists, dataset in LISTED) for name in SPLITS),
        ("--imb-type", imb_type != IMB_TYPE, dataset in MADE_LONG_TAILED),
        ("--imb-factor", imb_factor != IMB_FACTOR, dataset in MADE_LONG_TAILED),
        ("--download", download, dataset in CIFARS),
    ):
        if is_given and not applies:  # otherwise the option would be ignored silently
            raise DataError(f"{option} does not apply to {dataset}")
    if dataset == "digits-lt":
        source = read_digits(imb_type, imb_factor)
    else:
        if root is None:
            raise DataError(f"{dataset} needs --data, the folder of its data")
        root = Path(root).expanduser()
        if root.exists() and not root.is_dir():
            raise DataError(f"--data {root} is a file; {dataset} needs the folder of its data")
        if not root.exists() and not download:
            raise DataError(f"--data {root} does not exist; {dataset} needs the folder of its data")
        if dataset in CIFARS:
            source = read_long_tailed_cifar(dataset, root, imb_type, imb_factor, download)
        elif dataset == "folder":
            images, class_names, notes = read_folder(root)
            source = SourceSplits(images["train"], images.get("val"), images.get("test"), class_names, notes)
        else:
            source = read_lists(dataset, root, lists)
    if check_images:
        check_decoding([images for images in (source.train, source.val, source.test) if images is not None])
    if None not in (val_fraction, source.val, source.test):
        raise DataError("--val-fraction does not apply: there are a validation and a test split already")
    return assign_splits(source, VAL_FRACTION if val_fraction is None else val_fraction)


def read_lists(dataset: str, root: Path, given: dict[str, Path]) -> SourceSplits:
    """Read the given lists; splits without one are read from the files with the official names."""
    prefix, n_classes, official = LISTED[dataset]
    default_names = {split: f"{prefix}_{split}.txt" for split in official}
    competition_names = {split: f"{split}2018.json" for split in official} if dataset == "inaturalist2018" else {}
    formats = {is_json(path) for path in given.values()}
    if len(formats) == 2:
        options = " and ".join(f"--{split}-list {path}" for split, path in given.items())
        raise DataError(f"{options}: lists and JSON do not go together, as their labels may differ")
    if True in formats or (not formats and competition_names and not (root / default_names["train"]).is_file()):
        if not given and not (root / competition_names["train"]).is_file():
            raise DataError(
                f"{root} has neither {default_names['train']} nor {competition_names['train']}; see also --train-list"
            )
        default_names = competition_names

    files: dict[str, tuple[Path, str]] = {}
    notes = []
    reported = "test" if "test" in (*default_names, *given) else "val"
    for split in ("train", "test", "val"):
        if split in given:
            path = next((path for path in (root / given[split], given[split]) if path.is_file()), None)
            if path is None:
                raise DataError(f"--{split}-list {given[split]} does not exist, neither in {root} nor as it stands")
            files[split] = path, str(given[split])
        elif split in default_names:
            path = root / default_names[split]
            if path.is_file():
                if split != "val" or "test" not in files or not path.samefile(files["test"][0]):
                    files[split] = path, default_names[split]
            elif split in ("train", reported):
                raise DataError(f"{path} does not exist; --{split}-list names another file")
            else:
                notes.append(f"{path} does not exist: there is no official validation split")
    for split in ("train", reported):
        if split not in files:
            raise DataError(f"{dataset} from JSON files needs --{split}-list")
    images, class_names, more_notes = read_listings(files, root, n_classes)
    return SourceSplits(images["train"], images.get("val"), images.get("test"), class_names, notes + more_notes)


# ---- The role of each split


def assign_splits(source: SourceSplits, val_fraction: float) -> Data:
    train, val, test, class_names, notes = source
    n_classes = len(class_names)
    shots_counts = count_classes(train.target, n_classes)
    if val is not None and test is not None:
        reported, selection = Split("test", test), Split("val", val)
    else:
        images = val if test is None else test
        assert images is not None  # every data set has a val or a test split
        reported, selection = Split("val (no test split)" if test is None else "test", images), None
        index, val_index = carve(train.target, shots_counts, val_fraction)
        if len(val_index):
            selection = Split(f"val ({100 * val_fraction:g} % of train)", train.subset(val_index))
            train = train.subset(index)
            if n_without_val := int((count_classes(selection.images.target, n_classes) == 0).sum()):
                few = f"{n_without_val} of {n_classes} classes have fewer than {CARVED_FROM} images"
                notes.append(f"{few}, and none in {selection.name}")
        else:
            reason = "--val-fraction is 0" if val_fraction == 0 else f"no class has {CARVED_FROM} training images"
            notes.append(f"no validation split: {reason}, so nothing can be chosen on one")
    if selection is not None and (shared := shared_images(selection.images, reported.images)):
        raise DataError(
            f"{shared}, in {selection.name} and in {reported.name}: what is chosen on one would be chosen on the other"
        )
    for split in (selection, reported):
        if split is not None and (shared := shared_images(train, split.images)):
            notes.append(f"{shared} in train and in {split.name}")
    class_counts = count_classes(train.target, n_classes)
    class_names, notes = (list(map(printable, texts)) for texts in (class_names, notes))
    return Data(Split("train", train), selection, reported, n_classes, class_names, shots_counts, class_counts, notes)


def fingerprint(data: Data) -> str:
    """A hash of labels and of images or file names, to compare splits. The folder that they are in does not count."""
    splits = [split for split in (data.train, data.val, data.test) if split is not None]
    names = [
        [images.path(i) for i in range(len(images))] if isinstance(images, FileImages) else [] for _, images in splits
    ]
    # The common prefix of the strings, which may end within the name of a folder.
    root = os.path.commonprefix([end for paths in names if paths for end in (min(paths), max(paths))])  # noqa: RUF071
    digest = hashlib.sha256()
    for (name, images), paths in zip(splits, names, strict=True):
        digest.update(name.encode() + images.target.numpy().tobytes())
        digest.update("\0".join(path[len(root) :] for path in paths).encode(errors="surrogateescape"))
        if isinstance(images, ArrayImages):
            digest.update(images.images.numpy().tobytes())
    return digest.hexdigest()


CARVED_FROM = 5  # a class with fewer training images gives none to validation


def carve(target: Tensor, class_counts: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Indices that stay in training and indices for validation, drawn with a fixed seed."""
    n_val = (fraction * class_counts.double()).round().long()
    n_val = torch.where(class_counts >= CARVED_FROM, n_val.clamp(min=1 if fraction else 0), 0)
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
    order = order[target[order].argsort(stable=True)]  # by class, shuffled within each
    position_in_class = torch.arange(len(target)) - (class_counts.cumsum(0) - class_counts)[target[order]]
    is_val = torch.zeros(len(target), dtype=torch.bool)
    is_val[order] = position_in_class < n_val[target[order]]
    return (~is_val).nonzero().flatten(), is_val.nonzero().flatten()


def shared_images(a: Images, b: Images) -> str:
    """A message with the number of files in both and the first of them; "" if there is none, or no files."""
    if not (isinstance(a, FileImages) and isinstance(b, FileImages)):
        return ""
    shared = np.flatnonzero(np.isin(b.ids, a.ids))
    if not len(shared):
        return ""
    origin, path = b.origin(shared[0]), b.path(shared[0])
    first = path if origin == path else f"{origin} {path}"
    return f"1 image ({first})" if len(shared) == 1 else f"{len(shared)} images ({first}{and_more(len(shared))})"


# ---- Long-tailed subsets of balanced sets


def long_tailed_counts(n_max: int, n_classes: int, imb_factor: float, imb_type: str = "exp") -> list[int]:
    """Images of each class: n_max down to n_max * imb_factor ("exp"), or one half of the classes with each ("step")."""
    if imb_type == "exp":
        counts = [int(n_max * imb_factor ** (i / max(n_classes - 1.0, 1.0))) for i in range(n_classes)]
    else:
        counts = [n_max if i < n_classes // 2 else int(n_max * imb_factor) for i in range(n_classes)]
    if 0 in counts:
        raise DataError(
            f"--imb-factor must leave every class a training image, as about 1 / {n_max} and more do, "
            f"got {imb_factor:g}, which leaves none to class {counts.index(0)} of {n_classes}"
        )
    return counts


def read_long_tailed_cifar(dataset: str, root: Path, imb_type: str, imb_factor: float, download: bool) -> SourceSplits:
    """All test images, and the training images that the code of LDAM keeps.

    LDAM is Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss", NeurIPS 2019. Other
    papers report their results on these images.
    """
    train, test, class_names = read_cifar(CIFARS[dataset], root, download)
    n_max = int(count_classes(train.target, len(class_names)).min())
    rng, kept = np.random.RandomState(0), []
    for c, n in enumerate(long_tailed_counts(n_max, len(class_names), imb_factor, imb_type)):
        members = np.where(train.target.numpy() == c)[0]
        rng.shuffle(members)
        kept.append(members[:n])
    train = train.subset(torch.from_numpy(np.concatenate(kept)))
    repeated, first = find_repeats(np.array([hash(image.tobytes()) for image in train.images.numpy()]))
    notes = []
    if len(repeated):  # a note, not an error: the original data may have some
        n_other = int((train.target[repeated] != train.target[first]).sum())
        notes.append(
            f"training images that repeat another, pixel by pixel: {len(repeated)}, {n_other} with another label"
        )
    return SourceSplits(train, None, test, class_names, notes)


def read_digits(imb_type: str, imb_factor: float) -> SourceSplits:
    """50 images of every digit for testing, 20 for validation. The scarcest digit's remaining images set n_max."""
    from sklearn.datasets import load_digits  # imported here because nothing else needs scikit-learn

    pixels, digits = load_digits(return_X_y=True)
    grey = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) * (255 / 16)  # grey levels are 0 to 16
    images = functional.resize(grey, [32, 32], antialias=True).round().clamp(0, 255).to(torch.uint8)
    all_digits = ArrayImages(images.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(digits).long())
    n_test, n_val, n_classes = 50, 20, 10
    n_max = int(count_classes(all_digits.target, n_classes).min()) - n_test - n_val
    generator = torch.Generator().manual_seed(0)
    train, val, test = [], [], []
    for c, n_train in enumerate(long_tailed_counts(n_max, n_classes, imb_factor, imb_type)):
        members = (all_digits.target == c).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        test.append(members[:n_test])
        val.append(members[n_test : n_test + n_val])
        train.append(members[n_test + n_val : n_test + n_val + n_train])
    class_names = [str(c) for c in range(n_classes)]
    return SourceSplits(
        *(all_digits.subset(torch.cat(part)) for part in (train, val, test)), class_names=class_names, notes=[]
    )
