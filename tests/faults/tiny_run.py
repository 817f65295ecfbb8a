"""A tiny training run as a process of its own: `python tiny_run.py FOLDER`, to be killed."""

import random
import sys
from pathlib import Path

from moejax.data import train_tokenizer
from moejax.jobs.train import Train
from moejax.models import AttentionSpec, LayerSpec, ModelSpec
from moejax.moe import BiasedTopK, MoESpec, RouterSpec, SoftmaxGates, TopKLoadBalance
from moejax.runs import RunFolder
from moejax.train import AdamW

STEPS = 120


class Words:
    """Synthetic text in two groups of different words."""

    groups = ("a", "b")
    fingerprint = "words of the fault tests"

    def documents(self, group, split):
        generator = random.Random(f"{group}/{split}")
        words = [f"{group}{number:x}" for number in range(40)]
        for _ in range(60 if split == "train" else 6):
            yield " ".join(generator.choices(words, k=60))


def job() -> Train:
    """A run whose state holds everything a run can hold: Adam's moments, a router's bias, data."""
    corpus = Words()
    texts = (text for group in corpus.groups for text in corpus.documents(group, "train"))
    router = RouterSpec(selector=BiasedTopK(k=2), gates=SoftmaxGates(renormalise=True))
    mixer = AttentionSpec(heads=2, kv_heads=1, head_width=8)
    layer = LayerSpec(mixer=mixer, ffn=MoESpec(experts=4, width=8, router=router))
    return Train(
        model=ModelSpec(vocab=280, width=16, layers=(layer, layer)),
        corpus=corpus,
        tokenizer=train_tokenizer(texts, 280),
        steps=STEPS,
        batch=4,
        length=16,
        optimizer=AdamW(warmup=5),
        losses=(TopKLoadBalance(weight=0.01),),
        save_dtype="float32",
        log_every=1,
        checkpoint_every=7,
        evaluate_bytes=1000,
    )


if __name__ == "__main__":
    folder = RunFolder.create(Path(sys.argv[1]), "Train", "the fault tests", sys.argv)
    with folder:
        job().run(folder)
