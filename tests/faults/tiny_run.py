"""A tiny training run that can be told to die: `python tiny_run.py FOLDER [STEP SIGNAL]`."""

import dataclasses
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moejax.data import train_tokenizer
from moejax.jobs.train import Train
from moejax.models import AttentionSpec, LayerSpec, ModelSpec
from moejax.moe import BiasedTopK, MoESpec, RouterSpec, SoftmaxGates, TopKLoadBalance
from moejax.runs import RunFolder
from moejax.train import AdamW

STEPS = 60


class Words:
    """Synthetic text in two groups of different words."""

    groups = ("a", "b")
    fingerprint = "words of the fault tests"

    def documents(self, group, split):
        generator = random.Random(f"{group}/{split}")
        words = [f"{group}{number:x}" for number in range(40)]
        for _ in range(60 if split == "train" else 6):
            yield " ".join(generator.choices(words, k=60))


class Fate:
    """A tracker that sends its own process a signal, in the middle of the step it is given."""

    def __init__(self, step: int, number: int):
        self.step, self.number = step, number

    def __call__(self, folder):
        return self

    def write(self, step, values):
        if step == self.step:
            os.kill(os.getpid(), self.number)

    def close(self):
        pass


def job(*trackers: Callable, **changes: Any) -> Train:
    """A run whose state holds everything a run can hold: Adam's moments, a router's bias, data."""
    corpus = Words()
    texts = (text for group in corpus.groups for text in corpus.documents(group, "train"))
    router = RouterSpec(selector=BiasedTopK(k=2), gates=SoftmaxGates(renormalise=True))
    mixer = AttentionSpec(heads=2, kv_heads=1, head_width=8)
    layer = LayerSpec(mixer=mixer, ffn=MoESpec(experts=4, width=8, router=router))
    job = Train(
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
        checkpoint_every=5,
        evaluate_bytes=1000,
        trackers=trackers,
    )
    return dataclasses.replace(job, **changes)


def run(path: Path, *fate: int) -> None:
    """Runs or resumes in a folder."""
    with RunFolder.create(path, "Train", "the fault tests", ["tiny_run.py"]) as folder:
        job(*([Fate(*fate)] if fate else [])).run(folder)


if __name__ == "__main__":
    run(Path(sys.argv[1]), *map(int, sys.argv[2:]))
