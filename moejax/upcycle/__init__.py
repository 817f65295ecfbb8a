"""Upcycling: Mixture-of-Experts models made of dense ones."""

# Neurons dealt to experts
from moejax.upcycle.split import BalancedKMeans, Contiguous, RandomSplit, Split

# MoEfication
from moejax.upcycle.moefy import CentreRouting, RouterStart, ZeroRouting, moefied_spec, moefy

__all__ = [
    "BalancedKMeans",
    "CentreRouting",
    "Contiguous",
    "RandomSplit",
    "RouterStart",
    "Split",
    "ZeroRouting",
    "moefied_spec",
    "moefy",
]
