"""Files that are whole or not there: the checkpoint, the one before it, and everything else a run writes."""

import contextlib
import io
import os
import zipfile
from itertools import count
from pathlib import Path
from typing import Any

import torch

NAME, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
PARTS = {"model", "optimizer", "lr_scheduler", "scaler", "model_ema", "epoch", "args", "history", "best", "data"}


class CheckpointError(Exception):
    """No checkpoint that could be read, though there are some."""


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Whoever reads `path` finds the old content or the new, also after a power cut."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)  # a full disk needs the room
        error.filename = error.filename or str(path)
        raise


def save(directory: Path, state: dict[str, Any]) -> None:
    """The last checkpoint becomes the previous one. At no moment is there none that is whole."""
    buffer = io.BytesIO()  # so that a full disk is an OSError, and met before anything is moved
    torch.save(state, buffer)
    incoming = directory / "checkpoint.new.pt"
    write_atomically(incoming, buffer.getbuffer())
    with contextlib.suppress(FileNotFoundError):
        os.replace(directory / NAME, directory / PREVIOUS)
    os.replace(incoming, directory / NAME)


def load(directory: Path) -> tuple[dict[str, Any] | None, dict[Path, str]]:
    """The newest checkpoint that is whole, None if nothing was saved yet, and what is wrong with those that are not."""
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
    """So that it never takes the place of one that is whole."""
    for path in damaged:
        aside = path.with_name(path.name + ".damaged")
        if path.is_dir() or aside.is_dir():  # which a rename does not replace, or by nothing but another
            aside = free_name(aside)
        os.replace(path, aside)


def free_name(path: Path) -> Path:
    return next(name for n in count(1) if not (name := path.with_name(f"{path.name}{n}")).exists())


def read(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        wrong = archive.testzip()  # torch.load does not look at the checksums
    if wrong is not None:
        raise ValueError(f"the checksum of {wrong} is wrong")
    state = torch.load(path, map_location="cpu", weights_only=True)
    missing = PARTS - set(state if isinstance(state, dict) else ())
    if missing:
        raise ValueError(f"it has no {', '.join(sorted(missing))}")
    if len(state["history"]) != state["epoch"]:
        raise ValueError("its history has not a row for each epoch")
    return state


def check_same(directory: Path, state: dict[str, Any], args: dict[str, Any], data: str, free: set[str]) -> None:
    """The run that goes on is the one that was begun: what chose its best epoch must not be another split now."""
    begun = state["args"] if isinstance(state["args"], dict) else {}
    other = [name for name in args if name not in free and begun.get(name) != args[name]]
    if other:
        was, now = (", ".join(f"{name} {of.get(name)!r}" for name in other) for of in (begun, args))
        raise CheckpointError(f"the checkpoint in {directory} is of another run: it has {was}, not {now}")
    if state["data"] != data:
        raise CheckpointError(
            f"the images or labels are not those that the run in {directory} was begun with: give it the same "
            "--data and lists, or begin anew in another --out"
        )


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
