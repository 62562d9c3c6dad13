"""The package as a whole: optional dependencies, the direction of imports, public signatures and docstrings.

Imports are read from the sources with `ast`, which also finds those inside functions and in branches that no test runs.
"""

import ast
import doctest
import importlib.util
import inspect
import operator
import os
import pkgutil
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from conftest import slow

import fused_la

PACKAGE = Path(fused_la.__file__).resolve().parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400


def module_of(source):
    """ "fused_la._triton.loss" for fused_la/_triton/loss.py."""
    parts = source.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# Without Triton -------------------------------------------------------------------------------------------------------

TRITON_IS_NONE = """
import sys
sys.modules["triton"] = None
"""
TRITON_IS_NOT_FOUND = """
import sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton())
"""
TRITON_HAS_NO_SPEC = """
import sys, types
sys.modules["triton"] = types.ModuleType("triton")
"""
WITHOUT_TRITON = """
import torch
from fused_la import LogitAdjustedCrossEntropyLoss, logit_adjusted_cross_entropy

logits = torch.tensor([[2.0, 1.0, 1.5], [0.5, 0.0, 1.0]], requires_grad=True)
target = torch.tensor([0, 2])
log_prior = torch.tensor([0.9, 0.09, 0.01]).log()
expected = torch.nn.functional.cross_entropy(logits + log_prior, target).item()
for impl in ("auto", "reference", "blocked"):
    loss = logit_adjusted_cross_entropy(logits, target, log_prior, impl=impl)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert abs(loss.item() - expected) < 1e-5, loss
    assert gradient.isfinite().all() and (gradient != 0).all()
    assert torch.equal(LogitAdjustedCrossEntropyLoss([900, 90, 10], impl=impl)(logits, target), loss)
try:
    logit_adjusted_cross_entropy(logits, target, log_prior, impl="triton")
except ModuleNotFoundError as error:
    assert str(error) == "impl='triton' needs the package triton, which is not installed", error
else:
    raise AssertionError("impl='triton' ran without triton")
assert getattr(sys.modules.get("triton"), "__spec__", None) is None
assert "fused_la._triton" not in sys.modules
"""


def run_python(script):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize(
    "how",
    [TRITON_IS_NONE, slow(TRITON_IS_NOT_FOUND), slow(TRITON_HAS_NO_SPEC)],
    ids=["triton is None", "triton is not found", "triton is a stand-in"],
)
def test_everything_but_the_kernels_works_without_triton(how):
    run_python(how + WITHOUT_TRITON)


def test_importing_the_package_imports_neither_triton_nor_optional_packages():
    """A call on a CPU does not import them either; PyTorch's own imports do not count."""
    script = """
import sys
import torch
before = set(sys.modules)
import fused_la
fused_la.logit_adjusted_cross_entropy(torch.zeros(2, 3), torch.zeros(2).long(), torch.zeros(3)).item()
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
print(*sorted(name for name in sys.modules if name.startswith("fused_la._triton")))
"""
    new, kernels = run_python(script).split("\n")[:2]
    assert set(new.split()) <= {"fused_la", "torch", "numpy"}
    assert kernels == ""


WITHOUT_TORCHMETRICS = """
import sys
sys.modules["torchmetrics"] = None
import fused_la
from fused_la import posthoc
try:
    fused_la.metrics
except ModuleNotFoundError as error:
    assert str(error) == (
        "fused_la.metrics needs the package torchmetrics, which is not installed: pip install 'fused_la[metrics]'"
    ), error
else:
    raise AssertionError("imported without torchmetrics")
try:
    fused_la.nothing
except AttributeError as error:
    assert str(error) == "module 'fused_la' has no attribute 'nothing'", error
else:
    raise AssertionError("found")
"""


def test_everything_but_the_metrics_works_without_torchmetrics():
    run_python(WITHOUT_TORCHMETRICS)


def test_metrics_are_an_attribute_of_the_package(monkeypatch):
    monkeypatch.delitem(sys.modules, "fused_la.metrics", raising=False)  # other tests may have imported it
    monkeypatch.delitem(vars(fused_la), "metrics", raising=False)  # not delattr, which would look it up
    fused_la.metrics.BalancedError([1, 2])


# Imports --------------------------------------------------------------------------------------------------------------

# A room is a folder or a top-level file of the package. The layers of rooms, from the top down: a file imports only
# from its own room and from rooms of lower layers.
LAYERS = [
    {"__init__"},
    {"loss", "linear", "prior", "posthoc", "metrics", "distributed"},
    {"_evaluation"},
    {"_class_parallel"},
    {"_autograd"},
    {"_cpu", "_triton"},
    {"_tiled", "reference"},
    {"margins", "_modules"},
    {"_call"},
]
# The rooms that each room imports from, including imports inside functions.
MAY_IMPORT = {
    "__init__": {"distributed", "linear", "loss", "margins", "metrics", "posthoc", "prior"},
    "loss": {"_autograd", "_call", "_class_parallel", "_modules", "reference"},
    "linear": {"_autograd", "_call", "_class_parallel", "_modules", "_tiled"},
    "prior": {"_call", "_class_parallel"},
    "posthoc": {"_call", "_evaluation"},
    "metrics": {"_call", "_evaluation"},
    "distributed": {"_call", "_class_parallel"},
    "_evaluation": {"_call", "_class_parallel", "_tiled", "_triton"},
    "_class_parallel": {"_autograd", "_call", "_tiled"},
    "_autograd": {"_call", "_tiled", "_triton", "reference"},  # and _cpu and _triton by name, see IMPORTS_BY_NAME
    "_cpu": {"_call", "_tiled"},
    "_triton": {"_call", "_tiled"},
    "_tiled": {"_call"},
    "reference": {"_call"},
    "margins": {"_call"},
    "_modules": {"_call"},
    "_call": set(),
}
# Optional packages that a file may import. The package can be imported without them.
OPTIONAL = {"fused_la.metrics": {"torchmetrics"}, "fused_la._evaluation.tau_sweep": {"matplotlib"}}
# The only file that imports modules by a computed name.
IMPORTS_BY_NAME = "fused_la._autograd.implementations"


def room_of(module):
    """The room of a module, a key of MAY_IMPORT: "_triton" for "fused_la._triton.loss"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(source):
    """(absolute module, whether at import time) of every import; `from package import module` gives the module."""
    tree = ast.parse(source.read_text())
    in_functions = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in branch.body
        for node in ast.walk(statement)
    }
    modules = {module_of(path) for path in SOURCES}
    package = module_of(source) if source.name == "__init__.py" else module_of(source).rpartition(".")[0]
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level > 0:
                base = importlib.util.resolve_name("." * node.level + base, package)
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                names.append(submodule if submodule in modules else base)
        for name in names:
            yield name, id(node) not in in_functions and id(node) not in typing_only


def imported_by(source):
    """The modules of the package that a file imports."""
    return {name for name, _ in imports_of(source) if name.partition(".")[0] == "fused_la"}


@pytest.mark.parametrize("source", SOURCES, ids=module_of)
def test_a_file_imports_only_from_the_rooms_that_its_room_may_import(source):
    room = room_of(module_of(source))
    assert room in MAY_IMPORT, "a new room: say in LAYERS and MAY_IMPORT where it stands"
    assert {room_of(name) for name in imported_by(source)} - {room} <= MAY_IMPORT[room]


def test_the_table_of_imports_points_down_the_layers():
    """No room imports from its own layer or above, so implementations import neither one another nor their callers."""
    depth = {room: i for i, layer in enumerate(LAYERS) for room in layer}
    assert depth.keys() == MAY_IMPORT.keys()
    assert [(room, below) for room, rooms in MAY_IMPORT.items() for below in rooms if depth[below] <= depth[room]] == []


def test_no_files_import_one_another_in_a_circle():
    imports = {module_of(source): imported_by(source) for source in SOURCES}
    below = set()
    while len(below) < len(imports):
        placed = {module for module, names in imports.items() if module not in below and names - {module} <= below}
        assert placed, f"a circle among {imports.keys() - below}"
        below |= placed


def test_the_table_of_imports_has_no_unused_entry():
    """Unused entries would allow more and more imports over time."""
    used = {room: set() for room in MAY_IMPORT}
    for source in SOURCES:
        room = room_of(module_of(source))
        used[room] |= {room_of(name) for name in imported_by(source)} - {room}
    assert used == MAY_IMPORT


@pytest.mark.parametrize("source", [source for source in SOURCES if source.parent != PACKAGE], ids=module_of)
def test_the_name_of_a_file_does_not_repeat_its_folder(source):
    assert source.parent.name.strip("_") not in source.stem or source.stem == "__init__"


def test_only_the_kernels_import_triton_and_only_functions_import_the_kernels():
    for source in SOURCES:
        if room_of(module_of(source)) == "_triton":
            continue
        for name, at_import in imports_of(source):
            assert name.partition(".")[0] != "triton", source
            assert not (at_import and room_of(name) == "_triton" and name.startswith("fused_la")), source


@pytest.mark.parametrize("source", SOURCES, ids=module_of)
def test_the_package_needs_pytorch_numpy_and_triton_alone(source):
    outside = {name.partition(".")[0] for name, _ in imports_of(source)} - set(sys.stdlib_module_names)
    allowed = {"fused_la", "torch", "numpy", "triton"} | OPTIONAL.get(module_of(source), set())
    assert outside <= allowed, "in particular no tests, benchmarks, examples"


@pytest.mark.parametrize("source", SOURCES, ids=module_of)
def test_only_the_dispatch_imports_by_name(source):
    called = {ast.unparse(node.func) for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Call)}
    by_name = {name for name in called if name.rpartition(".")[2] in ("import_module", "__import__", "exec", "eval")}
    assert not by_name or module_of(source) == IMPORTS_BY_NAME


# Names and signatures -------------------------------------------------------------------------------------------------

OPTIONS = (
    "target_weight=None, weight=None, ignore_index=-100, reduction='mean', label_smoothing=0.0, "
    "smoothing_distribution=None, impl='auto'"
)
CLASS_OPTIONS = OPTIONS.replace("weight=None, ignore", "class_weight=None, ignore")
RANK_OPTIONS = "group=None, gather_features=False, average_over_ranks=False"
# Every public name and its signature, None without one.
INTERFACE = {
    "logit_adjusted_cross_entropy": f"(logits, target, log_prior, tau=1.0, *, group=None, {OPTIONS})",
    "margin_cross_entropy": f"(logits, target, margin, *, {OPTIONS})",
    "linear_logit_adjusted_cross_entropy": (
        f"(features, weight, target, log_prior, tau=1.0, *, bias=None, group=None, {CLASS_OPTIONS})"
    ),
    "linear_margin_cross_entropy": f"(features, weight, target, margin, *, bias=None, {CLASS_OPTIONS})",
    "LogitAdjustedCrossEntropyLoss": (
        "(class_counts, tau=1.0, *, pseudocount=0.0, exclude_absent=False, "
        f"{OPTIONS.removeprefix('target_weight=None, ')})"
    ),
    "MarginCrossEntropyLoss": f"(margin, *, {OPTIONS.removeprefix('target_weight=None, ')})",
    "LogitAdjustedLinear": (
        "(in_features, class_counts, tau=1.0, *, bias=True, cosine=False, scale=30.0, pseudocount=0.0, "
        "exclude_absent=False, "
        f"{CLASS_OPTIONS.removeprefix('target_weight=None, ').removesuffix(')')}, device=None, dtype=None)"
    ),
    "count_classes": "(target, n_classes, *, ignore_index=-100, groups=None, n_groups=None, group=None)",
    "log_prior_from_counts": "(class_counts, *, pseudocount=0.0, exclude_absent=False)",
    "adjust_logits": "(logits, log_prior, tau=1.0, *, target_log_prior=None, group=None)",
    "normalize_classifier": "(weight, tau=1.0)",
    "PairwiseMargin": None,
    "margins": None,
    "distributed.class_parallel_logit_adjusted_cross_entropy": (
        f"(logits, target, log_prior, tau=1.0, *, group=None, {OPTIONS})"
    ),
    "distributed.class_parallel_margin_cross_entropy": f"(logits, target, margin, *, group=None, {OPTIONS})",
    "distributed.class_parallel_linear_logit_adjusted_cross_entropy": (
        f"(features, weight, target, log_prior, tau=1.0, *, bias=None, {RANK_OPTIONS}, {CLASS_OPTIONS})"
    ),
    "distributed.class_parallel_linear_margin_cross_entropy": (
        f"(features, weight, target, margin, *, bias=None, {RANK_OPTIONS}, {CLASS_OPTIONS})"
    ),
}
ALWAYS_EXPORTED = {
    "logit_adjusted_cross_entropy",
    "LogitAdjustedCrossEntropyLoss",
    "LogitAdjustedLinear",
    "MarginCrossEntropyLoss",
    "count_classes",
    "linear_logit_adjusted_cross_entropy",
    "linear_margin_cross_entropy",
    "log_prior_from_counts",
    "adjust_logits",
    "normalize_classifier",
}


def public_callables():
    """The names of callables at the top level, and of those that only a submodule has."""
    top_level = [name for name in fused_la.__all__ if callable(getattr(fused_la, name))]
    return top_level + [name for name in INTERFACE if "." in name]


def public_object(name):
    return operator.attrgetter(name)(fused_la)


def test_distributed_has_the_functions_of_the_interface_and_no_other():
    own = {
        f"distributed.{name}"
        for name, value in vars(fused_la.distributed).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == "fused_la.distributed"
    }
    assert own == {name for name in INTERFACE if name.startswith("distributed.")}


def test_all_names_are_of_the_interface_and_resolve():
    assert len(set(fused_la.__all__)) == len(fused_la.__all__)
    assert set(fused_la.__all__) >= ALWAYS_EXPORTED
    assert set(fused_la.__all__) <= INTERFACE.keys()
    for name in fused_la.__all__:
        assert getattr(fused_la, name) is not None


def test_the_top_level_exports_exactly_what_it_imports():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imported = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert imported == set(fused_la.__all__)


@pytest.mark.parametrize("name", public_callables())
def test_signatures_are_those_of_the_interface(name):
    if INTERFACE[name] is None:
        pytest.skip("has no signature of its own")
    signature = inspect.signature(public_object(name))
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    assert str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)) == INTERFACE[name]


@pytest.mark.parametrize("name", public_callables())
def test_public_signatures_are_typed(name):
    signature = inspect.signature(public_object(name))
    untyped = [p.name for p in signature.parameters.values() if p.annotation is inspect.Parameter.empty]
    assert untyped == []


def test_the_marker_of_typed_packages_is_there():
    assert resources.files(fused_la).joinpath("py.typed").is_file()


def test_the_version_is_a_release_number():
    assert re.fullmatch(r"\d+\.\d+\.\d+", fused_la.__version__)


@pytest.mark.parametrize("source", SOURCES, ids=module_of)
def test_no_module_is_longer_than_the_limit(source):
    assert len(source.read_text().splitlines()) <= MAX_LINES


# Docstrings -----------------------------------------------------------------------------------------------------------


def sections_of(docstring):
    """{"Args": its text, ...}: a section begins with its name and a colon and continues while lines are indented."""
    sections, name = {}, None
    for line in inspect.cleandoc(docstring).splitlines():
        heading = re.match(r"([A-Z][a-z]+):(?!:)\s*(.*)$", line)
        if heading:
            name = heading[1]
            sections[name] = heading[2]
        elif name and (line.startswith(" ") or not line):
            sections[name] += "\n" + line
        else:
            name = None
    return {name: text.strip("\n") for name, text in sections.items()}


@pytest.mark.parametrize("name", public_callables())
def test_public_docstrings_have_every_section(name):
    sections = sections_of(public_object(name).__doc__)
    for wanted in (("Args",), ("Returns", "Shape"), ("Raises",), ("Example",), ("Source",)):
        assert any(sections.get(section, "").strip() for section in wanted), wanted
    assert ">>>" in sections["Example"]
    assert re.search(r"\b(TypeError|ValueError)\b", sections["Raises"])


@pytest.mark.parametrize("name", public_callables())
def test_public_docstrings_begin_with_a_summary_line(name):
    first, _, rest = inspect.cleandoc(public_object(name).__doc__).partition("\n")
    assert first.endswith(".")
    assert rest.startswith("\n")


@pytest.mark.parametrize("name", public_callables())
def test_public_docstrings_describe_every_argument_in_order(name):
    arguments = sections_of(public_object(name).__doc__)["Args"]
    indent = re.match(r" +", arguments)[0]
    described = []
    for line in re.findall(rf"^{indent}(\w[\w, ]*):", arguments, re.MULTILINE):
        described += line.split(", ")
    assert described == list(inspect.signature(public_object(name)).parameters)


def modules_with_examples():
    """Every module but the kernels, which need Triton and have no examples."""
    found = pkgutil.walk_packages([str(PACKAGE)], "fused_la.", onerror=lambda name: None)
    return ["fused_la", *(module.name for module in found if "._triton" not in module.name)]


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    results = doctest.testmod(module)
    assert results.failed == 0
    public = [value for key, value in vars(module).items() if key in fused_la.__all__]
    own = [value for value in public if getattr(value, "__module__", None) == name]
    assert results.attempted >= len(own), "every public name has an example"


def test_modules_with_examples_are_all_modules_but_the_kernels():
    assert set(modules_with_examples()) == {m for m in map(module_of, SOURCES) if room_of(m) != "_triton"}
