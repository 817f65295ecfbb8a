"""Logical axis names of parameters; a mesh maps them to device axes in one place."""

EXPERT = "expert"
EMBED = "embed"  # D, the model width
