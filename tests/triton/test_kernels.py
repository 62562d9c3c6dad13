"""Properties of the kernels beyond right numbers: bits, launches, and which pass computes the gradient.

Streamed rows are 1 to 4 tiles wide here (a tile is 512 classes in float32, 1024 in half precision, 256 in float64),
and a chunk is one tile, so 2,000 classes in the interpreter take the paths that 50,000 classes take on a GPU with 132
multiprocessors. Resident rows are the same as on a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, one_in, slow
from oracle import truth
from test_accuracy import assert_as_accurate, eager, long_tail, measure, randn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_la import PairwiseMargin, logit_adjusted_cross_entropy, margin_cross_entropy
from fused_la._call.problem import Problem

pytest.importorskip("triton")
# Modules by path: the package has functions of the same names.
launch_config, passes, variants = (
    importlib.import_module(f"fused_la._triton.{name}") for name in ("launch_config", "loss", "variants")
)
H100, SMALL = launch_config.Device(132, 50 << 20), launch_config.Device(1, 50 << 20)
KINDS = ["label", "weighted labels", "smoothing and weights", "probabilities"]
VEC = {torch.float16: 8, torch.bfloat16: 8, torch.float32: 4, torch.float64: 2}


def use_device(monkeypatch, device, chunk=1, streams=True):
    """Choose launches for this device, with chunks of `chunk` classes, or of one tile if `chunk` is less."""
    monkeypatch.setattr(launch_config, "CHUNK_CLASSES", chunk)
    if streams:
        monkeypatch.setattr(launch_config, "RESIDENT_ROW_BYTES", 0)
        monkeypatch.setattr(launch_config, "STREAM_THREADS", 128)
    monkeypatch.setattr(passes, "device_of", lambda _: device)
    passes.plan_launches.cache_clear()


@pytest.fixture(autouse=True)
def _plans_of_one_test():
    yield
    passes.plan_launches.cache_clear()


def share_programs(monkeypatch, rows, programs):
    """Let `rows` rows share a program, and `programs` programs share a row, as far as they can."""
    use_device(monkeypatch, SMALL)

    def shared_launch(n_rows, n_classes, dtype, layout, *rest, **options):
        launch = launch_config.choose_launch_config(n_rows, n_classes, dtype, layout, *rest, **options)
        period = launch.vec // math.gcd(layout.row_stride, launch.vec) if rows > 1 else 1
        splits = min(programs, launch.n_chunks(n_classes))  # a row of one chunk is never split
        return launch._replace(block_rows=rows, period=period, splits=splits)

    monkeypatch.setattr(passes, "choose_launch_config", shared_launch)


def gradient_from_forward(loss):
    """The gradient that the forward pass saved in the graph, or None."""
    node = loss.grad_fn
    while not hasattr(node, "gradient"):  # reduction "none" adds a reshape to the target's shape
        ((node, _),) = node.next_functions
    return node.gradient


class Rows(NamedTuple):
    """Rows of logits in a given memory layout, and the other arguments of a call."""

    logits: Tensor
    target: Tensor
    log_prior: Tensor
    options: dict

    def loss(self, reduction, **changes):
        x = changes.pop("logits", self.logits)
        prior = changes.pop("log_prior", self.log_prior)
        return x, logit_adjusted_cross_entropy(
            x, self.target, prior, reduction=reduction, impl="triton", **self.options
        )

    def outcome(self, reduction="sum", upstream=1.0):
        """Loss, gradient, and whether the forward pass computed the gradient."""
        x, loss = self.loss(reduction, logits=self.logits.detach().requires_grad_())
        from_forward = gradient_from_forward(loss) is not None
        (gradient,) = torch.autograd.grad(loss, x, torch.full_like(loss, upstream))
        return loss.detach(), gradient, from_forward


def copy_to(values, place):
    """Copy values to rows on 16-byte boundaries, an odd number of elements apart, or all 3 after a boundary."""
    n_rows, n_classes = values.shape
    aligned = -(-n_classes // 8) * 8
    left, step = {"aligned": (0, aligned), "odd": (0, n_classes | 1), "cut": (3, aligned + 8)}[place]
    wide = torch.full((n_rows, step), math.nan, dtype=values.dtype, device=values.device)  # read outside: NaN
    wide[:, left : left + n_classes] = values
    rows = wide[:, left : left + n_classes]
    assert (rows.data_ptr() % 16 == 0) == (left == 0)
    return rows


def make(kind, n_rows, n_classes, dtype=torch.float32, place="odd", dropped=True):
    logits, prior = randn(n_rows, n_classes, dtype=dtype), long_tail(n_classes)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    target = torch.arange(n_rows, device=DEVICE) * 37 % n_classes
    target[0], target[-1] = 0, n_classes - 1
    options: dict[str, Any] = {}
    if kind == "weighted labels":
        target = torch.stack([target, (target * 3 + 11) % n_classes, target.flip(0)], 1)
        target[1, 0] = -100
        options = dict(target_weight=torch.rand(target.shape, device=DEVICE))
    if kind == "smoothing and weights":
        options = dict(label_smoothing=0.2, weight=torch.rand(n_classes, device=DEVICE) + 0.1)
    if kind == "probabilities":
        target = torch.softmax(randn(n_rows, n_classes, dtype=wide), 1)
    if dropped:
        excluded = torch.zeros(n_classes, dtype=torch.bool, device=DEVICE)
        excluded[5::97] = True
        if not target.is_floating_point():
            excluded[target.clamp_min(0)] = False
        prior[excluded] = -math.inf
        if kind == "probabilities":
            target[:, excluded] = 0.0
        if kind == "smoothing and weights":
            options["smoothing_distribution"] = prior.softmax(0)
    return Rows(copy_to(logits, place), target, prior, options)


def same_bits(first, second):
    assert first.dtype == second.dtype
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


@contextlib.contextmanager
def launched(run=True):
    """The names of the kernels that are launched inside, in order; without `run` no kernel runs."""
    names: list[str] = []
    launch = variants.Variant.launch

    def count(variant, grid, *arguments):
        names.append(variant.kernel.__name__)
        if run:
            launch(variant, grid, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants.Variant, "launch", count)
        yield names


# Bits -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype", "n_rows", "n_classes", "place"),
    [
        ("label", torch.float32, 2, 1100, "aligned"),
        slow("label", torch.float32, 6, 1100, "odd"),  # every fourth row has the same alignment
        ("label", torch.bfloat16, 2, 2050, "cut"),
        slow("label", torch.float16, 3, 2050, "aligned"),
        ("weighted labels", torch.float64, 3, 601, "odd"),
        slow("smoothing and weights", torch.float32, 3, 1100, "cut"),
        slow("probabilities", torch.bfloat16, 3, 1031, "cut"),
        ("probabilities", torch.float32, 3, 1032, "aligned"),
    ],
)
def test_bits_of_a_row_depend_on_neither_the_split_nor_the_pass(monkeypatch, kind, dtype, n_rows, n_classes, place):
    """The same bits for any number of rows a program and programs a row, with the gradient in either pass."""
    rows = make(kind, n_rows, n_classes, dtype, place)
    problem = problem_of(rows)
    states, outcomes = [], []
    for rows_per_program, programs_per_row in ((1, 1), (2, 1), (1, 2), (2, 3)):
        share_programs(monkeypatch, rows_per_program, programs_per_row)
        outcomes.append(rows.outcome("none")[:2])
        loss, state, from_forward, _ = passes.forward(problem, "sum", programs_per_row == 1)
        state = state[: 3 * n_rows]
        torch.testing.assert_close(loss, outcomes[-1][0].sum())
        states.append(state)
        if from_forward is not None:
            outcomes.append((outcomes[-1][0], from_forward.view(n_rows, n_classes)))
    assert len(outcomes) == (6 if dtype != torch.float16 else 4)
    assert all(same_bits(state, states[0]) for state in states)
    for loss, gradient in outcomes[1:]:
        assert same_bits(loss, outcomes[0][0])
        assert same_bits(gradient, outcomes[0][1])


@pytest.mark.parametrize(
    ("kind", "dtype", "n_rows", "n_classes"),
    [
        slow("label", torch.bfloat16, 9, 2051),
        slow("weighted labels", torch.float32, 5, 1029),
        ("smoothing and weights", torch.float32, 5, 1029),
        ("probabilities", torch.float64, 4, 517),
    ],
)
def test_bits_are_the_same_on_any_device_and_accurate(monkeypatch, kind, dtype, n_rows, n_classes):
    """A device with one multiprocessor lets rows share a program; one with 132 lets programs share a row."""
    outcomes = {}
    rows = make(kind, n_rows, n_classes, dtype)
    for device, chunk in ((SMALL, 1), (H100, 1)):
        use_device(monkeypatch, device, chunk)
        outcomes[device] = rows.outcome("sum")
    assert outcomes[SMALL][2]
    assert not outcomes[H100][2], "rows are split"
    assert same_bits(outcomes[SMALL][1], outcomes[H100][1])
    use_device(monkeypatch, H100, chunk=1 << 14)
    in_one_chunk = rows.outcome("sum")
    assert in_one_chunk[2]
    exact = truth(rows.logits, rows.target, rows.log_prior, reduction="sum", **rows.options)
    baseline = measure("reference", rows.logits, rows.target, rows.log_prior, reduction="sum", **rows.options)
    for loss, gradient, _ in (*outcomes.values(), in_one_chunk):
        got = exact._replace(loss=loss.cpu().double(), grad_logits=gradient.cpu().double())
        assert_as_accurate(got, exact, baseline, dtype)


@contextlib.contextmanager
def programs_in_order(order):
    """Let the interpreter run a grid's programs in another order: `order` maps (position, count) to a program."""
    builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
    with pytest.MonkeyPatch.context() as patch:
        original = builder.set_grid_idx
        patch.setattr(builder, "set_grid_idx", lambda x, y, z: original(order(x, builder.grid_dim[0]), y, z))
        yield


ORDERS = {
    "backwards": lambda i, n: n - 1 - i,
    "rotated": lambda i, n: (i + n // 2) % n,
    "strided": lambda i, n: i * 7 % n if n % 7 else i,
}


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU chooses the order of programs")
@pytest.mark.parametrize(("order", "reduction"), one_in(2, list(ORDERS), ["none", "mean"]))
def test_whichever_program_comes_last_merges_the_partial_states(monkeypatch, reduction, order):
    rows = make("weighted labels", 3, 1600)
    share_programs(monkeypatch, 1, 3)  # 4 chunks over 3 programs: the last program has no chunk
    loss, gradient, _ = rows.outcome(reduction)
    with programs_in_order(ORDERS[order]):
        other_loss, other_gradient, _ = rows.outcome(reduction)
    assert same_bits(loss, other_loss)
    assert same_bits(gradient, other_gradient)
    exact = truth(rows.logits, rows.target, rows.log_prior, reduction=reduction, **rows.options)
    torch.testing.assert_close(loss.cpu().double(), exact.loss, rtol=1e-6, atol=1e-6)


# Launches -------------------------------------------------------------------------------------------------------------


def problem_of(rows):
    shape = (len(rows.logits), 1, -1)
    weights = rows.options.get("target_weight")
    return Problem(
        rows.logits.unsqueeze(1),
        rows.log_prior,
        rows.target.reshape(shape),
        None if weights is None else weights.reshape(shape),
        weight=rows.options.get("weight"),
        mean_weight=rows.options.get("weight"),
        smoothing_distribution=rows.options.get("smoothing_distribution"),
        label_smoothing=rows.options.get("label_smoothing", 0.0),
    )


class Operators(TorchDispatchMode):
    """Records the names of the operators that are called inside."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function.overloadpacket))
        return function(*args, **kwargs or {})


# They only allocate or make views: they run no PyTorch kernel and wait for no value.
HARMLESS = {"aten.empty", "aten.new_empty", "aten.new_empty_strided", "aten.empty_like", "aten.as_strided", "aten.view"}


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("programs", ["resident", 1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_step_is_two_launches_forward_and_one_backward_and_nothing_else(
    monkeypatch, reduction, kind, programs, learned
):
    rows, kernel = make(kind, 3, 1100), "_streamed_kernel"
    if programs == "resident":
        use_device(monkeypatch, H100, streams=False)
        kernel = "_resident_kernel"
    else:
        share_programs(monkeypatch, 1, programs)
    with_gradient = programs != 3 and reduction != "none" and not learned
    problem, upstream = problem_of(rows), torch.ones(() if reduction != "none" else (3, 1), device=DEVICE)
    with launched(run=False) as names, Operators() as operators:
        _, state, gradient, signature = passes.forward(problem, reduction, with_gradient)
        n_forward = len(names)
        passes.backward(problem, reduction, state, upstream, True, learned, gradient, signature)
    prepared = ["_prepare_kernel"] * (reduction != "none" or programs == 3)
    assert names[:n_forward] == [*prepared, kernel]
    assert names[n_forward:] == [kernel] + ["_grad_log_prior_kernel"] * learned
    assert operators.names <= HARMLESS


@pytest.mark.parametrize("streams", [False, True])
def test_a_training_step_of_the_public_function_is_three_launches(monkeypatch, streams):
    rows, kernel = make("label", 3, 1100), "_streamed_kernel" if streams else "_resident_kernel"
    use_device(monkeypatch, SMALL, streams=streams)
    x = rows.logits.detach().requires_grad_()
    with launched() as names:
        _, loss = rows.loss("mean", logits=x)
        loss.backward()
    assert names == ["_prepare_kernel", kernel, kernel]
    with launched() as names, torch.no_grad():
        rows.loss("mean", logits=x)
    assert names == ["_prepare_kernel", kernel]


# Which pass makes the gradient ----------------------------------------------------------------------------------------


def forward_gradient_of(rows, reduction="mean", log_prior=None):
    _, loss = rows.loss(
        reduction,
        logits=rows.logits.detach().requires_grad_(),
        log_prior=rows.log_prior if log_prior is None else log_prior,
    )
    return gradient_from_forward(loss)


@pytest.mark.parametrize(
    ("streams", "place", "dtype", "reduction"),
    one_in(
        3,
        [False, True],
        ["aligned", "odd", "cut"],
        [torch.bfloat16, torch.float32, torch.float64],
        ["mean", "sum"],
    ),
)
def test_the_forward_pass_makes_the_gradient(monkeypatch, streams, place, dtype, reduction):
    use_device(monkeypatch, H100, chunk=1 << 14, streams=streams)
    rows = make("label", 3, 300, dtype, place)
    from_forward = forward_gradient_of(rows, reduction)
    exact = truth(rows.logits, rows.target, rows.log_prior, reduction=reduction)
    baseline = eager(rows.logits, rows.target, rows.log_prior, reduction=reduction)
    got = exact._replace(grad_logits=from_forward.view(3, 300).cpu().double())
    assert_as_accurate(got, exact, baseline, dtype)


def test_the_forward_pass_makes_no_gradient_where_it_would_be_wrong_or_slow(monkeypatch):
    use_device(monkeypatch, SMALL)
    rows = make("label", 3, 1100)
    assert forward_gradient_of(rows) is not None
    assert forward_gradient_of(rows, "none") is None
    assert forward_gradient_of(make("label", 3, 1100, torch.float16)) is None
    assert forward_gradient_of(rows, log_prior=rows.log_prior.detach().requires_grad_()) is None
    use_device(monkeypatch, H100)
    assert forward_gradient_of(rows) is None, "a row is split over programs"


def test_the_forward_pass_makes_no_gradient_that_is_not_needed(monkeypatch):
    use_device(monkeypatch, SMALL)
    calls = []
    launch = passes.forward
    monkeypatch.setattr(
        importlib.import_module("fused_la._triton"),
        "forward",
        lambda problem, reduction, with_gradient: (
            calls.append(with_gradient) or launch(problem, reduction, with_gradient)
        ),
    )
    rows = make("label", 3, 300)
    with torch.no_grad():
        rows.loss("mean", logits=rows.logits.detach().requires_grad_())
    rows.loss("mean")  # logits that require no gradient
    rows.loss("mean", logits=rows.logits.detach().requires_grad_())
    assert calls == [False, False, True]


# Upstream gradients ---------------------------------------------------------------------------------------------------

POISON = 7.0


@pytest.fixture(params=["resident", "streamed"])
def step(monkeypatch, request):
    """Logits that require grad, their loss, the buffer that the forward pass wrote, and the true gradient."""
    use_device(monkeypatch, SMALL, streams=request.param == "streamed")
    rows = make("label", 3, 600)
    x = rows.logits.detach().requires_grad_()
    _, loss = rows.loss("mean", logits=x)
    exact = truth(rows.logits, rows.target, rows.log_prior).grad_logits
    from_forward = gradient_from_forward(loss)
    assert from_forward is not None
    assert_right(from_forward.view(3, 600), exact)
    return x, loss, from_forward, exact


def assert_right(gradient, exact):
    torch.testing.assert_close(gradient.detach().cpu().double(), exact, rtol=2e-5, atol=1e-30)


def test_an_upstream_gradient_of_1_returns_the_gradient_of_the_forward_pass(step):
    x, loss, from_forward, _ = step
    from_forward.fill_(POISON)
    (gradient,) = torch.autograd.grad(loss, x)
    assert (gradient == POISON).all()
    assert gradient.data_ptr() == from_forward.data_ptr()  # returned, not copied


@pytest.mark.parametrize("upstream", [0.0, -0.0, -2.5, -1.0, 1 + 2**-23, 2.0**16])
def test_any_other_upstream_gradient_rewrites_it(step, upstream):
    x, loss, from_forward, exact = step
    from_forward.fill_(POISON)
    loss.backward(torch.tensor(upstream, device=DEVICE))
    assert_right(x.grad, exact * upstream)


def test_the_gradient_is_rewritten_for_a_scaled_loss_but_not_for_a_factor_of_1(step):
    x, loss, from_forward, exact = step
    from_forward.fill_(POISON)
    (loss * 1).backward(retain_graph=True)
    assert (x.grad == POISON).all()
    x.grad = None
    (loss.expand(4).sum() / 2).backward()
    assert_right(x.grad, exact * 2)


def test_a_second_backward_pass_computes_a_new_gradient(step):
    x, loss, from_forward, exact = step
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert gradient_from_forward(loss) is None
    from_forward.fill_(POISON)  # this memory belongs to the caller now
    (second,) = torch.autograd.grad(loss, x, torch.tensor(3.0, device=DEVICE), retain_graph=True)
    assert (first == POISON).all()
    assert_right(second, exact * 3)
    (third,) = torch.autograd.grad(loss, x)
    assert_right(third, exact)


def test_gradients_of_several_passes_and_losses_add_up(monkeypatch):
    use_device(monkeypatch, SMALL)
    rows = make("label", 3, 600)
    x = rows.logits.detach().requires_grad_()
    exact = truth(rows.logits, rows.target, rows.log_prior).grad_logits
    first, second = rows.loss("mean", logits=x)[1], rows.loss("mean", logits=x)[1]
    (first + second).backward(retain_graph=True)
    assert_right(x.grad, 2 * exact)
    first.backward(retain_graph=True)
    (second * 0.5).backward()
    assert_right(x.grad, 3.5 * exact)


def test_one_upstream_number_a_row(monkeypatch):
    """Upstream gradients of reduction "none": strided, expanded from one number, and contiguous."""
    use_device(monkeypatch, SMALL)
    rows = make("label", 3, 600)
    exact = truth(rows.logits, rows.target, rows.log_prior, reduction="none").grad_logits
    numbers = torch.tensor([1.0, 9, -2.5, 9, 0.0, 9], device=DEVICE)
    for upstream in (numbers[::2], numbers[1].expand(3), torch.ones(3, device=DEVICE)):
        x, loss = rows.loss("none", logits=rows.logits.detach().requires_grad_())
        (gradient,) = torch.autograd.grad(loss, x, upstream)
        assert_right(gradient, upstream.cpu().double()[:, None] * exact)


@pytest.mark.parametrize("upstream", [1.0, 0.3])
def test_logits_changed_after_the_forward_pass_are_an_error_unless_the_gradient_exists(monkeypatch, upstream):
    """A gradient from the forward pass is right and is scaled; a second backward pass would read the logits again."""
    use_device(monkeypatch, SMALL)
    rows = make("label", 3, 600)
    for reduction in ("mean", "none"):
        leaf = rows.logits.detach().requires_grad_()
        x = leaf * 1
        _, loss = rows.loss(reduction, logits=x)
        x.mul_(2)
        if reduction == "mean":
            exact = truth(
                rows.logits, rows.target, rows.log_prior, reduction="mean", grad_loss=upstream, **rows.options
            )
            (grad,) = torch.autograd.grad(loss * upstream, leaf, retain_graph=True)
            torch.testing.assert_close(grad.cpu().double(), exact.grad_logits.cpu(), rtol=1e-5, atol=1e-9)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (loss * upstream).sum().backward()


# The edges of a row ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, slow(torch.bfloat16)], ids=str)
@pytest.mark.parametrize("streams", [False, True])
def test_every_head_and_tail_with_the_label_in_every_part(monkeypatch, streams, dtype):
    """VEC row lengths times VEC alignments give all VEC * VEC pairs of head and tail."""
    use_device(monkeypatch, SMALL, streams=streams)
    vec, cuts = VEC[dtype], set()
    for n_classes in range(32 * vec, 33 * vec):
        step = n_classes + (1 - n_classes) % vec  # 1 modulo VEC: every row begins one element later
        values = randn(4 * vec, n_classes, dtype=dtype)
        logits = torch.full((4 * vec, step), math.nan, dtype=dtype, device=DEVICE)[:, :n_classes]
        logits.copy_(values)
        target = torch.empty(4 * vec, dtype=torch.int64, device=DEVICE)
        for row in range(4 * vec):
            head = -(row * step) % vec
            body = (n_classes - head) // vec * vec
            cuts.add((head, n_classes - head - body))
            target[row] = (0, head, head + body - 1, n_classes - 1)[row // vec]
        rows = Rows(logits, target, long_tail(n_classes), {})
        loss, gradient, from_forward = rows.outcome("sum")
        assert from_forward
        exact = truth(logits, target, rows.log_prior, reduction="sum")
        baseline = eager(logits, target, rows.log_prior, reduction="sum")
        got = exact._replace(loss=loss.cpu().double(), grad_logits=gradient.cpu().double())
        assert_as_accurate(got, exact, baseline, dtype)
    assert cuts == {(head, tail) for head in range(vec) for tail in range(vec)}


# Both sides of every limit of `choose_launch_config`; the label at the top, in the middle of a vector, and in the tail.
HALF = (
    *(255, 256, 257, 270, 511, 525, 526),  # narrow and wide; one tile of the body and two
    *(1024, 1025, 2048, 2049, 4096, 4110, 4111, 8142, 8192, 8206, 16384, 16385),  # threads; the powers of 2
    *(32767, 32768, 32769),  # resident and streamed
)
BORDERS = [
    *((dtype, "label", n_classes) for dtype in (torch.bfloat16, torch.float16) for n_classes in HALF),
    *((torch.float32, "label", n) for n in (127, 128, 131, 515, 516, 1025, 4099, 8142, 16383, 16384, 16385)),
    *((torch.float64, "label", n) for n in (63, 64, 65, 129, 2049, 8191, 8192, 8193)),
    *((torch.bfloat16, kind, n) for kind in KINDS[2:] for n in (256, 1000, 8142, 8191, 8192, 8193)),
    *((torch.float32, kind, n) for kind in KINDS[2:] for n in (128, 4095, 4096, 4097)),
    *((torch.float64, "probabilities", n) for n in (2047, 2048, 2049)),
    *((torch.bfloat16, "weighted labels", n) for n in (256, 8142, 32768, 32769)),
]


@pytest.mark.parametrize(
    ("dtype", "kind", "n_classes"), [slow(*case) if i % 3 else case for i, case in enumerate(BORDERS)]
)
def test_both_sides_of_every_limit_of_a_launch(dtype, kind, n_classes):
    rows = make(kind, 3, n_classes, dtype)
    if kind == "label":
        rows.target[1] = rows.logits[1].float().argmax()
        rows.log_prior[rows.target[1]] = -1.0
        rows.logits[1, rows.target[1]] = 20.0  # a confident row
    loss, gradient, from_forward = rows.outcome("sum")
    most = (1 << 16) // dtype.itemsize // (1 if "label" in kind else 4)
    assert n_classes > most or from_forward == (dtype != torch.float16)
    exact = truth(rows.logits, rows.target, rows.log_prior, reduction="sum", **rows.options)
    baseline = measure("reference", rows.logits, rows.target, rows.log_prior, reduction="sum", **rows.options)
    got = exact._replace(loss=loss.cpu().double(), grad_logits=gradient.cpu().double())
    assert_as_accurate(got, exact, baseline, dtype)
    if kind == "label" and dtype != torch.float16:  # the small gradient of the confident row is accurate too
        mine, true = gradient[1, rows.target[1]].cpu().double(), exact.grad_logits[1, rows.target[1]]
        torch.testing.assert_close(mine, true, rtol=2 * torch.finfo(dtype).eps + 4e-6, atol=0.0)


@pytest.mark.parametrize("n_classes", [63, 64, 65, 200])
def test_both_sides_of_the_limit_of_images(n_classes):
    logits = randn(2, n_classes, 40, dtype=torch.bfloat16)
    target = torch.randint(n_classes, (2, 40), device=DEVICE)
    prior, x = long_tail(n_classes), logits.detach().requires_grad_()
    loss = logit_adjusted_cross_entropy(x, target, prior, impl="triton")
    loss.backward()
    exact, baseline = truth(logits, target, prior), eager(logits, target, prior)
    got = exact._replace(loss=loss.detach().cpu().double(), grad_logits=x.grad.cpu().double())
    assert_as_accurate(got, exact, baseline, torch.bfloat16)


N_CLASSES = 1541  # float32: 3 tiles and edges
PLACES = {"head": 1, "first of the body": 3, "middle": 770, "last of the body": 1538, "tail": 1540}
COLUMNS = list(PLACES.values())


@pytest.fixture(params=["resident", "one program a row", "several"])
def programs(request, monkeypatch):
    use_device(monkeypatch, H100 if request.param == "several" else SMALL, streams=request.param != "resident")


def assert_rows_right(values, labels, prior=None, kind="label", names=None):
    """Compare each row with the oracle and return losses and gradients. The head of every row has 3 classes."""
    wide = torch.zeros(len(values), 1552, device=DEVICE)
    wide[:, 1:1542] = values
    target = torch.tensor(labels, device=DEVICE)
    if kind == "probabilities":
        target = F.one_hot(target, N_CLASSES).float()
    prior = torch.zeros(N_CLASSES, device=DEVICE) if prior is None else prior
    rows = Rows(wide[:, 1:1542], target, prior, {})
    assert passes.signature_of(problem_of(rows)).layout() == (True, 1, 1552)
    loss, gradient, _ = rows.outcome("none")
    loss, gradient = loss.cpu().double(), gradient.cpu().double()
    exact = truth(rows.logits, target, prior, reduction="none")
    for row, name in enumerate(names or labels):
        if exact.loss[row].isnan():
            assert loss[row].isnan(), name
            assert gradient[row].isnan().all(), name
            continue
        torch.testing.assert_close(loss[row], exact.loss[row], rtol=3e-6, atol=1e-6, msg=str(name))
        torch.testing.assert_close(gradient[row], exact.grad_logits[row], rtol=2e-5, atol=1e-8, msg=str(name))
    return loss, gradient


@pytest.mark.parametrize("kind", ["label", "probabilities"])
def test_a_row_with_one_finite_class(programs, kind):
    """All other tiles, chunks and edges of the row are -inf."""
    values = torch.full((5, N_CLASSES), -math.inf, device=DEVICE)
    values[range(5), COLUMNS] = 2.0
    loss, gradient = assert_rows_right(values, COLUMNS, kind=kind, names=list(PLACES))
    assert (loss == 0).all()
    assert (gradient == 0).all()


def test_a_nan_or_infinite_class_anywhere_makes_its_row_nan_and_no_other(programs):
    values = randn(13, N_CLASSES)
    values[range(5), COLUMNS] = math.nan
    values[range(6, 11), COLUMNS] = math.inf
    values[12] = -math.inf  # no class at all
    loss, _ = assert_rows_right(values, [100] * 13)
    assert loss.isnan().tolist() == [True] * 5 + [False] + [True] * 5 + [False, True]


@pytest.mark.parametrize("kind", ["label", "probabilities"])
def test_dropped_classes_stay_out_whatever_their_logits(programs, kind):
    prior = torch.zeros(N_CLASSES, device=DEVICE)
    prior[COLUMNS] = -math.inf
    values = randn(4, N_CLASSES)
    values[:, COLUMNS] = torch.tensor([[math.nan], [math.inf], [-math.inf], [80.0]], device=DEVICE)
    _, gradient = assert_rows_right(values, [0, 769, 1000, 1539], prior, kind)
    assert (gradient[:, COLUMNS] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("streams", [False, True])
def test_half_precision_infinities_and_nan_count_only_in_classes_that_take_part(monkeypatch, dtype, streams):
    """In half precision a logit of inf or NaN counts as the highest float until the maximum is known."""
    use_device(monkeypatch, SMALL, streams=streams)
    columns = [0, 5, 300, 598, 599]
    prior = torch.zeros(600, device=DEVICE)
    prior[columns] = -math.inf
    logits = randn(6, 600, dtype=dtype)
    logits[0, columns], logits[1, columns], logits[2, columns] = math.nan, math.inf, -math.inf
    logits[3, 7], logits[4, 7], logits[5, 7] = math.nan, math.inf, -math.inf
    target = torch.full((6,), 100, device=DEVICE)
    loss, gradient, _ = Rows(logits, target, prior, {}).outcome("none")
    assert loss.isnan().tolist() == [False, False, False, True, True, False]
    assert gradient.isnan().any(1).tolist() == loss.isnan().tolist()
    assert (gradient[:3, columns] == 0).all()
    right = torch.tensor([0, 1, 2, 5])
    exact = truth(logits.nan_to_num(0.0, 0.0, -math.inf)[right], target[right], prior, reduction="none")
    torch.testing.assert_close(loss[right].cpu().double(), exact.loss, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "programs", "reduction"), one_in(3, KINDS, ["resident", 1, 3], ["mean", "sum", "none"])
)
def test_nothing_is_read_that_was_not_written(monkeypatch, kind, programs, reduction):
    """Fresh memory is NaN here: the workspace, the gradients, and the padding of what the last program sums."""
    rows = make(kind, 3, 1100)
    if programs == "resident":
        use_device(monkeypatch, H100, streams=False)
    else:
        share_programs(monkeypatch, 1, programs)
    exact = truth(rows.logits, rows.target, rows.log_prior, reduction=reduction, **rows.options)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1, device=DEVICE).isnan().all()
        loss, gradient, _ = rows.outcome(reduction, 2.0)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(loss.cpu().double(), exact.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.cpu().double(), 2 * exact.grad_logits, rtol=1e-4, atol=1e-7)


SPECIAL = {
    "ties of the maximum between edges and body": lambda row: row.index_fill_(
        0, torch.tensor(COLUMNS).to(row.device), 20
    ),
    "all at the lowest float": lambda row: row.fill_(torch.finfo(torch.float32).min),
    "all equal": lambda row: row.fill_(-3.0),
    "edges at -inf": lambda row: (row[:3].fill_(-math.inf), row[1539:].fill_(-math.inf)),
    "first chunk at -inf": lambda row: row[3:515].fill_(-math.inf),
    "middle chunk at -inf": lambda row: row[515:1027].fill_(-math.inf),
    "last chunk at -inf": lambda row: row[1027:1539].fill_(-math.inf),
    "top in the head": lambda row: row[0].fill_(60.0),
    "top in the tail": lambda row: row[1540].fill_(60.0),
}


def test_special_rows(programs):
    values = randn(len(SPECIAL), N_CLASSES)
    for row, fill in zip(values, SPECIAL.values(), strict=True):
        fill(row)
    labels = [3, 1540, 0, 700, 2, 1326, 3, 0, 1540]
    loss, _ = assert_rows_right(values, labels, names=list(SPECIAL))
    assert loss.isfinite().all()


# Which class stays out of a sum ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [16, 300])
def test_labels_whose_negative_offset_is_minus_infinity_leave_every_other_class_in_the_sum(n_classes):
    """Their classes are excluded as competitors but not as labels, so the loss is finite."""
    offset = torch.zeros(n_classes, device=DEVICE)
    offset[[5, 6]] = -math.inf
    margin = PairwiseMargin(negative_offset=offset, target_offset=torch.zeros_like(offset))
    logits, share = randn(1, n_classes), torch.tensor([[0.3, 0.7]], device=DEVICE)
    logits[0, 0] = 4.0
    outcomes = []
    for impl, x in (("triton", logits), ("reference", logits.double())):
        x, target = x.detach().requires_grad_(), torch.tensor([[5, 6]], device=DEVICE)
        loss = margin_cross_entropy(x, target, margin, target_weight=share, impl=impl)
        outcomes.append((loss.detach().double(), torch.autograd.grad(loss, x)[0].double()))
    (loss, gradient), (true_loss, true_gradient) = outcomes
    torch.testing.assert_close(loss, true_loss, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("n_classes", [16, 300])
@pytest.mark.parametrize("share", [(0.3, 0.7), (0.0, 0.0)])
def test_a_nan_at_the_only_class_that_labels_name_makes_its_row_nan(n_classes, share):
    logits = randn(2, n_classes)
    logits[0, 0] = math.nan
    target, weight = torch.zeros(2, 2, dtype=torch.int64, device=DEVICE), torch.tensor([share] * 2, device=DEVICE)
    rows = Rows(logits, target, torch.zeros(n_classes, device=DEVICE), {"target_weight": weight})
    loss, gradient, _ = rows.outcome("none")
    assert loss.isnan().tolist() == [True, False]
    assert gradient[0].isnan().all()
    assert gradient[1].isfinite().all()


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("n_classes", [16, 300])
def test_a_confident_row_keeps_its_digits_if_its_top_class_is_no_label(monkeypatch, n_classes, streams):
    """All target mass is on class 5, by smoothing toward it or because every other class has weight 0."""
    use_device(monkeypatch, SMALL, streams=streams)
    logits, only = torch.zeros(1, n_classes, device=DEVICE), torch.zeros(n_classes, device=DEVICE)
    logits[0, 5], only[5] = 30.0, 1.0
    target, prior = torch.tensor([2], device=DEVICE), torch.zeros(n_classes, device=DEVICE)
    for options in ({"label_smoothing": 1.0, "smoothing_distribution": only}, {"label_smoothing": 0.1, "weight": only}):
        loss, gradient, _ = Rows(logits, target, prior, options).outcome("sum")
        exact = truth(logits, target, prior, reduction="sum", **options)
        torch.testing.assert_close(loss.cpu().double(), exact.loss, rtol=4e-6, atol=0.0)
        torch.testing.assert_close(gradient.cpu().double(), exact.grad_logits, rtol=4e-6, atol=0.0)


# Tensors that autograd saved ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("n_classes", [300, slow(4096)])
def test_saved_tensors_may_come_back_transposed(n_classes, reduction):
    """The backward pass then uses another kernel than the forward pass."""
    rows = make("label", 3, n_classes)
    exact = truth(rows.logits, rows.target, rows.log_prior, reduction=reduction).grad_logits

    def transposed(saved):
        return saved.t().contiguous().t() if saved.shape == (3, n_classes) else saved

    for upstream in (1.0, 2.0):
        x = rows.logits.detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), transposed):
            _, loss = rows.loss(reduction, logits=x)
        (gradient,) = torch.autograd.grad(loss, x, torch.full_like(loss, upstream))
        assert_right(gradient, upstream * exact)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_saved_tensors_may_come_back_with_other_strides_and_alignment(monkeypatch, reduction):
    """Offloaded activations come back with other strides and another distance to 16-byte boundaries."""
    use_device(monkeypatch, SMALL)
    rows = make("label", 3, 600, place="odd")
    exact = truth(rows.logits, rows.target, rows.log_prior, reduction=reduction).grad_logits

    def moved(saved):
        return copy_to(saved, "cut") if saved.shape == (3, 600) else saved

    x = rows.logits.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), moved):
        _, loss = rows.loss(reduction, logits=x)
    (gradient,) = torch.autograd.grad(loss, x, torch.full_like(loss, 2.0))
    assert_right(gradient, 2 * exact)
