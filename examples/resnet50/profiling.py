"""Timing of a training step: the input pipeline, the step, and the loss within the step."""

import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from loading import TrainLoader, on_device
from model import Classifier
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from world import World

N_TIMED, N_BATCHES = 10, 30


def profile_step(
    args: Any, loader: TrainLoader, parallel_model: nn.Module, model: Classifier,
    train_step: Callable[[Tensor, Tensor], Any], autocast: Any, world: World,
) -> str:  # fmt: skip
    """A report for this process: images/s of the loader alone and of `train_step`, and the loss's share of the step."""
    per_rank = args.batch_size // world.n_ranks
    n_batches, images, target, seconds = 0, None, None, 0.0
    epoch = 0
    while n_batches < N_BATCHES:
        began = time.perf_counter()
        batches = iter(loader.epoch(epoch))
        images, target = next(batches)
        if len(loader) > 1:
            began = time.perf_counter()  # do not count the start of the workers
        n_batches += (len(loader) == 1) + sum(1 for _ in islice(batches, N_BATCHES - n_batches))
        seconds += time.perf_counter() - began
        epoch += 1
    assert images is not None
    assert target is not None
    loader_rate = n_batches * per_rank / seconds
    images, target = on_device(images, args, world), target.to(world.device)

    parallel_model.train()
    step_seconds = median_seconds(lambda: train_step(images, target))
    step_rate = per_rank / step_seconds
    lines = [
        f"loader alone  {loader_rate:12,.1f} images/s ({args.workers} workers, {n_batches} batches of {per_rank})",
        f"step          {step_rate:12,.1f} images/s ({1e3 * step_seconds:.1f} ms, median of {N_TIMED})",
    ]
    with torch.no_grad(), autocast():
        features, weight = model.head_operands(images, model.head.weight)
    if model.fused or model.is_sharded:
        inputs, name = (features, weight.detach()), f"head and loss of features {tuple(features.shape)}"
    else:
        logits = F.linear(features, weight, model.head.bias)
        inputs, name = (logits,), f"loss of logits {tuple(logits.shape)}"
    loss_fn: Callable[..., Tensor] = model.loss_of_features if len(inputs) == 2 else model.loss_of_logits
    leaves = [value.detach().clone().requires_grad_() for value in inputs]

    def loss_alone() -> None:
        with autocast():
            loss = loss_fn(*leaves, target)
        torch.autograd.grad(loss, leaves)

    loss_seconds = median_seconds(loss_alone)
    lines.append(
        f"{name}, forward + backward: {1e3 * loss_seconds:.2f} ms, "
        f"{100 * loss_seconds / step_seconds:.1f} % of the step"
    )
    slower, faster = ("loader", "step") if loader_rate < step_rate else ("step", "loader")
    ratio = max(loader_rate, step_rate) / min(loader_rate, step_rate)
    lines.append(f"limit: the {slower}; the {faster} is {ratio:.1f} x as fast")
    return "\n".join(lines)


def median_seconds(fn: Callable[[], Any]) -> float:
    """Median seconds of a call. The number of calls is fixed, because processes wait for each other in them."""
    timer = Timer("fn()", globals={"fn": fn}, num_threads=torch.get_num_threads())
    timer.timeit(2)
    return sorted(timer.timeit(1).median for _ in range(N_TIMED))[N_TIMED // 2]
