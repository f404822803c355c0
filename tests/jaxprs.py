# SPDX-License-Identifier: Apache-2.0
"""What arrays a computation makes: the search for logits of all tokens."""

import jax
import numpy as np


def equations(jaxpr):
    """All equations of a jaxpr and of every jaxpr inside its equations' parameters."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def shapes(function, *arguments):
    """The shapes of all arrays in the jaxpr of a call."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return {tuple(v.aval.shape) for eqn in equations(jaxpr) for v in (*eqn.invars, *eqn.outvars) if hasattr(v, "aval")}


def all_logits(found, rows, length, vocab):
    """The shapes that hold at least as many logits as a whole batch has: `vocab` times (nearly) all tokens."""
    return {shape for shape in found if vocab in shape and np.prod(shape) >= vocab * rows * length}
