# SPDX-License-Identifier: Apache-2.0
"""Sums per sequence, for rows that hold several: `segment_ids` [B, T] count from 1, 0 is padding.

A row of T tokens has at most T segments, so results are [B, T + 1], indexed by segment id, whatever the packing. Rows
never meet: under a mesh that shards B nothing moves between devices.
"""

import jax


def sums(values: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """[B, T + 1]: of `values` [B, T], the sum over each segment; 0 for segments that are not there."""
    return jax.vmap(lambda v, s: jax.ops.segment_sum(v, s, num_segments=v.shape[0] + 1))(values, segment_ids)


def spread(per_segment: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """[B, T]: each segment's value in [B, S] at all of its tokens."""
    return jax.vmap(lambda v, s: v[s])(per_segment, segment_ids)


def pairs(per_segment: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, P] each: the odd segments (1, 3, ...: chosen) and the even ones after them (rejected) of [B, S]."""
    count = (per_segment.shape[1] - 1) // 2
    return per_segment[:, 1 : 2 * count : 2], per_segment[:, 2 : 2 * count + 1 : 2]
