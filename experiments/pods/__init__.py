"""Shipped models on pods that nobody has to rent first: compiled, and beside plain rivals."""
