# SPDX-License-Identifier: Apache-2.0
"""Decoding with a cache for the tutorial: what it saves and takes, what sampling keeps, what is compiled when.

FLOPs are counted as in `step_tour.py` and asked of XLA; everything else is the engine's own (`infer/engine.py`,
`infer/sampling.py`), on a loaded model. Times are CPU seconds of this process.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax import monitoring
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from maxkit.checkpoint.load import Loaded
from maxkit.infer.engine import Engine
from maxkit.infer.sampling import controls, keep, sample
from maxkit.models.config import Execution, ModelConfig
from maxkit.models.decoder import cache_layout
from maxkit.models.definition import ModelDefinition
from maxkit.nb import architecture, step_tour
from maxkit.nb.architecture_figures import KINDS
from maxkit.nb.figures import COLOURS, FAINT, STYLE, Figure, finish

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = COLOURS
COMPILED = "/jax/core/compile/backend_compile_duration"  # an event for each program that is compiled


# --- what a cache saves -----------------------------------------------------------------------


def pass_flops(config: ModelConfig, new: int, keys: int) -> int:
    """FLOPs of one pass over `new` tokens that look at `keys`, of which the last one's logits are wanted."""
    flops = step_tour.flops_by_part(step_tour.products(config, 1, new, keys))
    head = step_tour.PARTS[-1]
    return sum(flops.values()) - flops[head] + flops[head] // new


def traced_pass_flops(config: ModelConfig, new: int, keys: int) -> float:
    """The same by XLA's count: a pass without a cache where `keys` is `new`, else one with a cache of `keys` slots."""
    definition = ModelDefinition(config, Execution(scan_layers=False))  # a loop's body would be counted once
    ids = jax.ShapeDtypeStruct((1, new), jnp.int32)

    def run(params: Any, ids: jax.Array, cache: Any) -> Any:
        model = definition.merge(params)
        hidden = model.hidden(ids, cache=cache)
        return model.head(hidden.x[:, -1:]), hidden.cache

    def empty(params: Any) -> Any:
        return definition.merge(params).init_cache(1, keys)

    cache = None if keys == new else jax.eval_shape(empty, definition.shapes)
    return float(jax.jit(run).lower(definition.shapes, ids, cache).cost_analysis()["flops"])


def writing_flops(config: ModelConfig, prompt: int, new: int) -> dict[str, np.ndarray]:
    """FLOPs so far after each of `new` tokens: [new], with a cache and without."""
    lengths = range(prompt, prompt + new)
    without = [pass_flops(config, length, length) for length in lengths]
    cached = [without[0], *(pass_flops(config, 1, length + 1) for length in lengths[:-1])]
    return {"without a cache": np.cumsum(without), "with a cache": np.cumsum(cached)}


def largest_difference(loaded: Loaded, ids: Sequence[int], prompt: int) -> float:
    """Of any logit, as a fraction of their spread: `ids` at once, and `prompt` of them and then one after another."""
    run = jax.jit(functools.partial(architecture.at_once_and_cached, loaded.definition, prompt))
    whole, cached = run(loaded.params, jnp.asarray([ids], jnp.int32))
    return float(jnp.max(jnp.abs(cached - whole)) / jnp.std(whole))


def cpu_milliseconds(loaded: Loaded, prompt: Sequence[int], new: int) -> dict[str, float]:
    """CPU milliseconds per token: "prefill" of the prompt, "decode" of the next `new`, after a run to compile both."""
    engine = Engine(loaded.definition, loaded.params, batch_size=1, cache_size=len(prompt) + new + 2)
    state = engine.insert(engine.prefill([prompt], max_new_tokens=new + 2), engine.init_state(), [0])
    state, _ = engine.generate(state)
    jax.block_until_ready(state)
    start = time.process_time()
    jax.block_until_ready(engine.prefill([prompt], max_new_tokens=new + 2))
    read = time.process_time()
    for _ in range(new):
        state, _ = engine.generate(state)
    jax.block_until_ready(state)
    done = time.process_time()
    return {"prefill": 1e3 * (read - start) / len(prompt), "decode": 1e3 * (done - read) / new}


def intensity(config: ModelConfig, sequences: int, new: int, context: int) -> dict[str, float]:
    """One pass of `new` tokens in each of `sequences`: FLOPs, bytes that must be read (bfloat16), FLOPs per byte."""
    flops = sequences * pass_flops(config, new, context)
    table = 0 if config.tie_embeddings else config.vocab_size * config.embed_dim  # looked up, not read whole
    weights = 2 * (ModelDefinition(config).num_params - table)
    read = weights + sequences * architecture.cache_bytes(config, context)
    return {"flops": flops, "bytes": read, "per byte": flops / read}


# --- what a cache takes -----------------------------------------------------------------------


def allocated_bytes(config: ModelConfig, rows: int, size: int, dtype: str) -> int:
    """Bytes of the keys and values in the arrays of maxkit's own cache."""
    leaves = jax.tree.leaves(cache_layout(config, Execution(), rows, size))
    return sum(int(np.prod(leaf.shape)) * jnp.dtype(leaf.dtype or dtype).itemsize for leaf in leaves)


def variants(config: ModelConfig) -> dict[str, ModelConfig]:
    """The same model with other attention: a head of keys for each query, as it is, one for all, windows, a latent."""

    def changed(**changes: Any) -> ModelConfig:
        return ModelConfig.model_validate(config.model_dump() | changes)

    block = config.pattern[0].model_dump()
    window = block | {"sliding_window": 1024}
    latent = {"kv_rank": 512, "nope_head_dim": config.head_dim, "rope_head_dim": 64, "v_head_dim": config.head_dim}
    return {
        "MHA: keys and values for each head": changed(num_kv_heads=config.num_heads),
        f"GQA: {config.num_kv_heads} for all heads": config,
        "MQA: one for all heads": changed(num_kv_heads=1),
        "GQA, 5 of 6 layers look back 1,024": changed(pattern=[window] * 5 + [block]),
        "MLA: a latent of 512 and a key of 64": changed(mla=latent, head_dim=config.head_dim + 64),
    }


# --- what comes next --------------------------------------------------------------------------


def next_logits(loaded: Loaded, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """{text: logits [V] of what follows it}, all in one batch."""
    ids = [loaded.tokenizer.encode(text) for text in texts]
    width = max(map(len, ids))
    rows = jnp.asarray([row + [0] * (width - len(row)) for row in ids], jnp.int32)
    # Padding stands behind the text, where no token of the text can see it.
    logits = jax.jit(lambda params, rows: loaded.definition.merge(params)(rows)[0])(loaded.params, rows)
    return {text: np.asarray(logits[i, len(row) - 1]) for i, (text, row) in enumerate(zip(texts, ids, strict=True))}


def probabilities(
    logits: np.ndarray, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> np.ndarray:
    """[V]: what the engine draws from: softmax(logits / temperature) of the tokens that top_k and top_p keep."""
    how = controls(1, temperature=temperature, top_k=top_k, top_p=top_p)
    kept = keep(jnp.asarray(logits)[None] / temperature, how.top_k, how.top_p)
    return np.asarray(jax.nn.softmax(kept[0]))


def drawn(logits: np.ndarray, draws: int, **how: Any) -> np.ndarray:
    """[V]: the share of `draws` draws that each token got, by the engine's own sampler."""
    rows = jnp.broadcast_to(jnp.asarray(logits), (draws, len(logits)))
    tokens, _ = jax.jit(sample)(rows, controls(draws, **how), jnp.zeros(draws, jnp.int32))
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / draws


def spelled(loaded: Loaded, token: int) -> str:
    """A token as a label."""
    return loaded.tokenizer.decode([int(token)]).replace("\n", "↵").strip() or "␣"


def compilations(engine: Engine, requests: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each call of `generate_batch`: its name and how many programs were compiled for it."""
    seen: list[str] = []

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILED:
            seen.append(event)

    rows = []
    monitoring.register_event_duration_secs_listener(note)
    try:
        for name, arguments in requests.items():
            before = len(seen)
            engine.generate_batch(**arguments)
            rows.append({"call": name, "programs compiled": len(seen) - before})
    finally:
        monitoring.unregister_event_duration_listener(note)
    return rows


# --- pictures ---------------------------------------------------------------------------------


def passes_figure(words: Sequence[str], prompt: int, *, title: str) -> Figure:
    """A row per pass, a column per token: which the model computes, and which it finds in the cache."""
    count = len(words) - prompt
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(7.2, 1.5 + 0.3 * count), layout="constrained", facecolor="white")
        canvas.suptitle(title, x=0.012, ha="left", fontweight="bold", fontsize=12)
        sums = {}
        for axes, cached in zip(canvas.subplots(1, 2, sharey=True), (False, True), strict=True):
            name, total = ("with a cache" if cached else "without"), 0
            for number in range(count):
                read = prompt + number - 1 if cached and number else 0
                for column in range(prompt + number):
                    old = column < read
                    style: Any = {"facecolor": "#e8eaed", "edgecolor": "#bdc1c6"} if old else {"facecolor": BLUE}
                    axes.add_patch(Rectangle((column + 0.06, number + 0.1), 0.88, 0.8, lw=0.6, **style))
                    total += not old
            sums[name] = total
            axes.set(xlim=(0, len(words) - 1), ylim=(count, 0))
            axes.set_title(f"{name}: {total} tokens computed", loc="left", fontsize=10)
            axes.set_xticks(np.arange(len(words) - 1) + 0.5, words[:-1], rotation=60, fontsize=8.5)
            axes.set_yticks(np.arange(count) + 0.5, [f"→ {word}" for word in words[prompt:]], fontsize=9)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        handles = [Patch(color=BLUE, label="computed"), Patch(facecolor="#e8eaed", edgecolor="#bdc1c6", label="read")]
        canvas.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        told = ", ".join(f"{total} {name}" for name, total in sums.items())
        return finish(canvas, f"Diagram, {title}: tokens computed for {count} new ones: {told}.")


def writing_figure(curves: Mapping[str, np.ndarray], *, title: str) -> Figure:
    """FLOPs so far over the number of new tokens."""
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(7.2, 3.6), layout="constrained", facecolor="white")
        axes = canvas.add_subplot(facecolor="white")
        axes.set_title(title, loc="left", fontweight="bold", fontsize=12)
        for colour, (name, values) in zip((VERMILLION, BLUE), curves.items(), strict=True):
            axes.plot(range(1, len(values) + 1), values / 1e9, color=colour, lw=2, label=name)
        axes.set(xlabel="new tokens", ylabel="GFLOPs so far", ylim=(0, None), xlim=(0, None))
        _dress(axes)
        axes.legend(frameon=False, fontsize=9.5)
        told = [f"{values[-1] / 1e9:,.0f} {name}" for name, values in curves.items()]
        return finish(canvas, f"Line chart, {title}: GFLOPs for {len(values)} tokens: " + "; ".join(told) + ".")


def cache_bars_figure(configs: Mapping[str, ModelConfig], context: int, *, title: str) -> Figure:
    """GiB of cache of one sequence of `context` tokens in bfloat16, a bar per model, coloured by kind of layer."""
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(7.2, 1.5 + 0.42 * len(configs)), layout="constrained", facecolor="white")
        canvas.suptitle(title, x=0.012, ha="left", fontweight="bold", fontsize=12)
        axes = canvas.subplots()
        told, used, longest = [], {}, 0.0
        for y, (name, config) in enumerate(configs.items()):
            left = 0.0
            for kind, size in architecture.cache_shares(config, context).items():
                used[kind] = KINDS[kind]
                axes.barh(y, size / 2**30, 0.62, left, color=KINDS[kind], edgecolor="white", lw=0.6)
                left += size / 2**30
            longest = max(longest, left)
            axes.text(left, y, f"  {left:.2f} GiB, {left * 2**20 / context:,.0f} KiB a token", va="center", fontsize=9)
            told.append(f"{name} {left:.1f}")
        axes.set_yticks(range(len(configs)), list(configs))
        axes.set(xlim=(0, 1.4 * longest), ylim=(len(configs) - 0.5, -0.5), xlabel="GiB, bfloat16")
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles = [Patch(color=colour, label=kind) for kind, colour in used.items()]
        canvas.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9.5)
        return finish(canvas, f"Bars, {title}, GiB: " + "; ".join(told) + ".")


def temperature_figure(loaded: Loaded, logits: np.ndarray, temperatures: Sequence[float], *, title: str) -> Figure:
    """Probability of each token of the vocabulary over its rank, both logarithmic, a line for each temperature."""
    order = np.argsort(-logits)
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(7.2, 4.0), layout="constrained", facecolor="white")
        axes = canvas.add_subplot(facecolor="white")
        ranks, told = np.arange(1, len(order) + 1), []
        for colour, style, temperature in zip((BLUE, VERMILLION, GREEN), ("-", "--", "-."), temperatures, strict=False):
            values = probabilities(logits, temperature=temperature)[order]
            share = f"five likeliest {values[:5].sum():.0%}"
            axes.plot(ranks, values, style, color=colour, lw=2, label=f"T = {temperature:g}: {share}")
            told.append(f"T {temperature:g} {share}")
        for rank, token in enumerate(order[:5], start=1):
            axes.axvline(rank, color=FAINT, lw=0.9, zorder=0)
            axes.text(rank, 1.35, spelled(loaded, token), fontsize=8.5, rotation=60, va="bottom")
        axes.set(xscale="log", yscale="log", ylim=(1e-9, 1.2), xlim=(0.9, len(order)))
        axes.set(xlabel="rank of the token, likeliest first", ylabel="probability")
        axes.set_title(title, loc="left", fontweight="bold", fontsize=12, pad=34)
        _dress(axes)
        axes.grid(False, axis="x")
        axes.legend(frameon=False, fontsize=9.5, loc="lower left")
        return finish(canvas, f"Line chart, {title}: " + "; ".join(told) + ".")


def kept_figure(
    loaded: Loaded, logits: Mapping[str, np.ndarray], *, top_k: int, top_p: float, count: int, title: str
) -> Figure:
    """For each text, the `count` likeliest tokens that may follow, and which of them top-k and top-p keep."""
    colours = {(True, True): BLUE, (True, False): SKY, (False, True): ORANGE, (False, False): "#bdc1c6"}
    labels = ("both keep it", f"top-k {top_k} alone", f"top-p {top_p:g} alone", "neither")
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(7.2, 0.8 + 2.15 * len(logits)), layout="constrained", facecolor="white")
        canvas.suptitle(title, x=0.012, ha="left", fontweight="bold", fontsize=12)
        told = []
        for axes, (text, values) in zip(
            canvas.subplots(len(logits), 1, squeeze=False).flat, logits.items(), strict=True
        ):
            plain = probabilities(values)
            by_k, by_p = probabilities(values, top_k=top_k) > 0, probabilities(values, top_p=top_p) > 0
            order = np.argsort(-plain)[:count]
            tint = [colours[bool(by_k[i]), bool(by_p[i])] for i in order]
            axes.bar(range(count), plain[order], 0.8, color=tint)
            axes.set_xticks(range(count), [spelled(loaded, i) for i in order], rotation=60, fontsize=8.5, ha="right",
                            rotation_mode="anchor")  # fmt: skip
            shares = (
                f"top-k keeps {by_k.sum()} tokens, {plain[by_k].sum():.0%}; top-p {by_p.sum()}, {plain[by_p].sum():.0%}"
            )
            axes.set_title(f"{text} …   ({shares})", loc="left", fontsize=9.5)
            axes.set_xlim(-0.6, count - 0.4)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.tick_params(axis="x", length=0)
            _dress(axes)
            axes.grid(False, axis="x")
            told.append(f"{text}: {by_k.sum()} and {by_p.sum()}")
        handles = [Patch(color=colour, label=label) for colour, label in zip(colours.values(), labels, strict=True)]
        canvas.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
        return finish(canvas, f"Bars, {title}, tokens kept: " + "; ".join(told) + ".")


def _dress(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
