"""Tests of examples/loops: losses against the formula in every library's loop, and that a wrong loss would be seen.

`--check` of a loop trains for some steps with the criterion and again with the formula, and ends with an error where
two losses differ by more than 1e-5. Each loop runs in its own process, or in two where it is made for two.
"""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import large, slow

import fused_la

ROOT = Path(__file__).parents[2]
LOOPS = ROOT / "examples" / "loops"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]  # standalone: a port that is free
PROGRAMS = {  # file: how Python runs it, and the packages that it needs
    "timm_loop.py": ([], ["timm", "torchvision"]),
    "torchvision_loop.py": ([], ["torchvision"]),
    "lightning_loop.py": ([], ["lightning"]),
    "transformers_image.py": ([], ["transformers", "accelerate", "datasets"]),
    "transformers_tokens.py": ([], ["transformers", "accelerate", "datasets"]),
    "accelerate_loop.py": (TORCHRUN, ["accelerate"]),
    "fsdp2_head.py": (TORCHRUN, []),
}
WRONG_PRIOR = """
import runpy, sys
sys.path.insert(0, {folder!r})
import digits

right = digits.Formula.__init__
digits.Formula.__init__ = lambda self, class_counts, **options: right(self, class_counts.flip(0), **options)
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def check(name, script, *options):
    """Run `--check` of a loop; of another script in its name."""
    launcher, packages = PROGRAMS[name]
    for package in packages:
        if importlib.util.find_spec(package) is None:  # not importorskip: some of them warn as they are imported
            pytest.skip(f"needs {package}")
    return subprocess.run(
        [sys.executable, *launcher, str(script), "--check", *options],
        env={**os.environ, "PYTHONPATH": str(Path(fused_la.__file__).parents[1])},  # the package under test
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_losses_are_those_of_the_formula(name):
    process = check(name, LOOPS / name)
    assert process.returncode == 0, process.stderr
    assert re.search(r"\d+ values, .* apart$", process.stdout, re.MULTILINE), process.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformers_image.py", "transformers_tokens.py"])
def test_losses_are_those_of_the_formula_in_bfloat16(name):
    process = check(name, LOOPS / name, "--bf16")
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("name", [slow(name) if name == "transformers_tokens.py" else large(name) for name in PROGRAMS])
def test_a_wrong_prior_is_seen(name, tmp_path):
    wrong = tmp_path / name
    wrong.write_text(WRONG_PRIOR.format(folder=str(LOOPS), script=str(LOOPS / name)))
    process = check(name, wrong)
    assert process.returncode != 0
    assert "differ from the formula's" in process.stderr, process.stderr


def test_every_loop_is_tested_and_listed():
    loops = {path.name for path in LOOPS.glob("*.py")} - {"digits.py"}
    assert loops == set(PROGRAMS)
    section = (ROOT / "examples" / "README.md").read_text().partition("## loops/")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+\.py)`", section, re.MULTILINE)) == loops


def test_the_extra_has_what_the_loops_import():
    """Beside what the package itself depends on. The Trainer needs accelerate, fused_la.metrics torchmetrics."""
    imported = set()
    for path in LOOPS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    needed = imported - set(sys.stdlib_module_names) - {"digits", "fused_la", "torch", "numpy"}
    distributions = {"sklearn": "scikit-learn", "PIL": "pillow"}
    extra = re.search(r"^loops = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)[1]
    listed = set(re.findall(r'"([\w-]+)', extra))
    assert {distributions.get(name, name) for name in needed} | {"accelerate", "torchmetrics"} <= listed
