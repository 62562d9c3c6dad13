"""Inputs of more than 2^31 elements, and peak memory that does not grow with N * C.

An offset computed in 32 bits wraps around at 2^31 elements and reads the wrong element. On a CPU the tests of this need
no memory: the logits are a view of a sparse file in which only the few elements of the view were written. Every view
begins 2^31 elements into its file, so that a wrapped offset reads zeros of the file and not memory outside it.
The tests with the marker large use real memory.
"""

import json
import math
import os
from itertools import accumulate

import pytest
import torch
from conftest import one_in
from torch.profiler import ProfilerActivity, profile

import fused_la._tiled.blocks
from fused_la import logit_adjusted_cross_entropy

LIMIT = 2**31
ELEMENTS_BEFORE_VIEW = LIMIT + 64  # elements of a file before its view
MAX_BYTES_ON_DISK = 1 << 20  # bytes on disk that a sparse file may take


class SparseFiles:
    """Creates views with huge strides on sparse files."""

    def __init__(self, folder):
        self.folder = folder
        self.files = []

    def view(self, values, strides):
        """A copy of `values` with these strides; the elements between are 0 and were never written."""
        size = ELEMENTS_BEFORE_VIEW + sum((n - 1) * stride for n, stride in zip(values.shape, strides, strict=True)) + 1
        path = self.folder / f"{len(self.files)}.bin"
        with open(path, "wb") as file:
            file.truncate(size * values.element_size())
        self.files.append(path)
        storage = torch.from_file(str(path), shared=True, size=size, dtype=values.dtype)
        return storage.as_strided(values.shape, strides, ELEMENTS_BEFORE_VIEW).copy_(values)

    def bytes_on_disk(self):
        return sum(os.stat(path).st_blocks * 512 for path in self.files)


@pytest.fixture
def sparse(tmp_path, device):
    if device != "cpu":
        pytest.skip("a sparse file is mapped into a CPU's memory")
    sparse = SparseFiles(tmp_path)
    yield sparse
    assert 0 < sparse.bytes_on_disk() < MAX_BYTES_ON_DISK, "something has written between the elements of the views"
    for path in sparse.files:
        path.unlink()


def outcome(impl, logits, target, log_prior, upstream, **options):
    """The losses, and the gradients of logits and of a log_prior that requires grad."""
    logits = logits.detach().requires_grad_()
    loss = logit_adjusted_cross_entropy(logits, target, log_prior, reduction="none", impl=impl, **options)
    inputs = [logits, log_prior] if log_prior.requires_grad else [logits]
    return [loss.detach(), *torch.autograd.grad(loss, inputs, upstream)]


def assert_same_outcome(large, small):
    """Compare an implementation on huge strides with the reference on ordinary ones, so that a shared fault shows.

    Intermediate values of up to 10 are rounded a few times in float32, and gradients once more to their dtype. A value
    from a wrong element differs in the first digits.
    """
    for got, expected in zip(large, small, strict=True):
        assert got.shape == expected.shape
        assert expected.any()
        eps = 32 * torch.finfo(torch.float32).eps + 2 * torch.finfo(expected.dtype).eps
        assert (got - expected).abs().max() <= eps * expected.abs().max(), f"{got} instead of {expected}"


LAYOUTS = {
    # A 32-bit stride whose product with the row index exceeds 2^31, and 2^32.
    "rows at a 32-bit stride": ((4, 5), (LIMIT - 7, 3)),
    "rows at a 64-bit stride": ((2, 5), (LIMIT + 11, 1)),
    "classes at a 32-bit stride": ((2, 6), (5, LIMIT // 2 - 3)),
    "classes at a 64-bit stride": ((2, 3), (1, LIMIT + 5)),
    "image rows at a 32-bit stride": ((2, 3, 4), (5, 1, LIMIT - 7)),
    "images at a 64-bit stride": ((2, 3, 4), (LIMIT + 11, 7, 1)),
}


def small_problem(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(shape, generator=generator) * 2 + 1).to(dtype)
    n_classes = shape[1]
    log_prior = torch.linspace(-1.0, -6.0, n_classes)
    target = torch.randint(n_classes, logits[:, 0].shape, generator=generator)
    return logits, target, log_prior


LEARNED = pytest.mark.parametrize("learned", [False, True], ids=["log_prior fixed", "log_prior learned"])


@LEARNED
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_past_2_31_elements_are_read_where_they_are(impl, sparse, layout, dtype, learned):
    shape, strides = LAYOUTS[layout]
    logits, target, log_prior = small_problem(shape, dtype)
    log_prior.requires_grad_(learned)
    large = sparse.view(logits, strides)
    assert large.stride() == strides
    assert sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) > LIMIT
    upstream = torch.ones(()).expand(target.shape)
    assert_same_outcome(
        outcome(impl, large, target, log_prior, upstream), outcome("reference", logits, target, log_prior, upstream)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_of_a_scalar_reads_logits_past_2_31_elements_where_they_are(sparse, layout):
    """impl="blocked" computes this gradient in its forward pass."""
    shape, strides = LAYOUTS[layout]
    logits, target, log_prior = small_problem(shape, torch.float32)
    gradients = []
    for impl, values in (("blocked", sparse.view(logits, strides)), ("reference", logits)):
        values = values.detach().requires_grad_()
        loss = logit_adjusted_cross_entropy(values, target, log_prior, impl=impl)
        gradients.append(torch.autograd.grad(loss, values))
    assert_same_outcome(*gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_probabilities_past_2_31_elements_are_read_where_they_are(impl, sparse, layout):
    shape, strides = LAYOUTS[layout]
    logits, _, log_prior = small_problem(shape, torch.float32)
    probabilities = torch.rand(shape, generator=torch.Generator().manual_seed(1)).softmax(1)
    upstream = torch.ones_like(logits[:, 0])
    large = sparse.view(probabilities, strides)
    assert_same_outcome(
        outcome(impl, logits, large, log_prior, upstream, label_smoothing=0.1),
        outcome("reference", logits, probabilities, log_prior, upstream, label_smoothing=0.1),
    )


@LEARNED
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "classes" not in layout])
def test_upstream_gradients_past_2_31_elements_are_read_where_they_are(impl, sparse, layout, learned):
    shape, strides = LAYOUTS[layout]
    logits, target, log_prior = small_problem(shape, torch.float32)
    log_prior.requires_grad_(learned)
    upstream = 1 + torch.rand(target.shape, generator=torch.Generator().manual_seed(1))
    large = sparse.view(upstream, (strides[0], *strides[2:]))
    assert_same_outcome(
        outcome(impl, logits, target, log_prior, large), outcome("reference", logits, target, log_prior, upstream)
    )


def test_labels_and_class_vectors_past_2_31_elements_are_read_where_they_are(impl, sparse):
    logits, _, log_prior = small_problem((3, 5), torch.float32)
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(5, (3, 2), generator=generator)
    share, weight = torch.rand(3, 2, generator=generator), torch.rand(5, generator=generator)
    rows, classes, upstream = (LIMIT - 7, 3), (LIMIT // 2 - 3,), torch.ones(3)
    large = outcome(
        impl, logits, sparse.view(target, rows), sparse.view(log_prior, classes), upstream,
        target_weight=sparse.view(share, rows), weight=sparse.view(weight, classes),
        label_smoothing=0.1, smoothing_distribution=sparse.view(log_prior.softmax(0), classes),
    )  # fmt: skip
    small = outcome(
        "reference", logits, target, log_prior, upstream,
        target_weight=share, weight=weight, label_smoothing=0.1, smoothing_distribution=log_prior.softmax(0),
    )  # fmt: skip
    assert_same_outcome(large, small)


# Real memory ----------------------------------------------------------------------------------------------------------


def free_memory(device):
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.parametrize("impl", ["triton"])
def test_rows_past_2_31_elements_on_a_gpu(impl, device):
    """Logits and gradient of more than 2^31 elements: the last rows equal those of a call on these rows alone."""
    n_rows, n_classes = 66, 2**25 + 8  # every row is aligned to 16 bytes
    if free_memory(device) < 5 * n_rows * n_classes:
        pytest.skip("needs 11 GB of GPU memory")
    logits = torch.randn(n_rows, n_classes, device=device, dtype=torch.float16)
    assert logits.numel() > LIMIT
    target = torch.arange(n_rows, device=device) * (n_classes // n_rows)
    log_prior = torch.linspace(-1.0, -12.0, n_classes, device=device)
    upstream = torch.full((n_rows,), 2.0**14, device=device)  # 1 / n_classes underflows in float16
    loss, gradient = outcome(impl, logits, target, log_prior, upstream)
    for row in (0, 63, 64, 65):
        only = [row]
        lone_loss, lone_gradient = outcome(impl, logits[only], target[only], log_prior, upstream[only])
        assert torch.equal(lone_loss, loss[only])
        assert torch.equal(lone_gradient, gradient[only])


@pytest.mark.large
def test_one_row_of_more_than_2_31_classes(tmp_path, device):
    """All logits but three are 0. tau is 0, because a prior in float32 would take 8 GB."""
    n_classes = LIMIT + 5
    if free_memory(device) < 3 * n_classes * 2:
        pytest.skip("needs 13 GB of memory")
    if device == "cpu":
        path = tmp_path / "row.bin"
        with open(path, "wb") as file:
            file.truncate(n_classes * 2)
        logits = torch.from_file(str(path), shared=True, size=n_classes, dtype=torch.float16)
    else:
        logits = torch.zeros(n_classes, device=device, dtype=torch.float16)
    top, other = 21.5, {LIMIT - 1: 17.0, LIMIT: 18.0}
    logits[-1] = top
    for column, value in other.items():
        logits[column] = value
    rest = (n_classes - 3) * math.exp(-top) + sum(math.exp(value - top) for value in other.values())

    logits.requires_grad_()
    log_prior = torch.zeros(1, device=device, dtype=torch.float16).expand(n_classes)
    target = torch.tensor(n_classes - 1, device=device)
    impl = "blocked" if device == "cpu" else "triton"
    loss = logit_adjusted_cross_entropy(logits, target, log_prior, 0.0, impl=impl)
    upstream = 2.0**14
    (gradient,) = torch.autograd.grad(loss, logits, torch.tensor(upstream, device=device))

    n_chunks = math.ceil(n_classes / fused_la._tiled.blocks.BLOCK_ELEMENTS)  # merged in order: half an ulp each at most
    tolerance = n_chunks * torch.finfo(torch.float32).eps
    assert abs(loss.item() / math.log1p(rest) - 1) < tolerance
    half = torch.finfo(torch.float16)
    for column, expected in [
        (n_classes - 1, -rest / (1 + rest)),
        *((column, math.exp(value - top) / (1 + rest)) for column, value in other.items()),
        *((column, math.exp(-top) / (1 + rest)) for column in (0, 2**19, LIMIT - 2, LIMIT + 1, n_classes - 2)),
    ]:
        expected *= upstream
        error = abs(gradient[column].item() - expected)
        assert error < (half.eps + tolerance) * abs(expected) + half.smallest_normal * half.eps, column


# Extra memory ---------------------------------------------------------------------------------------------------------


def peak_memory(step, trace):
    """(peak bytes that a step had allocated at once, bytes of its largest allocation)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    sizes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]  # negative: freed
    return max(accumulate(sizes)), max(sizes)


@pytest.mark.parametrize(
    ("dtype", "learned", "options"),
    one_in(
        4,
        [torch.float16, torch.bfloat16, torch.float32, torch.float64],
        [False, True],
        ["labels", "smoothing", "probabilities"],
    ),
)
def test_blocked_allocates_one_block_beyond_the_gradient(dtype, learned, options, tmp_path, device):
    """Includes what PyTorch allocates inside an operator: half-precision logits widened, a gradient summed in float64.

    Labels with float32 and float64 logits need no block: the gradient's own memory holds the intermediate values.
    """
    if device != "cpu":
        pytest.skip("impl='blocked' runs on a CPU")
    n_rows, n_classes = 1024, 8142
    logits = torch.randn(n_rows, n_classes).to(dtype).requires_grad_()
    target = torch.rand(n_rows, n_classes) if options == "probabilities" else torch.randint(n_classes, (n_rows,))
    log_prior = torch.linspace(-1.0, -12.0, n_classes, requires_grad=learned)
    inputs = [logits, log_prior] if learned else [logits]
    label_smoothing = 0.1 if options == "smoothing" else 0.0

    def loss(impl):
        return logit_adjusted_cross_entropy(logits, target, log_prior, label_smoothing=label_smoothing, impl=impl)

    def step(impl):
        return torch.autograd.grad(loss(impl), inputs)

    compute_size = 8 if dtype == torch.float64 else 4
    whole_bytes = n_rows * n_classes * compute_size
    reference_peak, _ = peak_memory(lambda: step("reference"), tmp_path / "reference.json")
    assert reference_peak > 3 * whole_bytes, "the measurement sees temporaries"

    gradient = logits.numel() * logits.element_size()
    block = fused_la._tiled.blocks.BLOCK_ELEMENTS * compute_size
    vectors = 8 * 8 * (n_rows + n_classes)  # a few numbers per row and per class
    assert vectors + block < whole_bytes
    peak, largest = peak_memory(lambda: step("blocked"), tmp_path / "blocked.json")
    in_place = logits.element_size() == compute_size and options == "labels" and not learned
    assert largest <= max(gradient, block)
    assert peak <= gradient + (0 if in_place else block) + vectors
    with torch.no_grad():
        peak, _ = peak_memory(lambda: loss("blocked"), tmp_path / "loss.json")
    assert peak <= block + vectors
