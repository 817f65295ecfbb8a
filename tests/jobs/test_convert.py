"""moejax convert: in and out again, with the tokenizer; imported models in studies."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.checkpoint import load_model, read_manifest, save_model
from moejax.compress import Frequency, Quantize
from moejax.core import CheckpointError, ConfigError, DataError, RunError
from moejax.data import HeldoutSample, shipped_tokenizer, train_tokenizer
from moejax.files import open_tensors
from moejax.jobs.convert import convert
from moejax.jobs.model_source import ImportedModel, ModelSource, SavedModel
from moejax.jobs.study import Arm, Compress, Study
from moejax.jobs.text import Text
from moejax.models import parameters
from moejax.weights import SymmetricGrid
from tests.checkpoint.hf_folders import MIXTRAL, mixtral_tensors, write_folder

TEXT = Text(corpus=HeldoutSample(), bytes_per_group=2_000, window=32, batch=8)
CALIBRATION = Text(corpus=HeldoutSample(), bytes_per_group=2_000, skip_bytes=30_000, window=32)


@pytest.fixture(scope="module")
def tensors():
    return mixtral_tensors(np.float16)


@pytest.fixture(scope="module")
def texts():
    return [text for group in TEXT.corpus.groups for text in TEXT.documents(group)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, texts):
    """A Mixtral of 300 tokens with a tokenizer of its own, whose documents end with </s>."""
    path = tmp_path_factory.mktemp("hf")
    sizes = {"vocab_size": 300}
    random = np.random.default_rng(3)
    tensors = mixtral_tensors()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = random.normal(size=(300, 12)).astype(np.float32)
    write_folder(path, MIXTRAL | sizes, tensors)
    train_tokenizer(texts, 300).save(path / "tokenizer.json")
    text = (path / "tokenizer.json").read_text().replace("<|endoftext|>", "</s>")
    (path / "tokenizer.json").write_text(text)
    (path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    return path


def test_a_folder_goes_in_and_out_unchanged(tmp_path, folder):
    """Catches a conversion that loses a tensor, its dtype, the config or the tokenizer."""
    said = convert(folder, tmp_path / "in")
    assert "mixtral" in said and "0 ignored" in said
    assert (tmp_path / "in" / "coverage.tsv").is_file()
    facts = read_manifest(tmp_path / "in").facts
    assert facts["family"] == "mixtral"
    assert facts["tokenizer"] == SavedModel(path=str(tmp_path / "in")).tokenizer().sha256
    convert(tmp_path / "in", tmp_path / "out", shard_bytes=10_000)
    before, after = open_tensors(folder), open_tensors(tmp_path / "out")
    assert set(before) == set(after) and len(after.files) > 1
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name].read(), tensor.read())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["bos_token_id"] == 1
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_dtype_and_grid_are_of_the_result(tmp_path, tensors):
    """Catches options that are parsed and left out."""
    source = write_folder(tmp_path / "hf", MIXTRAL, tensors)
    convert(source, tmp_path / "in", dtype="bfloat16")
    assert parameters(load_model(tmp_path / "in", dtype=None))["embed"].dtype == jnp.bfloat16
    with pytest.raises(CheckpointError, match="goes out as it is"):
        convert(tmp_path / "in", tmp_path / "out", grid=SymmetricGrid(bits=4, group=None))
    with pytest.raises(CheckpointError, match="comes in"):
        convert(source, tmp_path / "out", family="llama")
    with pytest.raises(CheckpointError, match="no family 'nope'"):
        convert(tmp_path / "in", tmp_path / "out", family="nope")
    with pytest.raises(RunError, match="there already"):
        convert(source, tmp_path / "in")
    with pytest.raises(ConfigError, match="Frequency.* is no grid"):
        convert(source, tmp_path / "out", grid=Frequency())
    with pytest.raises(ConfigError, match="files of 0 bytes"):
        convert(tmp_path / "in", tmp_path / "out", shard_bytes=0)
    with pytest.raises(CheckpointError, match="neither"):
        convert(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_of_the_shipped_tokenizer_goes_out_with_it(tmp_path, saved):
    """Catches folders that transformers loads and cannot give a word to."""
    model, shipped = load_model(saved["moe"], dtype=None), shipped_tokenizer()
    save_model(tmp_path / "in", model, facts={"tokenizer": shipped.sha256})
    convert(tmp_path / "in", tmp_path / "out")
    found = ImportedModel(path=str(tmp_path / "out")).tokenizer()
    assert found.sha256 == shipped.sha256
    assert found.end_of_document == shipped.end_of_document
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {
        "eos_token": "<|endoftext|>"
    }
    convert(Path(saved["moe"]), tmp_path / "unknown")
    assert not (tmp_path / "unknown" / "tokenizer.json").exists()


def test_a_model_without_its_tokenizer_is_not_read_with_another(tmp_path, tensors, saved):
    """Catches an imported model whose text is cut by the tokenizer that happens to ship: ids within
    its vocabulary, and a perplexity of nothing."""
    source = write_folder(tmp_path / "hf", MIXTRAL, tensors)
    convert(source, tmp_path / "in")
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        SavedModel(path=str(tmp_path / "in")).tokenizer()
    model = load_model(saved["moe"], dtype=None)
    save_model(tmp_path / "same size", model, facts={"family": "mixtral"})
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        SavedModel(path=str(tmp_path / "same size")).tokenizer()
    assert SavedModel(path=saved["moe"]).tokenizer().sha256 == shipped_tokenizer().sha256


def test_a_recipe_runs_on_an_imported_model(folder_run, folder):
    """Catches studies that read an imported model's text with the tokenizer that ships."""
    model = ImportedModel(path=str(folder))
    assert isinstance(model, ModelSource)
    recipe = (Quantize(grid=SymmetricGrid(bits=4, group=None), parameters="*.attention.o"),)
    job = Compress(model=model, recipe=recipe, text=TEXT, calibration=CALIBRATION)
    assert "attention.o" in str(job.plan())
    job.run(folder_run)
    saved = read_manifest(folder_run.model)
    assert saved.formats["layers.0.attention.o"]["format"] == "Packed"
    result = json.loads(folder_run.results_path.read_text())
    assert result["protocol"]["tokenizer"] == model.tokenizer().sha256
    assert model.tokenizer().sha256 != shipped_tokenizer().sha256
    assert all(np.isfinite(arm["average"]["perplexity"]) for arm in result["arms"])


def test_models_of_two_tokenizers_are_not_compared(folder_run, folder, saved):
    """Catches perplexities per token of two vocabularies side by side."""
    arms = (
        Arm(name="a", model=SavedModel(path=saved["moe"])),
        Arm(name="b", model=ImportedModel(path=str(folder))),
    )
    with pytest.raises(ConfigError, match="tokenizer"):
        Study(arms=arms, text=TEXT, calibration=CALIBRATION).run(folder_run)


def test_documents_end_with_the_folder_s_own_token(folder):
    """Catches an end of document that the model never saw."""
    tokenizer = ImportedModel(path=str(folder)).tokenizer()
    assert tokenizer.decode([tokenizer.end_of_document]) == "</s>"
    assert tokenizer.encode_documents(["a"])[-1] == tokenizer.end_of_document


@pytest.fixture
def folder_run(tmp_path):
    from moejax.runs import RunFolder

    return RunFolder.create(tmp_path / "run", "Compress", "run.job = @Compress()\n", ["moejax"])
