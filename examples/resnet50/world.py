"""Process group and devices of a run under torchrun, and the collectives that training needs."""

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


def init_world(device: str | None, seed: int, cudnn_benchmark: bool) -> World:
    """Choose the device, set up determinism, join the process group and seed PyTorch."""
    on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        raise OptionError(f"--device {device}: PyTorch finds no GPU")
    if cudnn_benchmark and not on_gpu:
        raise OptionError("--cudnn-benchmark is of GPUs")
    chosen = torch.device(device or ("cuda" if on_gpu else "cpu"))
    n_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if n_ranks > 1 and chosen.index is not None:
        raise OptionError(f"--device {device} is of one process; of several each has the GPU of its own number")
    if on_gpu:
        local_rank = int(os.environ["LOCAL_RANK"]) if n_ranks > 1 else 0
        chosen = torch.device("cuda", local_rank if chosen.index is None else chosen.index)
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = cudnn_benchmark
        if not cudnn_benchmark:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
    if n_ranks > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    torch.manual_seed(seed)
    return World(dist.get_rank() if n_ranks > 1 else 0, n_ranks, chosen)


def barrier() -> None:
    """Wait for all processes at the end of a run.

    After it no thread of a process group holds a tensor. A thread that releases one while Python shuts down aborts the
    process, and the group of a device mesh, which a DTensor has, outlives `close_world`.
    """
    if dist.is_initialized():
        dist.barrier()


def close_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def rank_0_first(world: World, enabled: bool) -> Iterator[None]:
    """Run the block on the first process before the others, so that they find its download done."""
    if enabled and not world.is_first:
        dist.barrier()
    yield
    if enabled and world.is_first and world.n_ranks > 1:
        dist.barrier()


def all_finite(model: nn.Module) -> bool:
    """Whether the weights and buffers of all processes are finite."""
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
    """Average BatchNorm statistics over processes, which each have those of their own images, to evaluate and save."""
    if dist.is_initialized():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(mean_over_ranks(buffer))
