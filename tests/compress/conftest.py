"""A tiny model, a text, and recipes that run once for all tests."""

import functools

import jax
import numpy as np
import pytest

from moejax.calibrate import Calibration
from moejax.compress import ExpertDrop, Frequency, Quantize, compress
from moejax.models import parameters
from moejax.runs import Ledger
from moejax.weights import SymmetricGrid
from tests.evaluate.conftest import cut, make_model, make_tokens, run

EXPERTS, MATRICES, LAYERS = 6, 3, 2
FOUR_BITS = Quantize(grid=SymmetricGrid(bits=4, group=None))
HALF = ExpertDrop(fraction=0.5, score=Frequency())


class Source:
    """Statistics of a model on the text; `asked` holds the names of every call."""

    def __init__(self, text):
        self.calibration, self.asked = Calibration(text), []

    def __call__(self, model, accumulators):
        self.asked.append({a.name for a in accumulators})
        return self.calibration(model, accumulators)

    def stream(self, model):
        return self.calibration.stream(model)


@pytest.fixture(scope="session")
def model():
    return make_model(0)


@pytest.fixture(scope="session")
def text():
    return cut({"docs": make_tokens(75)}, 5)


@pytest.fixture
def source(text):
    return Source(text)


@pytest.fixture(scope="session")
def applied(model, text):
    """(*passes) -> (the tiny model after them, the ledger), each recipe run once for all tests."""
    return functools.cache(lambda *recipe: apply(model, recipe, Source(text)))


def apply(model, recipe, source, **options):
    """The model after the passes of a recipe, and the ledger."""
    ledger, key = Ledger(), jax.random.key(0)
    after = compress(model, recipe, source, key=key, arm="arm", ledger=ledger, **options)
    return after, ledger


def logits(model, text):
    return np.asarray(run(model, text[0]).logits_BxSxV)


def leaves(model):
    """Name and leaf -> array of a model."""
    return {
        name + jax.tree_util.keystr(path): np.asarray(leaf)
        for name, weight in parameters(model).items()
        for path, leaf in jax.tree_util.tree_flatten_with_path(weight)[0]
    }


def assert_same_weights(a, b):
    mine, theirs = leaves(a), leaves(b)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
