# SPDX-License-Identifier: Apache-2.0
"""Facts about architectures, as numbers and tables: read from a `ModelConfig`, never written down.

No weight is made except by `agreement`. Pictures of the same facts: `architecture_figures.py`.
"""

import collections
import functools
import itertools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxkit.formats.presets import preset_config
from maxkit.models.attention import span
from maxkit.models.config import BlockSpec, Execution, ModelConfig, RopeScaling
from maxkit.models.decoder import mixer_class
from maxkit.models.definition import ModelDefinition, Parameter
from maxkit.models.rope import rotations
from maxkit.nb.cards import Card, table

# Sizes and names: two models that differ in nothing else are the same architecture.
SIZES = frozenset(
    "family vocab_size num_layers embed_dim mlp_dim num_heads num_kv_heads head_dim max_seq_len norm_eps rope_theta "
    "leading_blocks pattern".split()
)
PARTS = ("embedding and head", "attention", "MLP of every token", "experts", "norms and routers")


# --- what a family changes --------------------------------------------------------------------


def changes(config: ModelConfig) -> list[str]:
    """What sets an architecture apart from the plainest one (all defaults), sizes aside, in words."""
    plain = {name: field.default for name, field in ModelConfig.model_fields.items()}
    found = []
    for name, value in config:
        if name in SIZES or value == plain[name]:
            continue
        found.append(name if value is True else f"{name} {_brief(value)}")
    kinds = collections.Counter(layer_kind(config, block) for block in config.blocks)
    if set(kinds) != {"full attention"}:
        found.append("layers: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    return found


def _brief(value: Any) -> str:
    if isinstance(value, RopeScaling):
        return f"{value.kind} x{value.factor:g}"
    if hasattr(value, "num_experts"):
        return f"{value.experts_per_token} of {value.num_experts}" + (" + shared" if value.shared_mlp_dim else "")
    if hasattr(value, "kv_rank"):
        return f"rank {value.kv_rank}"
    if hasattr(value, "num_value_heads"):
        return f"{value.num_value_heads} heads"
    if hasattr(value, "floor_scale"):
        return f"from {value.floor_scale:,.0f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def changes_table(presets: Sequence[str]) -> Card:
    """One row per preset: its name, layers, and what it changes."""
    configs = {name: preset_config(name) for name in presets}
    rows = [
        {"preset": name, "layers": config.num_layers, "what it changes": "; ".join(changes(config)) or "nothing"}
        for name, config in configs.items()
    ]
    return table(rows, title="Everything that a family changes, sizes aside")


def layer_kind(config: ModelConfig, block: BlockSpec) -> str:
    """How a block mixes tokens, in two words."""
    if block.mixer == "gated_delta":
        return "gated delta"
    if block.chunk_size is not None:
        return "chunked"
    if block.sliding_window is not None:
        return "sliding window"
    if config.position == "rope" and not block.rope:
        return "full, no RoPE"
    return "latent" if config.mla else "full attention"


# --- where the parameters are -----------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def parameter_shares(config: ModelConfig) -> dict[str, int]:
    """Number of parameters in each of `PARTS`."""
    counts = dict.fromkeys(PARTS, 0)
    for parameter in ModelDefinition(config).parameters.values():
        counts[_part(parameter.address)] += math.prod(parameter.shape)
    return counts


def _part(address: str) -> str:
    if "norm/" in address and "attention/" not in address or "/router/" in address:
        return "norms and routers"
    if not address.startswith("layers/"):
        return "embedding and head"
    if address.startswith("layers/mlp/"):
        return "experts" if "/experts/" in address else "MLP of every token"
    return "attention"


def active_parameters(config: ModelConfig) -> float:
    """Parameters that one token meets: all but the experts it does not choose."""
    counts = parameter_shares(config)
    unused = 1 - config.moe.experts_per_token / config.moe.num_experts if config.moe else 0.0
    return sum(counts.values()) - unused * counts["experts"]


def parameter_table(config: ModelConfig, title: str) -> Card:
    """Every kind of tensor: path (below `layers/`), letters and shape in one layer, in how many layers, how many."""
    rows: dict[tuple, dict[str, Any]] = {}
    for parameter in ModelDefinition(config).parameters.values():
        shape = parameter.layer_shape
        row = rows.setdefault(
            (parameter.address, shape),
            {
                "tensor": parameter.address,
                "letters": parameter.letters[1:] if parameter.stacked else parameter.letters,
                "shape": "×".join(map(str, shape)),
                "layers": None if parameter.layers is None else 0,
                "parameters": 0,
            },
        )
        if parameter.layers is not None:
            row["layers"] += len(parameter.layers)
        row["parameters"] += math.prod(parameter.shape)
    ends = ("embed/", "positions/", "layers/attention", "layers/delta", "layers/mlp", "final_norm/", "output/")
    in_order = sorted(
        rows.values(), key=lambda row: next(i for i, end in enumerate(ends) if row["tensor"].startswith(end))
    )
    in_order = [row | {"tensor": row["tensor"].removeprefix("layers/")} for row in in_order]
    total = sum(row["parameters"] for row in rows.values())
    active = active_parameters(config)
    columns = ("tensor", "parameters", "layers", "letters", "shape")  # a narrow page cuts off what is last
    caption = f"{total:,} parameters in all" + (f", of which a token uses {active:,.0f}" if active < total else "")
    return table(in_order, title=title, caption=caption, columns=columns)


# --- what a token costs in the cache ----------------------------------------------------------


def cache_bytes(config: ModelConfig, context: int, dtype: str = "bfloat16") -> int:
    """Bytes that the layers must keep of a sequence of `context` tokens: never more than a layer can look back."""
    return sum(cache_shares(config, context, dtype).values())


def cache_shares(config: ModelConfig, context: int, dtype: str = "bfloat16") -> dict[str, int]:
    """`cache_bytes` of each kind of layer (`layer_kind`)."""
    usual, found = jnp.dtype(dtype).itemsize, collections.Counter()
    for block, count in collections.Counter(config.blocks).items():
        kept = min(context, span(block).reach or context)
        for shape, _, own in mixer_class(config, block).cache_shapes(config, 1, kept).values():
            size = jnp.dtype(own).itemsize if own else usual
            found[layer_kind(config, block)] += count * math.prod(shape) * size
    return dict(found)


# --- RoPE -------------------------------------------------------------------------------------


def rope_frequencies(dim: int, theta: float, scaling: RopeScaling | None, max_seq_len: int) -> np.ndarray:
    """Radians per token of each pair [dim/2], as `models.rope` turns them in a sequence of `max_seq_len`."""
    positions = jnp.asarray([[1, max_seq_len - 1]])  # the second decides for scalings that depend on the length
    cos, sin = rotations(positions, dim, theta, scaling, max_seq_len)
    return np.arctan2(np.asarray(sin, np.float64), np.asarray(cos, np.float64))[0, 0]


# --- it is one program ------------------------------------------------------------------------


def shrunk(config: ModelConfig) -> ModelConfig:
    """The same architecture with tiny sizes: every choice is kept, equal neighbours in the pattern are one.

    The pattern runs twice, and begins once more where the model's own number of layers leaves a remainder.
    """
    kv_heads = 4 if config.num_kv_heads == config.num_heads else 1 if config.num_kv_heads == 1 else 2
    head_dim = 12 if config.mla else 8
    pattern = [_tiny_block(block) for block, _ in itertools.groupby(config.pattern)]
    leading = [_tiny_block(block) for block, _ in itertools.groupby(config.leading_blocks)]
    rest = config.num_layers - len(config.leading_blocks)
    sizes: dict[str, Any] = dict(
        vocab_size=64, embed_dim=16, mlp_dim=24, num_heads=4, num_kv_heads=kv_heads, head_dim=head_dim, max_seq_len=64,
        num_layers=len(leading) + 2 * len(pattern) + (rest % len(config.pattern) > 0),
        leading_blocks=leading, pattern=pattern, **_tiny_parts(config),
    )  # fmt: skip
    if config.rope_dim:
        sizes["rope_dim"] = max(2, head_dim * config.rope_dim // config.head_dim // 2 * 2)
    if config.rope_scaling:
        pairs = (sizes.get("rope_dim") or (4 if config.mla else head_dim)) // 2
        sizes["rope_scaling"] = _tiny_scaling(config.rope_scaling, pairs)
    return ModelConfig.model_validate(config.model_dump() | sizes)


def _tiny_block(block: BlockSpec) -> dict[str, Any]:
    tiny = {"sliding_window": 5, "chunk_size": 6}
    return block.model_dump() | {name: size for name, size in tiny.items() if getattr(block, name)}


def _tiny_scaling(scaling: RopeScaling, pairs: int) -> dict[str, Any]:
    """A trained length of 8 tokens; of longrope's factors, evenly spaced ones."""
    tiny = scaling.model_dump() | ({"original_max_seq_len": 8} if scaling.original_max_seq_len else {})
    for name in ("short_factor", "long_factor"):
        given = tiny[name]
        tiny[name] = [given[i * len(given) // pairs] for i in range(pairs)] if given else ()
    return tiny


def _tiny_parts(config: ModelConfig) -> dict[str, Any]:
    moe, mla, delta, parts = config.moe, config.mla, config.gated_delta, {}
    if moe:
        groups = {"num_groups": 4, "groups_per_token": 2} if moe.num_groups > 1 else {}
        sizes = {"num_experts": 8, "experts_per_token": min(2, moe.experts_per_token), "mlp_dim": 12, **groups}
        parts["moe"] = moe.model_dump() | sizes | ({"shared_mlp_dim": 12} if moe.shared_mlp_dim else {})
    if mla:
        sizes = {"q_rank": mla.q_rank and 6, "kv_rank": 10, "nope_head_dim": 8, "rope_head_dim": 4, "v_head_dim": 6}
        parts["mla"] = mla.model_dump() | sizes
    if delta:
        heads = {"num_key_heads": 2, "num_value_heads": 2 if delta.num_key_heads == delta.num_value_heads else 4}
        parts["gated_delta"] = delta.model_dump() | heads | {"key_head_dim": 6, "value_head_dim": 8}
    if config.attention_temperature:
        parts["attention_temperature"] = config.attention_temperature.model_dump() | {"floor_scale": 4.0}
    return parts


def agreement(config: ModelConfig, *, seed: int = 0, tokens: int = 14, prompt: int = 6) -> dict[str, float]:
    """How far three ways to run one random model are apart, as a fraction of the spread of its logits.

    "unrolled": layer after layer instead of scanned. "cached": a prompt, then one token at a time, instead of all at
    once.
    """
    scanned, unrolled = (ModelDefinition(config, Execution(scan_layers=scan)) for scan in (True, False))
    ids = jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, (2, tokens), np.int32))
    whole, cached = jax.jit(functools.partial(at_once_and_cached, scanned, prompt))(random_values(scanned, seed), ids)
    other = jax.jit(lambda params: unrolled.merge(params)(ids)[0])(random_values(unrolled, seed))
    spread = float(jnp.std(whole))
    return {
        "unrolled": float(jnp.max(jnp.abs(other - whole))) / spread,
        "cached": float(jnp.max(jnp.abs(cached - whole))) / spread,
    }


def random_values(definition: ModelDefinition, seed: int) -> dict[str, Any]:
    """A random tree, drawn layer by layer from the name of a tensor, so that both layouts hold the same values.

    With numpy: to compile `ModelDefinition.init` takes longer than all that is compared here.
    """

    def draw(address: str, layer: int, shape: tuple[int, ...]) -> np.ndarray:
        noise = np.random.default_rng([seed, layer, zlib.crc32(address.encode())]).standard_normal(shape, np.float32)
        if address.endswith("/scale"):
            return 1 - definition.config.norm_scale_offset + 0.1 * noise
        return noise if address == "embed/table" else 0.25 * noise

    def value(p: Parameter) -> np.ndarray:
        layers = [draw(p.address, layer, p.layer_shape) for layer in (p.layers or (0,))]
        return (np.stack(layers) if p.stacked else layers[0]).astype(p.dtype)

    return definition.tree(value)


def at_once_and_cached(
    definition: ModelDefinition, prompt: int, params: Any, ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits [B, T, V] of ids [B, T] at once; and with a cache, `prompt` tokens and then one after another."""
    model = definition.merge(params)
    whole = model(ids)[0]
    first, cache = model(ids[:, :prompt], cache=model.init_cache(len(ids), ids.shape[1]))

    def step(cache, column):
        logits, cache = model(column[:, None], cache=cache)
        return cache, logits[:, 0]

    _, rest = jax.lax.scan(step, cache, ids[:, prompt:].T)
    return whole, jnp.concatenate([first, rest.swapaxes(0, 1)], axis=1)


def agreement_rows(configs: Mapping[str, ModelConfig]) -> list[dict[str, Any]]:
    """A row per model: its groups of layers, and how far the ways to run it are apart (`agreement`)."""
    return [
        {
            "model": name,
            "layers": config.num_layers,
            "groups": ", ".join(f"{len(g.pattern)} x {g.repeats}" for g in config.layer_groups()),
            **agreement(config),
        }
        for name, config in configs.items()
    ]
