# SPDX-License-Identifier: Apache-2.0
"""The decoder: embedding, layer groups, final norm, head. One class for every family.

- Pre-norm residual blocks: x + attention(norm(x)), then x + mlp(norm(x)).
- RMS norms and softmax in float32; activations in `Execution.dtype`; logits always float32.
- RoPE in float32. No dropout, no biases unless the config says so.
- A group's blocks run under `lax.scan` over stacked weights (axis 0), or one after another with weights of their own:
  the same code, the same values.

Deliberately absent: losses (`objectives`), sampling (`infer`), foreign weight names (`formats`). Next: `definition.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from maxkit import mesh, ops
from maxkit.models.attention import Attention, Context, write
from maxkit.models.config import BlockSpec, Execution, LayerGroup, ModelConfig
from maxkit.models.layers import Embedding, GatedMlp, Make, RMSNorm, normal
from maxkit.models.rope import rotations
from maxkit.types import Cache, Hidden

LayerCache = dict[str, jax.Array]


class Block(nnx.Module):
    """One transformer layer."""

    def __init__(self, config: ModelConfig, spec: BlockSpec, make: Make):
        self.attention_norm = RMSNorm(config.embed_dim, config.norm_eps, make.at("attention_norm"))
        self.attention = Attention(config, spec, make.at("attention"))
        self.mlp_norm = RMSNorm(config.embed_dim, config.norm_eps, make.at("mlp_norm"))
        self.mlp = GatedMlp(config, make.at("mlp"))

    def __call__(
        self, x: jax.Array, context: Context, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None, dict[str, jax.Array]]:
        """From x [B, T, D]: the new x, the layer's cache, and its statistics."""
        attended, cache = self.attention(self.attention_norm(x), context, cache)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), cache, {}


class Group(nnx.Module):
    """The blocks of one layer group: `block_{j}` stacked over the repeats, or `layer_{i}` one by one."""

    def __init__(self, config: ModelConfig, execution: Execution, group: LayerGroup, make: Make):
        self.scan, self.remat_policy = execution.scan_layers, execution.remat_policy
        self.repeats = group.repeats
        names = []
        for j, spec in enumerate(group.pattern):
            numbers = group.layer_numbers(j)
            if self.scan:
                setattr(self, f"block_{j}", Block(config, spec, make.for_layers(numbers, stacked=True)))
                names.append((numbers[0], f"block_{j}"))
                continue
            for number in numbers:
                setattr(self, f"layer_{number}", Block(config, spec, make.for_layers((number,), stacked=False)))
                names.append((number, f"layer_{number}"))
        self.names = tuple(name for _, name in sorted(names))

    def __call__(
        self, x: jax.Array, context: Context, caches: list[LayerCache] | None
    ) -> tuple[jax.Array, list[LayerCache] | None, dict[str, jax.Array]]:
        """Run x through all layers; caches in the order of `names`, stacked on axis 0 when scanned."""
        blocks = [getattr(self, name) for name in self.names]
        given = caches if caches is not None else [None] * len(blocks)
        if not self.scan:
            out = []
            for block, cache in zip(blocks, given, strict=True):
                graphdef, state = nnx.split(block)
                x, cache, aux = self._remat(lambda x, s, c, g=graphdef: nnx.merge(g, s)(x, context, c))(x, state, cache)
                out.append((cache, aux))
            new, aux = [c for c, _ in out], [a for _, a in out]
            aux = jax.tree.map(lambda *leaves: jnp.stack(leaves), *aux)
            return x, new if caches is not None else None, aux
        graphdef, state = nnx.split(blocks)

        def body(carry, layer):
            # The caches are carried, not sliced and stacked again: a token writes itself, not the cache of its layer.
            (x, caches), (state, number) = carry, layer
            new, stats = [], []
            for block, cache in zip(nnx.merge(graphdef, state), caches, strict=True):
                x, cache, aux = block(x, dataclasses.replace(context, layer=number), cache)
                new.append(cache)
                stats.append(aux)
            return (x, new), jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats)

        numbers = jnp.arange(self.repeats, dtype=jnp.int32)
        (x, new), aux = jax.lax.scan(self._remat(body), (x, given), (state, numbers))
        aux = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), aux)  # (repeats, P, ...) -> (L, ...)
        return x, new if caches is not None else None, aux

    def _remat(self, function):
        if self.remat_policy == "none":
            return function
        policy = None
        if self.remat_policy == "dots":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(function, policy=policy, prevent_cse=not self.scan)


class Decoder(nnx.Module):
    """A causal language model: `model(tokens, ...) -> (logits, cache)`, also exactly what Tunix calls."""

    def __init__(self, config: ModelConfig, execution: Execution, make: Make):
        self.config, self.execution = config, execution
        self.groups = tuple(group.name for group in config.layer_groups())
        self.embed = Embedding(config.vocab_size, config.embed_dim, make.at("embed"))
        for group in config.layer_groups():
            setattr(self, group.name, Group(config, execution, group, make.at(group.name)))
        self.final_norm = RMSNorm(config.embed_dim, config.norm_eps, make.at("final_norm"))
        self.output = None if config.tie_embeddings else Head(config, make.at("output"))

    @property
    def num_embed(self) -> int:
        """The vocabulary size, under the name Tunix's sampler asks for."""
        return self.config.vocab_size

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        attention_mask: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Logits [B, T, V] float32 and the cache with T more tokens (None without a cache).

        Args: as `hidden`.
        """
        hidden = self.hidden(tokens, positions, cache, attention_mask, segment_ids=segment_ids)
        return self.head(hidden.x), hidden.cache

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        attention_mask: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
    ) -> Hidden:
        """Return x [B, T, D] before the final norm, the cache, and per-layer statistics.

        Args:
            tokens: [B, T] ids.
            positions: [B, T]; counted from 0, or from the cache's end, when None.
            cache: from `init_cache` or an earlier call; the T tokens are appended to it.
            attention_mask: [B, T, S] bool, True where attention is allowed, besides causality; S is T, or the cache's.
            segment_ids: [B, T]; tokens see their own segment only, 0 is padding.
        """
        rows, length = tokens.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
            positions = positions if cache is None else positions + cache.end_index[:, None]
        if cache is not None:
            segments = jnp.ones_like(tokens) if segment_ids is None else segment_ids
            start = cache.end_index
            cache = Cache(
                layers=cache.layers,
                positions=write(cache.positions, positions, start),
                segment_ids=write(cache.segment_ids, segments, start),
                end_index=start + length,
            )
            sight = ops.Visibility(positions, cache.positions, segments, cache.segment_ids, attention_mask)
        else:
            start = None
            sight = ops.Visibility(positions, positions, segment_ids, segment_ids, attention_mask)
        context = self._context(positions, sight, start)
        x = self.embed(tokens, jnp.dtype(self.execution.dtype))
        layers, aux = {}, {}
        for name in self.groups:
            x, layers[name], stats = getattr(self, name)(x, context, cache.layers[name] if cache else None)
            for key, value in stats.items():
                aux[key] = jnp.concatenate([aux[key], value]) if key in aux else value
        if cache is not None:
            cache = Cache(layers, cache.positions, cache.segment_ids, cache.end_index)
        return Hidden(x, cache, aux)

    def head(self, x: jax.Array) -> jax.Array:
        """Final norm and projection: x [B, T, D] to logits [B, T, V], float32."""
        x = self.final_norm(x)
        table = self.head_table.astype(x.dtype)
        return mesh.einsum("BTD,VD->BTV", x, table, preferred_element_type=jnp.float32)

    @property
    def head_table(self) -> jax.Array:
        """The output projection [V, D]: the embedding table when tied."""
        return self.embed.table[...] if self.output is None else self.output.kernel[...]

    def init_cache(self, batch_size: int, cache_size: int, dtype: jnp.dtype | None = None) -> Cache:
        """An empty cache for `batch_size` rows of up to `cache_size` tokens, in the activations' type by default."""
        config, dtype = self.config, jnp.dtype(dtype or self.execution.dtype)
        shape, letters = (batch_size, cache_size, config.num_kv_heads, config.head_dim), "BSKH"

        def empty(repeats: int) -> LayerCache:
            if self.execution.scan_layers:
                return {k: mesh.zeros((repeats, *shape), dtype, "L" + letters) for k in ("k", "v")}
            return {k: mesh.zeros(shape, dtype, letters) for k in ("k", "v")}

        layers = {
            group.name: [
                empty(group.repeats)
                for _ in range(len(group.pattern) if self.execution.scan_layers else group.num_layers)
            ]
            for group in config.layer_groups()
        }
        slots = mesh.zeros((batch_size, cache_size), jnp.int32, "BS")
        return Cache(layers, slots - 1, slots, mesh.zeros((batch_size,), jnp.int32, "B"))

    def _context(self, positions, sight, end_index) -> Context:
        config = self.config
        specs = {spec for group in config.layer_groups() for spec in group.pattern}
        bases = sorted({spec.rope_theta or config.rope_theta for spec in specs})
        return Context(
            rotations={
                theta: rotations(positions, config.head_dim, theta, config.rope_scaling, config.max_seq_len)
                for theta in bases
            },
            masks={window: sight.mask(ops.Span(window)) for window in {spec.sliding_window for spec in specs}},
            end_index=end_index,
        )


class Head(nnx.Module):
    """The output projection of a model whose embedding is not tied: kernel [V, D]."""

    def __init__(self, config: ModelConfig, make: Make):
        self.kernel = make("kernel", (config.vocab_size, config.embed_dim), "VD", normal(config.embed_dim**-0.5))
