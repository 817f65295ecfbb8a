"""The peak of an import of 2 GiB: `python large_import.py FOLDER` prints bytes above the start."""

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

from moejax.checkpoint.families import families
from moejax.files import write_safetensors
from tests.checkpoint.hf_folders import MIXTRAL

SHARD = 256 << 20
CONFIG = MIXTRAL | {
    "vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 3584, "num_local_experts": 8,
    "num_hidden_layers": 11, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip


def write_large(folder: Path) -> tuple[int, int]:
    """A bfloat16 Mixtral in shards; (bytes of its tensors, bytes of the largest shard)."""
    from moejax.checkpoint.config_reader import ConfigReader
    from moejax.checkpoint.coverage import bind, tensor_shape
    from moejax.models import abstract_model, parameters

    family = families()["mixtral"]
    spec = family.spec(ConfigReader(CONFIG))
    shapes = {name: tuple(a.shape) for name, a in parameters(abstract_model(spec)).items()}
    bits = np.random.default_rng(0).integers(0x3C00, 0x3F80, 1 << 26, np.uint16)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    place: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}
    sizes: list[int] = []

    def flush() -> None:
        file = f"model-{len(sizes) + 1:05d}.safetensors"
        write_safetensors(folder / file, shard)
        place.update(dict.fromkeys(shard, file))
        sizes.append(sum(a.nbytes for a in shard.values()))
        shard.clear()

    for name in shapes:
        rule = next(rule for rule in family.rules if rule.match(name))
        source = bind(name, shapes, spec, rule, *rule.match(name))
        shape = tensor_shape(source, shapes)
        for tensor in source.tensors:
            values = bits[: int(np.prod(shape))].view(ml_dtypes.bfloat16).reshape(shape)
            if shard and sum(a.nbytes for a in shard.values()) + values.nbytes > SHARD:
                flush()
            shard[tensor] = values
    flush()
    index = {"metadata": {}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(sizes), max(sizes)


def resident(field: str) -> int:
    """A line of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    import jax

    from moejax.checkpoint import import_model

    jax.block_until_ready(jax.numpy.ones(3) + 1)
    before = resident("VmRSS:")
    model = import_model(sys.argv[1]).model
    jax.block_until_ready(jax.tree.leaves(model.embed.get_value()))
    print(resident("VmHWM:") - before)
