"""What the ranks of a process group tell one another, so that none waits for one that has left.

A call that communicates begins with `meet`: every rank checks its own arguments and sends a header of fixed size, a few
numbers, or the error that it met. Every rank reads all headers, so either all go on or all raise.

Rows of uneven number travel padded to the most that a rank has.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

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


# Headers --------------------------------------------------------------------------------------------------------------


def meet(
    ranks: Ranks, caller: str, check: Callable[[], tuple[T, Mapping[str, Number]]]
) -> tuple[T, list[dict[str, Any]]]:
    """What `check` makes of this rank's arguments, and the numbers of every rank, in rank order.

    Where it raises, that error goes up here, and one of its kind, with its words, on every other rank. The numbers have
    the same names and types on all ranks of one caller.
    """
    error, result, numbers, status, text = None, None, {}, 0, caller
    try:
        result, numbers = check()
    except Exception as raised:
        error = raised
        kinds = [i for i, kind in enumerate(_ERRORS) if isinstance(raised, kind)]
        status, text = 1 + (kinds[-1] if kinds else 0), f"{caller}: {raised}"
    words = _all_words(ranks, status, list(numbers.values()), text)
    if error is not None:
        raise error
    texts = [_text(row[1 + _N_NUMBERS :]) for row in words]
    for rank, row in enumerate(words):
        if row[0] > 0:
            raise _ERRORS[row[0] - 1](f"rank {rank} raised an error in {texts[rank]}")
    check_same("The call", "of the same function", texts)
    assert result is not None
    return result, [
        {name: _number(word, like) for word, (name, like) in zip(row[1:], numbers.items(), strict=False)}
        for row in words
    ]


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


def _all_words(ranks: Ranks, status: int, numbers: list[Number], text: str) -> list[list[int]]:
    assert len(numbers) <= _N_NUMBERS
    n_bytes = 8 * (_WORDS - 1 - _N_NUMBERS)
    words = [status, *(0 if isinstance(number, Tensor) else _word(number) for number in numbers)]
    words += [0] * (1 + _N_NUMBERS - len(words))
    encoded = text.encode()[:n_bytes].ljust(n_bytes, b"\0")
    header = torch.tensor(words + list(struct.unpack(f"{n_bytes // 8}q", encoded)), dtype=torch.int64)
    device_type = "cpu" if "cpu" in ranks.device_types else ranks.device_types[0]
    header = header.to(device_type)
    for i, number in enumerate(numbers):  # of a GPU's numbers nothing is read before the header is
        if isinstance(number, Tensor):
            header[1 + i] = number.detach().reshape(1).view(torch.int64)[0]
    return all_gather(ranks, header).tolist()


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


def all_reduce(ranks: Ranks, tensor: Tensor) -> None:
    """Add up over the ranks, in place."""
    if tensor.numel() > 0:
        dist.all_reduce(tensor, group=ranks.group)


def gather_rows(ranks: Ranks, counts: list[int], tensors: list[Tensor]) -> list[Tensor]:
    """Tensors whose rows, `counts` of them, are those of all ranks in order; all travel in one buffer of bytes."""
    most = max(counts)
    if most == 0:
        return tensors
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())  # so that each is aligned
    row_bytes = [tensor.element_size() * tensor.shape[1:].numel() for tensor in tensors]
    starts, end = {}, 0
    for i in order:
        starts[i] = end
        end += most * row_bytes[i]
    sent = tensors[0].new_zeros(-(-end // 8) * 8, dtype=torch.uint8)
    for i, tensor in enumerate(tensors):
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        sent[starts[i] : starts[i] + len(flat)] = flat
    came = all_gather(ranks, sent)
    return [
        torch.cat([
            came[rank, starts[i] : starts[i] + n * row_bytes[i]].view(tensor.dtype).view(n, *tensor.shape[1:])
            for rank, n in enumerate(counts)
        ])
        for i, tensor in enumerate(tensors)
    ]  # fmt: skip


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
