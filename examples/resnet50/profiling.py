"""Where the time of training goes: the input pipeline, the step, and the loss within it."""

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
    args: Any, loader: TrainLoader, trained: nn.Module, model: Classifier, one_step: Callable[[Tensor, Tensor], Any],
    autocast: Any, world: World,
) -> str:  # fmt: skip
    """Medians of this process: images/s of the loader alone and of `one_step`, and the loss's share of that."""
    per_rank = args.batch_size // world.n_ranks
    n_batches, images, target, seconds = 0, None, None, 0.0
    epoch = 0
    while n_batches < N_BATCHES:
        began = time.perf_counter()
        batches = iter(loader.epoch(epoch))
        images, target = next(batches)
        if len(loader) > 1:
            began = time.perf_counter()  # starting the workers is not their speed
        n_batches += (len(loader) == 1) + sum(1 for _ in islice(batches, N_BATCHES - n_batches))
        seconds += time.perf_counter() - began
        epoch += 1
    assert images is not None
    assert target is not None
    of_loader = n_batches * per_rank / seconds
    images, target = on_device(images, args, world), target.to(world.device)

    trained.train()
    step = median(lambda: one_step(images, target))
    of_step = per_rank / step
    lines = [
        f"loader alone  {of_loader:12,.1f} images/s ({args.workers} workers, {n_batches} batches of {per_rank})",
        f"step          {of_step:12,.1f} images/s ({1e3 * step:.1f} ms, median of {N_TIMED})",
    ]
    with torch.no_grad(), autocast():
        features, weight = model.operands(images, model.head.weight)
    if model.fused or model.is_spread:
        inputs, name = (features, weight.detach()), f"head and loss of features {tuple(features.shape)}"
    else:
        logits = F.linear(features, weight, model.head.bias)
        inputs, name = (logits,), f"loss of logits {tuple(logits.shape)}"
    loss_of: Callable[..., Tensor] = model.loss_of if len(inputs) == 2 else model.loss_of_logits
    leaves = [value.detach().clone().requires_grad_() for value in inputs]

    def loss_alone() -> None:
        with autocast():
            loss = loss_of(*leaves, target)
        torch.autograd.grad(loss, leaves)

    alone = median(loss_alone)
    lines.append(f"{name}, forward + backward: {1e3 * alone:.2f} ms, {100 * alone / step:.1f} % of the step")
    slower, faster = ("loader", "step") if of_loader < of_step else ("step", "loader")
    ratio = max(of_loader, of_step) / min(of_loader, of_step)
    lines.append(f"limit: the {slower}; the {faster} is {ratio:.1f} x as fast")
    return "\n".join(lines)


def median(fn: Callable[[], Any]) -> float:
    """Seconds of a call. A fixed number of calls, since processes wait for each other in them."""
    timer = Timer("fn()", globals={"fn": fn}, num_threads=torch.get_num_threads())
    timer.timeit(2)
    return sorted(timer.timeit(1).median for _ in range(N_TIMED))[N_TIMED // 2]
