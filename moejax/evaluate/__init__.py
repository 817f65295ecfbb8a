"""Evaluation on held-out text: likelihood, and distance from a base model, window by window."""

from moejax.evaluate.evaluation import evaluate
from moejax.evaluate.scores import PairedSums, Scores, WindowSums, specialisation

__all__ = ["PairedSums", "Scores", "WindowSums", "evaluate", "specialisation"]
