"""The processes of a run, as torchrun starts them, and the device of each."""

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from options import OptionError
from torch import nn
from torch.distributed.tensor import DTensor


class World(NamedTuple):
    rank: int
    n_ranks: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def start(device: str | None, seed: int, fast_convolutions: bool) -> World:
    on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        raise OptionError(f"--device {device}: PyTorch finds no GPU")
    if fast_convolutions and not on_gpu:
        raise OptionError("--cudnn-benchmark is of GPUs")
    chosen = torch.device(device or ("cuda" if on_gpu else "cpu"))
    n_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if n_ranks > 1 and chosen.index is not None:
        raise OptionError(f"--device {device} is of one process; of several each has the GPU of its own number")
    if on_gpu:
        of_rank = int(os.environ["LOCAL_RANK"]) if n_ranks > 1 else 0
        chosen = torch.device("cuda", of_rank if chosen.index is None else chosen.index)
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = fast_convolutions
        if not fast_convolutions:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
    if n_ranks > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    torch.manual_seed(seed)
    return World(dist.get_rank() if n_ranks > 1 else 0, n_ranks, chosen)


def meet() -> None:
    """Wait for the others at the end of a run.

    By then no thread of the group holds a tensor any more. One that lets go of it while Python ends aborts the process,
    and the group of a mesh, as of a DTensor, outlives `stop`.
    """
    if dist.is_initialized():
        dist.barrier()


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def first_alone(world: World, wanted: bool) -> Iterator[None]:
    """The first process goes ahead, as in a download that the others then find done."""
    if wanted and not world.is_first:
        dist.barrier()
    yield
    if wanted and world.is_first and world.n_ranks > 1:
        dist.barrier()


def all_finite(model: nn.Module) -> bool:
    """Weights and statistics of all processes."""
    parts = (value.to_local() if isinstance(value, DTensor) else value for value in model.state_dict().values())
    finite = torch.stack([part.isfinite().all() for part in parts])
    return float(mean_over_ranks(finite.all().float())) == 1.0


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


@torch.no_grad()
def average_buffers(model: nn.Module) -> None:
    """Each process has the BatchNorm statistics of its own images; what is evaluated and saved is their mean."""
    if dist.is_initialized():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(mean_over_ranks(buffer))
