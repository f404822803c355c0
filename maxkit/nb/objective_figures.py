# SPDX-License-Identifier: Apache-2.0
"""Losses of post-training as curves, for the tutorial: drawn from the formulas that training uses, slopes by JAX."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from maxkit.nb.figures import BAND, COLOURS, FAINT, INK, STYLE, Figure, finish
from maxkit.objectives import policy

Curve = Callable[[Any], Any]


def slope(curve: Curve, at: float) -> float:
    """The derivative of a loss of one number."""
    return float(jax.grad(lambda x: jnp.sum(curve(x)))(jnp.asarray(at, jnp.float32)))


def margins_figure(
    losses: Mapping[str, Curve], *, title: str, low: float = -30.0, high: float = 30.0, top: float = 4.0
) -> Figure:
    """Each loss over the margin of a pair, and beside it how hard it pushes: minus its slope."""
    margins = jnp.linspace(low, high, 241)
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(7.2, 3.5), layout="constrained", facecolor="white")
        canvas.suptitle(title, x=0.012, ha="left", fontweight="bold", fontsize=12)
        left, right = canvas.subplots(1, 2)
        for colour, style, (name, loss) in zip(COLOURS, ("-", "--", "-.", ":"), losses.items(), strict=False):
            values, push = loss(margins), -jax.vmap(jax.grad(loss))(margins)
            left.plot(margins, values, style, color=colour, lw=2, label=name)
            right.plot(margins, push, style, color=colour, lw=2)
        left.set_ylim(0, top)
        _dress(left, "loss", "margin h (nats)")
        _dress(right, "push: minus the slope", "margin h (nats)")
        for axes in (left, right):
            axes.axvline(0, color=INK, lw=0.9, ls=":")
        canvas.legend(*left.get_legend_handles_labels(), frameon=False, fontsize=9.5, loc="outside lower left", ncols=4)
        told = [f"{name} {float(loss(jnp.asarray(0.0))):.2f}" for name, loss in losses.items()]
        return finish(canvas, f"Line charts, {title}: losses at margin 0: {', '.join(told)}; beside them their slopes.")


def clipping_figure(
    *, title: str, epsilon_low: float = 0.2, epsilon_high: float = 0.2, dual_clip: float | None = None
) -> Figure:
    """The clipped loss of a token over its ratio, for advantage 1 and -1; grey where it has no gradient."""
    ratios = np.linspace(0.02, 2.2, 437)
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(7.2, 3.4), layout="constrained", facecolor="white")
        canvas.suptitle(title, x=0.012, ha="left", fontweight="bold", fontsize=12)
        told = []
        for axes, advantage in zip(canvas.subplots(1, 2), (1.0, -1.0), strict=True):
            logs, advantages = jnp.log(jnp.asarray(ratios)), jnp.full(ratios.shape, advantage)
            loss = policy.clipped_surrogate(logs, advantages, epsilon_low, epsilon_high, dual_clip)
            low, high = policy.clipped(logs, advantages, epsilon_low, epsilon_high)
            still = np.asarray(low | high)
            axes.axvspan(ratios[still].min(), ratios[still].max(), color=BAND, zorder=0, lw=0)
            middle = float(ratios[still].mean())
            axes.text(middle, 0.03, "no gradient", transform=axes.get_xaxis_transform(), ha="center", fontsize=8.5)
            axes.plot(ratios, -ratios * advantage, ":", color=INK, lw=1.2, label="not clipped")
            axes.plot(ratios, loss, color=COLOURS[0], lw=2.2, label="clipped")
            axes.axvline(1.0, color=INK, lw=0.9, ls=":")
            _dress(axes, f"advantage {advantage:+.0f}: " + ("do it more" if advantage > 0 else "do it less"), "ratio r")
            told.append(f"advantage {advantage:+.0f} from ratio {ratios[still].min():.2f} to {ratios[still].max():.2f}")
        canvas.axes[0].set_ylabel("loss of the token")
        handles = canvas.axes[0].get_legend_handles_labels()
        canvas.legend(*handles, frameon=False, fontsize=9.5, loc="outside lower left", ncols=2)
        return finish(canvas, f"Line charts, {title}: no gradient for " + ", for ".join(told) + ".")


def token_shares(lengths: Sequence[int], aggregation: policy.Aggregation, max_tokens: int | None = None) -> list[float]:
    """What one token of each answer counts in the loss of the group."""
    mask = (np.arange(max(lengths))[None] < np.asarray(lengths)[:, None]).astype(np.float32)
    weights = policy.token_weights(jnp.asarray(mask), None, aggregation)
    total = policy.denominator(jnp.asarray(mask), None, aggregation, max_tokens)
    return [float(share) for share in weights[:, 0] / total]


def _dress(axes: Axes, title: str, xlabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(xlabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
