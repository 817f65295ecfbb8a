"""GGUF and MoEfied models in jobs: planned from headers, cut by their own tokenizer, saved."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.compress import Quantize
from moejax.config import load_config
from moejax.core import CheckpointError, SpecError
from moejax.data import HeldoutSample
from moejax.jobs.gguf_source import GGUFModel
from moejax.jobs.model_source import ModelSource, SavedModel
from moejax.jobs.moefied_source import MoEfied
from moejax.jobs.study import Compress, Study
from moejax.jobs.text import Text
from moejax.jobs.unprompted_text import UnpromptedText
from moejax.models import parameters
from moejax.moe import MoESpec
from moejax.runs import StudyResult
from moejax.upcycle import Contiguous, RandomSplit
from moejax.weights import SymmetricGrid
from tests.checkpoint import gguf_llama as llama
from tests.data.gguf_bpe import SIZE, metadata
from tests.files.gguf_writer import write_gguf


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> GGUFModel:
    """A tiny llama with a tokenizer in its file."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tensors, _ = llama.tensors(tied=True, vocab=SIZE)
    write_gguf(path, llama.metadata() | metadata("smollm"), tensors)
    return GGUFModel(path=str(path))


@pytest.fixture(scope="module")
def moefied(dense) -> MoEfied:
    return MoEfied(model=dense, experts=3, top_k=2)


def test_a_manifest_needs_no_weights_and_is_that_of_the_model(dense, moefied):
    """Catches a plan of another model than the one that loads."""
    for source in (dense, moefied):
        assert isinstance(source, ModelSource)
        manifest, model = source.manifest(), source.load(jnp.bfloat16)
        assert manifest.spec == model.spec
        assert set(manifest.formats) == set(parameters(model))
    assert {type(layer.ffn) for layer in moefied.manifest().spec.layers} == {MoESpec}


def test_what_is_cut_otherwise_is_another_model(dense, moefied):
    """Catches a hash or a name that does not say how the model was split."""
    other = MoEfied(model=dense, experts=3, top_k=2, split=RandomSplit(), seed=1)
    assert other.manifest().sha256 != moefied.manifest().sha256 != dense.manifest().sha256
    assert len({other.path, moefied.path, dense.path}) == 3


def test_weights_are_rounded_to_what_will_be_stored(dense, moefied):
    """Catches a model measured at a precision in which it is not saved."""
    for source in (dense, moefied):
        for weight in parameters(source.load(jnp.bfloat16)).values():
            assert weight.dtype == jnp.float32
            np.testing.assert_array_equal(weight, weight.astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.slow
def test_a_compressed_split_model_is_saved_whole(dense, folder):
    """Catches a saved copy that lost its experts or comes back with another tokenizer."""
    text = Text(bytes_per_group=600, window=32, batch=16)
    calibration = Text(bytes_per_group=600, skip_bytes=600, window=32, batch=16)
    job = Compress(
        model=MoEfied(model=dense, experts=3, top_k=3, split=Contiguous()),
        recipe=(Quantize(grid=SymmetricGrid(bits=4, group=32)),),
        text=text,
        calibration=calibration,
    )
    job.run(folder)
    saved = SavedModel(path=str(folder.model))
    assert saved.tokenizer().sha256 == dense.tokenizer().sha256
    assert saved.manifest().facts["tokenizer"] == dense.tokenizer().sha256
    assert saved.load(jnp.bfloat16).spec == job.model.manifest().spec
    arms = StudyResult.load(folder.results_path)
    assert arms.arm("compressed").stored_bytes < arms.arm("base").stored_bytes


def test_unprompted_windows_score_all_but_their_first_token():
    """Catches targets that are their own inputs, a first token that counts, and bits per byte over
    bytes of tokens that were not scored."""
    how = {"bytes_per_group": 3000, "window": 32, "batch": 4}
    plain, sizes = Text(**how).batches()
    bare, scored_sizes = UnpromptedText(**how).batches()
    assert "first token" in UnpromptedText(**how).windowing
    for group, size in sizes.items():
        tokens = sum(int(b.mask_BxS.sum()) for b in plain if b.group == group)
        windows = -(-tokens // 32)
        assert scored_sizes[group] == round(size * (tokens - windows) / tokens)
    for with_end, without in zip(plain, bare, strict=True):
        np.testing.assert_array_equal(without.tokens_BxS, with_end.tokens_BxS[:, 1:])
        np.testing.assert_array_equal(without.targets_BxS, with_end.targets_BxS[:, 1:])
        np.testing.assert_array_equal(without.mask_BxS, with_end.mask_BxS[:, 1:])
    with pytest.raises(SpecError, match="window = 1"):
        UnpromptedText(corpus=HeldoutSample(), window=1)


def test_shipped_configs_name_the_model():
    """Catches a config whose names no longer bind."""
    for name, arms in (("evaluate/smollm2.gin", 1), ("compress/smollm2_moefied.gin", 5)):
        job = load_config(name).job()
        assert isinstance(job, Study) and len(job.arms) == arms
        source = job.arms[-1].model
        dense = source.model if isinstance(source, MoEfied) else source
        assert dense == GGUFModel(path="smollm2_135m")


def test_a_file_that_is_not_there_is_named():
    """Catches a bare FileNotFoundError, and an asset's name taken for any."""
    with pytest.raises(CheckpointError, match="botocore"):
        GGUFModel(path="botocore").manifest()


def test_more_experts_on_than_there_are_is_refused(dense):
    """Catches an error that waits for the weights."""
    with pytest.raises(SpecError, match="MoEfied.top_k = 9"):
        MoEfied(model=dense, experts=8, top_k=9)
