"""Rules of the house that a tool can check: geometry runs without torch, the public names are the contract's."""

import subprocess
import sys
from pathlib import Path

import ringattn

GEOMETRY = ("geometry.tiles", "geometry.masks", "planning.placement", "planning.program")


def test_geometry_runs_without_torch():
    code = f"""
import sys, types
sys.modules["torch"] = None
package = types.ModuleType("ringattn"); package.__path__ = [{str(Path(ringattn.__file__).parent)!r}]
sys.modules["ringattn"] = package
import importlib
for name in {GEOMETRY}: importlib.import_module("ringattn." + name)
expression, rules = sys.modules["ringattn.geometry.masks"].Expression, sys.modules["ringattn.geometry.rules"]
mask = expression(rules.sliding_window, (3, 3)) & expression(rules.documents, ((0, 7, 20),))
assert mask.area(20, 20) == mask.pairs(20, 20).sum() == {
        (ringattn.sliding_window(3, 3) & ringattn.documents([0, 7, 20])).dense(20, 20).sum()
    }
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_tests_are_made_of_needs_no_test_package():
    """`ringattn.testing`, as a user installs it."""
    absent = ("pytest", "hypothesis", "transformers", "typer", "rich")
    code = f"import sys; sys.modules |= dict.fromkeys({absent}); from ringattn.testing import *"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names():
    contract = {
        *("full", "causal", "sliding_window", "global_tokens", "documents", "prefix_lm", "chunked", "strided"),
        *("dilated", "longformer", "bigbird", "ContextParallel", "Options", "attention", "Loopback"),
    }
    assert contract <= set(ringattn.__all__)
    assert all(hasattr(ringattn, name) and getattr(ringattn, name).__doc__ for name in ringattn.__all__)


def test_make_resumes_with_the_runs_own_settings():
    def command(arguments):
        root = Path(ringattn.__file__).parent.parent
        made = ["make", "-n", "pretrain", f"PYTHON={sys.executable}", f"ARGS={arguments}"]
        return subprocess.run(made, cwd=root, check=True, capture_output=True, text=True).stdout

    assert "--config cpu-128k" in command("--steps 3")
    assert "--resume runs/mine" in command("--resume runs/mine") and "--config" not in command("--resume runs/mine")
