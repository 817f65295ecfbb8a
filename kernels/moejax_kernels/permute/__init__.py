"""Tokens to rows in expert order and back, by gathers in both directions and both passes."""

from moejax_kernels.permute.api import BACKENDS, PLACES, permute, unpermute

__all__ = ["BACKENDS", "PLACES", "permute", "unpermute"]
