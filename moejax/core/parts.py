"""Names of the parts of a model under which its operations are traced.

`jax.named_scope` carries them into compiled programs, where profiles and rooflines find them. The
kernels of `moejax_kernels.permute` and `.route` say "dispatch" themselves.
"""

from __future__ import annotations

import re

ATTENTION, ROUTER, DISPATCH, EXPERTS = "attention", "router", "dispatch", "experts"
FFN, HEAD = "dense ffn", "head"
OPTIMIZER, REST = "optimizer", "rest"
PARTS = (ATTENTION, ROUTER, DISPATCH, EXPERTS, FFN, HEAD)
_NAMED = re.compile(rf"(?:^|[/(])({'|'.join(PARTS)})(?=[/)]|$)")
_DIFFERENTIATED = re.compile(r"\bjvp\(")


def of_scope(scope: str, *, trains: bool = False) -> str:
    """The innermost part that a scope such as "jit(step)/jvp()/while/body/attention/dot" names.

    trains: whether the program is a training step, of which all that is not differentiated is the
    optimizer's. What belongs to no part (norms, residuals, slices of stacked layers) is the rest.
    """
    named = _NAMED.findall(scope)
    if named:
        return named[-1]
    return OPTIMIZER if trains and scope and not _DIFFERENTIATED.search(scope) else REST
