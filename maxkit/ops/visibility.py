# SPDX-License-Identifier: Apache-2.0
"""Who may see whom in attention, in a form that dense masks and kernels that make their own masks both read.

Causality goes by position, not by place in the row: a query sees the keys whose position is not after its own. Kernels
go by place. The two agree where positions count up by one inside each segment and segments lie one after another, which
is what packing makes; `Visibility.in_order` says whether a row is like that.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Span:
    """How far back a layer looks: at most `sliding_window - 1` tokens, or not beyond its own `chunk_size` positions."""

    sliding_window: int | None = None
    chunk_size: int | None = None

    @property
    def reach(self) -> int | None:
        """A query sees at most this many keys, itself included; None: no limit."""
        limits = [limit for limit in (self.sliding_window, self.chunk_size) if limit is not None]
        return min(limits, default=None)


WHOLE_ROW = Span()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visibility:
    """Positions and segments of queries and keys.

    query_positions, key_positions: [B, T] and [B, S]; without the second the keys are the queries' own tokens. Segments
    likewise: 0 is padding, equal segments see each other; without any, a row is one segment. An empty cache slot has
    position -1. extra: [B, T, S], True where attention is allowed, besides all that.
    """

    query_positions: jax.Array
    key_positions: jax.Array | None = None
    query_segments: jax.Array | None = None
    key_segments: jax.Array | None = None
    extra: jax.Array | None = None

    @property
    def own_keys(self) -> bool:
        """Whether the keys are the queries' own tokens: no cache."""
        return self.key_positions is None

    def mask(self, span: Span = WHOLE_ROW) -> jax.Array:
        """[B, T, S] bool: causal, inside the segment, inside the span."""
        query = self.query_positions[:, :, None]
        key = (self.query_positions if self.own_keys else self.key_positions)[:, None, :]
        allowed = (key <= query) & (key >= 0)
        if span.sliding_window is not None:
            allowed &= key > query - span.sliding_window
        if span.chunk_size is not None:
            allowed &= key // span.chunk_size == query // span.chunk_size
        if self.query_segments is not None:
            key_segments = self.query_segments if self.own_keys else self.key_segments
            allowed &= self.query_segments[:, :, None] == key_segments[:, None, :]
        if self.extra is not None:
            allowed &= self.extra
        return allowed

    def in_order(self) -> jax.Array:
        """[B] bool: positions count up by one inside each segment, and no segment begins twice (padding may)."""
        steps = self.query_positions[:, 1:] - self.query_positions[:, :-1]
        if self.query_segments is None:
            return jnp.all(steps == 1, axis=1)
        segments = self.query_segments
        before, after = segments[:, :-1], segments[:, 1:]
        begins = after > jax.lax.cummax(segments, axis=1)[:, :-1]  # segments are numbered in the order of the row
        return jnp.all((after == 0) | jnp.where(before == after, steps == 1, begins), axis=1)

    def segments(self, span: Span = WHOLE_ROW) -> jax.Array | None:
        """[B, T] int32, equal for tokens of one segment and, where there are chunks, of one chunk; None: all of one.

        In a row that is `in_order`, a query sees those before it with its own number, within the window.
        """
        if span.chunk_size is None:
            return self.query_segments
        changes = self.query_positions[:, 1:] // span.chunk_size != self.query_positions[:, :-1] // span.chunk_size
        if self.query_segments is not None:
            changes |= self.query_segments[:, 1:] != self.query_segments[:, :-1]
        return jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
