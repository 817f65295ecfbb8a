"""moejax: research on Mixture-of-Experts models in JAX, from a gin file to an honest number."""

__version__ = "0.1.0"
