"""Routing: the k best experts of every token, and the order that groups assignments by expert."""

from moejax_kernels.route.api import BACKENDS, Order, route, sort_by_expert

__all__ = ["BACKENDS", "Order", "route", "sort_by_expert"]
