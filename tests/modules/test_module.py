"""Loss modules inside models: moved, cast, copied, saved, loaded, compiled, and called as training loops call them.

Their per-class vectors must survive all of that. `model.half()` must not round a log prior of -12 to steps of 1/128
(1/16 in bfloat16). A loader that fills buffers with fresh memory, or a checkpoint with another prior, must not replace
it. Fresh memory may hold the old values by chance, so tests compare the vectors, not only one loss.
"""

import copy
import functools
import io
import logging
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from oracle import truth
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PretrainedConfig, PreTrainedModel

import fused_la._cpu
import fused_la._triton
import fused_la.reference
from fused_la import (
    LogitAdjustedCrossEntropyLoss,
    LogitAdjustedLinear,
    MarginCrossEntropyLoss,
    PairwiseMargin,
    log_prior_from_counts,
    margins,
)

COUNTS = [160_000, 9_000, 401, 37, 1]  # log priors from -0.06 to -12.04
NEW_COUNTS = [10, 20, 30, 40, 50]
WEIGHT = [0.5, 1.0, 2.0, 0.25, 1.5]
DISTRIBUTION = [0.5, 0.25, 0.125, 0.0625, 0.0625]  # exact in half precision
OPTIONS = dict(label_smoothing=0.1, smoothing_distribution=DISTRIBUTION)
MARGIN = margins.logit_adjusted_adaptive(log_prior_from_counts(COUNTS))
SCALED = margins.vector_scaling(log_prior_from_counts(COUNTS), gamma=0.1, tau=1.0)

MODULES = {
    "loss": lambda: LogitAdjustedCrossEntropyLoss(COUNTS, 1.3, weight=WEIGHT, **OPTIONS),
    "margin": lambda: MarginCrossEntropyLoss(SCALED, weight=WEIGHT),
    "head": lambda: LogitAdjustedLinear(5, COUNTS, 1.3, class_weight=WEIGHT, **OPTIONS),
}


def log_prior_of(counts):
    return torch.tensor([math.log(n / sum(counts)) for n in counts], dtype=torch.float64)


def per_class(module: nn.Module) -> dict[str, torch.Tensor]:
    """The per-class vectors of a module of MODULES, by name."""
    names = ["class_counts", "log_prior", "weight", "class_weight", "smoothing_distribution"]
    held = {name: getattr(module, name, None) for name in names}
    if isinstance(module, LogitAdjustedLinear):
        del held["weight"]
    if isinstance(module, MarginCrossEntropyLoss):
        held |= dict(module.margin.named_vectors())
    return {name: value for name, value in held.items() if value is not None}


def assert_intact(module: nn.Module) -> None:
    """The per-class vectors hold exactly the numbers that the module was made from."""
    held = per_class(module)
    assert len(held) >= 3
    right = {
        "class_counts": torch.tensor(COUNTS), "log_prior": log_prior_of(COUNTS).float(), "weight": torch.tensor(WEIGHT),
        "class_weight": torch.tensor(WEIGHT), "smoothing_distribution": torch.tensor(DISTRIBUTION),
        **dict(SCALED.named_vectors()),
    }  # fmt: skip
    for name, value in held.items():
        assert torch.equal(value.cpu(), right[name]), name


def loss_of(module: nn.Module, dtype=torch.float32, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(4, 5, generator=generator).to(DEVICE, dtype)
    return module(inputs, torch.tensor([0, 4, -100, 2], device=DEVICE), **options)


@pytest.fixture(params=MODULES)
def module(request) -> nn.Module:
    return MODULES[request.param]().to(DEVICE)


# Copied, saved and loaded ---------------------------------------------------------------------------------------------


def through_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, map_location=DEVICE, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save])
def test_a_copy_computes_the_same_bits_and_shares_nothing(module, copied):
    want = loss_of(module).detach()
    duplicate = copied(module)
    assert torch.equal(loss_of(duplicate), want)
    if hasattr(module, "class_counts"):
        module.class_counts = NEW_COUNTS
    else:
        module.margin = PairwiseMargin()
    assert torch.equal(loss_of(duplicate), want)
    assert not torch.equal(loss_of(module), want)
    assert_intact(duplicate)


def test_per_class_vectors_are_neither_saved_nor_trained(module):
    names = {"weight", "bias"} if isinstance(module, LogitAdjustedLinear) else set()
    assert set(module.state_dict()) == {name for name, _ in module.named_parameters()} == names
    assert list(module.buffers()) == []


@pytest.mark.parametrize("theirs", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(weight=torch.tensor(WEIGHT))])
def test_checkpoints_of_models_with_cross_entropy_load_strictly(theirs):
    ours = nn.ModuleDict({"trunk": nn.Linear(5, 5), "criterion": MODULES["loss"]()})
    ours.load_state_dict(nn.ModuleDict({"trunk": nn.Linear(5, 5), "criterion": theirs}).state_dict())
    assert_intact(ours["criterion"])


def test_checkpoints_load_strictly_into_models_with_cross_entropy_and_with_more_or_fewer_options():
    saved = nn.ModuleDict({"criterion": MODULES["loss"]()}).state_dict()
    more = LogitAdjustedCrossEntropyLoss([1] * 6, weight=[1.0] * 6)
    for other in (nn.CrossEntropyLoss(), LogitAdjustedCrossEntropyLoss(COUNTS), more):
        nn.ModuleDict({"criterion": other}).load_state_dict(saved)


def old_state(prefix: str, counts, **more) -> dict[str, torch.Tensor]:
    """A state dict as modules saved it when they had buffers."""
    return {f"{prefix}log_prior": log_prior_of(counts).float(), **{prefix + name: v for name, v in more.items()}}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("prefix", ["", "criterion."])
def test_an_old_checkpoint_loads_and_warns_of_entries_that_are_not_used(caplog, strict, prefix):
    criterion = MODULES["loss"]()
    model = nn.ModuleDict({"criterion": criterion}) if prefix else criterion
    same = old_state(prefix, COUNTS, weight=torch.tensor(WEIGHT), smoothing_distribution=torch.tensor(DISTRIBUTION))
    with caplog.at_level(logging.WARNING, "fused_la"):
        assert model.load_state_dict(same, strict=strict) == ([], [])
        assert caplog.messages == []
        model.load_state_dict(old_state(prefix, NEW_COUNTS, weight=torch.ones(5)), strict=strict)
    assert [message.split()[0] for message in caplog.messages] == [f"{prefix}log_prior", f"{prefix}weight"]
    assert "is not used" in caplog.text
    caplog.clear()
    model.load_state_dict(old_state(prefix, [3, 2, 1]), strict=strict)  # another number of classes
    assert len(caplog.messages) == 1
    assert_intact(criterion)


def test_an_old_checkpoint_of_a_head_loads(caplog):
    head, other = MODULES["head"](), MODULES["head"]()
    other.load_state_dict(head.state_dict() | old_state("", COUNTS, class_weight=torch.tensor(WEIGHT)))
    assert torch.equal(other.weight, head.weight)
    assert_intact(other)
    assert caplog.messages == []
    with pytest.raises(RuntimeError, match=r"Unexpected key.*nonsense"):
        head.load_state_dict(head.state_dict() | {"nonsense": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        head.load_state_dict({"bias": head.bias})


# Meta device and other loaders ----------------------------------------------------------------------------------------


class _Config(PretrainedConfig):
    model_type = "fused_la_test"

    def __init__(self, counts=tuple(COUNTS), **kwargs):
        super().__init__(**kwargs)
        self.counts = list(counts)


class _Model(PreTrainedModel):
    config_class = _Config

    def __init__(self, config):
        super().__init__(config)
        self.trunk = nn.Linear(5, 5)
        self.criterion = LogitAdjustedCrossEntropyLoss(config.counts, 1.3, weight=WEIGHT, **OPTIONS)
        self.head = LogitAdjustedLinear(5, config.counts, 1.3, class_weight=WEIGHT, **OPTIONS)
        self.by_margin = MarginCrossEntropyLoss(SCALED, weight=WEIGHT)
        self.post_init()

    def forward(self, x, target):
        features = self.trunk(x)
        return self.criterion(features, target) + self.head(features, target) + self.by_margin(features, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_transformers_loads_has_its_prior(tmp_path, dtype):
    """transformers builds on the meta device, and gives fresh memory to buffers that the checkpoint lacks."""
    model = _Model(_Config())
    model.save_pretrained(tmp_path)
    loaded = _Model.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.trunk.weight.dtype == dtype
    for held in (loaded.criterion, loaded.head, loaded.by_margin):
        assert_intact(held)
    if dtype == torch.float32:
        assert torch.equal(loss_of(loaded.to(DEVICE)), loss_of(model.to(DEVICE)))
    # Counts of the data that the model is tuned on.
    tuned = _Model.from_pretrained(tmp_path, counts=NEW_COUNTS)
    assert tuned.criterion.class_counts.tolist() == tuned.head.class_counts.tolist() == NEW_COUNTS


class _Base(PreTrainedModel):
    config_class = _Config

    def __init__(self, config):
        super().__init__(config)
        self.trunk = nn.Linear(5, 5)
        self.post_init()


class _WithHead(_Base):
    def __init__(self, config):
        super().__init__(config)
        self.head = LogitAdjustedLinear(5, config.counts)
        self.post_init()


@pytest.mark.parametrize("saved", [_Base, _WithHead])
def test_a_head_that_no_checkpoint_has_is_initialised_as_linear_layers_are(tmp_path, saved):
    """The checkpoint has no head or one of other classes. transformers initialises by the type of a layer."""
    saved(_Config()).save_pretrained(tmp_path)
    model = _WithHead.from_pretrained(tmp_path, counts=[3, 2, 1, 1, 1, 1, 1], ignore_mismatched_sizes=True)
    assert model.head.weight.shape == (7, 5)
    assert 0.005 < model.head.weight.std() < 0.05  # 0.02
    assert (model.head.bias == 0).all()


def test_a_whole_module_that_was_pickled_with_buffers_works():
    """It keeps the prior that it was saved with; the counts are known only up to a factor."""
    for name in ("loss", "head"):
        module = MODULES[name]().to(DEVICE)
        old = copy.deepcopy(module)
        for key in ("_pseudocount", "_exclude_absent", "_class_counts", "_per_class"):
            old.__dict__.pop(key)
        for key, value in module._per_class.items():
            old._buffers[key] = value
        loaded = pickle.loads(pickle.dumps(old))
        assert torch.equal(loss_of(loaded), loss_of(module))
        assert list(loaded.buffers()) == []
        torch.testing.assert_close(loaded.class_counts * sum(COUNTS), torch.tensor(COUNTS).double(), rtol=1e-5, atol=0)


def test_a_module_that_was_loaded_to_the_meta_device_makes_its_prior_again():
    file = io.BytesIO()
    torch.save(LogitAdjustedCrossEntropyLoss(COUNTS), file)
    file.seek(0)
    loaded = torch.load(file, map_location="meta", weights_only=False).to_empty(device=DEVICE)
    assert loss_of(loaded).isfinite()
    assert torch.equal(loaded.log_prior.cpu(), log_prior_of(COUNTS).float())


@pytest.mark.parametrize("build", ["default device", "to meta"])
def test_a_module_built_on_the_meta_device_recovers(build):
    for make in MODULES.values():
        if build == "default device":
            with torch.device("meta"):
                module = make()
        else:
            module = make().to("meta")
        module.to_empty(device=DEVICE)
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        assert_intact(module)
        assert loss_of(module).isfinite()


def test_a_head_is_initialised_again_as_linear_is():
    head = LogitAdjustedLinear(16, [3, 2, 1], device="meta").to_empty(device=DEVICE)
    torch.manual_seed(5)
    head.reset_parameters()
    torch.manual_seed(5)
    linear = nn.Linear(16, 3).to(DEVICE)
    assert torch.equal(head.weight, linear.weight)
    assert torch.equal(head.bias, linear.bias)
    LogitAdjustedLinear(16, [3, 2, 1], bias=False).reset_parameters()


def test_tensors_without_values_are_named_where_they_are_needed():
    with torch.device("meta"):
        criterion = LogitAdjustedCrossEntropyLoss(COUNTS, weight=torch.ones(5))
    criterion.to_empty(device=DEVICE)
    with pytest.raises(ValueError, match="weight must have values, got a tensor on the meta device; a list or an arr"):
        loss_of(criterion)
    on_meta = criterion(torch.zeros(4, 5, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta"))
    assert on_meta.is_meta
    with pytest.raises(TypeError, match="class_counts must have values, got a tensor on the meta device"):
        LogitAdjustedCrossEntropyLoss(torch.ones(5, device="meta"))


# Moved and cast -------------------------------------------------------------------------------------------------------

CASTS = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "to dtype": lambda module: module.to(torch.float16),
    "to device and dtype": lambda module: module.to(DEVICE, torch.bfloat16),
    "half and back": lambda module: module.half().float(),
    "by way of meta": lambda module: module.to("meta").to_empty(device=DEVICE),
    "shared": lambda module: module.share_memory(),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("parents", [0, 2])
def test_no_cast_rounds_what_a_module_holds(module, cast, parents):
    """The module is cast by itself or with the model that holds it."""
    if cast == "shared" and DEVICE != "cpu":
        pytest.skip("only CPU memory can be shared")
    whole = module
    for _ in range(parents):
        whole = nn.Sequential(nn.Linear(3, 3), whole)
    CASTS[cast](whole)
    assert_intact(module)


def test_options_given_in_half_precision_stay_so():
    criterion = LogitAdjustedCrossEntropyLoss(COUNTS, weight=torch.tensor(WEIGHT).half())
    assert criterion.bfloat16().weight.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_has_the_loss_of_an_exact_prior(impl, dtype):
    criterion = LogitAdjustedCrossEntropyLoss(COUNTS, 1.3, impl=impl).to(DEVICE, dtype)
    logits, target = torch.randn(4, 5, device=DEVICE).to(dtype), torch.tensor([0, 4, -100, 2], device=DEVICE)
    loss = criterion(logits, target)
    assert loss.dtype == torch.float32
    want = truth(logits, target, log_prior_of(COUNTS).to(DEVICE), 1.3).loss
    # float32 has steps of 2**-20 below 16; four values are rounded: the log prior, times tau, plus the logit, the loss.
    assert abs(loss.double().item() - want.item()) <= 4 * 2**-20


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_per_class_vectors_follow_the_logits_to_their_device(make):
    """The meta device stands for a device that the module was not moved to."""
    module = make()
    if isinstance(module, LogitAdjustedLinear):
        module.weight, module.bias = (nn.Parameter(p.to("meta")) for p in (module.weight, module.bias))
    inputs, target = torch.zeros(4, 5, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    assert module(inputs, target).is_meta
    assert_intact(module)


@pytest.mark.parametrize(
    "make", [MODULES["loss"], lambda: MarginCrossEntropyLoss(PairwiseMargin(scale=torch.ones(5)), weight=WEIGHT)]
)
def test_per_class_vectors_move_with_the_module(make):
    """On a fake GPU. Compiled code then needs no copy between devices."""
    with FakeTensorMode():
        module = nn.Sequential(make()).to("cuda")[0]
        assert {value.device.type for name, value in per_class(module).items() if name != "class_counts"} == {"cuda"}
        module.weight = torch.ones(5)
        assert module.weight.device.type == "cuda"


def test_options_that_are_learned_stay_the_callers_own():
    weight = torch.tensor(WEIGHT, device=DEVICE).requires_grad_()
    scale = nn.Parameter(torch.ones(5, device=DEVICE))
    criterion = MarginCrossEntropyLoss(PairwiseMargin(scale=scale), weight=weight).to(DEVICE)
    loss_of(criterion).backward()
    assert weight.grad.abs().sum() > 0
    assert scale.grad.abs().sum() > 0
    before = loss_of(criterion)
    with torch.no_grad():
        weight.mul_(torch.arange(5, device=DEVICE))
    assert not torch.equal(loss_of(criterion), before)


def test_a_parameter_may_be_assigned_and_stays_the_callers_own():
    head = LogitAdjustedLinear(5, COUNTS).to(DEVICE)
    for module, name in ((LogitAdjustedCrossEntropyLoss(COUNTS).to(DEVICE), "weight"), (head, "class_weight")):
        weight = nn.Parameter(torch.ones(5, device=DEVICE))
        setattr(module, name, weight)
        loss_of(module).backward()
        assert weight.grad.abs().sum() > 0
        assert not any(parameter is weight for parameter in module.parameters())


@pytest.mark.parametrize("name", ["loss", "margin"])
def test_a_loss_made_in_inference_mode_trains(name):
    with torch.inference_mode():
        module = MODULES[name]().to(DEVICE)
        module.weight = torch.tensor(WEIGHT, device=DEVICE)
    logits = torch.randn(4, 5, device=DEVICE, requires_grad=True)
    module(logits, torch.tensor([0, 4, -100, 2], device=DEVICE)).backward()
    assert logits.grad.isfinite().all()
    assert not any(value.is_inference() for value in per_class(module).values())


# Around the module ----------------------------------------------------------------------------------------------------


class Whole(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.trunk, self.module = nn.Linear(5, 5), module

    def forward(self, x, target):
        return self.module(self.trunk(x), target)


@pytest.mark.parametrize("use_buffers", [True, False])
def test_an_averaged_model_keeps_per_class_vectors(module, use_buffers):
    model = Whole(module).to(DEVICE)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    for _ in range(3):
        averaged.update_parameters(model)
    assert_intact(averaged.module.module)
    assert torch.allclose(loss_of(averaged), loss_of(model))


def test_functional_call_keeps_per_class_vectors(module):
    model = Whole(module).to(DEVICE)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    halved = {name: tensor / 2 for name, tensor in tensors.items()}
    want = loss_of(model)
    assert torch.equal(functional_call(model, tensors, (*inputs_of(),)), want)
    assert not torch.equal(functional_call(model, halved, (*inputs_of(),)), want)
    assert_intact(module)


def inputs_of():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, 5, generator=generator).to(DEVICE), torch.tensor([0, 4, -100, 2], device=DEVICE)


def test_replicas_of_data_parallel_do_not_move_what_others_hold(module):
    """A replica is a shallow copy; the meta device stands for the replica's GPU."""
    replica = module._replicate_for_data_parallel()
    if isinstance(module, LogitAdjustedLinear):
        replica.weight, replica.bias = module.weight.to("meta"), module.bias.to("meta")
    replica._per_class = replica._per_class_on(torch.device("meta"))
    assert_intact(module)
    assert torch.equal(loss_of(DataParallel(module)), loss_of(module))


@pytest.mark.parametrize("name", MODULES)
def test_a_compiled_module_is_traced_once_whatever_is_assigned(name):
    torch._dynamo.reset()
    module = MODULES[name]().to(DEVICE)
    model, counter = Whole(module).to(DEVICE), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(4):
        if step == 2 and name == "margin":
            module.margin = margins.vector_scaling(log_prior_from_counts(NEW_COUNTS), gamma=0.2, tau=1.0)
        elif step == 2:
            module.class_counts = NEW_COUNTS
        elif step == 3:
            setattr(module, "class_weight" if name == "head" else "weight", torch.arange(1.0, 6.0))
        model.zero_grad()
        compiled(*inputs_of()).backward()
        compiled_gradient = model.trunk.weight.grad.clone()
        model.zero_grad()
        loss = model(*inputs_of())
        loss.backward()
        torch.testing.assert_close(compiled(*inputs_of()), loss)
        torch.testing.assert_close(compiled_gradient, model.trunk.weight.grad)
    # One graph with a gradient, and it copies no per-class vector.
    assert counter.frame_count == 1
    targets = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes if node.op != "placeholder"]
    assert not any(word in target for target in targets for word in ("clone", "copy_", "to_copy"))


def test_compiling_a_module_on_another_device_breaks_the_graph_or_raises():
    """The meta device stands for the device of the logits."""
    inputs = torch.zeros(4, 5, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"move the module there first, with \.to\(\)"):
        torch.compile(MODULES["loss"](), backend="eager", fullgraph=True)(*inputs)
    torch._dynamo.reset()
    assert torch.compile(MODULES["loss"](), backend="eager")(*inputs).is_meta


@pytest.mark.gpu
def test_a_captured_graph_goes_on_with_counts_that_are_assigned():
    criterion = LogitAdjustedCrossEntropyLoss(COUNTS).to("cuda")
    logits, target = torch.randn(4, 5, device="cuda"), torch.tensor([0, 4, -100, 2], device="cuda")
    criterion(logits, target)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = criterion(logits, target)
    for counts in (COUNTS, NEW_COUNTS):
        criterion.class_counts = counts
        graph.replay()
        want = truth(logits, target, log_prior_of(counts).cuda()).loss
        torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-6)


# Assigned -------------------------------------------------------------------------------------------------------------


def test_counts_can_be_read_back_and_assigned(impl):
    criterion = LogitAdjustedCrossEntropyLoss(COUNTS, 1.3, impl=impl).to(DEVICE)
    assert torch.equal(criterion.class_counts, torch.tensor(COUNTS))
    held, (logits, target) = criterion.log_prior, inputs_of()
    for counts in (NEW_COUNTS, dict(enumerate(reversed(NEW_COUNTS))), torch.tensor(COUNTS).double()):
        criterion.class_counts = counts
        values = list(counts.values()) if isinstance(counts, dict) else [float(n) for n in counts]
        assert criterion.class_counts.tolist() == values
        assert criterion.log_prior is held  # the tensor that compiled code and captured graphs read
        want = truth(logits, target, log_prior_of(values).to(DEVICE), 1.3).loss
        torch.testing.assert_close(criterion(logits, target).double(), want, rtol=1e-6, atol=1e-6)
    criterion.class_counts[0] = 7  # class_counts gives a copy
    assert criterion.class_counts.tolist() == COUNTS


def test_counts_of_more_classes_may_be_assigned_unless_another_vector_fixes_their_number():
    criterion = LogitAdjustedCrossEntropyLoss([3, 2, 1], pseudocount=1)
    criterion.class_counts = [3, 0, 1, 4]  # with the pseudocount of the constructor
    torch.testing.assert_close(criterion.log_prior.double(), log_prior_of([4, 1, 2, 5]), rtol=0, atol=1e-7)
    assert criterion(torch.zeros(1, 4), torch.tensor([3])).isfinite()
    weighted = LogitAdjustedCrossEntropyLoss([3, 2, 1], weight=[1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"class_counts must have shape \(3,\) as weight has, got \(4,\)"):
        weighted.class_counts = [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"class_counts must have shape \(3,\) as weight has, got \(4,\)"):
        LogitAdjustedLinear(2, [3, 2, 1]).class_counts = [1, 2, 3, 4]
    with pytest.raises(ValueError, match="class_counts must have examples of every class"):
        weighted.class_counts = [1, 2, 0]
    assert weighted.class_counts.tolist() == [3, 2, 1]
    assert weighted.log_prior.isfinite().all()


def test_smoothing_toward_the_prior_follows_the_counts():
    logits, target = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 0])
    features, group = torch.randn(4, 2), torch.tensor([0, 1, 1, 0])

    def expected(counts: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        log_prior = (counts.double() / counts.sum(-1, keepdim=True)).log()
        z = z + log_prior
        return 0.8 * F.cross_entropy(z, target) + 0.2 * F.cross_entropy(z, log_prior.exp().expand_as(z))

    criterion = LogitAdjustedCrossEntropyLoss([30, 2, 1], label_smoothing=0.2, smoothing_distribution="prior")
    head = LogitAdjustedLinear(2, [30, 2, 1], label_smoothing=0.2, smoothing_distribution="prior")
    held = criterion.smoothing_distribution
    for counts in ([30, 2, 1], [4, 5, 6]):
        criterion.class_counts = head.class_counts = counts
        torch.testing.assert_close(criterion(logits, target), expected(torch.tensor(counts), logits))
        want = expected(torch.tensor(counts), F.linear(features, head.weight, head.bias).double())
        torch.testing.assert_close(head(features, target).double(), want, rtol=1e-5, atol=1e-6)
    assert criterion.smoothing_distribution is held
    assert copy.deepcopy(criterion)(logits, target) == criterion(logits, target)
    criterion.class_counts = [4, 3, 2, 1]
    assert criterion.smoothing_distribution.tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1])
    criterion.smoothing_distribution = [0.25] * 4
    criterion.class_counts = [1, 2, 3, 4]  # no longer toward the prior
    assert criterion.smoothing_distribution.tolist() == [0.25] * 4
    by_group = torch.tensor([[30, 2, 1], [4, 5, 6]])
    criterion = LogitAdjustedCrossEntropyLoss(by_group, label_smoothing=0.2, smoothing_distribution="prior")
    torch.testing.assert_close(criterion(logits, target, group=group), expected(by_group[group], logits))
    with pytest.raises(TypeError, match="smoothing_distribution must be a tensor, an array or a list"):
        LogitAdjustedCrossEntropyLoss([30, 2, 1], smoothing_distribution="uniform")
    with pytest.raises(TypeError, match="smoothing_distribution must be a tensor, an array or a list"):
        MarginCrossEntropyLoss(margins.erm(), smoothing_distribution="prior")


def test_labels_and_their_weights_may_be_one_target():
    logits, labels, share = torch.randn(2, 3), torch.tensor([[0, 1], [2, 2]]), torch.rand(2, 2)
    features, head = torch.randn(2, 2), LogitAdjustedLinear(2, [3, 2, 1])
    for criterion in (LogitAdjustedCrossEntropyLoss([3, 2, 1]), MarginCrossEntropyLoss(margins.erm())):
        for pair in ((labels, share), [labels, share]):
            assert criterion(logits, pair) == criterion(logits, labels, share)
        with pytest.raises(TypeError, match="target_weight must be given once"):
            criterion(logits, (labels, share), share)
    assert head(features, (labels, share)) == head(features, labels, share)


def test_a_module_may_have_parameters_that_are_not_per_class():
    criterion = LogitAdjustedCrossEntropyLoss([3, 2, 1])
    criterion.temperature = nn.Parameter(torch.ones(()))
    head = torch.nn.utils.parametrizations.weight_norm(LogitAdjustedLinear(2, [3, 2, 1]), dim=None)
    for module in (criterion, head):
        module.class_counts = [1, 1, 2]
        assert module.class_counts.tolist() == [1, 1, 2]


def test_what_follows_from_counts_cannot_be_assigned():
    criterion = LogitAdjustedCrossEntropyLoss(COUNTS)
    for name, value in (("pseudocount", 1.0), ("exclude_absent", True)):
        with pytest.raises(AttributeError):
            setattr(criterion, name, value)
    with pytest.raises(AttributeError, match="log_prior must not be assigned, it follows from class_counts"):
        criterion.log_prior = torch.zeros(5)


def test_weights_and_distributions_may_be_assigned():
    criterion = LogitAdjustedCrossEntropyLoss(COUNTS, label_smoothing=0.1).to(DEVICE)
    logits, target = inputs_of()
    given = torch.tensor(WEIGHT)
    criterion.weight, criterion.smoothing_distribution = given, DISTRIBUTION
    kwargs = dict(label_smoothing=0.1, weight=torch.tensor(WEIGHT), smoothing_distribution=torch.tensor(DISTRIBUTION))
    want = truth(logits.cpu(), target.cpu(), log_prior_of(COUNTS), **kwargs).loss
    torch.testing.assert_close(criterion(logits, target).cpu().double(), want, rtol=1e-6, atol=1e-6)
    before = criterion.weight
    criterion.weight = torch.ones(5)
    criterion.weight = before  # a value that was read may be assigned again
    torch.testing.assert_close(criterion(logits, target).cpu().double(), want, rtol=1e-6, atol=1e-6)
    criterion.weight = criterion.smoothing_distribution = None
    want = truth(logits.cpu(), target.cpu(), log_prior_of(COUNTS), label_smoothing=0.1).loss
    torch.testing.assert_close(criterion(logits, target).cpu().double(), want, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"weight must have shape \(5,\), got \(4,\)"):
        criterion.weight = [1.0] * 4
    with pytest.raises(ValueError, match="smoothing_distribution must hold probabilities that add up to 1"):
        criterion.smoothing_distribution = [1.0] * 5


def margin_loss(logits, target, margin):
    """alpha_y * log[1 + sum_{c != y} exp((s_c f_c + u_c) - (s_y f_y + v_y))] times the weight of y, in float64."""
    f = logits.cpu().double()
    if margin.scale is not None:
        f = f * margin.scale
    zeros = torch.zeros(5, dtype=torch.float64)
    u, v = (zeros if offset is None else offset.double() for offset in (margin.negative_offset, margin.target_offset))
    alpha = torch.tensor(WEIGHT).double() * (1.0 if margin.alpha is None else margin.alpha)
    losses = torch.zeros(len(f), dtype=torch.float64)
    for n, y in enumerate(target.tolist()):
        if y >= 0:
            others = [c for c in range(5) if c != y]
            losses[n] = alpha[y] * ((f[n] + u)[others] - f[n, y] - v[y]).exp().sum().log1p()
    return losses


def test_the_margin_module_gives_the_loss_of_the_formula():
    for margin in (MARGIN, SCALED, PairwiseMargin(scale=2.0), PairwiseMargin()):
        criterion = MarginCrossEntropyLoss(margin, weight=WEIGHT, reduction="none").to(DEVICE)
        logits, target = inputs_of()
        torch.testing.assert_close(
            criterion(logits, target).cpu().double(), margin_loss(logits, target, margin), rtol=2e-6, atol=1e-6
        )
    criterion.margin = MARGIN.to(DEVICE)
    assert criterion.margin.offsets_are_equal == MARGIN.offsets_are_equal
    with pytest.raises(TypeError, match="margin must be a PairwiseMargin, got Tensor"):
        criterion.margin = torch.ones(5)
    with pytest.raises(ValueError, match=r"margin.scale must have shape \(5,\), got \(3,\)"):
        criterion.margin = PairwiseMargin(scale=torch.ones(3))
    with pytest.raises(TypeError, match="margin must be a PairwiseMargin, got list"):
        MarginCrossEntropyLoss([1.0])
    assert "n_classes=5" in repr(criterion)


def test_a_margin_whose_offsets_are_one_tensor_keeps_one_tensor():
    """One tensor costs less than two equal ones."""
    criterion = MarginCrossEntropyLoss(SCALED).to(DEVICE)
    assert criterion.margin.offsets_are_equal
    criterion.margin = margins.vector_scaling(log_prior_from_counts(NEW_COUNTS), gamma=0.2, tau=1.0)
    assert criterion.margin.offsets_are_equal
    before, criterion.margin = criterion.margin, MARGIN
    assert not criterion.margin.offsets_are_equal
    criterion.margin = before
    assert criterion.margin.offsets_are_equal


# Called ---------------------------------------------------------------------------------------------------------------


def test_input_is_another_name_of_the_first_argument(module):
    inputs, target = inputs_of()
    assert torch.equal(module(input=inputs, target=target), module(inputs, target))
    first = "features" if isinstance(module, LogitAdjustedLinear) else "logits"
    with pytest.raises(TypeError, match=f"{first} must be given once, got {first} and input"):
        module(inputs, target, input=inputs)
    with pytest.raises(TypeError, match=f"{first} must be a torch.Tensor, got NoneType"):
        module(target=target)
    if first == "logits":
        with pytest.raises(TypeError, match=r"target must be a torch.Tensor, got NoneType"):
            module(inputs)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_call_may_override_the_reduction(module, reduction):
    want = loss_of(module, reduction=reduction)
    assert module.reduction == "mean"
    module.reduction = reduction
    assert torch.equal(loss_of(module), want)
    with pytest.raises(ValueError, match="reduction must be 'none', 'mean' or 'sum', got 'batchmean'"):
        loss_of(module, reduction="batchmean")


@pytest.mark.parametrize(
    "number",
    [7, 7.0, torch.tensor(7), torch.tensor(7.0), torch.tensor([7]), torch.tensor(7).unsqueeze(0).expand(2, -1)],
    ids=repr,
)
def test_a_mean_may_be_over_a_given_number_of_items(module, number):
    """So the losses of two halves of a batch add up to the loss of the batch."""
    torch.testing.assert_close(loss_of(module, num_items_in_batch=number), loss_of(module, reduction="sum") / 7)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            dict(num_items_in_batch=3, reduction="sum"),
            ValueError,
            "must be None unless reduction is 'mean', got it with",
        ),
        (dict(num_items_in_batch="3"), TypeError, "must be a number or a tensor of one number, got str"),
        (dict(num_items_in_batch=True), TypeError, "must be a number or a tensor of one number, got bool"),
        (dict(num_items_in_batch=torch.ones(2)), TypeError, "must be a number or a tensor of one number, got Tensor"),
        (dict(num_items_in_batch=torch.tensor(True)), TypeError, "must be a number or a tensor of one number, got"),
    ],
)
def test_a_number_of_items_that_means_nothing_is_refused(module, options, error, message):
    with pytest.raises(error, match=f"num_items_in_batch {message}"):
        loss_of(module, **options)


def test_the_output_of_a_transformers_model_may_be_passed_as_logits():
    from transformers.modeling_outputs import ImageClassifierOutput

    inputs, target = inputs_of()
    for make in (MODULES["loss"], MODULES["margin"]):
        criterion = make().to(DEVICE)
        assert torch.equal(criterion(ImageClassifierOutput(logits=inputs), target), criterion(inputs, target))


def test_a_class_without_examples_may_take_no_part(impl):
    counts = [5, 0, 3, 0]
    criterion = LogitAdjustedCrossEntropyLoss(counts, exclude_absent=True, impl=impl).to(DEVICE)
    logits = torch.randn(6, 4, device=DEVICE, requires_grad=True)
    target = torch.tensor([0, 2, 0, 2, 2, 0], device=DEVICE)
    loss = criterion(logits, target)
    loss.backward()
    want = truth(logits.detach()[:, ::2], target // 2, log_prior_of([5, 3]).to(DEVICE))
    torch.testing.assert_close(loss.double(), want.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.grad[:, ::2].double(), want.grad_logits, rtol=1e-5, atol=1e-7)
    assert (logits.grad[:, 1::2] == 0).all()
    criterion.class_counts = [0, 5, 0, 3]
    assert criterion.log_prior.isinf().tolist() == [True, False, True, False]


def test_options_that_would_count_excluded_classes_are_refused():
    for options, message in (
        (
            dict(label_smoothing=0.1),
            "smoothing_distribution must be given with label_smoothing and exclude_absent=True",
        ),
        (dict(tau=0.0), "tau must be positive with exclude_absent=True, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            LogitAdjustedCrossEntropyLoss([5, 0, 3], exclude_absent=True, **options)
    smoothed = LogitAdjustedCrossEntropyLoss(
        [5, 0, 3], exclude_absent=True, label_smoothing=0.1, smoothing_distribution=[0.5, 0.0, 0.5]
    )
    assert smoothed(torch.randn(2, 3), torch.tensor([0, 2])).isfinite()
    LogitAdjustedCrossEntropyLoss([5, 1, 3], exclude_absent=True, label_smoothing=0.1)


def test_options_of_a_loss_are_refused_for_raw_logits():
    head = LogitAdjustedLinear(3, [5, 1])
    for option in (dict(reduction="none"), dict(num_items_in_batch=3), dict(target_weight=torch.ones(2, 1))):
        with pytest.raises(TypeError, match=f"{next(iter(option))} must be None without a target"):
            head(torch.randn(2, 3), **option)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cosine", [True, False])
def test_a_head_predicts_no_class_that_takes_no_part(bias, cosine):
    head = LogitAdjustedLinear(3, [5, 0, 3, 0], exclude_absent=True, bias=bias, cosine=cosine).to(DEVICE)
    with torch.no_grad():
        head.weight[1::2] *= 100  # never trained, and highest
    features = torch.randn(50, 3, device=DEVICE)
    logits = head(features)
    assert (logits[:, 1::2] == -math.inf).all()
    assert logits[:, ::2].isfinite().all()
    predicted = head.predict(features)
    assert torch.equal(predicted, logits.argmax(1))
    assert set(predicted.tolist()) <= {0, 2}
    logits.softmax(1)[:, 0].sum().backward()
    assert head.weight.grad.isfinite().all()


def test_impl_of_the_module_is_the_one_that_runs(impl, monkeypatch):
    places = {
        "reference": (fused_la.reference, "loss_rows"),
        "blocked": (fused_la._cpu, "forward"),
        "triton": (fused_la._triton, "forward"),
    }
    ran = []
    for name, (module, function) in places.items():
        real = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *a, name=name, real=real: ran.append(name) or real(*a))
    LogitAdjustedCrossEntropyLoss(COUNTS, impl=impl).to(DEVICE)(*inputs_of())
    assert ran == [impl]


def test_a_module_puts_its_vectors_on_the_default_device(monkeypatch):
    """Compiled code is then traced once. The meta device, which has no values, is left out."""
    moved = []
    monkeypatch.setattr(torch, "get_default_device", functools.partial(torch.device, "cuda"))
    monkeypatch.setattr(
        fused_la.loss.LossOptions, "_per_class_on", lambda self, device: moved.append(device.type) or self._per_class
    )
    LogitAdjustedCrossEntropyLoss(COUNTS)
    assert moved == ["cuda"]
