"""Images in files: what list files, the competition's JSON and folders hold, and what is wrong with them.

No image file is opened here but by FileImages, when an image is asked for, and by check_decoding.
"""

import codecs
import json
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from tqdm import tqdm

from fused_la import count_classes

SPLITS = ("train", "val", "test")
N_THREADS = 16  # they wait for a disk or for PIL, which lets go of the interpreter while it decodes


class DataError(Exception):
    """What is wrong with the data; the message names the file and the line, or the option."""

    def __init__(self, message: str) -> None:
        super().__init__(message.split("DataError: ")[-1].strip())  # a worker's has its traceback before it


class Images(Dataset, ABC):
    """Images without their labels: those are in `target`, (N,) int64 on the CPU."""

    target: Tensor

    def __len__(self) -> int:
        return len(self.target)

    @abstractmethod
    def subset(self, index: Tensor) -> "Images": ...


class ArrayImages(Images):
    """Images in memory: (N, 3, H, W) uint8."""

    def __init__(self, images: Tensor, target: Tensor) -> None:
        self.images, self.target = images, target

    def __getitem__(self, i: int) -> Tensor:
        return self.images[i]

    def subset(self, index: Tensor) -> "ArrayImages":
        return ArrayImages(self.images[index], self.target[index])


class FileImages(Images):
    """Images in files; `origins` says where each was listed, as in ImageNet_LT_train.txt:17.

    Paths and origins are kept as arrays of bytes. Reading one from a list would write to its reference count, and so
    in time copy the whole list into every worker process of a loader.
    """

    def __init__(self, paths: Sequence[str], target: Tensor, origins: Sequence[str]) -> None:
        self._paths, self._origins = (np.array([os.fsencode(s) for s in of]) for of in (paths, origins))
        self.target = target

    def path(self, i: int) -> str:
        return os.fsdecode(self._paths[i])

    def origin(self, i: int) -> str:
        return os.fsdecode(self._origins[i])

    def __getitem__(self, i: int) -> Any:
        try:
            return load_rgb(self.path(i))
        except Exception as error:  # which one, PIL's decoders do not agree on
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{self.origin(i)}: image {self.path(i)} cannot be read ({reason})") from error

    def subset(self, index: Tensor) -> "FileImages":
        part = FileImages([], self.target[index], [])
        part._paths, part._origins = self._paths[index.numpy()], self._origins[index.numpy()]
        return part


def load_rgb(path: str) -> Any:
    """As torchvision does, which makes white of all that is above 255 in a grey image of 16 bits."""
    with Image.open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"mode {image.mode} has more than 8 bits a channel: convert it first")
        return image.convert("RGB")


def and_more(n: int) -> str:
    """After the first of n."""
    return f", and {n - 1} more" if n > 1 else ""


# ---- List files and JSON: what each says, with every path joined to the root


class Listing(NamedTuple):
    name: str  # as messages name it
    paths: list[str]
    target: list[int]
    origins: list[str]


def read_list(path: Path, name: str, root: Path, n_classes: int) -> Listing:
    """Lines `path label`; the path may hold spaces, blank lines are skipped."""
    listing = Listing(name, [], [], [])
    for number, line in enumerate(read_text(path, name).split("\n"), 1):
        if not (line := line.strip()):
            continue
        match = re.fullmatch(r"(.*\S)\s+(-?[0-9]{1,18})", line)
        if match is None:
            shown = line if len(line) <= 100 else line[:100] + "..."
            raise DataError(f"{name}:{number}: expected 'path label', got {shown!r}")
        label = int(match[2])
        if not 0 <= label < n_classes:
            raise DataError(f"{name}:{number}: label {label} is not in [0, {n_classes})")
        listing.paths.append(os.path.join(root, match[1]))
        listing.target.append(label)
        listing.origins.append(f"{name}:{number}")
    if not listing.paths:
        raise DataError(f"{name} lists no image ({path})")
    return listing


def read_json(path: Path, name: str, root: Path) -> tuple[Listing, dict[int, str]]:
    """COCO-like images, annotations and categories. The label is the rank of the category's id; also id -> name."""
    try:
        content = json.loads(read_text(path, name))
    except json.JSONDecodeError as error:
        raise DataError(f"{name}:{error.lineno}: {error.msg} (column {error.colno})") from error
    except (RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise DataError(f"{name} cannot be parsed: {error}") from error

    def entries(key: str) -> Iterator[tuple[str, dict]]:
        found = content.get(key) if isinstance(content, dict) else None
        if not isinstance(found, list):
            raise DataError(f"{name} must be an object with a list {key!r}")
        for i, entry in enumerate(found):
            if not isinstance(entry, dict):
                raise DataError(f"{name}: {key}[{i}] must be an object")
            yield f"{name}: {key}[{i}]", entry

    def field(where: str, entry: dict, key: str, kind: type) -> Any:
        if key not in entry:
            raise DataError(f"{where} has no {key!r}")
        if type(entry[key]) is not kind:  # a bool is no int here
            raise DataError(f"{where}: {key!r} must be {kind.__name__}, got {entry[key]!r}")
        return entry[key]

    categories: dict[int, str] = {}
    for where, entry in entries("categories"):
        key = field(where, entry, "id", int)
        if key in categories:
            raise DataError(f"{where}: another category has the id {key}")
        categories[key] = field(where, entry, "name", str)
    label_of = {key: label for label, key in enumerate(sorted(categories))}

    listing = Listing(name, [], [], [])
    index_of: dict[int, int] = {}
    for where, entry in entries("images"):
        key = field(where, entry, "id", int)
        if key in index_of:
            raise DataError(f"{where}: another image has the id {key}")
        index_of[key] = len(listing.paths)
        listing.paths.append(os.path.join(root, field(where, entry, "file_name", str)))
        listing.target.append(-1)
        listing.origins.append(where)
    for where, entry in entries("annotations"):
        image, category = field(where, entry, "image_id", int), field(where, entry, "category_id", int)
        if image not in index_of:
            raise DataError(f"{where}: no image has the id {image}")
        if category not in label_of:
            raise DataError(f"{where}: no category has the id {category}")
        i = index_of[image]
        if listing.target[i] != -1:
            raise DataError(f"{where}: image {image} has an annotation already; {listing.origins[i]}")
        listing.target[i] = label_of[category]
    if not listing.paths:
        raise DataError(f"{name} lists no image ({path})")
    if n_without := listing.target.count(-1):
        i = listing.target.index(-1)
        raise DataError(f"{listing.origins[i]} ({listing.paths[i]}) has no annotation{and_more(n_without)}")
    return listing, categories


def read_listings(
    files: dict[str, tuple[Path, str]], root: Path, n_classes: int
) -> tuple[dict[str, Images], list[str]]:
    """Images of each split, and the names of classes, from files by split: where each lies and what to call it."""
    listings: dict[str, Listing] = {}
    if all(is_json(path) for path, _ in files.values()):
        categories: dict[str, dict[int, str]] = {}
        for split, (path, name) in files.items():
            listings[split], categories[split] = read_json(path, name, root)
        expected = categories["train"]
        for split, found in categories.items():
            for key in sorted(expected.keys() | found.keys()):
                if (in_train := expected.get(key)) != (here := found.get(key)):
                    raise DataError(
                        f"{listings[split].name}: category {key} is {here!r}, "
                        f"but {in_train!r} in {listings['train'].name}"
                    )
        class_names = [expected[key] for key in sorted(expected)]
        reason = "though its categories name them"
    else:
        for split, (path, name) in files.items():
            listings[split] = read_list(path, name, root, n_classes)
        train = listings["train"]
        largest = max(train.target)
        class_names = [str(c) for c in range(largest + 1)]
        reason = f"though {train.origins[train.target.index(largest)]} has the label {largest}"
        for listing in listings.values():
            for label, origin in zip(listing.target, listing.origins, strict=True):
                if label > largest:
                    raise DataError(f"{origin}: label {label} is no class of {train.name}, which has 0 to {largest}")
    train = listings["train"]
    if len(class_names) < 2:
        raise DataError(f"{train.name} has one class only: there is nothing to tell apart")
    without = (count_classes(train.target, len(class_names)) == 0).nonzero().flatten().tolist()
    if without:
        first = ", ".join(str(c) if class_names[c] == str(c) else f"{c} ({class_names[c]})" for c in without[:10])
        first += f" and {len(without) - 10} more" if len(without) > 10 else ""
        raise DataError(f"{train.name}: no image of class {first}, {reason}")
    check_files([pair for listing in listings.values() for pair in zip(listing.origins, listing.paths, strict=True)])
    images = {split: FileImages(of.paths, torch.tensor(of.target), of.origins) for split, of in listings.items()}
    return dict(images), class_names


def is_json(path: Path) -> bool:
    return path.suffix.lower() == ".json"


def read_text(path: Path, name: str) -> str:
    content = read_bytes(path).removeprefix(codecs.BOM_UTF8)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: not UTF-8 ({error.reason} {content[error.start]:#04x})") from error


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


# ---- A folder a class


def read_folder(root: Path) -> tuple[dict[str, Images], list[str]]:
    """Images of each split that there is, and the names of classes: those of train."""
    splits = [split for split in SPLITS if (root / split).is_dir()]
    if "train" not in splits:
        raise DataError(f"{root / 'train'} is no folder; expected {root}/train/CLASS/*.jpg, and val or test beside it")
    if len(splits) == 1:
        raise DataError(f"{root} has neither a folder val nor test to report results on")
    class_to_idx: dict[str, int] = {}
    samples: dict[str, list[tuple[str, int]]] = {}
    for split in splits:
        folder = root / split
        try:
            classes, ranks = find_classes(folder)
        except OSError as error:  # also where there is no class
            raise DataError(f"{folder} has no class folders that can be read") from error
        class_to_idx = class_to_idx or ranks
        if unknown := [c for c in classes if c not in class_to_idx]:
            raise DataError(f"{folder / unknown[0]} is a class that train does not have{and_more(len(unknown))}")
        samples[split] = make_dataset(folder, {c: class_to_idx[c] for c in classes}, IMG_EXTENSIONS, allow_empty=True)
        if not samples[split]:
            raise DataError(f"{folder} holds no image ({', '.join(IMG_EXTENSIONS)})")
    if len(class_to_idx) < 2:
        raise DataError(f"{root / 'train'} has one class only: there is nothing to tell apart")
    has_image = {label for _, label in samples["train"]}
    if without := [c for c, label in class_to_idx.items() if label not in has_image]:
        raise DataError(
            f"{root / 'train' / without[0]} holds no image ({', '.join(IMG_EXTENSIONS)}){and_more(len(without))}"
        )
    check_files([(path, path) for of in samples.values() for path, _ in of])
    images: dict[str, Images] = {}
    for split, of in samples.items():
        paths = [path for path, _ in of]
        images[split] = FileImages(paths, torch.tensor([label for _, label in of]), paths)
    return images, list(class_to_idx)


# ---- Image files


def check_files(files: Sequence[tuple[str, str]]) -> None:
    """Each (origin, path) is a file and not empty."""

    def fault(file: tuple[str, str]) -> str:
        origin, path = file
        image = "" if origin == path else f" {path}"
        try:
            status = os.stat(path)
        except (OSError, ValueError) as error:  # ValueError: NUL and the like are in no file's name
            return f"{origin}: image{image} does not exist or cannot be reached ({error})"
        if not stat.S_ISREG(status.st_mode):
            return f"{origin}: image{image} is not a file"
        return "" if status.st_size else f"{origin}: image{image} is an empty file"

    with ThreadPool(N_THREADS) as pool:
        faults = [found for found in pool.map(fault, files, chunksize=256) if found]
    if faults:
        raise DataError(faults[0] + and_more(len(faults)))


def check_decoding(images: Sequence[Images]) -> None:
    """Decode every image that is a file."""

    def fault(item: tuple[FileImages, int]) -> str:
        of, i = item
        try:
            of[i]
        except DataError as error:
            return str(error)
        return ""

    items = [(of, i) for of in images if isinstance(of, FileImages) for i in range(len(of))]
    with ThreadPool(N_THREADS) as pool:
        decoded = tqdm(pool.imap(fault, items, chunksize=16), "decoding images", len(items), disable=not items)
        faults = [found for found in decoded if found]
    if faults:
        raise DataError(faults[0] + and_more(len(faults)))
