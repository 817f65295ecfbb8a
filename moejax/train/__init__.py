"""Training: objective, optimizer, step and loop."""

from moejax.train.loop import BatchSource, Evaluator, Schedule, train
from moejax.train.objective import cross_entropy, output_table
from moejax.train.optimizer import AdamW, Optimizer, is_matrix
from moejax.train.step import Step, StepMetrics, TrainState, start, train_step

__all__ = [
    "AdamW",
    "BatchSource",
    "Evaluator",
    "Optimizer",
    "Schedule",
    "Step",
    "StepMetrics",
    "TrainState",
    "cross_entropy",
    "is_matrix",
    "output_table",
    "start",
    "train",
    "train_step",
]
