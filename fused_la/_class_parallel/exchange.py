"""Collectives of a process group: headers, so that no rank waits for one that raised, and gathers and sums of rows.

A call that communicates begins with `exchange_headers`: every rank checks its own arguments and sends a header of fixed
size, a few numbers or the error that was raised. Every rank reads all headers, so either all go on or all raise.

If ranks have different numbers of rows, rows are padded to the largest. Rows that a call needs from all ranks are sent
behind its header, as its payload, which saves a collective if they fit. The payload's size and device follow from
earlier calls that all ranks agreed on, so all ranks send buffers of one size, whatever they call next and whatever
arguments they have. A call that needs more gathers its rows in a collective of its own, and enlarges the next payload.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")
Number = int | float | Tensor  # a tensor is int64 or float64, of one element

_WORDS = 96  # of a header, 8 bytes each: the status, numbers, and text
_N_NUMBERS = 31
_ERRORS = (RuntimeError, TypeError, ValueError, IndexError)  # status - 1; what is none of these travels as the first


class Ranks(NamedTuple):
    """A process group, and this process in it."""

    group: ProcessGroup
    rank: int
    size: int
    device_types: list[str]  # where the group can communicate


def ranks_of(group: ProcessGroup | None) -> Ranks:
    """The ranks of a group, of all processes if it is None."""
    if not dist.is_available():
        raise RuntimeError("a process group needs a PyTorch that was built with torch.distributed")
    if group is None:
        if not dist.is_initialized():
            raise ValueError("group must be a process group, or None after torch.distributed.init_process_group, "
                             "got None before it")  # fmt: skip
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed ProcessGroup or None, got {type(group).__name__}")
    # "cpu:gloo,cuda:nccl" says on which devices the group can communicate; NCCL alone takes no CPU tensors.
    device_types = [part.split(":")[0] for part in dist.get_backend_config(group).split(",")]
    return Ranks(group, dist.get_rank(group), dist.get_world_size(group), device_types)


def check_device_type(ranks: Ranks, name: str, value: Tensor) -> None:
    if value.device.type not in ranks.device_types:
        raise ValueError(
            f"{name} must be on a device that the group communicates on, {' or '.join(ranks.device_types)}, "
            f"got {value.device}"
        )


class Room(NamedTuple):
    """What follows the headers of a group: bytes, on this type of device."""

    device_type: str
    n_bytes: int


_rooms: WeakKeyDictionary[ProcessGroup, Room] = WeakKeyDictionary()


def _room_of(ranks: Ranks) -> Room:
    return _rooms.get(ranks.group) or Room("cpu" if "cpu" in ranks.device_types else ranks.device_types[0], 0)


# Headers --------------------------------------------------------------------------------------------------------------


def exchange_headers(
    ranks: Ranks, caller: str, check: Callable[[], tuple[T, Mapping[str, Number]]]
) -> tuple[T, list[dict[str, Any]]]:
    """What `check` makes of this rank's arguments, and the numbers of every rank, in rank order.

    Where it raises, that error goes up here, and one of its kind, with its words, on every other rank. The numbers have
    the same names and types on all ranks of one caller.
    """

    def check_without_rows() -> tuple[T, Mapping[str, Number], list[Tensor]]:
        return *check(), []

    return exchange_headers_and_rows(ranks, caller, check_without_rows)[:2]


def exchange_headers_and_rows(
    ranks: Ranks, caller: str, check: Callable[[], tuple[T, Mapping[str, Number], list[Tensor]]]
) -> tuple[T, list[dict[str, Any]], Tensor]:
    """As `exchange_headers`; `check` also returns tensors of rows, for `gathered_rows` to take from the payload."""
    error, result, numbers, rows, status, text = None, None, {}, [], 0, caller
    try:
        result, numbers, rows = check()
    except Exception as raised:
        error = raised
        kinds = [i for i, kind in enumerate(_ERRORS) if isinstance(raised, kind)]
        status, text = 1 + (kinds[-1] if kinds else 0), f"{caller}: {raised}"
    came = _all_headers(ranks, status, list(numbers.values()), text, rows)
    words = came[:, :_WORDS].tolist()
    if error is not None:
        raise error
    texts = [_text(row[1 + _N_NUMBERS :]) for row in words]
    for rank, row in enumerate(words):
        if row[0] > 0:
            raise _ERRORS[row[0] - 1](f"rank {rank} raised an error in {texts[rank]}")
    check_same("The call", "of the same function", texts)
    assert result is not None
    of_ranks = [
        {name: _number(word, like) for word, (name, like) in zip(row[1:], numbers.items(), strict=False)}
        for row in words
    ]
    return result, of_ranks, came[:, _WORDS:].view(torch.uint8)


def check_same(name: str, what: str, values: Sequence[Any]) -> None:
    """If the ranks' values differ an error, "<name> must be <what> on every rank, got 5 on rank 0, 4 on rank 1"."""
    if any(value != values[0] for value in values):
        who: dict[Any, list[int]] = {}
        for rank, value in enumerate(values):
            who.setdefault(value, []).append(rank)
        came = ", ".join(f"{value} on {_listed(ranks)}" for value, ranks in who.items())
        raise ValueError(f"{name} must be {what} on every rank, got {came}")


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _all_headers(ranks: Ranks, status: int, numbers: list[Number], text: str, rows: list[Tensor]) -> Tensor:
    """The header of every rank, and the rows behind it where they fit."""
    assert len(numbers) <= _N_NUMBERS
    n_bytes = 8 * (_WORDS - 1 - _N_NUMBERS)
    words = [status, *(0 if isinstance(number, Tensor) else _word(number) for number in numbers)]
    words += [0] * (1 + _N_NUMBERS - len(words))
    encoded = text.encode()[:n_bytes].ljust(n_bytes, b"\0")
    header = torch.tensor(words + list(struct.unpack(f"{n_bytes // 8}q", encoded)), dtype=torch.int64)
    room = _room_of(ranks)
    sent = torch.zeros(_WORDS + room.n_bytes // 8, dtype=torch.int64, device=room.device_type)
    sent[:_WORDS] = header
    for i, number in enumerate(numbers):  # of a GPU's numbers nothing is read before the header is
        if isinstance(number, Tensor):
            sent[1 + i] = number.detach().reshape(1).view(torch.int64)[0]
    if rows and _fit(rows, len(rows[0]), room):
        _write(rows, sent[_WORDS:].view(torch.uint8))
    return all_gather(ranks, sent)


def _word(number: int | float) -> int:
    if isinstance(number, float):
        return struct.unpack("q", struct.pack("d", number))[0]
    return int(number)


def _number(word: int, like: Number) -> int | float:
    floating = like.is_floating_point() if isinstance(like, Tensor) else isinstance(like, float)
    return struct.unpack("d", struct.pack("q", word))[0] if floating else word


def _text(words: list[int]) -> str:
    return struct.pack(f"{len(words)}q", *words).rstrip(b"\0").decode(errors="replace")


def checksum(*tensors: Tensor | None) -> Tensor:
    """An int64 that differs, but for bad luck, where the elements of the tensors or their order do."""
    total = torch.zeros((), dtype=torch.int64)
    for number, tensor in enumerate(tensors):
        if tensor is None:
            continue
        tensor = tensor.detach().reshape(-1)
        bits = tensor.double().view(torch.int64) if tensor.is_floating_point() else tensor
        # The multipliers are odd and large, so what one position lacks no other makes up for.
        place = torch.arange(len(bits), device=bits.device) * 0x1E3779B97F4A7C15 + (2 * number + 1)
        mixed = (bits ^ (bits >> 29)) * (place ^ (place >> 31) | 1)
        total = total.to(bits.device) + (mixed ^ (mixed >> 32)).sum()
    return total


# Tensors --------------------------------------------------------------------------------------------------------------


def all_gather(ranks: Ranks, tensor: Tensor) -> Tensor:
    """The tensors of all ranks, (R, ...), all of one shape."""
    out = tensor.new_empty(ranks.size * tensor.numel())
    if len(out) > 0:
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(out, tensor.contiguous().view(-1), group=ranks.group)
    return out.view(ranks.size, *tensor.shape)


def all_reduce(ranks: Ranks, tensor: Tensor) -> Tensor:
    """The sum over the ranks, in place if contiguous: what adds up is memory, and strides may differ between ranks."""
    tensor = tensor.contiguous()
    if tensor.numel() > 0:
        dist.all_reduce(tensor, group=ranks.group)
    return tensor


def sum_over_group(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over the ranks of `group`, computed on a device that it communicates on, on the device of `tensor`."""
    ranks = ranks_of(group)
    device = tensor.device if tensor.device.type in ranks.device_types else ranks.device_types[0]
    return all_reduce(ranks, tensor.to(device, copy=True)).to(tensor.device)


def gather_rows(ranks: Ranks, counts: list[int], rows: list[Tensor]) -> list[Tensor]:
    """Tensors whose rows, `counts` of them, are those of all ranks in order; all travel in one buffer of bytes."""
    sent = rows[0].new_zeros(_layout(rows, max(counts))[1], dtype=torch.uint8)
    _write(rows, sent)
    return _read(all_gather(ranks, sent), counts, rows)


def gathered_rows(ranks: Ranks, counts: list[int], rows: list[Tensor], came: Tensor) -> list[Tensor]:
    """As `gather_rows`, of rows of agreed dtypes, widths and type of device that `exchange_headers_and_rows` was given.

    Room is kept while a call needs half of it or more, so a smaller last batch costs the next epoch nothing.
    """
    most, room = max(counts), _room_of(ranks)
    fit, needed = _fit(rows, most, room), _layout(rows, most)[1]
    if not fit or 2 * needed < room.n_bytes:
        _rooms[ranks.group] = Room(rows[0].device.type, needed)
    return _read(came, counts, rows) if fit else gather_rows(ranks, counts, rows)


def _fit(rows: list[Tensor], n_rows: int, room: Room) -> bool:
    return rows[0].device.type == room.device_type and _layout(rows, n_rows)[1] <= room.n_bytes


def _layout(rows: list[Tensor], n_rows: int) -> tuple[list[int], int]:
    """Where n rows of each tensor begin in a buffer of bytes, large elements first so that each is aligned; its end."""
    starts, end = [0] * len(rows), 0
    for i in sorted(range(len(rows)), key=lambda i: -rows[i].element_size()):
        starts[i] = end
        end += n_rows * _row_bytes(rows[i])
    return starts, -(-end // 8) * 8


def _row_bytes(tensor: Tensor) -> int:
    return tensor.element_size() * tensor.shape[1:].numel()


def _write(rows: list[Tensor], to: Tensor) -> None:
    for tensor, start in zip(rows, _layout(rows, len(rows[0]))[0], strict=True):
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        to[start : start + len(flat)] = flat


def _read(came: Tensor, counts: list[int], rows: list[Tensor]) -> list[Tensor]:
    """The rows of all ranks, each a tensor in memory of its own, from (R, bytes)."""
    if max(counts) == 0:
        return [tensor.detach() for tensor in rows]
    parts: list[list[Tensor]] = [[] for _ in rows]
    for of_rank, n_rows in zip(came, counts, strict=True):
        for part, tensor, start in zip(parts, rows, _layout(rows, n_rows)[0], strict=True):
            flat = of_rank[start : start + n_rows * _row_bytes(tensor)]
            part.append(flat.view(tensor.dtype).view(n_rows, *tensor.shape[1:]))
    return [torch.cat(part).to(tensor.device) for part, tensor in zip(parts, rows, strict=True)]


def scatter_row_sums(ranks: Ranks, counts: list[int], rows: Tensor) -> Tensor:
    """This rank's rows of the sum over ranks of (rows, D); every rank has the rows of all of them, `counts` of each."""
    most, width = max(counts), rows.shape[1]
    out = rows.new_zeros(most * width)
    if len(out) > 0:
        if min(counts) < most:
            padded = rows.new_zeros(ranks.size, most, width)
            for to, of_rank in zip(padded, rows.split(counts), strict=True):
                to[: len(of_rank)] = of_rank
            rows = padded
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(out, rows.contiguous().view(-1), group=ranks.group)
    return out.view(most, width)[: counts[ranks.rank]]
