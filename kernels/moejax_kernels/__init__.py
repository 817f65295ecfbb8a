"""Kernels of Mixture-of-Experts models: one folder per op, each with an oracle and a portable path.

| op | what it does | kernels of its own |
| `route` | the best experts of a token, and the order by expert from one sort | |
| `permute` | rows into expert order and back, gathers in both directions | |
| `grouped_matmul` | rows by group times their expert, experts in any format | TPU, GPU |
| `gated_grouped_matmul` | gate, up and activation in one pass over the rows | TPU |
| `quantized_grouped_matmul` | experts of 1 to 8 bits as packed, a low-rank term fused | TPU |
| `lowrank_grouped_matmul` | experts as two factors | |
| `grouped_outer` | second moments of the rows of each expert | |

`backend=None` always works. `aot` compiles for TPUs and an H100 without one and reads the schedule,
`chips` knows their rates, `shapes` the dimensions of real models. Imports jax and numpy only.
"""
