"""Our kernels beside their peers: `python -m experiments.benchmarks --help`."""
