"""Logical axis names of parameters; `moejax.mesh.rules` maps them to axes of devices."""

EXPERT = "expert"  # E, the experts of a bank
EMBED = "embed"  # D, the model width
HIDDEN = "hidden"  # F of a dense or shared feed-forward
EXPERT_HIDDEN = "expert_hidden"  # F of routed experts
HEADS = "heads"  # H W, what queries, keys, values and the context are as wide as
VOCAB = "vocab"  # V
