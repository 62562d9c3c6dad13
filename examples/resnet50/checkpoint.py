"""Atomic file writes, and checkpoints: save, load, detect damage, and check that a checkpoint fits the run."""

import contextlib
import io
import os
import zipfile
from itertools import count
from pathlib import Path
from typing import Any

import torch

NAME, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
STATE_KEYS = {"model", "optimizer", "lr_scheduler", "scaler", "model_ema", "epoch", "args", "history", "best", "data"}


class CheckpointError(Exception):
    """A checkpoint that cannot be used: none that exists could be read, or it does not fit the run."""


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replace a file atomically: a reader finds either the old content or the new, even after a power cut."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)  # frees its space if the disk is full
        error.filename = error.filename or str(path)
        raise


def save(directory: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint and keep the last one as the previous. A complete checkpoint exists at every moment."""
    buffer = io.BytesIO()  # a full disk then raises an OSError, and before any file is moved
    torch.save(state, buffer)
    incoming = directory / "checkpoint.new.pt"
    write_atomically(incoming, buffer.getbuffer())
    with contextlib.suppress(FileNotFoundError):
        os.replace(directory / NAME, directory / PREVIOUS)
    os.replace(incoming, directory / NAME)


def load(directory: Path) -> tuple[dict[str, Any] | None, dict[Path, str]]:
    """The newest undamaged checkpoint (None if nothing was saved yet), and for each damaged one what is wrong."""
    damaged: dict[Path, str] = {}
    for path in (directory / NAME, directory / PREVIOUS):
        if not path.exists():
            continue
        try:
            return read(path), damaged
        except Exception as error:  # a damaged file makes torch.load raise nearly anything
            damaged[path] = f"{path} is damaged: {type(error).__name__}: {first_line(error)}"
    if damaged:
        raise CheckpointError(
            "\n".join(damaged.values()) + f"\nno whole checkpoint is left in {directory}: begin anew in another --out"
        )
    return None, damaged


def set_aside(damaged: dict[Path, str]) -> None:
    """Rename damaged checkpoints, so that the next `save` does not keep one as the previous checkpoint."""
    for path in damaged:
        aside = path.with_name(path.name + ".damaged")
        if path.is_dir() or aside.is_dir():  # a rename cannot replace a folder, except by another folder
            aside = free_name(aside)
        os.replace(path, aside)


def free_name(path: Path) -> Path:
    return next(name for n in count(1) if not (name := path.with_name(f"{path.name}{n}")).exists())


def read(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        bad_record = archive.testzip()  # torch.load does not verify the checksums
    if bad_record is not None:
        raise ValueError(f"the checksum of {bad_record} is wrong")
    state = torch.load(path, map_location="cpu", weights_only=True)
    missing = STATE_KEYS - set(state if isinstance(state, dict) else ())
    if missing:
        raise ValueError(f"it has no {', '.join(sorted(missing))}")
    if len(state["history"]) != state["epoch"]:
        raise ValueError("its history has not a row for each epoch")
    return state


def check_same(
    directory: Path, state: dict[str, Any], args: dict[str, Any], data_fingerprint: str, may_change: set[str]
) -> None:
    """Refuse to resume with other options or images: the best epoch would have been chosen on another split."""
    saved_args = state["args"] if isinstance(state["args"], dict) else {}
    changed = [name for name in args if name not in may_change and saved_args.get(name) != args[name]]
    if changed:
        was, now = (", ".join(f"{name} {options.get(name)!r}" for name in changed) for options in (saved_args, args))
        raise CheckpointError(f"the checkpoint in {directory} is of another run: it has {was}, not {now}")
    if state["data"] != data_fingerprint:
        raise CheckpointError(
            f"the images or labels are not those that the run in {directory} was begun with: give it the same "
            "--data and lists, or begin anew in another --out"
        )


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
