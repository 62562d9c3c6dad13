"""`LogitAdjustedCrossEntropyLoss` as a module among others: copied, saved, cast and moved.

What must not happen to it: `model.half()` rounds a log prior of -12 to steps of 1/128, in bfloat16 of 1/16, and class
weights and probabilities to 3 digits.
"""

import copy
import io
import math
import pickle

import pytest
import torch
from oracle import truth

import fused_la._blocked
import fused_la._triton
import fused_la.reference
from fused_la import LogitAdjustedCrossEntropyLoss

COUNTS = [160_000, 9_000, 401, 37, 1]  # log priors from -0.06 to -12.04
LOG_PRIOR = torch.tensor([math.log(n / sum(COUNTS)) for n in COUNTS], dtype=torch.float64)
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.25, 1.5])
DISTRIBUTION = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])  # exact in half precision


@pytest.fixture
def inputs(device):
    return torch.randn(4, 5, device=device), torch.tensor([0, 4, -100, 2], device=device)


def criterion_of(device, **options) -> LogitAdjustedCrossEntropyLoss:
    return LogitAdjustedCrossEntropyLoss(COUNTS, 1.3, **options).to(device)


def through_a_state_dict(criterion):
    file = io.BytesIO()
    torch.save(criterion.state_dict(), file)
    file.seek(0)
    device = criterion.log_prior.device
    other = LogitAdjustedCrossEntropyLoss(
        [1] * 5, 1.3, weight=torch.zeros(5), label_smoothing=0.1, smoothing_distribution=torch.full((5,), 0.2)
    ).to(device)
    other.load_state_dict(torch.load(file, map_location=device, weights_only=True))
    return other


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda criterion: pickle.loads(pickle.dumps(criterion)),
    "state_dict": through_a_state_dict,
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_computes_the_same_bits_and_shares_nothing(device, inputs, name):
    criterion = criterion_of(
        device, weight=WEIGHT.clone(), label_smoothing=0.1, smoothing_distribution=DISTRIBUTION.clone()
    )
    want = criterion(*inputs)
    duplicate = COPIES[name](criterion)
    assert torch.equal(duplicate(*inputs), want)
    for buffer in criterion.buffers():
        buffer.zero_()
    assert torch.equal(duplicate(*inputs), want)


CASTS = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "to dtype": lambda module: module.to(torch.float16),
    "to device and dtype": lambda module: module.to("meta", torch.bfloat16),
    "half and back": lambda module: module.half().float(),
    "double, then half": lambda module: module.double().half(),
    "bfloat16 twice": lambda module: module.bfloat16().bfloat16(),
}


@pytest.mark.parametrize("name", CASTS)
@pytest.mark.parametrize("parents", [0, 2])
def test_no_cast_rounds_what_the_module_holds(name, parents):
    """Cast by itself, or with the model that it is a part of."""
    distribution = torch.tensor([0.4, 0.3, 0.2, 0.07, 0.03])
    criterion = LogitAdjustedCrossEntropyLoss(COUNTS, weight=WEIGHT / 3, smoothing_distribution=distribution)
    exact = {name: buffer.clone() for name, buffer in criterion.named_buffers()}
    assert len(exact) == 3
    module = criterion
    for _ in range(parents):
        module = torch.nn.Sequential(torch.nn.Linear(3, 3), module)
    CASTS[name](module)
    moved = name == "to device and dtype"
    for name, buffer in criterion.named_buffers():
        assert buffer.dtype in (torch.float32, torch.float64)
        assert buffer.device.type == ("meta" if moved else "cpu")
        if not moved:
            assert torch.equal(buffer, exact[name].to(buffer.dtype))
            assert torch.equal(criterion.state_dict()[name], buffer)


def test_class_weights_given_in_half_precision_stay_so():
    criterion = LogitAdjustedCrossEntropyLoss(COUNTS, weight=WEIGHT.half())
    assert criterion.bfloat16().weight.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_has_the_loss_of_an_exact_prior(device, inputs, impl, dtype):
    logits, target = inputs[0].to(dtype), inputs[1]
    criterion = criterion_of(device, impl=impl).to(dtype)
    loss = criterion(logits, target)
    assert loss.dtype == torch.float32
    want = truth(logits, target, LOG_PRIOR.to(device), 1.3).loss
    # float32 has steps of 2**-20 below 16: of the log prior, times tau, plus the logit, and of the loss.
    assert abs(loss.double().item() - want.item()) <= 4 * 2**-20


def test_buffers_move_with_the_model_and_nothing_is_trained():
    criterion = LogitAdjustedCrossEntropyLoss(COUNTS, weight=WEIGHT, label_smoothing=0.1)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), criterion).to("meta")
    assert {name: b.device.type for name, b in model.named_buffers()} == {"1.log_prior": "meta", "1.weight": "meta"}
    assert list(criterion.parameters()) == []
    assert set(criterion.state_dict()) == {"log_prior", "weight"}


def test_options_may_come_from_another_device_than_the_counts_until_all_move():
    """Counts in a list, class weights where the model is."""
    options = dict(weight=WEIGHT.to("meta"), label_smoothing=0.1, smoothing_distribution=DISTRIBUTION.to("meta"))
    criterion = LogitAdjustedCrossEntropyLoss(COUNTS, impl="reference", **options)
    logits, target = torch.zeros(4, 5, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"log_prior must be on .* meta, got cpu; .* with \.to\(logits\.device\)$"):
        criterion(logits, target)
    assert criterion.to("meta")(logits, target).shape == ()


def test_impl_of_the_module_is_the_one_that_runs(device, inputs, impl, monkeypatch):
    places = {
        "reference": (fused_la.reference, "loss_rows"),
        "blocked": (fused_la._blocked, "forward"),
        "triton": (fused_la._triton, "forward"),
    }
    ran = []
    for name, (module, function) in places.items():
        real = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *a, name=name, real=real: ran.append(name) or real(*a))
    criterion_of(device, impl=impl)(*inputs)
    assert ran == [impl]
