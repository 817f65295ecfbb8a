"""Hugging Face folders come in: every tensor where it belongs, every fault by its name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moejax import weights
from moejax.checkpoint import import_model
from moejax.checkpoint.families import families
from moejax.core import CheckpointError
from moejax.files import write_safetensors
from moejax.models import parameters
from moejax.weights import SymmetricGrid
from tests.checkpoint.hf_folders import MIXTRAL, E, F, L, mixtral_tensors, write_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tensors():
    return mixtral_tensors()


@pytest.fixture
def folder(tmp_path, tensors):
    return write_folder(tmp_path / "model", MIXTRAL, tensors)


def test_every_parameter_has_its_tensor(folder, tensors):
    """Catches w2 and w3 exchanged, experts or layers out of order, a matrix not transposed."""
    found = parameters(import_model(folder).model)
    for layer in range(L):
        at = f"model.layers.{layer}.block_sparse_moe"
        moe = f"layers.{layer}.moe"
        for e in range(E):
            for name, disk in {"gate": "w1", "down": "w2", "up": "w3"}.items():
                expected = tensors[f"{at}.experts.{e}.{disk}.weight"].T
                np.testing.assert_array_equal(found[f"{moe}.experts.{name}"][e], expected)
        np.testing.assert_array_equal(
            found[f"{moe}.router.scores.kernel"], tensors[f"{at}.gate.weight"].T
        )
        for name in "qkvo":
            disk = tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"]
            np.testing.assert_array_equal(found[f"layers.{layer}.attention.{name}"], disk.T)
    np.testing.assert_array_equal(found["embed"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(found["head"], tensors["lm_head.weight"].T)


def test_weights_are_cast_as_they_come(folder, tensors):
    """Catches a cast that truncates, and a dtype of the files that is not kept by default."""
    assert parameters(import_model(folder).model)["embed"].dtype == jnp.float32
    found = parameters(import_model(folder, dtype=jnp.bfloat16).model)["embed"]
    exact = tensors["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(found), exact)


def test_experts_are_quantized_as_they_come(folder, tensors):
    """Catches experts packed in another order, a router or attention quantized too."""
    grid = SymmetricGrid(bits=8, group=None)
    plain = parameters(import_model(folder).model)
    write_folder(folder, MIXTRAL | {"intermediate_size": 8}, widened(tensors, 8))
    plain = parameters(import_model(folder).model)
    found = parameters(import_model(folder, grid=SymmetricGrid(bits=8, group=None)).model)
    for name, weight in found.items():
        expected = grid(plain[name]) if ".experts." in name else plain[name]
        assert type(weight) is type(expected)
        np.testing.assert_array_equal(
            weights.materialize(weight), weights.materialize(expected), err_msg=name
        )


def widened(tensors, width):
    """The tensors with experts of another width, which 8-bit words fill."""
    random = np.random.default_rng(1)
    shape = lambda a: tuple(width if n == F else n for n in a.shape)
    return {
        name: random.normal(size=shape(a)).astype(a.dtype) if ".experts." in name else a
        for name, a in tensors.items()
    }


def test_a_tied_head_in_the_files_must_be_the_embedding(folder, tensors):
    """Catches a head of its own dropped because the config ties it."""
    tied = MIXTRAL | {"tie_word_embeddings": True}
    same = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    found = import_model(write_folder(folder, tied, same))
    assert [r.use for r in found.coverage.rows if r.tensor == "lm_head.weight"] == ["tied"]
    same["lm_head.weight"] = same["lm_head.weight"].copy()
    same["lm_head.weight"][-1, -1] += 1
    with pytest.raises(CheckpointError, match="differs from the embedding"):
        import_model(write_folder(folder, tied, same))


def test_the_account_names_every_tensor_and_parameter(folder, tensors, tmp_path):
    """Catches a coverage table with holes: tensors used twice, or parameters from nowhere."""
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    found = import_model(write_folder(folder, MIXTRAL, tensors | frequencies))
    rows = {row.tensor: row for row in found.coverage.rows}
    assert set(rows) == set(tensors | frequencies)
    assert [r.tensor for r in rows.values() if r.use == "ignored"] == list(frequencies)
    used = [name for source in found.coverage.sources.values() for name in source.tensors]
    assert sorted(used) == sorted(tensors)
    found.coverage.write(tmp_path / "coverage.tsv")
    text = (tmp_path / "coverage.tsv").read_text()
    assert all(name in text for name in [*tensors, *parameters(found.model), "bos_token_id"])


NAME = "model.layers.1.block_sparse_moe.experts.2.w2.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({NAME: None}, f"lack {NAME}"),
        ({NAME: np.ones((F, 12), np.float32)}, f"{NAME} has shape"),
        ({NAME: np.ones((12, F), np.int8)}, f"{NAME} has dtype int8"),
        ({NAME: np.ones((12, F), np.float64)}, f"{NAME} has dtype float64"),
        ({NAME: np.full((12, F), np.nan, np.float32)}, f"{NAME} holds 60"),
        ({"model.norm.weight": np.full(12, np.inf, np.float16)}, "model.norm.weight holds 12"),
        ({"model.layers.2.input_layernorm.weight": np.ones(12)}, "layers.2.input_layernorm"),
        ({"stray": np.ones(2)}, "belong to no parameter .* first stray"),
    ],
)
def test_a_fault_of_the_tensors_is_named(tmp_path, tensors, change, message):
    """Catches zeros for what is missing, a NaN let through, a leftover dropped in silence."""
    changed = {name: a for name, a in (tensors | change).items() if a is not None}
    with pytest.raises(CheckpointError, match=message):
        import_model(write_folder(tmp_path, MIXTRAL, changed))


def test_values_beyond_the_dtype_are_named(folder, tensors):
    """Catches infinities made by the cast itself."""
    large = tensors | {"model.norm.weight": np.full(12, 1e6, np.float32)}
    write_folder(folder, MIXTRAL, large)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight .* as float16"):
        import_model(folder, dtype=jnp.float16)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "nope"}, "model_type 'nope'"),
        ({"model_type": "nope", "auto_map": {"AutoModel": "evil.Model"}}, "code of its own"),
        ({"model_type": ["mixtral"]}, "model_type"),
        ({"num_key_value_heads": 3}, "describes no model"),
        ({"num_experts_per_tok": 9}, "describes no model"),
    ],
)
def test_a_config_that_cannot_be_is_refused(folder, config, message):
    """Catches a traceback for a config's fault, and remote code looked for."""
    (folder / "config.json").write_text(json.dumps(MIXTRAL | config))
    with pytest.raises(CheckpointError, match=message) as caught:
        import_model(folder)
    if config.get("model_type") == "nope":
        assert all(name in caught.value.fix for name in families())


def test_known_families_come_in_whatever_code_lies_beside(folder):
    """Catches remote code that runs, or that keeps a known model out."""
    code = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
    (folder / "modeling.py").write_text(code)
    config = MIXTRAL | {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert import_model(folder).family.name == "mixtral"
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 20_000, "3"])
def test_a_damaged_config_is_named(folder, text):
    """Catches raw JSON errors."""
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        import_model(folder)


def test_float8_and_halves_come_in_together(tmp_path, tensors):
    """Catches scales left out of the account, or the default dtype taken from the codes."""
    name = "model.layers.0.self_attn.q_proj.weight"
    halves = {n: a.astype(np.float16) for n, a in tensors.items()}
    halves[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    halves[f"{name}_scale_inv"] = np.full((1, 1), 2, np.float32)
    found = import_model(write_folder(tmp_path, MIXTRAL, halves))
    expected = halves[name].astype(np.float32).T * 2
    q = parameters(found.model)["layers.0.attention.q"]
    assert q.dtype == np.float16
    np.testing.assert_array_equal(q, expected)
    assert [r.use for r in found.coverage.rows if name in r.tensor] == ["used"] * 2


def test_float8_of_another_block_is_refused(tmp_path, tensors):
    """Catches scales of blocks of 64 spread over 128, which their shape alone need not show."""
    config = MIXTRAL | {"quantization_config": {"weight_block_size": [64, 64]}}
    with pytest.raises(CheckpointError, match=r"weight_block_size = \[64, 64\]"):
        import_model(write_folder(tmp_path, config, tensors))
    config["quantization_config"] = {"weight_block_size": [128, 128], "quant_method": "fp8"}
    import_model(write_folder(tmp_path, config, tensors))


def child(script: str, *arguments: str, **environment: str) -> str:
    """What a script of this folder prints, in a process of its own."""
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "JAX_PLATFORMS": "cpu",
        "MALLOC_MMAP_THRESHOLD_": "1000000",  # so that what is freed is given back
        **environment,
    }
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_each_device_gets_its_part(folder):
    """Catches shards filled with another device's experts or rows."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=6"
    assert child("sharded_import.py", str(folder), XLA_FLAGS=flags) == "equal"


@pytest.mark.slow
def test_a_large_import_stays_in_its_bound(tmp_path):
    """Catches a second copy of the model: layers stacked after loading, files read whole, a cast
    of everything at once. Peak: the model as it becomes, one shard, and a fifth of the model."""
    from tests.checkpoint.large_import import write_large

    total, shard = write_large(tmp_path)
    assert total >= 2 << 30
    for bits in ((), ("4",)):
        size, peak = map(int, child("large_import.py", str(tmp_path), *bits).split())
        print(f"model {size:,}, largest shard {shard:,}, peak above the start {peak:,} bytes")
        assert size == total if not bits else size < total / 3
        assert size <= peak + (64 << 20)  # or nothing was measured
        assert peak <= size + shard + size // 5


def test_a_file_is_never_read_before_all_is_accounted_for(folder, tensors, monkeypatch):
    """Catches gigabytes read before the last tensor is found to be missing."""
    write_safetensors(folder / "model.safetensors", {**tensors, "stray": np.ones(1)})
    monkeypatch.setattr(np, "fromfile", lambda *_, **__: pytest.fail("data was read"))
    with pytest.raises(CheckpointError, match="stray"):
        import_model(folder)
