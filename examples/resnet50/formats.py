"""Readers of image data sets, with checks: list files, the competition's JSON, and one folder for each class.

Only `FileImages.__getitem__` and `check_decoding` decode images. For folders `find_copies` also reads the files whose
names and sizes suggest copies.
"""

import codecs
import json
import os
import re
import stat
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from fused_la import count_classes

SPLITS = ("train", "val", "test")
N_THREADS = 16  # they wait for a disk, or for PIL, which releases the GIL while it decodes


class DataError(Exception):
    """A fault of the data. The message names the file and the line, or the option."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message.split("DataError: ")[-1].strip()))  # a worker puts its traceback before it


def printable(text: str) -> str:
    r"""Escape control characters and bytes that are not UTF-8, as \xe9: file names may hold both."""

    def escape(match: re.Match[str]) -> str:
        byte = ord(match[0]) - 0xDC00  # os.fsdecode maps an undecodable byte to U+DC00 + byte
        return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else repr(match[0])[1:-1]

    return re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", escape, text)


class Images(Dataset, ABC):
    """Indexing gives an image without its label; the labels are in `target`, (N,) int64 on the CPU."""

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
    """Images in files. `origins` says where each is listed, as in ImageNet_LT_train.txt:17; equal `ids` are one file.

    Paths and origins are kept as arrays of bytes, not as lists of strings. Reading a string writes to its reference
    count, so a list would in time be copied into every worker process of a loader.
    """

    def __init__(self, paths: Sequence[str], target: Tensor, origins: Sequence[str], ids: np.ndarray) -> None:
        self._paths, self._origins = (np.array([os.fsencode(s) for s in strings]) for strings in (paths, origins))
        self.target, self.ids = target, ids

    def path(self, i: int) -> str:
        return os.fsdecode(self._paths[i])

    def origin(self, i: int) -> str:
        return os.fsdecode(self._origins[i])

    def __getitem__(self, i: int) -> Any:
        try:
            return load_rgb(self.path(i))
        except Exception as error:  # PIL's decoders raise many types
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{self.origin(i)}: image {self.path(i)} cannot be read ({reason})") from error

    def subset(self, index: Tensor) -> "FileImages":
        part = FileImages([], self.target[index], [], self.ids[index.numpy()])
        part._paths, part._origins = self._paths[index.numpy()], self._origins[index.numpy()]
        return part


def load_rgb(path: str) -> Any:
    """Load as torchvision does, but refuse 16-bit grey images, where it makes everything above 255 white."""
    with Image.open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"mode {image.mode} has more than 8 bits a channel: convert it first")
        return image.convert("RGB")


def and_more(n: int, n_named: int = 1) -> str:
    """The rest of n items, to follow the first `n_named` in a message."""
    return f", and {n - n_named} more" if n > n_named else ""


# ---- List files and JSON, with every path joined to the root


class Listing(NamedTuple):
    name: str  # for messages
    paths: list[str]
    target: list[int]
    origins: list[str]
    notes: list[str]


def read_list(path: Path, name: str, root: Path, n_classes: int) -> Listing:
    """Read lines `path label`. The path may hold spaces; blank lines are skipped."""
    listing = Listing(name, [], [], [], [])
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
    """Read COCO-like JSON: the listing and category names by id. A label is the rank of its category's id."""
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

    def read_field(location: str, entry: dict, key: str, kind: type) -> Any:
        if key not in entry:
            raise DataError(f"{location} has no {key!r}")
        if type(entry[key]) is not kind:  # not isinstance, because a bool is an int
            raise DataError(f"{location}: {key!r} must be {kind.__name__}, got {entry[key]!r}")
        return entry[key]

    categories: dict[int, str] = {}
    for location, entry in entries("categories"):
        key = read_field(location, entry, "id", int)
        if key in categories:
            raise DataError(f"{location}: another category has the id {key}")
        categories[key] = read_field(location, entry, "name", str)
    label_of = {key: label for label, key in enumerate(sorted(categories))}

    listing = Listing(name, [], [], [], [])
    index_of: dict[int, int] = {}
    for location, entry in entries("images"):
        key = read_field(location, entry, "id", int)
        if key in index_of:
            raise DataError(f"{location}: another image has the id {key}")
        index_of[key] = len(listing.paths)
        listing.paths.append(os.path.join(root, read_field(location, entry, "file_name", str)))
        listing.target.append(-1)
        listing.origins.append(location)
    repeated: list[str] = []
    for location, entry in entries("annotations"):
        image, category = read_field(location, entry, "image_id", int), read_field(location, entry, "category_id", int)
        if image not in index_of:
            raise DataError(f"{location}: no image has the id {image}")
        if category not in label_of:
            raise DataError(f"{location}: no category has the id {category}")
        i = index_of[image]
        if listing.target[i] == label_of[category]:
            repeated.append(location)
        elif listing.target[i] != -1:
            raise DataError(f"{location}: image {image} has an annotation of another category; {listing.origins[i]}")
        listing.target[i] = label_of[category]
    if repeated:
        listing.notes.append(
            f"repeated annotations count once: {len(repeated)} ({repeated[0]}{and_more(len(repeated))})"
        )
    if not listing.paths:
        raise DataError(f"{name} lists no image ({path})")
    if n_unlabelled := listing.target.count(-1):
        i = listing.target.index(-1)
        raise DataError(f"{listing.origins[i]} ({listing.paths[i]}) has no annotation{and_more(n_unlabelled)}")
    return listing, categories


def read_listings(
    files: dict[str, tuple[Path, str]], root: Path, n_classes: int
) -> tuple[dict[str, Images], list[str], list[str]]:
    """Images of each split, class names and notes. `files` has the path and the name for messages of each split."""
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
    empty_classes = (count_classes(train.target, len(class_names)) == 0).nonzero().flatten().tolist()
    if empty_classes:
        first = ", ".join(str(c) if class_names[c] == str(c) else f"{c} ({class_names[c]})" for c in empty_classes[:10])
        first += f" and {len(empty_classes) - 10} more" if len(empty_classes) > 10 else ""
        raise DataError(f"{train.name}: no image of class {first}, {reason}")
    images = as_images(listings, class_names, None)
    notes = [note for listing in listings.values() for note in listing.notes]
    for split_images in images.values():
        repeated, first = find_repeats(split_images.ids)
        if len(repeated):
            example = (
                f"{split_images.origin(repeated[0])} repeats {split_images.origin(first[0])}{and_more(len(repeated))}"
            )
            notes.append(f"images that are listed again count again: {len(repeated)} ({example})")
    return dict(images), class_names, notes


def is_json(path: Path) -> bool:
    return path.suffix.lower() == ".json"


def read_text(path: Path, name: str) -> str:
    content = re.sub(rb"\r\n?", b"\n", read_bytes(path).removeprefix(codecs.BOM_UTF8))
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: not UTF-8 ({error.reason} {content[error.start]:#04x})") from error


def read_bytes(path: Path | str, start: int = 0, length: int = -1) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(length)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


# ---- One folder for each class

EXTENSIONS = (*IMG_EXTENSIONS, ".jfif", ".jpe", ".gif")  # .gif: the first frame
SYSTEM_FOLDERS = {  # not hidden: of macOS, Synology, QNAP, NetApp, Windows, GoodSync, Linux, Python
    "__macosx", "network trash folder", "temporary items", "@eadir", "@tmp", "#recycle", "#snapshot", "@recycle",
    "@__thumb", "~snapshot", "$recycle.bin", "recycler", "found.000", "system volume information", "_gsdata_",
    "lost+found", "__pycache__",
}  # fmt: skip
REASONS = HIDDEN, NOT_IMAGE, COPY, NO_CLASS = (
    "hidden and system files and folders", "files without an image's extension", "copies of an image beside them",
    "files and folders of no class",
)  # fmt: skip
Skipped = dict[str, list[str]]  # paths by reason


def read_folder(root: Path) -> tuple[dict[str, Images], list[str], list[str]]:
    """Images of each existing split, the class names of train, and notes of what was skipped."""
    splits = [split for split in SPLITS if (root / split).is_dir()]
    if "train" not in splits:
        raise DataError(f"{root / 'train'} is no folder; expected {root}/train/CLASS/*.jpg, and val or test beside it")
    if len(splits) == 1:
        raise DataError(f"{root} has neither a folder val nor test to report results on")
    skipped: Skipped = {reason: [] for reason in REASONS}
    label_of: dict[str, int] = {}
    listings: dict[str, Listing] = {}
    for split in splits:
        folder = root / split
        try:
            classes = find_classes(folder, skipped)
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
        if not classes:
            raise DataError(f"{folder} has no class folders")
        label_of = label_of or {name: label for label, name in enumerate(classes)}
        unknown = [name for name in classes if name not in label_of]
        skipped[NO_CLASS] += [str(folder / name) for name in unknown if not classes[name]]
        if unknown := [name for name in unknown if classes[name]]:
            raise DataError(f"{folder / unknown[0]} is a class that train does not have{and_more(len(unknown))}")
        paths = [path for class_paths in classes.values() for path in class_paths]
        if not paths:
            raise DataError(f"{folder} holds no image ({', '.join(EXTENSIONS)})")
        if split == "train" and len(classes) < 2:
            raise DataError(f"{folder} has one class only: there is nothing to tell apart")
        if split == "train" and (empty_classes := [name for name, class_paths in classes.items() if not class_paths]):
            raise DataError(
                f"{folder / empty_classes[0]} holds no image ({', '.join(EXTENSIONS)}){and_more(len(empty_classes))}; "
                "a folder that is no class has to be taken out of there"
            )
        target = [label_of[name] for name, class_paths in classes.items() for _ in class_paths]
        listings[split] = Listing(split, paths, target, paths, [])
    images = as_images(listings, list(label_of), skipped)
    for split_images in images.values():
        repeated, first = find_repeats(split_images.ids)
        if len(repeated):
            path, other = split_images.path(repeated[0]), split_images.path(first[0])
            reason = "are one file, through a link" if os.path.samefile(path, other) else "hold the same bytes"
            raise DataError(f"{path} and {other} {reason}: the image would count twice{and_more(len(repeated))}")
    return dict(images), list(label_of), [skip_note(root, reason, paths) for reason, paths in skipped.items() if paths]


def find_classes(folder: Path, skipped: Skipped) -> dict[str, list[str]]:
    """The image files of each class; classes and files are sorted by name."""
    classes: dict[str, list[str]] = {}
    seen_folders = {os.path.realpath(above): str(above) for above in (folder, *folder.resolve().parents)}
    for entry in sorted(visible_entries(folder, skipped), key=lambda entry: entry.name):
        if not entry.is_dir():
            skip_file(entry, NO_CLASS, skipped)
            continue
        name = unicodedata.normalize("NFC", entry.name)  # macOS stores a letter and its accent as two characters
        if name in classes:
            raise DataError(f"{entry.path} is there twice, its accents encoded in two ways: it would be two classes")
        classes[name] = find_images(entry.path, seen_folders, skipped)
    return classes


def find_images(folder: str, seen_folders: dict[str, str], skipped: Skipped) -> list[str]:
    """The image files below a folder. Adds the folders that it reads to `seen_folders`, by their real paths."""
    found: list[tuple[str, str]] = []
    folders = [folder]
    while folders:
        folder = folders.pop()
        other = seen_folders.setdefault(os.path.realpath(folder), folder)
        if other != folder:
            raise DataError(f"{folder} and {other} are one folder, through a link: its images would count twice")
        for entry in visible_entries(folder, skipped):
            if entry.is_dir():
                folders.append(entry.path)
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                found.append((folder, entry.name))
            else:
                skip_file(entry, NOT_IMAGE, skipped)
    return [os.path.join(*pair) for pair in sorted(found)]


def visible_entries(folder: Path | str, skipped: Skipped) -> Iterator[os.DirEntry[str]]:
    """The entries of a folder, without the hidden and system files that systems, archives and notebooks leave."""
    with os.scandir(folder) as found:
        for entry in found:
            if entry.name.startswith(".") or entry.name.lower() in SYSTEM_FOLDERS:
                skipped[HIDDEN].append(entry.path)
            else:
                yield entry


def skip_file(entry: os.DirEntry[str], reason: str, skipped: Skipped) -> None:
    if entry.is_symlink() and not os.path.exists(entry.path):
        raise DataError(f"{entry.path} is a link to nothing")  # it may have been a folder of images
    skipped[reason].append(entry.path)


def skip_note(root: Path, reason: str, paths: list[str]) -> str:
    first = ", ".join(os.path.relpath(path, root) for path in sorted(paths)[:3]) + and_more(len(paths), 3)
    if reason == NOT_IMAGE:
        tally = Counter(os.path.splitext(path)[1].lower() or "without any" for path in paths)
        common = sorted(tally, key=lambda extension: (-tally[extension], extension))
        kinds = ", ".join(f"{tally[extension]:,} {extension}" for extension in common[:5]) + and_more(len(common), 5)
        first = f"{kinds}; {first}"
    return f"{reason} are skipped: {len(paths):,} ({first})"


# ---- Image files


def as_images(listings: dict[str, Listing], class_names: list[str], skipped: Skipped | None) -> dict[str, FileImages]:
    """Images of each split. Checks that each file exists and has one label, even if it is listed by several paths.

    Only folders pass `skipped`. There, files of the same name and bytes are one image; copies beside it are skipped.
    """
    files = [pair for listing in listings.values() for pair in zip(listing.origins, listing.paths, strict=True)]
    ids, sizes = check_files(files)
    split_of = np.repeat(np.arange(len(listings)), [len(listing.paths) for listing in listings.values()])
    if skipped is not None:
        copies, repeated, first = find_copies([path for _, path in files], sizes)
        ids[repeated], split_of[copies] = ids[first], -1
        skipped[COPY] += [files[i][1] for i in copies]
    target = np.array([label for listing in listings.values() for label in listing.target])
    repeated, first = find_repeats(ids)
    conflicts = target[repeated] != target[first]
    if conflicts.any():
        (origin, path), (other, other_path) = files[repeated[conflicts][0]], files[first[conflicts][0]]
        image = "" if origin == path else f" {path}"
        label, before = (class_names[target[index[conflicts][0]]] for index in (repeated, first))
        more = ("" if os.path.samefile(path, other_path) else ", of the same bytes") + and_more(int(conflicts.sum()))
        raise DataError(f"{origin}: image{image} has the label {label}, but the label {before} in {other}{more}")
    origins, paths = zip(*files, strict=True)
    images = FileImages(paths, torch.from_numpy(target), origins, ids)
    return {split: images.subset(torch.from_numpy(split_of == i).nonzero()[:, 0]) for i, split in enumerate(listings)}


def find_copies(paths: list[str], sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three arrays of indices: copies beside their image, files with the name and bytes of an earlier file, these.

    A copy's stem begins or ends with the stem of its image in the same folder. The case of letters is ignored. If names
    and sizes match, 4 KB of each file are read, and if these match too, the whole files.
    """
    path_parts = [(folder, *os.path.splitext(name.lower())) for folder, name in map(os.path.split, paths)]
    keys = [(hash((place[0], n)), hash((*place[1:], n))) for place, n in zip(path_parts, sizes.tolist(), strict=True)]
    folders, names = np.array(keys, dtype=np.int64).T
    index_of: dict[tuple[int, str], list[int]] = {}
    found: list[tuple[int, int]] = []
    for i in sorted(np.union1d(*find_repeats(folders)).tolist(), key=lambda i: len(path_parts[i][1])):
        key, stem = keys[i][0], path_parts[i][1]
        affixes = (affix for cut in range(len(stem)) for affix in (stem[cut:], stem[: cut + 1]))
        found += [(i, original) for affix in affixes for original in index_of.get((key, affix), ())]
        index_of.setdefault((key, stem), []).append(i)
    pairs = np.array(found, dtype=np.int64).reshape(-1, 2)
    repeated, first = find_repeats(names)
    contents = np.zeros(len(paths), dtype=np.int64)
    with ThreadPool(N_THREADS) as pool:
        for begin, length in ((0.5, 4096), (0, -1)):  # first from the middle, because uncompressed images begin alike
            named = np.union1d(repeated, first)
            index = np.union1d(named, pairs)
            reads = [(paths[i], int(begin * sizes[i]), length) for i in index]
            contents[index] = pool.starmap(lambda *read: hash(read_bytes(*read)), reads, chunksize=256)
            pairs = pairs[contents[pairs[:, 0]] == contents[pairs[:, 1]]]
            repeated, first = (named[index] for index in find_repeats(names[named] ^ contents[named]))
    return np.unique(pairs[:, 0]), repeated, first


def find_repeats(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the items whose id occurred before, and for each of them the index of the first with that id."""
    _, index, inverse = np.unique(ids, return_index=True, return_inverse=True)
    first = index[inverse]
    repeated = np.flatnonzero(first != np.arange(len(ids)))
    return repeated, first[repeated]


def check_files(files: Sequence[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Check that each (origin, path) is a file and not empty. Returns ids, equal for paths to one file, and sizes."""

    def stat_file(file: tuple[str, str]) -> str | tuple[int, int]:
        """The fault, or the id and the size."""
        origin, path = file
        image = "" if origin == path else f" {path}"
        try:
            status = os.stat(path)
        except (OSError, ValueError) as error:  # ValueError: a path that no file can have, as with NUL
            return f"{origin}: image{image} does not exist or cannot be reached ({error})"
        if not stat.S_ISREG(status.st_mode):
            return f"{origin}: image{image} is not a file"
        identity = hash((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
        return (identity, status.st_size) if status.st_size else f"{origin}: image{image} is an empty file"

    with ThreadPool(N_THREADS) as pool:
        seen = pool.map(stat_file, files, chunksize=256)
    faults = [found for found in seen if isinstance(found, str)]
    if faults:
        raise DataError(faults[0] + and_more(len(faults)))
    ids, sizes = np.array(seen, dtype=np.int64).T
    for i, first in zip(*find_repeats(ids), strict=True):  # inodes of some network file systems are not unique
        path, other = files[i][1], files[first][1]
        if path == other or os.path.realpath(path) == os.path.realpath(other):
            continue
        if read_bytes(path) != read_bytes(other):
            ids[i] = hash(os.path.realpath(path))
    return ids, sizes


def check_decoding(images: Sequence[Images]) -> None:
    """Decode every image that is a file, and name the first that cannot be decoded."""

    def decode_error(item: tuple[FileImages, int]) -> str:
        images, i = item
        try:
            images[i]
        except DataError as error:
            return str(error)
        return ""

    items = [(split, i) for split in images if isinstance(split, FileImages) for i in range(len(split))]
    with ThreadPool(N_THREADS) as pool:
        decoded = tqdm(pool.imap(decode_error, items, chunksize=16), "decoding images", len(items), disable=not items)
        faults = [found for found in decoded if found]
    if faults:
        raise DataError(faults[0] + and_more(len(faults)))
