"""Kernels of moejax: one folder per op, each with an oracle and a portable fast path.

Imports jax and numpy only. Today: `moejax_kernels.grouped_matmul`, `moejax_kernels.grouped_outer`.
"""
