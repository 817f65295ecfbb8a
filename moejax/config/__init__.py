"""Configs: gin files in, jobs out. The only folder that imports gin.

gin's parser reads the files; the bindings live in a `Config`, not in gin's process-wide registry,
so that parses do not leak into each other and every value keeps its file and line.
"""

from moejax.config.parse import Config, load_config
from moejax.config.registry import register

__all__ = ["Config", "load_config", "register"]
