# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention: keys and values are made from one narrow latent per token (arXiv 2405.04434).

The cache holds the latent and the one rotary key that all heads share, kv_rank + rope_head_dim numbers per token.
With a cache, attention runs on the latents themselves: the query is carried into their space and the result out of it
(the same products in another order), so the keys and values of S tokens are never formed.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from maxkit import mesh
from maxkit.models.attention import CacheShapes, Context, LayerCache, attend, read, rope, write
from maxkit.models.config import BlockSpec, ModelConfig
from maxkit.models.layers import Make, Norm, Projection
from maxkit.models.rope import rotate


class LatentAttention(nnx.Module):
    """DeepSeek's attention, with or without a latent for the queries."""

    def __init__(self, config: ModelConfig, spec: BlockSpec, make: Make):
        mla = config.mla
        assert mla is not None, "the decoder asks for this layer only where mla is given"
        self.config, self.spec, self.mla, bias = config, spec, mla, config.attention_bias
        sizes = {
            "D": config.embed_dim,
            "N": config.num_heads,
            "H": config.head_dim,
            "Q": mla.q_rank or 0,
            "Z": mla.kv_rank,
        }
        if mla.q_rank is None:
            self.query = Projection("BTD,DNH->BTNH", sizes, make.at("query"))
        else:
            self.query_down = Projection("BTD,DQ->BTQ", sizes, make.at("query_down"), bias=bias)
            self.query_norm = Norm(config, (mla.q_rank,), "Q", make.at("query_norm"), eps=mla.norm_eps)
            self.query_up = Projection("BTQ,QNH->BTNH", sizes, make.at("query_up"))
        self.kv_down = Projection("BTD,DZ->BTZ", sizes, make.at("kv_down"), bias=bias)
        self.kv_norm = Norm(config, (mla.kv_rank,), "Z", make.at("kv_norm"), eps=mla.norm_eps)
        self.key_rope = Projection("BTD,DH->BTH", sizes | {"H": mla.rope_head_dim}, make.at("key_rope"), bias=bias)
        self.key_up = Projection("BTZ,ZNH->BTNH", sizes | {"H": mla.nope_head_dim}, make.at("key_up"))
        values = sizes | {"H": mla.v_head_dim}
        self.value_up = Projection("BTZ,ZNH->BTNH", values, make.at("value_up"))
        scale = (2 * config.num_layers) ** -0.5
        self.out = Projection("BTNH,NHD->BTD", values, make.at("out"), bias=config.attention_out_bias, scale=scale)

    def __call__(self, x: jax.Array, context: Context, cache: LayerCache | None) -> tuple[jax.Array, LayerCache | None]:
        """From x [B, T, D] and this layer's {"latent": [B, S, Z], "key": [B, S, H]}: the output and the new cache."""
        down = self.mla.q_rank is not None
        query = self.query_up(self.query_norm(self.query_down(x))) if down else self.query(x)
        cos, sin = context.rotations[rope(self.config, self.spec)]
        turn = lambda part: rotate(part, cos, sin, interleaved=self.config.rope_interleaved)  # noqa: E731
        nope, turned = query[..., : self.mla.nope_head_dim], turn(query[..., self.mla.nope_head_dim :])
        latent, key = self.kv_norm(self.kv_down(x)), turn(self.key_rope(x)[:, :, None])[:, :, 0]
        if cache is None:
            return self.out(self._expanded(nope, turned, latent, key, context)), None
        cache = {
            "latent": write(cache["latent"], latent, context.end_index, context.layer),
            "key": write(cache["key"], key, context.end_index, context.layer),
        }
        latent, key = (read(cache[name], context.layer).astype(x.dtype) for name in ("latent", "key"))
        return self.out(self._absorbed(nope, turned, latent, key, context)), cache

    def _expanded(self, nope, turned, latent, key, context) -> jax.Array:
        """With the keys and values of every head: cheaper where many queries meet them."""
        keys = self.key_up(latent)
        shared = mesh.constrain(jnp.broadcast_to(key[:, :, None], (*keys.shape[:-1], key.shape[-1])), "BTNH")
        query, key = jnp.concatenate([nope, turned], axis=-1), jnp.concatenate([keys, shared], axis=-1)
        return attend(self.config, self.spec, context, query, key, self.value_up(latent))

    def _absorbed(self, nope, turned, latent, key, context) -> jax.Array:
        """On the latents: one key/value head of width Z + H (section 2.1.2 of the paper)."""
        into = mesh.einsum("BTNH,ZNH->BTNZ", nope, self.key_up.matrix(nope.dtype))
        query = jnp.concatenate([into, turned], axis=-1)  # (B, T, N, Z + H)
        key = jnp.concatenate([latent, key], axis=-1)[:, :, None]  # (B, S, 1, Z + H)
        seen = attend(self.config, self.spec, context, query, key, latent[:, :, None])  # (B, T, N, Z)
        return mesh.einsum("BTNZ,ZNH->BTNH", seen, self.value_up.matrix(seen.dtype))

    @staticmethod
    def cache_shapes(config: ModelConfig, rows: int, size: int) -> CacheShapes:
        """The latent and the shared rotary key of `size` tokens."""
        assert config.mla is not None
        return {
            "latent": ((rows, size, config.mla.kv_rank), "BSZ", None),
            "key": ((rows, size, config.mla.rope_head_dim), "BSH", None),
        }
