"""Training: objective, optimizer, step and loop."""

from moejax.train.loop import BatchSource, Evaluator, Schedule, train
from moejax.train.objective import cross_entropy, output_table
from moejax.train.optimizer import AdamW, Optimizer, is_matrix
from moejax.train.placement import MeshBatches, Placement, outline_on_mesh, start_on_mesh
from moejax.train.state import TrainState, start
from moejax.train.step import Step, StepMetrics, train_step

__all__ = [
    "AdamW",
    "BatchSource",
    "Evaluator",
    "MeshBatches",
    "Optimizer",
    "Placement",
    "Schedule",
    "Step",
    "StepMetrics",
    "TrainState",
    "cross_entropy",
    "is_matrix",
    "outline_on_mesh",
    "output_table",
    "start",
    "start_on_mesh",
    "train",
    "train_step",
]
