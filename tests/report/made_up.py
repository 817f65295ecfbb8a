"""Synthetic run folders, made up for the tests: no number in them was measured."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from moejax.runs import (
    ArmResult,
    DomainScore,
    Ledger,
    LedgerRow,
    Metrics,
    RunFolder,
    StudyResult,
    Verdict,
)

GROUPS = ("docs", "code", "scripture_en", "scripture_other")
BYTES, TOKENS = 262_144, 71_003


def made_up_score(group: str, bits: float, base: float | None, groups: int = 1) -> DomainScore:
    size, tokens = BYTES * groups, TOKENS * groups
    nll = bits * math.log(2) * size
    delta = None if base is None else (bits - base) * math.log(2) * size / tokens
    return DomainScore(
        group=group,
        tokens=tokens,
        bytes=size,
        nll_sum=nll,
        bits_per_byte=bits,
        perplexity=math.exp(nll / tokens),
        kl=None if base is None else 1.7 * abs(bits - base),
        agreement=None if base is None else 1 - abs(bits - base),
        delta_nll=delta,
        delta_stderr=None if base is None else 0.0021,
        tokens_per_second=5210.0,
    )


def made_up_arm(name: str, stored: int, loss: float | None, bits: float) -> ArmResult:
    levels = {group: 1.2 + 0.15 * i for i, group in enumerate(GROUPS)}
    scores = tuple(
        made_up_score(g, level + (loss or 0), None if loss is None else level)
        for g, level in levels.items()
    )
    mean = sum(levels.values()) / len(levels)
    return ArmResult(
        name=name,
        base=None if loss is None else "dense",
        passes=() if loss is None else ("GPTQ(bits=3)", "Permute"),
        code_bits=bits,
        bits_per_weight=bits + (0.25 if loss is not None else 0),
        stored_bytes=stored,
        expert_bytes=int(stored * 0.83),
        parameters=6_300_000,
        domains=scores,
        average=made_up_score("average", mean + (loss or 0), None if loss is None else mean, 4),
        seconds=41.5,
    )


def made_up_study(arms: tuple[ArmResult, ...] | None = None, layers: int = 6) -> StudyResult:
    rng = np.random.default_rng(0)
    shares = [None, *rng.dirichlet(np.ones(8), size=(layers - 1, len(GROUPS)))]
    return StudyResult(
        protocol={
            "text": "held-out slice of the pip corpus",
            "bytes_per_group": BYTES,
            "window": 512,
            "tokenizer_sha256": "5e1f" * 16,
            "model_sha256": "ab09" * 16,
            "seeds": [0, 1, 2],
            "dtype": "float32",
            "device": "cpu",
        },
        arms=arms
        or (
            made_up_arm("dense", 25_296_128, None, 32.0),
            made_up_arm("RTN 8 bit", 7_412_992, 0.0004, 8.0),
            made_up_arm("RTN 4 bit", 4_302_848, 0.0312, 4.0),
            made_up_arm("GPTQ 4 bit", 4_302_850, 0.0101, 4.0),
            made_up_arm("GPTQ 3 bit", 3_539_072, 0.0467, 3.0),
            made_up_arm("RTN 3 bit", 3_539_072, 0.1398, 3.0),
            made_up_arm("PMQ 2.5 bit", 3_120_128, 0.0924, 2.5),
            made_up_arm("GPTQ 2 bit", 2_741_504, 0.3917, 2.0),
        ),
        baselines={"xz -9e": dict.fromkeys(GROUPS, 1.951)},
        verdicts=(
            Verdict(
                "GPTQ loses less than RTN at 3 bits", True, "0.0467 against 0.1398 bits per byte."
            ),
            Verdict("2 bits stay below 0.3", False, "0.3917 bits per byte."),
        ),
        specialisation=tuple(None if s is None else tuple(map(tuple, s.tolist())) for s in shares),
    )


def made_up_ledger(arms: list[str], layers: int = 6, experts: int = 8) -> Ledger:
    rng, ledger = np.random.default_rng(1), Ledger()
    for k, arm in enumerate(arms):
        for layer in range(1, layers):
            tokens = rng.zipf(1.4, experts).clip(1, 4000) * 13
            if layer == 3:
                tokens[2], tokens[6] = 0, 5
            for expert in range(experts):
                for matrix in ("gate", "up", "down"):
                    gone = layer == 4 and expert == 1
                    ledger.add(
                        [
                            LedgerRow(
                                arm=arm,
                                pass_name="GPTQ",
                                layer=layer,
                                expert=expert,
                                matrix=matrix,
                                tokens=int(tokens[expert]),
                                gate_mass=float(tokens[expert]) * 0.4,
                                code_bits=None if gone else float(2 + (expert + k) % 3),
                                stored_bytes=0 if gone else 4096 * (2 + (expert + k) % 3),
                                relative_error=None
                                if gone
                                else 0.04 * (1 + k) * float(rng.uniform(0.5, 1.5)),
                                fallback="rounded to nearest" if tokens[expert] == 0 else None,
                                dead=bool(tokens[expert] == 0),
                                calibrated=bool(tokens[expert] > 50),
                                lineage=("dropped",) if gone else (),
                            )
                        ]
                    )
    return ledger


def made_up_run(path: Path, study: StudyResult, ledger: Ledger | None = None) -> RunFolder:
    run = RunFolder.create(
        path, "compress", "Compress.recipe = [@GPTQ()]\n", ["moejax", "run", "x.gin"]
    )
    study.save(run.results_path)
    if ledger is not None:
        ledger.save(run.ledger_path)
    run.finish()
    return run


def made_up_training(path: Path, steps: int = 400) -> RunFolder:
    rng = np.random.default_rng(2)
    run = RunFolder.create(path, "train", "Train.steps = 400\n", ["moejax", "run", "train.gin"])
    with Metrics(run) as metrics:
        for step in range(steps):
            progress = (step + 1) / steps
            loss = 8.0 * math.exp(-4 * progress) + 2.0 + rng.normal() * 0.08
            loads = {f"load_max_over_mean/layer_{i}": 1.2 + rng.uniform() for i in range(4)}
            entropies = {f"load_entropy/layer_{i}": 0.9 + 0.1 * rng.uniform() for i in range(4)}
            metrics.write(
                step,
                tokens=8192 * (step + 1),
                loss=math.nan if step == 7 else loss,
                learning_rate=3e-3 * math.sin(math.pi * progress),
                tokens_per_second=11_000 + 500 * rng.normal(),
                **loads,
                **entropies,
            )
            if step % 50 == 49:
                bits = {
                    f"bits_per_byte/{g}": 1.4 + 0.2 * i + 2 * math.exp(-4 * progress)
                    for i, g in enumerate(GROUPS)
                }
                metrics.write(step, **bits)
    run.finish()
    return run
