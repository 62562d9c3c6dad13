"""Collectives of a process group: an exchange of headers that keeps ranks in step, and gathers and sums of rows.

A call that communicates begins with `exchange_headers`. Every rank checks its own arguments and sends a header of fixed
size, which holds a few numbers or the error that was raised. Every rank reads all headers, so either all go on or all
raise, and no rank waits for one that raised.

If ranks have different numbers of rows, rows are padded to the largest number. Rows that a call needs from all ranks
follow its header as a payload if they fit, which saves a collective. The payload's size and device follow from earlier
calls that all ranks agreed on. So all ranks send buffers of one size, for any next call and any arguments.
A call whose rows do not fit gathers them in another collective, and enlarges the payload of later calls.
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
Number = int | float | Tensor  # a tensor has one element, int64 or float64

_HEADER_WORDS = 96  # 8 bytes each: the status, the numbers, and text
_MAX_NUMBERS = 31
_ERROR_TYPES = (RuntimeError, TypeError, ValueError, IndexError)  # by status - 1; any other error is sent as the first


class Ranks(NamedTuple):
    """A process group, and the rank of this process in it."""

    group: ProcessGroup
    rank: int
    size: int
    device_types: list[str]  # of the tensors that the group can communicate


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


class PayloadCapacity(NamedTuple):
    """The size of the payload that follows each header of a group, and the type of device of both."""

    device_type: str
    n_bytes: int


_capacities: WeakKeyDictionary[ProcessGroup, PayloadCapacity] = WeakKeyDictionary()


def _capacity_of(ranks: Ranks) -> PayloadCapacity:
    device_type = "cpu" if "cpu" in ranks.device_types else ranks.device_types[0]
    return _capacities.get(ranks.group) or PayloadCapacity(device_type, 0)


# Headers --------------------------------------------------------------------------------------------------------------


def exchange_headers(
    ranks: Ranks, caller: str, check: Callable[[], tuple[T, Mapping[str, Number]]]
) -> tuple[T, list[dict[str, Any]]]:
    """Run `check` on this rank's arguments; return its result, and the header's numbers of every rank, in rank order.

    If it raises, this rank raises that error, and every other rank one of the same type with its message. The numbers
    have the same names and types on all ranks of one caller.
    """

    def check_without_rows() -> tuple[T, Mapping[str, Number], list[Tensor]]:
        return *check(), []

    return exchange_headers_and_rows(ranks, caller, check_without_rows)[:2]


def exchange_headers_and_rows(
    ranks: Ranks, caller: str, check: Callable[[], tuple[T, Mapping[str, Number], list[Tensor]]]
) -> tuple[T, list[dict[str, Any]], Tensor]:
    """As `exchange_headers`; `check` also returns rows, and the payloads returned here are for `rows_of_all_ranks`."""
    error, result, numbers, rows, status, text = None, None, {}, [], 0, caller
    try:
        result, numbers, rows = check()
    except Exception as raised:
        error = raised
        matching = [i for i, error_type in enumerate(_ERROR_TYPES) if isinstance(raised, error_type)]
        status, text = 1 + (matching[-1] if matching else 0), f"{caller}: {raised}"
    gathered = _gather_headers(ranks, status, list(numbers.values()), text, rows)
    words = gathered[:, :_HEADER_WORDS].tolist()
    if error is not None:
        raise error
    texts = [_decode_text(row[1 + _MAX_NUMBERS :]) for row in words]
    for rank, row in enumerate(words):
        if row[0] > 0:
            raise _ERROR_TYPES[row[0] - 1](f"rank {rank} raised an error in {texts[rank]}")
    check_same("The call", "of the same function", texts)
    assert result is not None
    headers = [
        {name: _decode_number(word, like) for word, (name, like) in zip(row[1:], numbers.items(), strict=False)}
        for row in words
    ]
    return result, headers, gathered[:, _HEADER_WORDS:].view(torch.uint8)


def check_same(name: str, expected: str, values: Sequence[Any]) -> None:
    """Raise "<name> must be <expected> on every rank, got 5 on rank 0, 4 on rank 1" if the ranks' values differ."""
    if any(value != values[0] for value in values):
        ranks_by_value: dict[Any, list[int]] = {}
        for rank, value in enumerate(values):
            ranks_by_value.setdefault(value, []).append(rank)
        got = ", ".join(f"{value} on {_format_ranks(ranks)}" for value, ranks in ranks_by_value.items())
        raise ValueError(f"{name} must be {expected} on every rank, got {got}")


def _format_ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _gather_headers(ranks: Ranks, status: int, numbers: list[Number], text: str, rows: list[Tensor]) -> Tensor:
    """The header of every rank and its payload, (R, words) int64; the payload holds the rows if they fit."""
    assert len(numbers) <= _MAX_NUMBERS
    n_bytes = 8 * (_HEADER_WORDS - 1 - _MAX_NUMBERS)
    words = [status, *(0 if isinstance(number, Tensor) else _encode_number(number) for number in numbers)]
    words += [0] * (1 + _MAX_NUMBERS - len(words))
    encoded = text.encode()[:n_bytes].ljust(n_bytes, b"\0")
    header = torch.tensor(words + list(struct.unpack(f"{n_bytes // 8}q", encoded)), dtype=torch.int64)
    capacity = _capacity_of(ranks)
    sent = torch.zeros(_HEADER_WORDS + capacity.n_bytes // 8, dtype=torch.int64, device=capacity.device_type)
    sent[:_HEADER_WORDS] = header
    for i, number in enumerate(numbers):  # numbers on a GPU stay there until the header is read
        if isinstance(number, Tensor):
            sent[1 + i] = number.detach().reshape(1).view(torch.int64)[0]
    if rows and _fits(rows, len(rows[0]), capacity):
        _pack(rows, sent[_HEADER_WORDS:].view(torch.uint8))
    return all_gather(ranks, sent)


def _encode_number(number: int | float) -> int:
    if isinstance(number, float):
        return struct.unpack("q", struct.pack("d", number))[0]
    return int(number)


def _decode_number(word: int, like: Number) -> int | float:
    floating = like.is_floating_point() if isinstance(like, Tensor) else isinstance(like, float)
    return struct.unpack("d", struct.pack("q", word))[0] if floating else word


def _decode_text(words: list[int]) -> str:
    return struct.pack(f"{len(words)}q", *words).rstrip(b"\0").decode(errors="replace")


def checksum(*tensors: Tensor | None) -> Tensor:
    """An int64 that almost surely differs if the elements of the tensors or their order do."""
    total = torch.zeros((), dtype=torch.int64)
    for index, tensor in enumerate(tensors):
        if tensor is None:
            continue
        tensor = tensor.detach().reshape(-1)
        bits = tensor.double().view(torch.int64) if tensor.is_floating_point() else tensor
        # The multipliers are odd and large, so a change at one position does not cancel a change at another.
        position = torch.arange(len(bits), device=bits.device) * 0x1E3779B97F4A7C15 + (2 * index + 1)
        mixed = (bits ^ (bits >> 29)) * (position ^ (position >> 31) | 1)
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
    """The sum over the ranks, in place if contiguous. Ranks add up memory, and their strides may differ."""
    tensor = tensor.contiguous()
    if tensor.numel() > 0:
        dist.all_reduce(tensor, group=ranks.group)
    return tensor


def sum_over_group(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over the ranks of `group`, on the device of `tensor`, whatever device the group communicates on."""
    ranks = ranks_of(group)
    device = tensor.device if tensor.device.type in ranks.device_types else ranks.device_types[0]
    return all_reduce(ranks, tensor.to(device, copy=True)).to(tensor.device)


def gather_rows(ranks: Ranks, row_counts: list[int], rows: list[Tensor]) -> list[Tensor]:
    """The rows of all ranks in rank order, `row_counts` of each, for several tensors in one collective."""
    sent = rows[0].new_zeros(_buffer_layout(rows, max(row_counts))[1], dtype=torch.uint8)
    _pack(rows, sent)
    return _unpack(all_gather(ranks, sent), row_counts, rows)


def rows_of_all_ranks(ranks: Ranks, row_counts: list[int], rows: list[Tensor], payloads: Tensor) -> list[Tensor]:
    """As `gather_rows`, from the payloads of `exchange_headers_and_rows` if the rows fit; else they are gathered here.

    All ranks agree on the rows' dtypes, widths and type of device. The capacity is kept while a call needs half of it
    or more, so a smaller last batch costs the next epoch nothing.
    """
    max_rows, capacity = max(row_counts), _capacity_of(ranks)
    fit, needed = _fits(rows, max_rows, capacity), _buffer_layout(rows, max_rows)[1]
    if not fit or 2 * needed < capacity.n_bytes:
        _capacities[ranks.group] = PayloadCapacity(rows[0].device.type, needed)
    return _unpack(payloads, row_counts, rows) if fit else gather_rows(ranks, row_counts, rows)


def _fits(rows: list[Tensor], n_rows: int, capacity: PayloadCapacity) -> bool:
    return rows[0].device.type == capacity.device_type and _buffer_layout(rows, n_rows)[1] <= capacity.n_bytes


def _buffer_layout(rows: list[Tensor], n_rows: int) -> tuple[list[int], int]:
    """Where each tensor's n rows start in a buffer of bytes, and its size; large elements come first, for alignment."""
    starts, end = [0] * len(rows), 0
    for i in sorted(range(len(rows)), key=lambda i: -rows[i].element_size()):
        starts[i] = end
        end += n_rows * _row_bytes(rows[i])
    return starts, -(-end // 8) * 8


def _row_bytes(tensor: Tensor) -> int:
    return tensor.element_size() * tensor.shape[1:].numel()


def _pack(rows: list[Tensor], buffer: Tensor) -> None:
    for tensor, start in zip(rows, _buffer_layout(rows, len(rows[0]))[0], strict=True):
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        buffer[start : start + len(flat)] = flat


def _unpack(buffers: Tensor, row_counts: list[int], rows: list[Tensor]) -> list[Tensor]:
    """The rows of all ranks from their buffers, (R, bytes), copied into new tensors."""
    if max(row_counts) == 0:
        return [tensor.detach() for tensor in rows]
    parts: list[list[Tensor]] = [[] for _ in rows]
    for buffer, n_rows in zip(buffers, row_counts, strict=True):
        for part, tensor, start in zip(parts, rows, _buffer_layout(rows, n_rows)[0], strict=True):
            flat = buffer[start : start + n_rows * _row_bytes(tensor)]
            part.append(flat.view(tensor.dtype).view(n_rows, *tensor.shape[1:]))
    return [torch.cat(part).to(tensor.device) for part, tensor in zip(parts, rows, strict=True)]


def reduce_scatter_rows(ranks: Ranks, row_counts: list[int], rows: Tensor) -> Tensor:
    """This rank's rows of the sum over ranks of (rows, D), where every rank has `row_counts` rows for each rank."""
    max_rows, width = max(row_counts), rows.shape[1]
    out = rows.new_zeros(max_rows * width)
    if len(out) > 0:
        if min(row_counts) < max_rows:
            padded = rows.new_zeros(ranks.size, max_rows, width)
            for block, rank_rows in zip(padded, rows.split(row_counts), strict=True):
                block[: len(rank_rows)] = rank_rows
            rows = padded
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(out, rows.contiguous().view(-1), group=ranks.group)
    return out.view(max_rows, width)[: row_counts[ranks.rank]]
