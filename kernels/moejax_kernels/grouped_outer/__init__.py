"""Grouped outer products: x^T y over the rows of each group, added up in place."""

from moejax_kernels.grouped_outer.api import grouped_outer

__all__ = ["grouped_outer"]
