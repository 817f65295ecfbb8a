"""Calibrates a model of 100 million parameters: `python large_walk.py counts|moments CACHE`.

Prints the peak resident memory during the walk, above that of the loaded model, in bytes.
"""

import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.calibrate import Calibration, ExpertCounts, SecondMoments
from moejax.data import windows
from moejax.models import AttentionSpec, DecoderLM, LayerSpec, ModelSpec
from moejax.moe import MoESpec, RouterSpec, SoftmaxGates, TopK

EXPERTS, WIDTH, LAYERS = 64, 256, 8
MOMENTS = (SecondMoments(tap="expert_input"), SecondMoments(tap="expert_hidden"))
LARGEST = 2 * EXPERTS * WIDTH * WIDTH * 4  # bytes of the accumulators of one layer


def resident() -> int:
    """Bytes of anonymous memory: what is mapped from files is not the process's own."""
    fields = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in fields if line.startswith("RssAnon:"))


def peak_of(work) -> int:
    """The most that `work` held above what was there before."""
    before, seen, done = resident(), [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(resident())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    work()
    done.set()
    thread.join()
    return max(seen) - before


def run(accumulators, cache: Path) -> int:
    router = RouterSpec(selector=TopK(k=2), gates=SoftmaxGates(renormalise=True))
    layer = LayerSpec(
        mixer=AttentionSpec(heads=4, kv_heads=4, head_width=64),
        ffn=MoESpec(experts=EXPERTS, width=WIDTH, router=router),
    )
    spec = ModelSpec(vocab=512, width=WIDTH, layers=(layer,) * LAYERS)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: DecoderLM(spec, rngs=nnx.Rngs(0))))
    draw = np.random.default_rng(1)
    state = jax.tree.map(lambda s: jnp.asarray(draw.standard_normal(s.shape, np.float32)), shapes)
    model = nnx.merge(graphdef, jax.tree.map(lambda leaf: 0.05 * leaf, state))
    del state
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.split(model)[1])) > 100_000_000
    tokens = np.random.default_rng(0).integers(0, 512, 1024, np.int32)
    text = list(windows(tokens, 64, 4))
    # Compiled before anything is measured: the compiler's own memory is not the walk's.
    Calibration(text[:1], cache=cache / "first")(model, accumulators)
    return peak_of(lambda: Calibration(text, cache=cache / "whole")(model, accumulators))


if __name__ == "__main__":
    counts = sys.argv[1] == "counts"
    print(run((ExpertCounts(),) if counts else MOMENTS, Path(sys.argv[2])))
