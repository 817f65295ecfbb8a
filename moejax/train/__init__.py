"""Training: objective, optimizer, step and loop."""

from moejax.train.channel_pruning import PrunesChannels, channels_left
from moejax.train.loop import BatchSource, Evaluator, Schedule, train
from moejax.train.divergences import Divergence, ForwardKL, JensenShannon, ReverseKL
from moejax.train.objective import cross_entropy, output_table
from moejax.train.objectives import (
    CrossEntropy,
    FromExperts,
    FromHidden,
    FromLogits,
    Objective,
    Passed,
    Term,
    Together,
    check_objective,
)
from moejax.train.on_policy import OnPolicy
from moejax.train.optimizer import AdamW, Optimizer, is_matrix
from moejax.train.placement import MeshBatches, Placement, outline_on_mesh, start_on_mesh
from moejax.train.state import TrainState, start
from moejax.train.step import Step, StepMetrics, train_step
from moejax.train.straight_through import straight_through
from moejax.train.trainable import Adapters, Everything, Matching, Norms, RouterOnly, Trains

__all__ = [
    "AdamW",
    "Adapters",
    "BatchSource",
    "CrossEntropy",
    "Divergence",
    "Evaluator",
    "Everything",
    "ForwardKL",
    "FromExperts",
    "FromHidden",
    "FromLogits",
    "JensenShannon",
    "Matching",
    "MeshBatches",
    "Norms",
    "Objective",
    "OnPolicy",
    "Optimizer",
    "Passed",
    "Placement",
    "PrunesChannels",
    "ReverseKL",
    "RouterOnly",
    "Schedule",
    "Step",
    "StepMetrics",
    "Term",
    "Together",
    "TrainState",
    "Trains",
    "channels_left",
    "check_objective",
    "cross_entropy",
    "is_matrix",
    "outline_on_mesh",
    "output_table",
    "start",
    "start_on_mesh",
    "straight_through",
    "train",
    "train_step",
]
