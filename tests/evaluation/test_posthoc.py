"""Post hoc corrections against their formulas in float64, and estimates of a prior against iterations of naive EM.

Regimes: every shape and dtype of logits; classes that were never seen or do not occur; a posterior that is known
exactly; rows of zeros.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_la
from fused_la._call import checks
from fused_la.posthoc import adjust_logits, divide_by_prior, estimate_prior, normalize_classifier

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(5,), (4, 5), (2, 5, 3), (2, 5, 3, 2), (0, 5)]
INF, NAN = math.inf, math.nan
LOG_PRIOR = torch.tensor([0.6, 0.3, 0.06, 0.03, 0.01]).log()

no_deadline = settings(deadline=None)  # the first example pays for PyTorch's start


def along_classes(vector, logits):
    return vector.reshape([-1 if d == checks.class_dim(logits) else 1 for d in range(logits.dim())])


def ulps(result, exact):
    """The largest error in units of the last place (at magnitude 8 or more) of the result's dtype."""
    eps = torch.finfo(result.dtype).eps
    return ((result.double() - exact).abs() / (eps * exact.abs().clamp(min=8.0))).max().item() if len(exact) else 0.0


# adjust_logits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adjusted_logits_are_the_formula_in_float32_or_better(shape, dtype):
    logits = (4 * torch.randn(shape)).to(dtype)
    exact = logits.double() - 1.3 * along_classes(LOG_PRIOR, logits).double()
    adjusted = adjust_logits(logits, LOG_PRIOR, 1.3)
    assert adjusted.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert adjusted.shape == logits.shape
    # The offset of float64 logits is computed in float64 as well.
    assert ulps(adjusted, exact) <= 1.0


def test_half_precision_logits_are_not_adjusted_in_half_precision():
    """Between 8 and 16 a step of bfloat16 is 0.0625; the offsets here differ by 0.02."""
    logits = torch.tensor([10.0, 10.0]).bfloat16()
    log_prior = torch.tensor([0.505, 0.495]).log()
    assert adjust_logits(logits, log_prior).argmax() == 1
    assert (logits - log_prior.bfloat16()).argmax() == 0


@no_deadline
@given(st.floats(0, 4), st.floats(-50, 50))
def test_a_constant_in_a_log_prior_changes_no_probability(tau, constant):
    logits = torch.linspace(-3, 3, 15, dtype=torch.float64).view(3, 5)
    adjusted = adjust_logits(logits, LOG_PRIOR.double(), tau).softmax(1)
    torch.testing.assert_close(adjust_logits(logits, LOG_PRIOR.double() + constant, tau).softmax(1), adjusted)


def test_tau_0_changes_nothing_and_shares_no_memory():
    logits = torch.randn(3, 5)
    log_prior = torch.tensor([0.0, -INF, -1.0, -2.0, -3.0])
    for function in (adjust_logits, divide_by_prior):
        adjusted = function(logits, log_prior, 0.0)
        assert torch.equal(adjusted, logits)
        assert adjusted.data_ptr() != logits.data_ptr()


@pytest.mark.parametrize("function", [adjust_logits, divide_by_prior])
@pytest.mark.parametrize("stray", [0.0, 1e30, -1e30, INF, -INF, NAN])
def test_a_class_that_was_never_seen_is_never_predicted(function, stray):
    logits = torch.tensor([[-5.0, -7.0, stray], [1.0, 3.0, stray]], requires_grad=True)
    log_prior = torch.tensor([-0.5, -1.0, -INF], requires_grad=True)
    adjusted = function(logits, log_prior, 0.5)
    assert torch.equal(adjusted[:, 2], torch.tensor([-INF, -INF]))
    assert torch.equal(adjusted[:, :2], function(logits[:, :2], log_prior[:2], 0.5))
    (grad_logits, grad_log_prior) = torch.autograd.grad(adjusted[:, :2].sum(), (logits, log_prior))
    assert grad_logits.isfinite().all()
    assert (grad_logits[:, 2] == 0).all()
    assert grad_log_prior[:2].isfinite().all()


def random_posteriors(n_classes=4, n_inputs=30):
    """Class-conditional distributions over a finite set of inputs, and the posteriors under any prior."""
    generator = torch.Generator().manual_seed(3)
    likelihood = torch.randn(n_inputs, n_classes, generator=generator, dtype=torch.float64).mul(2).softmax(0)

    def posterior(prior):
        joint = likelihood * prior
        return joint / joint.sum(1, keepdim=True)

    train = torch.tensor([0.7, 0.2, 0.09, 0.01], dtype=torch.float64)
    test = torch.tensor([0.1, 0.1, 0.3, 0.5], dtype=torch.float64)
    return likelihood, posterior, train, test


def test_a_target_prior_gives_the_posterior_under_that_prior():
    _, posterior, train, test = random_posteriors()
    logits = posterior(train).log() + torch.randn(30, 1, dtype=torch.float64)
    adjusted = adjust_logits(logits, train.log() + 2.0, target_log_prior=test.log() - 3.0)
    torch.testing.assert_close(adjusted.softmax(1), posterior(test))
    torch.testing.assert_close(adjust_logits(logits, train.log()).softmax(1), posterior(torch.ones_like(test)))


def test_tau_is_the_scale_of_the_logits_for_both_priors():
    """A model whose logits are tau times too large needs both offsets tau times as large, and no other combination."""
    _, posterior, train, test = random_posteriors()
    logits = 2.5 * posterior(train).log()
    adjusted = adjust_logits(logits, train.log(), 2.5, target_log_prior=test.log())
    assert torch.equal(adjusted.argmax(1), posterior(test).argmax(1))
    assert not torch.equal((logits - 2.5 * train.log() + test.log()).argmax(1), posterior(test).argmax(1))


@no_deadline
@given(st.floats(0, 4))
def test_a_target_prior_that_is_the_training_prior_changes_nothing(tau):
    logits = torch.randn(4, 5)
    assert torch.equal(adjust_logits(logits, LOG_PRIOR, tau, target_log_prior=LOG_PRIOR), logits)


def test_a_class_that_does_not_occur_at_test_time_is_never_predicted():
    target_log_prior = torch.tensor([-INF, -INF, 0.0, 0.0, 0.0])
    log_prior = torch.tensor([0.0, -INF, -1.0, -INF, -2.0])
    adjusted = adjust_logits(torch.full((1, 5), 7.0), log_prior, target_log_prior=target_log_prior)
    assert adjusted.tolist() == [[-INF, -INF, 8.0, -INF, 9.0]]


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 5, 3)], ids=str)
def test_corrections_are_differentiable_in_all_tensors(shape):
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    log_prior = LOG_PRIOR.double().requires_grad_()
    target = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda f, p, q: adjust_logits(f, p, 1.3, target_log_prior=q), (logits, log_prior, target)
    )
    assert torch.autograd.gradcheck(lambda f, p: divide_by_prior(f, p, 0.7), (logits, log_prior))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "logits must be a torch.Tensor, got list"),
        (
            {"logits": torch.zeros(2, 3).long()},
            TypeError,
            "logits must be float16, bfloat16, float32 or float64, got torch.int64",
        ),
        ({"log_prior": torch.zeros(4)}, ValueError, "log_prior must have shape (3,), got (4,)"),
        (
            {"log_prior": torch.tensor([3, 2, 1])},
            TypeError,
            "log_prior must be float16, bfloat16, float32 or float64, got torch.int64; "
            "log_prior_from_counts makes a log prior from class counts",
        ),
        (
            {"log_prior": torch.full((3,), -INF)},
            ValueError,
            "log_prior must be finite for some class, got -inf for every class",
        ),
        (
            {"log_prior": torch.tensor([0.0, NAN, 0.0])},
            ValueError,
            "log_prior must be finite or -inf, got nan for some class",
        ),
        ({"tau": -1.0}, ValueError, "tau must be finite and not negative, got -1.0"),
        ({"tau": "1"}, TypeError, "tau must be a number, got str"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    given = {"logits": torch.zeros(2, 3), "log_prior": torch.zeros(3), **arguments}
    for function in (adjust_logits, divide_by_prior):
        with pytest.raises(error) as caught:
            function(**given)
        assert str(caught.value) == message


def test_a_wrong_target_prior_is_named():
    with pytest.raises(ValueError, match=r"^target_log_prior must have shape \(3,\), got \(2,\)$"):
        adjust_logits(torch.zeros(2, 3), torch.zeros(3), target_log_prior=torch.zeros(2))
    with pytest.raises(ValueError, match=r"^target_log_prior must be finite or -inf, got inf for some class$"):
        adjust_logits(torch.zeros(3), torch.zeros(3), target_log_prior=torch.tensor([0.0, INF, 0.0]))


# divide_by_prior ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_divided_scores_are_the_formula_in_float32_or_better(shape, dtype):
    logits = (4 * torch.randn(shape)).to(dtype)
    exact = logits.double() / along_classes(LOG_PRIOR, logits).double().exp() ** 0.7
    divided = divide_by_prior(logits, LOG_PRIOR, 0.7)
    assert divided.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The power has the relative error of its exponent, |0.7 * -4.6| times an ulp of float32, before its own roundings.
    torch.testing.assert_close(divided.double(), exact, rtol=6 * torch.finfo(divided.dtype).eps, atol=0)


def test_dividing_probabilities_is_adjusting_their_logarithm():
    probabilities = torch.randn(20, 5).softmax(1)
    divided = divide_by_prior(probabilities, LOG_PRIOR, 0.8)
    torch.testing.assert_close(divided.log(), adjust_logits(probabilities.log(), LOG_PRIOR, 0.8))


# normalize_classifier -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_rows_are_divided_by_a_power_of_their_norm(dtype, tau):
    weight = torch.randn(7, 33).to(dtype)
    exact = weight.double() / weight.double().norm(dim=1, keepdim=True) ** tau
    normalized = normalize_classifier(weight, tau)
    assert normalized.dtype == dtype
    compute_eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    # Half an ulp of the result, and the relative error of the norm (a sum of 33 squares) and its power.
    torch.testing.assert_close(normalized.double(), exact, rtol=torch.finfo(dtype).eps + 8 * compute_eps, atol=0)


def test_rows_of_zeros_stay_zeros_and_keep_gradients_finite():
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    for tau in (0.0, 0.5, 1.0, 3.0):
        normalized = normalize_classifier(weight, tau)
        assert normalized[1].tolist() == [0.0, 0.0]
        assert torch.autograd.grad(normalized.sum(), weight)[0].isfinite().all()


def test_normalization_is_differentiable():
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: normalize_classifier(w, 0.7), weight)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (None, TypeError, "weight must be a torch.Tensor, got NoneType"),
        (torch.zeros(2, 3).int(), TypeError, "weight must be float16, bfloat16, float32 or float64, got torch.int32"),
        (torch.zeros(3), ValueError, "weight must have shape (C, n_features) with C >= 1, got (3,)"),
        (torch.zeros(0, 3), ValueError, "weight must have shape (C, n_features) with C >= 1, got (0, 3)"),
    ],
)
def test_wrong_weights_are_named(weight, error, message):
    with pytest.raises(error) as caught:
        normalize_classifier(weight)
    assert str(caught.value) == message


# estimate_prior -------------------------------------------------------------------------------------------------------


def naive_em(logits, log_prior, n_iterations):
    """Saerens et al. (2002), equations 2.8 to 2.10, on probabilities."""
    train = log_prior.double().softmax(0)
    posterior = logits.double().softmax(1)
    prior = train
    for _ in range(n_iterations):
        updated = prior / train * posterior
        updated = updated / updated.sum(1, keepdim=True)
        prior = updated.mean(0)
    return prior


def sample(n_rows, prior, train):
    """Labels drawn from `prior`, and calibrated logits of a model that was trained under the prior `train`."""
    means = 1.5 * torch.randn(len(prior), 6, dtype=torch.float64)
    target = torch.multinomial(prior, n_rows, replacement=True)
    features = means[target] + torch.randn(n_rows, 6, dtype=torch.float64)
    return features @ means.T - 0.5 * (means**2).sum(1) + train.log(), target


TRAIN = torch.tensor([0.8, 0.1, 0.07, 0.03], dtype=torch.float64)
TEST = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


def test_the_prior_of_unlabelled_examples_is_found():
    logits, target = sample(4000, TEST, TRAIN)
    estimate = estimate_prior(logits, TRAIN.log())
    assert estimate.dtype == torch.float64
    shares = torch.bincount(target) / 4000
    assert (estimate.exp() - shares).abs().max() < 0.02  # 2.5 standard errors of a share; TRAIN is off by 0.7
    torch.testing.assert_close(estimate.exp(), naive_em(logits, TRAIN.log(), 5000), atol=1e-4, rtol=0)


def test_no_prior_is_more_likely_by_more_than_the_tolerance():
    logits, _ = sample(300, TEST, TRAIN)
    ratio = (logits - TRAIN.log()).exp()

    def mean_log_likelihood(prior):
        return (ratio @ prior).log().mean().item()

    maximum = mean_log_likelihood(naive_em(logits, TRAIN.log(), 20_000))
    gaps = [
        maximum - mean_log_likelihood(estimate_prior(logits, TRAIN.log(), tolerance=10.0**-k).exp()) for k in (1, 3, 6)
    ]
    assert all(gap <= 10.0**-k for gap, k in zip(gaps, (1, 3, 6), strict=True))
    assert gaps[0] > gaps[1] > gaps[2]  # so the tolerance ends the iteration


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_float32_estimates_are_computed_in_float64(dtype):
    logits = sample(200, TEST, TRAIN)[0].to(dtype)
    estimate = estimate_prior(logits, TRAIN.float().log())
    assert estimate.dtype == torch.float32
    expected = estimate_prior(logits.double(), TRAIN.float().log().double())
    assert torch.equal(estimate, expected.float())


def test_constants_of_rows_and_priors_change_no_estimate():
    logits, _ = sample(200, TEST, TRAIN)
    estimate = estimate_prior(logits, TRAIN.log())
    moved = estimate_prior(logits + 300 * torch.randn(200, 1, dtype=torch.float64), TRAIN.log() + 7.0)
    torch.testing.assert_close(moved, estimate)
    assert estimate.exp().sum().item() == pytest.approx(1.0, abs=1e-12)


def test_pixels_are_rows_of_an_estimate():
    logits, _ = sample(60, TEST, TRAIN)
    images = logits.view(5, 12, 4).transpose(1, 2).reshape(5, 4, 3, 4)
    torch.testing.assert_close(estimate_prior(images, TRAIN.log()), estimate_prior(logits, TRAIN.log()))
    assert estimate_prior(logits[0], TRAIN.log()).shape == (4,)


def test_a_class_never_seen_is_estimated_as_never_and_changes_no_other():
    logits, _ = sample(100, TEST, TRAIN)
    estimate = estimate_prior(logits, TRAIN.log())
    stray = torch.cat([logits, torch.full((100, 1), 50.0, dtype=torch.float64)], 1)
    with_stray = estimate_prior(stray, torch.cat([TRAIN.log(), torch.tensor([-INF])]))
    assert with_stray[4] == -INF
    torch.testing.assert_close(with_stray[:4], estimate)


def test_an_estimate_that_has_not_converged_warns():
    logits, _ = sample(300, TEST, TRAIN)
    with pytest.warns(
        RuntimeWarning, match=r"not converged in max_iterations = 2: the mean log likelihood may be .* below"
    ):
        estimate = estimate_prior(logits, TRAIN.log(), max_iterations=2)
    torch.testing.assert_close(estimate.exp(), naive_em(logits, TRAIN.log(), 2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": torch.zeros(0, 2)}, ValueError, "logits must have at least one row, got shape (0, 2)"),
        (
            {"logits": torch.tensor([[0.0, 0.0], [NAN, 0.0]])},
            ValueError,
            "logits must be finite or -inf, and finite for some class with a prior in every row, "
            "got a largest of nan in row 1",
        ),
        (
            {"logits": torch.tensor([[INF, 0.0]])},
            ValueError,
            "logits must be finite or -inf, and finite for some class with a prior in every row, "
            "got a largest of inf in row 0",
        ),
        (
            {"logits": torch.tensor([[0.0, -INF]]), "log_prior": torch.tensor([-INF, 0.0])},
            ValueError,
            "logits must be finite or -inf, and finite for some class with a prior in every row, "
            "got a largest of -inf in row 0",
        ),
        ({"log_prior": torch.zeros(3)}, ValueError, "log_prior must have shape (2,), got (3,)"),
        ({"tolerance": 0.0}, ValueError, "tolerance must be positive and finite, got 0.0"),
        ({"max_iterations": 0}, ValueError, "max_iterations must be at least 1, got 0"),
        ({"max_iterations": 1.5}, TypeError, "max_iterations must be an int, got float"),
    ],
)
def test_wrong_arguments_of_an_estimate_are_named(arguments, error, message):
    with pytest.raises(error) as caught:
        estimate_prior(**{"logits": torch.zeros(3, 2), "log_prior": torch.zeros(2), **arguments})
    assert str(caught.value) == message


def test_public_names_are_those_of_the_modules():
    assert fused_la.adjust_logits is adjust_logits
    assert fused_la.normalize_classifier is normalize_classifier
