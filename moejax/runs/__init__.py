"""Run folders: provenance, metrics, ledgers, results and progress; knows nothing of models."""

from moejax.runs.folder import FAILED, FINISHED, INTERRUPTED, RUNNING, RunFolder, config_hash
from moejax.runs.ledger import Ledger, LedgerRow
from moejax.runs.metrics import Metrics, NoMetrics, read_metrics
from moejax.runs.progress import Progress, duration, progress
from moejax.runs.provenance import device_facts, git_state, versions
from moejax.runs.results import AVERAGE, ArmResult, DomainScore, StudyResult, Verdict
from moejax.runs.trackers import TensorBoard, Tracker

__all__ = [
    "AVERAGE",
    "FAILED",
    "FINISHED",
    "INTERRUPTED",
    "RUNNING",
    "ArmResult",
    "DomainScore",
    "Ledger",
    "LedgerRow",
    "Metrics",
    "NoMetrics",
    "Progress",
    "RunFolder",
    "StudyResult",
    "TensorBoard",
    "Tracker",
    "Verdict",
    "config_hash",
    "device_facts",
    "duration",
    "git_state",
    "progress",
    "read_metrics",
    "versions",
]
