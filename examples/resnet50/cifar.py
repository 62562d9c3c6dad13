"""Reader for CIFAR-10 and CIFAR-100 in the authors' Python format: pickles, loaded without running code in them.

torchvision only downloads the files here. Its own readers insist on the original checksums: they refuse files that
were made anew, and do not say what is wrong with a damaged one.
"""

import io
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from formats import ArrayImages, DataError, and_more, read_bytes

from fused_la import count_classes


class Cifar(NamedTuple):
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str  # key of the labels in a batch
    names: str  # key of the class names in `meta`
    n_classes: int
    source: str  # torchvision class that downloads it


CIFARS = {
    "cifar10-lt": Cifar(
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test="test_batch",
        meta="batches.meta",
        labels="labels",
        names="label_names",
        n_classes=10,
        source="CIFAR10",
    ),
    "cifar100-lt": Cifar(
        folder="cifar-100-python",
        train=("train",),
        test="test",
        meta="meta",
        labels="fine_labels",
        names="fine_label_names",
        n_classes=100,
        source="CIFAR100",
    ),
}


def read_cifar(cifar: Cifar, root: Path, download: bool) -> tuple[ArrayImages, ArrayImages, list[str]]:
    """Training images, test images, class names."""
    folder = root / cifar.folder
    missing = [name for name in (*cifar.train, cifar.test, cifar.meta) if not (folder / name).is_file()]
    if missing and download:
        try:
            getattr(torchvision.datasets, cifar.source)(str(root), download=True)
        except Exception as error:  # of the network, the disk or the archive
            raise DataError(f"{cifar.source} could not be downloaded to {root}: {error}") from error
    elif missing:
        raise DataError(
            f"{folder / missing[0]} does not exist{and_more(len(missing))}; --download fetches {cifar.source}"
        )
    path = folder / cifar.meta
    names = read_pickle(path).get(cifar.names)
    if not isinstance(names, list) or len(names) != cifar.n_classes:
        raise DataError(f"{path}: {cifar.names!r} must be a list of {cifar.n_classes} names")
    names = [name.decode("latin1") if isinstance(name, bytes) else str(name) for name in names]
    batches = [read_batch(folder / name, cifar) for name in cifar.train]
    train = ArrayImages(*(torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*batches, strict=True)))
    counts = count_classes(train.target, cifar.n_classes)
    if not counts.all():
        c = int(counts.argmin())
        raise DataError(f"{folder}: no training image of class {c} ({names[c]}) in {', '.join(cifar.train)}")
    test = ArrayImages(*map(torch.from_numpy, read_batch(folder / cifar.test, cifar)))
    return train, test, names


def read_batch(path: Path, cifar: Cifar) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64."""
    batch = read_pickle(path)
    for key in ("data", cifar.labels):
        if key not in batch:
            raise DataError(f"{path} has no {key!r}, but {', '.join(map(repr, batch)) or 'nothing'}")
    images = batch["data"]
    if not (isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape[1:] == (3072,)):
        got = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise DataError(f"{path}: 'data' must be a uint8 array (N, 3072), got {got}")
    if not len(images):
        raise DataError(f"{path} holds no image")
    try:
        labels = np.asarray(batch[cifar.labels])
    except ValueError:  # ragged
        labels = np.empty(())
    if labels.ndim != 1 or (len(labels) and labels.dtype.kind not in "iu"):
        raise DataError(f"{path}: {cifar.labels!r} must be a list of integers")
    if len(labels) != len(images):
        raise DataError(f"{path} has {len(images)} images, but {len(labels)} labels")
    out_of_range = np.flatnonzero((labels < 0) | (labels >= cifar.n_classes))
    if len(out_of_range):
        i = out_of_range[0]
        more = and_more(len(out_of_range))
        raise DataError(f"{path}: {cifar.labels}[{i}] is {labels[i]}, not in [0, {cifar.n_classes}){more}")
    return np.array(images).reshape(-1, 3, 32, 32), labels.astype(np.int64)


def _dtype(name: str, align: object = False, copy: object = False) -> np.dtype:
    if np.dtype(name).kind not in "biu":
        raise pickle.UnpicklingError(f"an array of {name} is not expected")
    return np.dtype(name, bool(align), bool(copy))  # a copy, because the pickle then sets its byte order


# The only globals that a pickle may look up: those that arrays and bytes need, by any version of Python and NumPy. A
# pickle can call any function that it finds.
_ALLOWED_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
    **{
        (f"numpy.{core}.{module}", name): function
        for core in ("core", "_core")
        for module, name, function in (
            ("multiarray", "_reconstruct", np.empty(0).__reduce__()[0]),
            ("multiarray", "scalar", np.int64(0).__reduce__()[0]),
            ("numeric", "_frombuffer", np.empty(0).__reduce_ex__(5)[0]),
        )
    },
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return _ALLOWED_GLOBALS[module, name]


def read_pickle(path: Path) -> dict[str, Any]:
    pickled = read_bytes(path)
    try:
        content = _ArrayUnpickler(io.BytesIO(pickled), encoding="latin1").load()
    except Exception as error:  # damaged bytes can be any pickle instruction, so they can raise any error
        raise DataError(f"{path} is damaged or no pickle of arrays ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold a dict, got {type(content).__name__}")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}
