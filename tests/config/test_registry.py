"""Which names gin files may use."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from moejax.config import register, registry
from moejax.core.errors import ConfigError
from moejax.core.spec import known_specs


def test_the_index_finds_what_imports_register():
    """Catches specs that the reading of sources misses, or finds under a wrong module."""
    index = registry._source_index()
    for module in {place for places in index.values() for place in places}:
        importlib.import_module(module)
    ours = {n: c for n, c in known_specs().items() if c.__module__.startswith("moejax.")}
    assert {name: (cls.__module__,) for name, cls in ours.items()} == {
        name: places for name, places in index.items() if name not in registry.BUILDERS
    }


def test_builders_exist_and_take_parameters():
    """Catches a builder that was renamed or moved."""
    for name in registry.BUILDERS:
        assert callable(registry.lookup(name).target)
    assert list(registry.lookup("load_tokenizer").parameters) == ["path", "end_of_document"]


def test_jobs_are_what_can_run_and_plan():
    """Catches parts of jobs that are offered as jobs."""
    assert {"Compress", "Study", "Train"} <= set(registry.jobs())
    for name in registry.jobs():
        job = registry.lookup(name).target
        assert callable(job.run)
        assert callable(job.plan)
    assert "Arm" not in registry.jobs()


def test_a_name_may_carry_its_module():
    """Catches dotted names that are refused, or matched in the middle of a word."""
    register(["tests.config.toy_specs"])
    assert registry.lookup("toy_specs.ToyGrid") == registry.lookup("ToyGrid")
    assert registry.lookup("tests.config.toy_specs.ToyGrid").name == "ToyGrid"
    for wrong in ("specs.ToyGrid", "other.ToyGrid"):
        with pytest.raises(ConfigError, match="nothing is named"):
            registry.lookup(wrong)


def test_an_ambiguous_name_asks_for_its_module(monkeypatch):
    """Catches a silent choice between two specs of one name."""
    two = {"Twin": ("moejax.moe.left", "moejax.moe.right")}
    monkeypatch.setattr(registry, "_source_index", lambda: two)
    with pytest.raises(ConfigError, match="ambiguous") as caught:
        registry.lookup("Twin")
    assert caught.value.fix == "Write left.Twin."


def test_a_taken_name_is_a_config_error(tmp_path, monkeypatch):
    """Catches the TypeError of a second spec of one name on its way to the user."""
    register(["tests.config.toy_specs"])
    source = "from moejax.core import spec\n@spec\nclass ToyGrid:\n    bits: int\n"
    (tmp_path / "toy_taken_name.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="two specs are named ToyGrid"):
        register(["toy_taken_name"])


def test_a_config_error_comes_without_the_heavy_imports():
    """Catches a registry that imports every folder: errors would wait for Orbax and matplotlib."""
    code = """
import sys
from moejax.config import load_config
from moejax.core.errors import ConfigError
try:
    load_config("no_such_config")
except ConfigError:
    heavy = {"orbax.checkpoint", "matplotlib", "flax.nnx", "optax"} & set(sys.modules)
    assert not heavy, heavy
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
