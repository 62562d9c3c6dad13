"""Images in files: what list files, the competition's JSON and folders hold, and what is wrong with them.

No image is decoded here but by FileImages, when it is asked for, and by check_decoding. Of folders,
find_copies also reads the files whose names and sizes suggest copies.
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
N_THREADS = 16  # they wait for a disk or for PIL, which lets go of the interpreter while it decodes


class DataError(Exception):
    """What is wrong with the data; the message names the file and the line, or the option."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message.split("DataError: ")[-1].strip()))  # a worker's has its traceback before it


def printable(text: str) -> str:
    r"""Control characters, and bytes that are not UTF-8, as escapes (\xe9): a file's name may hold both."""

    def escape(match: re.Match[str]) -> str:
        byte = ord(match[0]) - 0xDC00  # as os.fsdecode keeps one that it cannot decode
        return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else repr(match[0])[1:-1]

    return re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", escape, text)


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
    """Images in files; `origins` says where each was listed, as in ImageNet_LT_train.txt:17, `ids` which file it is.

    Paths and origins are kept as arrays of bytes. Reading one from a list would write to its reference count, and so
    in time copy the whole list into every worker process of a loader.
    """

    def __init__(self, paths: Sequence[str], target: Tensor, origins: Sequence[str], ids: np.ndarray) -> None:
        self._paths, self._origins = (np.array([os.fsencode(s) for s in of]) for of in (paths, origins))
        self.target, self.ids = target, ids

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
        part = FileImages([], self.target[index], [], self.ids[index.numpy()])
        part._paths, part._origins = self._paths[index.numpy()], self._origins[index.numpy()]
        return part


def load_rgb(path: str) -> Any:
    """As torchvision does, which makes white of all that is above 255 in a grey image of 16 bits."""
    with Image.open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"mode {image.mode} has more than 8 bits a channel: convert it first")
        return image.convert("RGB")


def and_more(n: int, n_named: int = 1) -> str:
    """After the first `n_named` of n."""
    return f", and {n - n_named} more" if n > n_named else ""


# ---- List files and JSON: what each says, with every path joined to the root


class Listing(NamedTuple):
    name: str  # as messages name it
    paths: list[str]
    target: list[int]
    origins: list[str]
    notes: list[str]


def read_list(path: Path, name: str, root: Path, n_classes: int) -> Listing:
    """Lines `path label`; the path may hold spaces, blank lines are skipped."""
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

    listing = Listing(name, [], [], [], [])
    index_of: dict[int, int] = {}
    for where, entry in entries("images"):
        key = field(where, entry, "id", int)
        if key in index_of:
            raise DataError(f"{where}: another image has the id {key}")
        index_of[key] = len(listing.paths)
        listing.paths.append(os.path.join(root, field(where, entry, "file_name", str)))
        listing.target.append(-1)
        listing.origins.append(where)
    repeated: list[str] = []
    for where, entry in entries("annotations"):
        image, category = field(where, entry, "image_id", int), field(where, entry, "category_id", int)
        if image not in index_of:
            raise DataError(f"{where}: no image has the id {image}")
        if category not in label_of:
            raise DataError(f"{where}: no category has the id {category}")
        i = index_of[image]
        if listing.target[i] == label_of[category]:
            repeated.append(where)
        elif listing.target[i] != -1:
            raise DataError(f"{where}: image {image} has an annotation of another category; {listing.origins[i]}")
        listing.target[i] = label_of[category]
    if repeated:
        listing.notes.append(
            f"repeated annotations count once: {len(repeated)} ({repeated[0]}{and_more(len(repeated))})"
        )
    if not listing.paths:
        raise DataError(f"{name} lists no image ({path})")
    if n_without := listing.target.count(-1):
        i = listing.target.index(-1)
        raise DataError(f"{listing.origins[i]} ({listing.paths[i]}) has no annotation{and_more(n_without)}")
    return listing, categories


def read_listings(
    files: dict[str, tuple[Path, str]], root: Path, n_classes: int
) -> tuple[dict[str, Images], list[str], list[str]]:
    """Images of each split, names of classes and notes, from files by split: where each lies and what to call it."""
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
    images = as_images(listings, class_names, None)
    notes = [note for listing in listings.values() for note in listing.notes]
    for of in images.values():
        again, first = repeats(of.ids)
        if len(again):
            example = f"{of.origin(again[0])} repeats {of.origin(first[0])}{and_more(len(again))}"
            notes.append(f"images that are listed again count again: {len(again)} ({example})")
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


# ---- A folder a class

EXTENSIONS = (*IMG_EXTENSIONS, ".jfif", ".jpe", ".gif")  # of an animation the first frame
SYSTEM_FOLDERS = {  # that are not hidden: of macOS, Synology, QNAP, NetApp, Windows, GoodSync, Linux, Python
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
    """Images of each split that there is, the names of classes, which are train's, and notes of what is skipped."""
    splits = [split for split in SPLITS if (root / split).is_dir()]
    if "train" not in splits:
        raise DataError(f"{root / 'train'} is no folder; expected {root}/train/CLASS/*.jpg, and val or test beside it")
    if len(splits) == 1:
        raise DataError(f"{root} has neither a folder val nor test to report results on")
    skipped: Skipped = {why: [] for why in REASONS}
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
        paths = [path for of in classes.values() for path in of]
        if not paths:
            raise DataError(f"{folder} holds no image ({', '.join(EXTENSIONS)})")
        if split == "train" and len(classes) < 2:
            raise DataError(f"{folder} has one class only: there is nothing to tell apart")
        if split == "train" and (without := [name for name, of in classes.items() if not of]):
            raise DataError(
                f"{folder / without[0]} holds no image ({', '.join(EXTENSIONS)}){and_more(len(without))}; "
                "a folder that is no class has to be taken out of there"
            )
        target = [label_of[name] for name, of in classes.items() for _ in of]
        listings[split] = Listing(split, paths, target, paths, [])
    images = as_images(listings, list(label_of), skipped)
    for of in images.values():
        again, first = repeats(of.ids)
        if len(again):
            path, other = of.path(again[0]), of.path(first[0])
            why = "are one file, through a link" if os.path.samefile(path, other) else "hold the same bytes"
            raise DataError(f"{path} and {other} {why}: the image would count twice{and_more(len(again))}")
    return dict(images), list(label_of), [skip_note(root, why, paths) for why, paths in skipped.items() if paths]


def find_classes(folder: Path, skipped: Skipped) -> dict[str, list[str]]:
    """The image files of each class, both in the order of their names."""
    classes: dict[str, list[str]] = {}
    reached = {os.path.realpath(above): str(above) for above in (folder, *folder.resolve().parents)}
    for entry in sorted(entries(folder, skipped), key=lambda entry: entry.name):
        if not entry.is_dir():
            skip_file(entry, NO_CLASS, skipped)
            continue
        name = unicodedata.normalize("NFC", entry.name)  # macOS takes letters and their accents apart
        if name in classes:
            raise DataError(f"{entry.path} is there twice, its accents encoded in two ways: it would be two classes")
        classes[name] = find_images(entry.path, reached, skipped)
    return classes


def find_images(folder: str, reached: dict[str, str], skipped: Skipped) -> list[str]:
    """The image files below a folder; `reached` has the folders that were read, and grows."""
    found: list[tuple[str, str]] = []
    folders = [folder]
    while folders:
        folder = folders.pop()
        other = reached.setdefault(os.path.realpath(folder), folder)
        if other != folder:
            raise DataError(f"{folder} and {other} are one folder, through a link: its images would count twice")
        for entry in entries(folder, skipped):
            if entry.is_dir():
                folders.append(entry.path)
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                found.append((folder, entry.name))
            else:
                skip_file(entry, NOT_IMAGE, skipped)
    return [os.path.join(*pair) for pair in sorted(found)]


def entries(folder: Path | str, skipped: Skipped) -> Iterator[os.DirEntry[str]]:
    """What is in a folder, but for what systems, archives and notebooks leave there."""
    with os.scandir(folder) as found:
        for entry in found:
            if entry.name.startswith(".") or entry.name.lower() in SYSTEM_FOLDERS:
                skipped[HIDDEN].append(entry.path)
            else:
                yield entry


def skip_file(entry: os.DirEntry[str], why: str, skipped: Skipped) -> None:
    if entry.is_symlink() and not os.path.exists(entry.path):
        raise DataError(f"{entry.path} is a link to nothing")  # which may have been a folder of images
    skipped[why].append(entry.path)


def skip_note(root: Path, why: str, paths: list[str]) -> str:
    first = ", ".join(os.path.relpath(path, root) for path in sorted(paths)[:3]) + and_more(len(paths), 3)
    if why == NOT_IMAGE:
        tally = Counter(os.path.splitext(path)[1].lower() or "without any" for path in paths)
        common = sorted(tally, key=lambda extension: (-tally[extension], extension))
        kinds = ", ".join(f"{tally[extension]:,} {extension}" for extension in common[:5]) + and_more(len(common), 5)
        first = f"{kinds}; {first}"
    return f"{why} are skipped: {len(paths):,} ({first})"


# ---- Image files


def as_images(listings: dict[str, Listing], class_names: list[str], skipped: Skipped | None) -> dict[str, FileImages]:
    """Images of each split. Each file is there, and has one label, however often and by whatever path it is listed.

    In folders, which give `skipped`, files of one name and the same bytes are one image; copies beside it are skipped.
    """
    files = [pair for listing in listings.values() for pair in zip(listing.origins, listing.paths, strict=True)]
    ids, sizes = check_files(files)
    split_of = np.repeat(np.arange(len(listings)), [len(listing.paths) for listing in listings.values()])
    if skipped is not None:
        copies, again, first = find_copies([path for _, path in files], sizes)
        ids[again], split_of[copies] = ids[first], -1
        skipped[COPY] += [files[i][1] for i in copies]
    target = np.array([label for listing in listings.values() for label in listing.target])
    again, first = repeats(ids)
    differ = target[again] != target[first]
    if differ.any():
        (origin, path), (other, other_path) = files[again[differ][0]], files[first[differ][0]]
        image = "" if origin == path else f" {path}"
        label, before = (class_names[target[of[differ][0]]] for of in (again, first))
        more = ("" if os.path.samefile(path, other_path) else ", of the same bytes") + and_more(int(differ.sum()))
        raise DataError(f"{origin}: image{image} has the label {label}, but the label {before} in {other}{more}")
    origins, paths = zip(*files, strict=True)
    images = FileImages(paths, torch.from_numpy(target), origins, ids)
    return {split: images.subset(torch.from_numpy(split_of == i).nonzero()[:, 0]) for i, split in enumerate(listings)}


def find_copies(paths: list[str], sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of copies beside their image; of files with the name and bytes of an earlier one, and of those.

    The stem of a copy's name begins or ends with that of its image in the same folder. The case of letters is ignored.
    Of files whose names and sizes go together 4 KB are read, and the whole of those that still agree.
    """
    places = [(folder, *os.path.splitext(name.lower())) for folder, name in map(os.path.split, paths)]
    keys = [(hash((place[0], n)), hash((*place[1:], n))) for place, n in zip(places, sizes.tolist(), strict=True)]
    folders, names = np.array(keys, dtype=np.int64).T
    index_of: dict[tuple[int, str], list[int]] = {}
    found: list[tuple[int, int]] = []
    for i in sorted(np.union1d(*repeats(folders)).tolist(), key=lambda i: len(places[i][1])):
        key, stem = keys[i][0], places[i][1]
        parts = (part for cut in range(len(stem)) for part in (stem[cut:], stem[: cut + 1]))
        found += [(i, original) for part in parts for original in index_of.get((key, part), ())]
        index_of.setdefault((key, stem), []).append(i)
    pairs = np.array(found, dtype=np.int64).reshape(-1, 2)
    again, first = repeats(names)
    contents = np.zeros(len(paths), dtype=np.int64)
    with ThreadPool(N_THREADS) as pool:
        for begin, length in ((0.5, 4096), (0, -1)):  # uncompressed images begin alike, and differ in the middle
            named = np.union1d(again, first)
            index = np.union1d(named, pairs)
            parts = [(paths[i], int(begin * sizes[i]), length) for i in index]
            contents[index] = pool.starmap(lambda *part: hash(read_bytes(*part)), parts, chunksize=256)
            pairs = pairs[contents[pairs[:, 0]] == contents[pairs[:, 1]]]
            again, first = (named[of] for of in repeats(names[named] ^ contents[named]))
    return np.unique(pairs[:, 0]), again, first


def repeats(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of those whose id was there before, and for each the index of the first that has it."""
    _, index, inverse = np.unique(ids, return_index=True, return_inverse=True)
    first = index[inverse]
    again = np.flatnonzero(first != np.arange(len(ids)))
    return again, first[again]


def check_files(files: Sequence[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Each (origin, path) is a file and not empty. Returns ids, the same for all paths to one file, and sizes."""

    def look(file: tuple[str, str]) -> str | tuple[int, int]:
        """What is wrong, or the id and the size."""
        origin, path = file
        image = "" if origin == path else f" {path}"
        try:
            status = os.stat(path)
        except (OSError, ValueError) as error:  # ValueError: NUL and the like are in no file's name
            return f"{origin}: image{image} does not exist or cannot be reached ({error})"
        if not stat.S_ISREG(status.st_mode):
            return f"{origin}: image{image} is not a file"
        identity = hash((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
        return (identity, status.st_size) if status.st_size else f"{origin}: image{image} is an empty file"

    with ThreadPool(N_THREADS) as pool:
        seen = pool.map(look, files, chunksize=256)
    faults = [found for found in seen if isinstance(found, str)]
    if faults:
        raise DataError(faults[0] + and_more(len(faults)))
    ids, sizes = np.array(seen, dtype=np.int64).T
    for i, first in zip(*repeats(ids), strict=True):  # some network file systems make up inodes that are not unique
        path, other = files[i][1], files[first][1]
        if path == other or os.path.realpath(path) == os.path.realpath(other):
            continue
        if read_bytes(path) != read_bytes(other):
            ids[i] = hash(os.path.realpath(path))
    return ids, sizes


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
