# SPDX-License-Identifier: Apache-2.0
"""The decoder: embedding, layer groups, final norm, head. One class for every family.

- A block is a mixer (attention, latent attention, gated delta rule) and an MLP (dense or a mixture of experts), each a
  branch of the residual stream, normalised before, after or both.
- Norms, router and softmax in float32; RoPE in float32; activations in `Execution.dtype`; logits always float32.
- What differs between families is data: `ModelConfig`. No dropout.
- A group's blocks run under `lax.scan` over stacked weights (axis 0), or one after another with weights of their own:
  the same code, the same values.

Deliberately absent: losses (`objectives`), sampling (`infer`), foreign weight names (`formats`). Next: `definition.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from maxkit import mesh, ops
from maxkit.models.attention import Attention, Context, LayerCache, write
from maxkit.models.config import BlockSpec, Execution, LayerGroup, ModelConfig
from maxkit.models.gated_delta import GatedDelta
from maxkit.models.layers import Embedding, Make, Mlp, Norm, normal, zeros
from maxkit.models.mla import LatentAttention
from maxkit.models.moe import Moe
from maxkit.ops.head_tiles import soft_capped
from maxkit.types import Cache, Hidden

Statistics = dict[str, jax.Array]


class Block(nnx.Module):
    """One transformer layer."""

    def __init__(self, config: ModelConfig, execution: Execution, spec: BlockSpec, make: Make):
        self.parallel, self.residual_scale = config.parallel_branches, config.residual_scale
        before, after = config.norm_placement in ("pre", "both"), config.norm_placement in ("post", "both")

        def norm(name: str, present: bool) -> Norm | None:
            return Norm(config, (config.embed_dim,), "D", make.at(name)) if present else None

        self.attention_norm = norm("attention_norm", before)
        self.mlp_norm = norm("mlp_norm", before and self.parallel != "one_norm")
        self.attention_out_norm, self.mlp_out_norm = norm("attention_out_norm", after), norm("mlp_out_norm", after)
        name = mixer_name(spec)
        setattr(self, name, mixer_class(config, spec)(config, spec, make.at(name)))
        self.mixer = name
        make = make.at("mlp")
        self.mlp = Moe(config, execution, make) if spec.mlp == "moe" else Mlp(config, make)

    def __call__(
        self, x: jax.Array, context: Context, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None, Statistics]:
        """From x [B, T, D]: the new x, the layer's cache, and its statistics."""
        attended, cache = getattr(self, self.mixer)(_through(self.attention_norm, x), context, cache)
        attended = self.residual_scale * _through(self.attention_out_norm, attended)
        if self.parallel == "no":
            x = x + attended
            fed, stats = self._mlp(_through(self.mlp_norm, x), context)
            return x + self.residual_scale * _through(self.mlp_out_norm, fed), cache, stats
        norm = self.attention_norm if self.parallel == "one_norm" else self.mlp_norm
        fed, stats = self._mlp(_through(norm, x), context)
        return x + attended + self.residual_scale * _through(self.mlp_out_norm, fed), cache, stats

    def _mlp(self, x: jax.Array, context: Context) -> tuple[jax.Array, Statistics]:
        return self.mlp(x, context) if isinstance(self.mlp, Moe) else (self.mlp(x), {})


def _through(norm: Norm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)


def mixer_name(spec: BlockSpec) -> str:
    """Where a block keeps its mixer."""
    return "delta" if spec.mixer == "gated_delta" else "attention"


def mixer_class(config: ModelConfig, spec: BlockSpec) -> type[Attention | LatentAttention | GatedDelta]:
    """What mixes the tokens of a block."""
    if spec.mixer == "gated_delta":
        return GatedDelta
    return LatentAttention if config.mla is not None else Attention


class Group(nnx.Module):
    """The blocks of one layer group: `block_{j}` stacked over the repeats, or `layer_{i}` one by one."""

    def __init__(self, config: ModelConfig, execution: Execution, group: LayerGroup, make: Make):
        self.scan, self.remat_policy = execution.scan_layers, execution.remat_policy
        self.repeats = group.repeats
        names = []
        for j, spec in enumerate(group.pattern):
            numbers = group.layer_numbers(j)
            name = f"block_{j}" if self.scan else f"layer_{numbers[0]}"
            setattr(self, name, Block(config, execution, spec, make.for_layers(numbers, stacked=self.scan)))
            names.append(name)
        self.names = tuple(names)

    def __call__(
        self, x: jax.Array, context: Context, caches: list[LayerCache] | None
    ) -> tuple[jax.Array, list[LayerCache] | None, Statistics]:
        """Run x through all layers; caches in the order of `names`, stacked on axis 0 when scanned."""
        blocks = [getattr(self, name) for name in self.names]
        given = caches if caches is not None else [None] * len(blocks)
        x, new, stats = (self._scanned if self.scan else self._unrolled)(blocks, x, context, given)
        return x, new if caches is not None else None, stats

    def _unrolled(self, blocks, x, context, caches):
        new, stats = [], []
        for block, cache in zip(blocks, caches, strict=True):
            graphdef, state = nnx.split(block)
            run = self._remat(lambda x, state, cache, g=graphdef: nnx.merge(g, state)(x, context, cache))
            x, cache, stat = run(x, state, cache)
            new.append(cache)
            stats.append(stat)
        return x, new, _stacked(stats)

    def _scanned(self, blocks, x, context, caches):
        graphdef, state = nnx.split(blocks)

        def body(carry, layer):
            # The caches are carried, not sliced and stacked again: a token writes itself, not the cache of its layer.
            (x, caches), (state, number) = carry, layer
            new, stats = [], []
            for block, cache in zip(nnx.merge(graphdef, state), caches, strict=True):
                x, cache, stat = block(x, dataclasses.replace(context, layer=number), cache)
                new.append(cache)
                stats.append(stat)
            return (x, new), _stacked(stats)

        numbers = jnp.arange(self.repeats, dtype=jnp.int32)
        (x, new), stats = jax.lax.scan(self._remat(body), (x, caches), (state, numbers))
        # (repeats, blocks that have it, ...) -> (layers that have it, ...), in the order of the layers
        return x, new, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), stats)

    def _remat(self, function):
        if self.remat_policy == "none":
            return function
        policy = None
        if self.remat_policy == "dots":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(function, policy=policy, prevent_cse=not self.scan)


def _stacked(stats: list[Statistics]) -> Statistics:
    """{name: [layers that have it, ...]} from the statistics of one layer after the other."""
    names = dict.fromkeys(name for stat in stats for name in stat)
    return {name: jnp.stack([stat[name] for stat in stats if name in stat]) for name in names}


class Decoder(nnx.Module):
    """A causal language model: `model(tokens, ...) -> (logits, cache)`, also exactly what Tunix calls."""

    def __init__(self, config: ModelConfig, execution: Execution, make: Make):
        self.config, self.execution, self.lora = config, execution, make.lora
        self.embed = Embedding(config.vocab_size, config.embed_dim, make.at("embed"))
        self.positions = Positions(config, make.at("positions")) if config.position == "learned" else None
        groups = config.layer_groups(execution.scan_layers)
        self.groups = tuple(group.name for group in groups)
        for group in groups:
            # Values are drawn from the path `layers/...` whatever the group is called: grouping changes no model.
            setattr(self, group.name, Group(config, execution, group, make.at("layers")))
        self.final_norm = Norm(config, (config.embed_dim,), "D", make.at("final_norm"))
        tied = config.tie_embeddings and not config.head_bias
        self.output = None if tied else Head(config, make.at("output"))

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
            sight = ops.Visibility(positions, query_segments=segment_ids, extra=attention_mask)
        if segment_ids is None and attention_mask is not None:
            segment_ids = _not_padding(attention_mask, start).astype(jnp.int32)
        context = Context.of(
            self.config, positions, segment_ids, sight, end_index=start, kernel=self.execution.attention_kernel
        )
        x = self._embedded(tokens, positions)
        layers, aux = {}, {}
        for name in self.groups:
            x, layers[name], stats = getattr(self, name)(x, context, cache.layers[name] if cache else None)
            for key, value in stats.items():
                aux[key] = jnp.concatenate([aux[key], value]) if key in aux else value
        if cache is not None:
            cache = Cache(layers, cache.positions, cache.segment_ids, cache.end_index)
        return Hidden(x, cache, aux)

    def _embedded(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        x = self.embed(tokens, jnp.dtype(self.execution.dtype))
        if self.config.embedding_scale is not None:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        return x if self.positions is None else x + self.positions(positions, x.dtype)

    def head(self, x: jax.Array) -> jax.Array:
        """Final norm and projection: x [B, T, D] to logits [B, T, V], float32."""
        x, table = self.head_operands(x)
        logits = mesh.einsum("BTD,VD->BTV", x, table.astype(x.dtype), preferred_element_type=jnp.float32)
        return soft_capped(logits, self.config.final_soft_cap)

    def head_operands(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(hidden [B, T, D], table [V, D]) whose products are the logits before the soft cap, for x before the norm.

        A bias on the logits is one more column of both.
        """
        x = self.final_norm(x)
        if self.config.logit_scale != 1.0:
            x = x * jnp.asarray(self.config.logit_scale, x.dtype)
        table = self.embed.table[...] if self.config.tie_embeddings else self.output.kernel[...]
        if not self.config.head_bias:
            return x, table
        bias = mesh.constrain(self.output.bias[...][:, None].astype(table.dtype), "VD")
        ones = mesh.constrain(jnp.ones_like(x[..., :1]), "BTD")
        return jnp.concatenate([x, ones], axis=-1), jnp.concatenate([mesh.constrain(table, "VD"), bias], axis=-1)

    def init_cache(self, batch_size: int, cache_size: int, dtype: jnp.dtype | None = None) -> Cache:
        """An empty cache for `batch_size` rows of up to `cache_size` tokens, in the activations' type by default."""
        usual = jnp.dtype(dtype or self.execution.dtype)
        layers = jax.tree.map(
            lambda leaf: mesh.zeros(leaf.shape, jnp.dtype(leaf.dtype or usual), leaf.letters),
            cache_layout(self.config, self.execution, batch_size, cache_size),
        )
        slots = mesh.zeros((batch_size, cache_size), jnp.int32, "BS")
        return Cache(layers, slots - 1, slots, mesh.zeros((batch_size,), jnp.int32, "B"))


@dataclasses.dataclass(frozen=True)
class CacheLeaf:
    """One array of a cache: with the letter L in front where it is stacked; dtype None is that of the activations."""

    shape: tuple[int, ...]
    letters: str
    dtype: str | None


def cache_layout(
    config: ModelConfig, execution: Execution, rows: int, size: int
) -> dict[str, list[dict[str, CacheLeaf]]]:
    """What `Cache.layers` holds for `rows` rows of up to `size` tokens: {group: [{name: leaf} per block]}."""
    scan = execution.scan_layers

    def leaves(spec: BlockSpec, repeats: int) -> dict[str, CacheLeaf]:
        shapes = mixer_class(config, spec).cache_shapes(config, rows, size)
        stack, letter = ((repeats,), "L") if scan else ((), "")
        return {
            name: CacheLeaf((*stack, *shape), letter + letters, dtype)
            for name, (shape, letters, dtype) in shapes.items()
        }

    return {group.name: [leaves(spec, group.repeats) for spec in group.pattern] for group in config.layer_groups(scan)}


def _not_padding(attention_mask: jax.Array, start: jax.Array | None) -> jax.Array:
    """[B, T] bool: the tokens that may see themselves, in a mask [B, T, S] whose rows begin at slot `start` [B]."""
    own = jnp.arange(attention_mask.shape[1], dtype=jnp.int32)[None, :]
    own = own if start is None else own + start[:, None]
    slots = jnp.arange(attention_mask.shape[2], dtype=jnp.int32)
    return jnp.any(attention_mask & (slots == own[..., None]), axis=-1)


class Positions(nnx.Module):
    """A learned vector for every position: table [S, D]."""

    def __init__(self, config: ModelConfig, make: Make):
        self.table = make("table", (config.max_seq_len, config.embed_dim), "SD", normal(0.02))

    def __call__(self, positions: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Vectors [B, T, D] of positions [B, T]."""
        return mesh.gather_rows(self.table[...], positions, "BTD", "SD").astype(dtype)


class Head(nnx.Module):
    """What the output projection has of its own: kernel [V, D] where the embedding is not tied, bias [V]."""

    def __init__(self, config: ModelConfig, make: Make):
        shape = (config.vocab_size, config.embed_dim)
        self.kernel = None if config.tie_embeddings else make("kernel", shape, "VD", normal(config.embed_dim**-0.5))
        self.bias = make("bias", shape[:1], "V", zeros) if config.head_bias else None
