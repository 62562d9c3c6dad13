"""Properties of the loss for all inputs: invariances, bits that depend only on the row, equivalent forms.

Hypothesis draws small problems of every kind (labels, weighted labels, probabilities; smoothing, class weights, classes
at -inf, ignored rows). Two computations of one number are compared within `rounding`, a bound on their rounding errors
that follows from the problem's values. Logits, priors and shifts are multiples of 1/256, so the inputs are shifted
exactly. Tests of bits compare exactly, at row widths that are summed in different ways: one vector, a ragged tail, more
than one tile, and more than the 32,768 elements from which PyTorch splits a sum over its threads.
"""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import one_in, slow
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import fused_la._cpu.loss
import fused_la._cpu.single_label
import fused_la._tiled.blocks
from fused_la import logit_adjusted_cross_entropy

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class Problem(NamedTuple):
    logits: torch.Tensor
    target: torch.Tensor
    log_prior: torch.Tensor
    tau: float
    options: dict

    def outcome(self, impl, reduction="none", **changes):
        """Loss and gradient of its sum."""
        logits = self.logits.detach().requires_grad_()  # not a clone, which may have other strides
        arguments = {**self.options, "log_prior": self.log_prior, "tau": self.tau, "target": self.target, **changes}
        loss = logit_adjusted_cross_entropy(logits, **arguments, reduction=reduction, impl=impl)
        loss.sum().backward()
        return loss.detach(), logits.grad

    def rows(self, which):
        """The problem with only these rows, as a view for a slice."""
        options = dict(self.options)
        if "target_weight" in options:
            options["target_weight"] = options["target_weight"][which]
        return self._replace(logits=self.logits[which], target=self.target[which], options=options)


def rounding(problem, shift=0.0):
    """The largest allowed difference between two evaluations of losses and gradients in the compute dtype.

    z = logit + tau * log_prior and z - m are each rounded by half an ulp of the largest intermediate value. An error of
    dz in every z changes a row's loss by up to 2 * A * dz, A the row's target mass, and its gradient by a factor of
    exp(2 * dz), which is less than 2 * A * dz more. Every later operation (exp, sums of up to 9 classes, log1p,
    products) costs some ulp of the loss and of A; the 16 is a generous count of them.
    """
    eps = torch.finfo(problem.logits.dtype if problem.logits.dtype == torch.float64 else torch.float32).eps
    offset = problem.log_prior[problem.log_prior.isfinite()].double() * problem.tau
    largest = problem.logits.double().abs().max() + offset.abs().max() + abs(shift) * max(1.0, problem.tau)
    weight = problem.options.get("weight")
    mass = 1.0 if weight is None else weight.double().max()
    if "target_weight" in problem.options:
        mass = mass * problem.options["target_weight"].double().sum(1).max()
    return (4 * largest + 16) * eps * mass


def same_bits(first, second):
    """Whether all bits are equal, including the sign of a zero and the payload of a NaN."""
    assert first.shape == second.shape
    assert first.dtype == second.dtype
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def assert_close(got, expected, bound):
    assert got.dtype == expected.dtype
    assert torch.equal(got.isfinite(), expected.isfinite())
    distance = (got.double() - expected.double()).abs().nan_to_num(0.0)
    assert (distance <= bound).all(), f"{distance.max()} apart, {bound} allowed"


def on_grid(generator, shape, largest):
    return torch.randint(-256 * largest, 256 * largest + 1, shape, generator=generator).double() / 256


KINDS = "labels", "weighted labels", "probabilities"


@st.composite
def problems(draw, device, dtype=torch.float64, kinds=KINDS, excluded=True, ignored=True, smoothed=True):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    n_rows, n_classes = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    logits = on_grid(generator, (n_rows, n_classes), 8)
    log_prior = on_grid(generator, (n_classes,), 6) - 6
    n_excluded = draw(st.integers(0, n_classes - 1)) if excluded and draw(st.booleans()) else 0
    kept = torch.randperm(n_classes, generator=generator)[n_excluded:]
    is_excluded = torch.ones(n_classes, dtype=torch.bool).index_fill(0, kept, False)
    log_prior[is_excluded] = -torch.inf
    tau = draw(st.sampled_from([0.5, 1.0, 2.5]))

    options = {}
    if draw(st.booleans()):
        options["weight"] = torch.rand(n_classes, generator=generator, dtype=torch.float64) + 0.25
    if smoothed and draw(st.booleans()):
        options["label_smoothing"] = 0.125
        distribution = torch.rand(n_classes, generator=generator, dtype=torch.float64).masked_fill(is_excluded, 0.0)
        if n_excluded > 0 or draw(st.booleans()):  # uniform smoothing has an infinite loss beside a class at -inf
            options["smoothing_distribution"] = distribution / distribution.sum()

    kind = draw(st.sampled_from(kinds))
    if kind == "probabilities":
        target = torch.rand(n_rows, n_classes, generator=generator, dtype=torch.float64).masked_fill(is_excluded, 0.0)
        target /= target.sum(1, keepdim=True)
    else:
        shape = (n_rows, draw(st.integers(1, 3))) if kind == "weighted labels" else (n_rows,)
        target = kept[torch.randint(len(kept), shape, generator=generator)]
        if kind == "weighted labels":
            options["target_weight"] = torch.rand(shape, generator=generator, dtype=torch.float64)
        if ignored and draw(st.booleans()):
            options["ignore_index"] = draw(st.sampled_from([-100, -1, 255]))
            target[torch.rand(shape, generator=generator) < 0.3] = options["ignore_index"]

    def cast(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else None)

    return Problem(cast(logits), cast(target), cast(log_prior), tau, {name: cast(v) for name, v in options.items()})


def run_property(impl, check, **strategies):
    """Run `check` on drawn values: the same ones in every run, and only a few in Triton's interpreter.

    Failures are not shrunk in the interpreter, which would take minutes there, and never explained, which traces every
    line and takes minutes everywhere.
    """
    phases = [Phase.generate] if impl == "triton" else [Phase.generate, Phase.shrink]
    limits = settings(
        max_examples=8 if impl == "triton" else 60,
        deadline=None,
        derandomize=True,
        phases=phases,
        suppress_health_check=[HealthCheck.too_slow],
    )
    limits(given(**strategies)(check))()


# Invariances ----------------------------------------------------------------------------------------------------------

SHIFTS = st.integers(-64 * 256, 64 * 256).map(lambda steps: steps / 256)


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.float64)])
def test_a_constant_added_to_the_log_prior_changes_nothing(impl, device, dtype):
    def check(problem, shift):
        bound = rounding(problem, shift)
        loss, gradient = problem.outcome(impl)
        shifted_loss, shifted_gradient = problem.outcome(impl, log_prior=problem.log_prior + shift)
        assert_close(shifted_loss, loss, bound)
        assert_close(shifted_gradient, gradient, bound)

    run_property(impl, check, problem=problems(device, dtype), shift=SHIFTS)


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.float64)])
def test_a_constant_added_to_the_logits_of_a_row_changes_nothing(impl, device, dtype):
    def check(problem, shifts):
        shift = torch.tensor(shifts[: len(problem.logits)], device=device, dtype=dtype)
        bound = rounding(problem, shift.abs().max().item())
        loss, gradient = problem.outcome(impl)
        shifted_loss, shifted_gradient = problem._replace(logits=problem.logits + shift[:, None]).outcome(impl)
        assert_close(shifted_loss, loss, bound)
        assert_close(shifted_gradient, gradient, bound)

    run_property(impl, check, problem=problems(device, dtype), shifts=st.lists(SHIFTS, min_size=5, max_size=5))


def permuted(problem, order):
    """The problem with its classes in another order: class i is the former class order[i]."""
    by_class = ["weight", "smoothing_distribution"]
    options = {name: value[order] if name in by_class else value for name, value in problem.options.items()}
    target = problem.target
    if target.is_floating_point():
        target = target[:, order]
    else:
        counts = target != problem.options.get("ignore_index", -100)
        target = torch.where(counts, order.argsort()[torch.where(counts, target, 0)], target)
    return Problem(problem.logits[:, order], target, problem.log_prior[order], problem.tau, options)


def test_permuted_classes_have_the_same_loss_and_permuted_gradients(impl, device):
    def check(problem, seed):
        n_classes = problem.logits.shape[1]
        order = torch.randperm(n_classes, generator=torch.Generator().manual_seed(seed)).to(device)
        loss, gradient = problem.outcome(impl)
        permuted_loss, permuted_gradient = permuted(problem, order).outcome(impl)
        assert_close(permuted_loss, loss, rounding(problem))
        assert_close(permuted_gradient, gradient[:, order], rounding(problem))

    run_property(impl, check, problem=problems(device), seed=st.integers(0, 2**32))


def test_the_gradient_of_a_row_adds_up_to_zero_if_no_class_is_excluded(impl, device):
    def check(problem):
        _, gradient = problem.outcome(impl)
        assert_close(gradient.sum(1), torch.zeros_like(gradient[:, 0]), rounding(problem))
        if problem.logits.shape[1] > 1 and problem.target.dim() == 1:
            counts = problem.target != problem.options.get("ignore_index", -100)
            assert torch.equal((gradient != 0).any(1), counts), "a sum over nothing but zeros says nothing"

    run_property(impl, check, problem=problems(device, excluded=False))


# Bits -----------------------------------------------------------------------------------------------------------------

OPTIONS = "plain", "smoothing and weights", "weighted labels", "probabilities"


def wide_problem(device, dtype, n_rows, n_classes, options="plain"):
    generator = torch.Generator().manual_seed(n_classes)

    def rand(*shape):
        return torch.rand(*shape, generator=generator).to(device)

    logits = (torch.randn(n_rows, n_classes, generator=generator, dtype=torch.float64) * 3).to(device, dtype)
    log_prior = -12 * rand(n_classes)
    target = torch.randint(n_classes, (n_rows,), generator=generator).to(device)
    given = {}
    if options == "smoothing and weights":
        given = dict(label_smoothing=0.9, weight=rand(n_classes) + 0.1)
    if options == "weighted labels":
        target = torch.randint(n_classes, (n_rows, 3), generator=generator).to(device)
        given = dict(target_weight=rand(n_rows, 3))
    if options == "probabilities":
        target = rand(n_rows, n_classes)
    return Problem(logits, target, log_prior, 1.0, given)


def class_counts(impl):
    return (3, 17, 259, 1027) if impl == "triton" else (1, 3, 17, 100, 1023, 8142)


def lone_rows(impl):
    """Rows that are also computed alone: at the ends of the batch, at the ends of blocks of four, and inside."""
    return [0, 3] if impl == "triton" else [0, 1, 3, 4, 16]


@pytest.mark.parametrize(("dtype", "options"), one_in(4, DTYPES, OPTIONS))
def test_row_bits_do_not_depend_on_the_batch_or_the_position_in_it(impl, device, dtype, options):
    for n_classes in class_counts(impl):
        problem = wide_problem(device, dtype, 5 if impl == "triton" else 17, n_classes, options)
        loss, gradient = problem.outcome(impl)
        for row in lone_rows(impl):
            lone_loss, lone_gradient = problem.rows(slice(row, row + 1)).outcome(impl)
            assert same_bits(lone_loss, loss[[row]]), (n_classes, row)
            assert same_bits(lone_gradient, gradient[[row]]), (n_classes, row)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_bits_do_not_depend_on_the_values_of_other_rows(impl, device, dtype):
    for n_classes in class_counts(impl):
        problem = wide_problem(device, dtype, 5, n_classes)
        loss, gradient = problem.outcome(impl)
        logits, target = problem.logits.clone(), problem.target.clone()
        logits[0], logits[1], logits[3] = torch.nan, torch.inf, logits[3].flip(0)
        target[4] = -100
        other_loss, other_gradient = problem._replace(logits=logits, target=target).outcome(impl)
        assert same_bits(other_loss[2], loss[2]), n_classes
        assert same_bits(other_gradient[2], gradient[2]), n_classes
        assert other_loss[:2].isnan().all()


def test_the_same_inputs_give_the_same_bits(impl, device):
    def check(problem, reduction):
        first_loss, first_gradient = problem.outcome(impl, reduction)
        second_loss, second_gradient = problem.outcome(impl, reduction)
        assert same_bits(first_loss, second_loss)
        assert same_bits(first_gradient, second_gradient)

    drawn = st.sampled_from(DTYPES).flatmap(lambda dtype: problems(device, dtype))
    run_property(impl, check, problem=drawn, reduction=st.sampled_from(["none", "mean", "sum"]))


@pytest.fixture
def threads():
    """A function that sets PyTorch's number of threads; sums are split over them even on a machine with fewer cores."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def cpu(device):
    if device != "cpu":
        pytest.skip("impl='blocked' runs on a CPU")
    return device


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_bits_of_blocked_do_not_depend_on_the_batch_if_a_sum_is_split_over_threads(cpu, threads, dtype, options):
    """PyTorch splits the sum of one row of more than 32,768 classes over threads, but not the sums of several rows."""
    threads(4)
    samples = torch.rand(20, 40009, generator=torch.Generator().manual_seed(0))
    assert any(sample.sum() != total for sample, total in zip(samples, samples.sum(1), strict=True)), "PyTorch does so"

    problem = wide_problem(cpu, dtype, 5, 40009, options)
    loss, gradient = problem.outcome("blocked")
    for row in (0, 2, 4):
        lone_loss, lone_gradient = problem.rows(slice(row, row + 1)).outcome("blocked")
        assert same_bits(lone_loss, loss[[row]]), row
        assert same_bits(lone_gradient, gradient[[row]]), row


def row_outcomes(problem, impl):
    """Losses, first derivatives, and second derivatives with respect to logits and upstream gradient."""
    logits = problem.logits.detach().requires_grad_()
    loss = logit_adjusted_cross_entropy(
        logits, problem.target, problem.log_prior, reduction="none", impl=impl, **problem.options
    )
    upstream = torch.ones_like(loss).requires_grad_()
    (gradient,) = torch.autograd.grad(loss, logits, upstream, create_graph=True)
    direction = torch.linspace(-1.0, 1.0, problem.logits.shape[1], dtype=gradient.dtype)
    second = torch.autograd.grad((gradient.movedim(1, -1) * direction).sum(), [logits, upstream])
    return [loss.detach(), gradient.detach(), *second]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n_classes", [17, 32767, 32768, 40009])
@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_row_bits_of_derivatives_do_not_depend_on_the_batch_if_sums_are_split(cpu, threads, impl, n_classes, options):
    """Includes autograd's derivatives of the reference formula. A sum to one number is split from 32,768 terms on."""
    for n_threads in (2, 4):
        threads(n_threads)
        problem = wide_problem(cpu, torch.float32, 5, n_classes, options)
        batch = row_outcomes(problem, impl)
        for row in (0, 3):
            for lone, together in zip(row_outcomes(problem.rows(slice(row, row + 1)), impl), batch, strict=True):
                assert same_bits(lone, together[[row]]), (n_threads, row)


@pytest.mark.parametrize("options", ["plain", "smoothing and weights", "probabilities"])
@pytest.mark.parametrize("n_classes", [17, 40009])
def test_row_bits_do_not_depend_on_the_position_in_an_image(cpu, threads, n_classes, options):
    """Compare (2, C, 3), whose classes are not adjacent, with the (1, C, 1) of one position."""
    threads(4)
    flat = wide_problem(cpu, torch.float32, 6, n_classes, options)
    logits = flat.logits.reshape(2, 3, n_classes).movedim(2, 1).contiguous()
    target = flat.target.reshape(2, 3, *flat.target.shape[1:])
    target = target.movedim(2, 1).contiguous() if options == "probabilities" else target
    image = flat._replace(logits=logits, target=target)
    for impl in ("reference", "blocked"):
        loss, gradient = row_outcomes(image, impl)[:2]
        lone_target = target[1:, :, 2:] if options == "probabilities" else target[1:, 2:]
        lone_loss, lone_gradient = row_outcomes(image._replace(logits=logits[1:, :, 2:], target=lone_target), impl)[:2]
        assert same_bits(lone_loss, loss[1:, 2:]), impl
        assert same_bits(lone_gradient, gradient[1:, :, 2:]), impl


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n_rows", [1, 2])
def test_bits_of_blocked_do_not_depend_on_the_number_of_threads(cpu, threads, n_rows, options):
    for n_classes in (40009, 50021, 70001):
        problem = wide_problem(cpu, torch.float32, n_rows, n_classes, options)
        threads(1)
        loss, gradient = problem.outcome("blocked")
        threads(4)
        other_loss, other_gradient = problem.outcome("blocked")
        assert same_bits(other_loss, loss), n_classes
        assert same_bits(other_gradient, gradient), n_classes


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("ignored", [-100, 2])
def test_an_ignored_label_may_be_in_a_later_block(cpu, monkeypatch, reduction, ignored):
    monkeypatch.setattr(fused_la._tiled.blocks, "BLOCK_ELEMENTS", 20)  # four rows
    problem = wide_problem(cpu, torch.float64, 11, 5)
    problem = problem._replace(target=problem.target.index_fill(0, torch.tensor([6, 10]), ignored))
    problem.options["ignore_index"] = ignored
    x = problem.logits.detach().requires_grad_()
    expected = F.cross_entropy(x + problem.log_prior, problem.target, ignore_index=ignored, reduction=reduction)
    expected.sum().backward()
    loss, gradient = problem.outcome("blocked", reduction)
    assert_close(loss, expected.detach(), rounding(problem) * 11)
    assert_close(gradient, x.grad, rounding(problem))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_classes", [17, 1023, 40009])
def test_row_bits_of_blocked_do_not_depend_on_the_block_size(cpu, threads, monkeypatch, n_classes, dtype, options):
    """Seven rows in blocks of 4 + 3 rows, in blocks of 6 + 1, and in one block."""
    threads(4)
    problem = wide_problem(cpu, dtype, 7, n_classes, options)
    outcomes, n_blocks = [], []
    row_blocks = fused_la._cpu.loss.row_blocks
    for module, name in ((fused_la._cpu.loss, "_reduce_block"), (fused_la._cpu.single_label, "_sums")):
        original = getattr(module, name)

        def counted(*arguments, original=original):
            n_blocks[-1] += 1
            return original(*arguments)

        monkeypatch.setattr(module, name, counted)
    for height in (4, 6, 7):
        for module in (fused_la._cpu.loss, fused_la._cpu.single_label):
            monkeypatch.setattr(
                module, "row_blocks", lambda n_outer, n_inner, _, height=height: row_blocks(n_outer, n_inner, height)
            )
            choose = fused_la._tiled.blocks.choose_blocking
            monkeypatch.setattr(
                module,
                "choose_blocking",
                lambda *call, height=height, choose=choose, **how: choose(*call, **how)._replace(height=height),
            )
        n_blocks.append(0)
        outcomes.append(problem.outcome("blocked"))
    passes = n_blocks[-1]  # two if the backward pass processes the blocks again, otherwise one
    assert n_blocks == [2 * passes, 2 * passes, passes]
    for loss, gradient in outcomes[1:]:
        assert same_bits(loss, outcomes[0][0])
        assert same_bits(gradient, outcomes[0][1])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_classes", "block_elements"), [(100, 33), (1023, 512), (40009, 34000)])
def test_row_bits_of_blocked_do_not_depend_on_the_batch_if_a_row_takes_several_chunks(
    cpu, threads, monkeypatch, n_classes, block_elements, dtype, options
):
    threads(4)
    monkeypatch.setattr(fused_la._tiled.blocks, "BLOCK_ELEMENTS", block_elements)
    problem = wide_problem(cpu, dtype, 5, n_classes, options)
    loss, gradient = problem.outcome("blocked")
    for row in (0, 3, 4):
        lone_loss, lone_gradient = problem.rows(slice(row, row + 1)).outcome("blocked")
        assert same_bits(lone_loss, loss[[row]]), row
        assert same_bits(lone_gradient, gradient[[row]]), row


# Equivalent forms -----------------------------------------------------------------------------------------------------


def row_weights(problem):
    """Each row's term in the denominator of a mean: the class weight of its label, or the mean over its labels."""
    if problem.target.is_floating_point():
        return torch.ones_like(problem.logits[:, 0])
    labels = problem.target.reshape(len(problem.target), -1)
    counts = labels != problem.options.get("ignore_index", -100)
    share = problem.options.get("target_weight", torch.ones_like(labels, dtype=problem.logits.dtype))
    share = share.reshape(labels.shape) * counts
    weight = problem.options.get("weight", torch.ones_like(problem.log_prior))[torch.where(counts, labels, 0)]
    return ((share * weight).sum(1) / share.sum(1)).nan_to_num(0.0)


def test_reductions_are_the_sum_and_the_weighted_mean_of_the_rows(impl, device):
    def check(problem):
        loss, gradient = problem.outcome(impl, "none")
        total, total_gradient = problem.outcome(impl, "sum")
        mean, mean_gradient = problem.outcome(impl, "mean")
        denominator = row_weights(problem).sum()
        bound = rounding(problem)
        assert_close(total, loss.sum(), bound * len(loss))
        assert_close(total_gradient, gradient, bound)
        assert_close(mean, loss.sum() / denominator, bound * len(loss) / denominator)
        if denominator > 0:
            assert_close(mean_gradient, gradient / denominator, bound / denominator)

    run_property(impl, check, problem=problems(device))


def test_ignored_rows_have_no_effect_on_the_mean(impl, device):
    def check(problem):
        if problem.target.is_floating_point():
            return
        labels = problem.target.reshape(len(problem.target), -1)
        kept = (labels != problem.options.get("ignore_index", -100)).any(1)
        loss, gradient = problem.outcome(impl, "mean")
        kept_loss, kept_gradient = problem.rows(kept).outcome(impl, "mean")
        assert_close(loss, kept_loss, rounding(problem))
        assert_close(gradient[kept], kept_gradient, rounding(problem))
        assert (gradient[~kept] == 0).all()

    run_property(impl, check, problem=problems(device, kinds=("labels", "weighted labels")))


def single_label_sum(problem, impl):
    """The sum over k of target_weight[:, k] * loss(target[:, k])."""
    options = {name: value for name, value in problem.options.items() if name != "target_weight"}
    share = problem.options["target_weight"]
    losses, gradients = [], []
    for k in range(share.shape[1]):
        loss, gradient = problem._replace(target=problem.target[:, k], options=options).outcome(impl)
        losses.append(share[:, k] * loss)
        gradients.append(share[:, k, None] * gradient)
    return sum(losses), sum(gradients)


def dense(problem):
    """The problem with its index labels as class probabilities, (N, C), whose rows need not add up to 1."""
    options = {name: value for name, value in problem.options.items() if name != "target_weight"}
    labels = problem.target.reshape(len(problem.target), -1)
    share = problem.options.get("target_weight", torch.ones_like(labels, dtype=problem.logits.dtype))
    target = torch.zeros_like(problem.logits).scatter_add(1, labels, share.reshape(labels.shape))
    return problem._replace(target=target, options=options)


def test_weighted_labels_are_the_weighted_sum_of_single_labels(impl, device):
    def check(problem):
        loss, gradient = problem.outcome(impl)
        expected_loss, expected_gradient = single_label_sum(problem, impl)
        assert_close(loss, expected_loss, 2 * rounding(problem))
        assert_close(gradient, expected_gradient, 2 * rounding(problem))

    run_property(impl, check, problem=problems(device, kinds=("weighted labels",)))


def test_labels_agree_with_the_same_class_probabilities(impl, device):
    """One label is a one-hot row; several weighted labels are a row of zeros with their weights."""

    def check(problem):
        loss, gradient = problem.outcome(impl)
        dense_loss, dense_gradient = dense(problem).outcome(impl)
        assert_close(loss, dense_loss, rounding(problem))
        assert_close(gradient, dense_gradient, rounding(problem))

    # Without smoothing: it is scaled by the total weight of labels, but not by that of probabilities.
    drawn = problems(device, kinds=("labels", "weighted labels"), ignored=False, smoothed=False)
    run_property(impl, check, problem=drawn)


def test_a_label_agrees_with_a_one_hot_row_with_smoothing(impl, device):
    def check(problem):
        loss, gradient = problem.outcome(impl)
        dense_loss, dense_gradient = dense(problem).outcome(impl)
        assert_close(loss, dense_loss, rounding(problem))
        assert_close(gradient, dense_gradient, rounding(problem))

    run_property(impl, check, problem=problems(device, kinds=("labels",), ignored=False))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_without_adjustment_the_loss_is_the_cross_entropy_of_pytorch(impl, device, reduction):
    def check(problem):
        problem = problem._replace(tau=0.0)
        problem.options.pop("smoothing_distribution", None)
        loss, gradient = problem.outcome(impl, reduction)

        logits = problem.logits.clone().requires_grad_()
        expected = F.cross_entropy(logits, problem.target, reduction=reduction, **problem.options)
        expected.sum().backward()
        # A small denominator of the mean enlarges errors, and F.cross_entropy has cancellation of its own.
        denominator = row_weights(problem).sum() if reduction == "mean" else 1.0
        bound = 2 * len(logits) * rounding(problem) / denominator
        assert_close(loss, expected.detach(), bound)
        assert_close(gradient, logits.grad, bound)

    # With tau = 0 a prior of -inf makes no adjustment either: no class is excluded.
    run_property(impl, check, problem=problems(device, kinds=("labels", "probabilities")))
