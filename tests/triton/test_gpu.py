"""Properties that only a GPU shows: graphs, streams, synchronisation, and results of programs that run in parallel."""

import pytest
import torch
import torch.nn.functional as F
from oracle import truth

from fused_la import linear_logit_adjusted_cross_entropy, logit_adjusted_cross_entropy
from fused_la._tiled import head as tiled_head

pytestmark = pytest.mark.gpu

# (n_rows, n_classes): one tile; unaligned; several chunks and several programs a row; two rows a program.
SHAPES = [(256, 1000), (256, 8142), (3, 200_003), (700, 8142)]


def make(n_rows, n_classes, dtype, device, seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(n_rows, n_classes, generator=generator, device=device, dtype=torch.float32) * 3
    target = torch.randint(n_classes, (n_rows,), generator=generator, device=device)
    log_prior = -12 * torch.rand(n_classes, generator=generator, device=device)
    return logits.to(dtype), target, log_prior


def outcome(logits, target, log_prior, reduction="mean"):
    x = logits.detach().requires_grad_()
    loss = logit_adjusted_cross_entropy(x, target, log_prior, reduction=reduction, impl="triton")
    loss.sum().backward()
    return loss.detach(), x.grad


def same_bits(first, second):
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses_and_gradients_are_those_of_float64(device, shape, dtype):
    logits, target, log_prior = make(*shape, dtype, device)
    loss, gradient = outcome(logits, target, log_prior)
    expected = truth(logits, target, log_prior)
    plain = F.cross_entropy(logits.double() + log_prior, target)  # checks the oracle
    torch.testing.assert_close(expected.loss, plain.cpu(), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(loss.double().cpu(), expected.loss, rtol=1e-5, atol=0.0)
    eps = max(torch.finfo(dtype).eps, 1e-5)
    assert (gradient.double().cpu() - expected.grad_logits).norm() <= eps * expected.grad_logits.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_waits_for_the_device(device, shape):
    logits, target, log_prior = make(*shape, torch.bfloat16, device)
    outcome(logits, target, log_prior)  # compiles
    x = logits.clone().requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = logit_adjusted_cross_entropy(x, target, log_prior, impl="triton")
        (3.0 * loss).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_learned_priors_by_group_are_those_of_float64_without_waiting_and_with_the_same_bits(device, shape):
    logits, target, _ = make(*shape, torch.float32, device)
    log_prior = -12 * torch.rand(5, shape[1], device=device)
    group = torch.randint(5, (shape[0],), device=device)

    def step():
        x, prior = logits.detach().requires_grad_(), log_prior.detach().requires_grad_()
        loss = logit_adjusted_cross_entropy(x, target, prior, group=group, impl="triton")
        return loss.detach(), *torch.autograd.grad(loss, (x, prior))

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, second = step(), step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = truth(logits, target, log_prior, group=group)
    for one, two, exact in zip(first, second, expected, strict=True):
        assert same_bits(one, two)
        assert (one.double().cpu() - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_captured_graph_replays_on_new_inputs(device, shape):
    logits, target, log_prior = make(*shape, torch.bfloat16, device)
    x = logits.clone().requires_grad_()

    def step():
        x.grad = None
        loss = logit_adjusted_cross_entropy(x, target, log_prior, impl="triton")
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for seed in (1, 2):
        other, _, _ = make(*shape, torch.bfloat16, device, seed)
        with torch.no_grad():
            x.copy_(other)
        graph.replay()
        expected, expected_gradient = outcome(other, target, log_prior)
        assert same_bits(loss.detach(), expected)
        assert same_bits(x.grad, expected_gradient)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_inputs_give_the_same_bits_in_any_order_of_programs(device, shape):
    """Programs merge what others stored, and the last one sums, always in the same order."""
    logits, target, log_prior = make(*shape, torch.bfloat16, device)
    first, first_gradient = outcome(logits, target, log_prior)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    for i in range(100):
        with torch.cuda.stream(streams[i % 4]):
            loss, gradient = outcome(logits, target, log_prior)
            streams[i % 4].synchronize()
        assert same_bits(loss, first)
        assert same_bits(gradient, first_gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n_classes", [300, 1001, 8142, 50_257, 200_003])
def test_row_bits_do_not_depend_on_the_batch(device, n_classes, dtype):
    """A single row is split over programs; in a batch a row has one program or shares one with another row."""
    logits, target, log_prior = make(600, n_classes, dtype, device)
    loss, gradient = outcome(logits, target, log_prior, "none")
    for row in (0, 1, 5, 299, 599):
        rows = slice(row, row + 1)
        lone_loss, lone_gradient = outcome(logits[rows], target[rows], log_prior, "none")
        assert same_bits(lone_loss, loss[rows]), row
        assert same_bits(lone_gradient, gradient[rows]), row


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_launches_are_two_forward_and_one_backward(device, shape):
    logits, target, log_prior = make(*shape, torch.bfloat16, device)
    outcome(logits, target, log_prior)
    x = logits.clone().requires_grad_()
    torch.cuda.synchronize()
    counts = []
    loss = None
    for step in ("forward", "backward"):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            if step == "forward":
                loss = logit_adjusted_cross_entropy(x, target, log_prior, impl="triton")
            else:
                torch.autograd.grad(loss, x, torch.ones_like(loss))
            torch.cuda.synchronize()
        names = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        counts.append(sum("_kernel" in name and "elementwise" not in name for name in names))
    assert counts[0] <= 2
    assert counts[1] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(256, 64, 100_001), (5000, 32, 8142)], ids=str)
def test_a_tiled_head_is_accurate_and_does_not_synchronise(device, shape, dtype):
    """Several tiles of classes or of rows; errors at most twice those of whole logits in the same dtype."""
    n_rows, n_features, n_classes = shape
    tiles = tiled_head.choose_tile_shape(n_rows, n_classes, device)
    assert tiles.classes < n_classes or tiles.rows < n_rows
    _, target, log_prior = make(n_rows, n_classes, dtype, device)
    features = torch.randn(n_rows, n_features, device=device).to(dtype).requires_grad_()
    weight = torch.randn(n_classes, n_features, device=device).to(dtype).requires_grad_()
    bias = torch.randn(n_classes, device=device).to(dtype).requires_grad_()
    leaves = (features, weight, bias)

    def step():
        loss = linear_logit_adjusted_cross_entropy(features, weight, target, log_prior, bias=bias)
        return loss, torch.autograd.grad(loss, leaves)

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, grads = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    eager = F.cross_entropy(F.linear(*leaves).float() + log_prior, target)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = F.cross_entropy(F.linear(*wide) + log_prior, target)
    theirs, truths = torch.autograd.grad(eager, leaves), torch.autograd.grad(exact, wide)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=0.0)
    for actual, baseline, value in zip(grads, theirs, truths, strict=True):
        ulp = torch.finfo(dtype).eps * value.norm()
        assert (actual.double() - value).norm() <= 2 * (baseline.double() - value).norm() + ulp
