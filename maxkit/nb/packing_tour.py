# SPDX-License-Identifier: Apache-2.0
"""From a chat to a packed row, for the tutorial: a small tokenizer, pictures of rows, who sees whom by measurement.

Rows are made by `data/chat.py` and `data/packing.py` as in training; nothing of that is repeated here.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Patch, Rectangle

from maxkit.data.packing import Columns
from maxkit.data.tokenizer import Tokenizer, train_bpe
from maxkit.models.definition import ModelDefinition
from maxkit.nb.figures import COLOURS, INK, STYLE, Figure, finish
from maxkit.types import Tree

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# How a row can be told apart, or not.
KNOWN = {"segments and positions": (True, True), "positions only": (False, True), "neither": (False, False)}
GREY = "#e8eaed"
SEGMENTS = ("#f1f3f4", "#cfe3f2", "#fbe3c0", "#cdeadf", "#f3d9e8")  # 0 is padding


def chatml_tokenizer(conversations: Iterable[Sequence[Mapping[str, str]]]) -> Tokenizer:
    """A tokenizer with a token for every word of the conversations, the ChatML template, and its two special tokens.

    As in SmolLM2 the end of a turn is also the end of text and the padding.
    """
    texts = [f"{message['role']}\n{message['content']}" for turns in conversations for message in turns]
    backend = train_bpe(texts * 2, 4096).backend
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(backend, special={"eos": "<|im_end|>", "pad": "<|im_end|>"}, chat_template=CHATML)


def spelled(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """Each token as text, a line break as ↵."""
    return [tokenizer.decode([number]).replace("\n", "↵") for number in ids]


# --- who sees whom, measured ------------------------------------------------------------------


def influence(definition: ModelDefinition, params: Tree, columns: Columns) -> dict[str, np.ndarray]:
    """{what the model is told (`KNOWN`): [T, S]}: how much the logits at t move when token s of row 0 is changed.

    Every token is changed in turn, in a row of its own; the largest absolute difference of any logit.
    """
    tokens = np.asarray(columns["tokens"][:1])
    length = tokens.shape[1]
    rows = np.repeat(tokens, length + 1, axis=0)
    rows[np.arange(length), np.arange(length)] += 1
    rows %= definition.config.vocab_size
    run = jax.jit(lambda weights, t, p, s: definition.merge(weights)(t, p, segment_ids=s)[0])

    def moved(segments: np.ndarray, positions: np.ndarray) -> np.ndarray:
        logits = np.asarray(run(params, rows, np.repeat(positions, len(rows), 0), np.repeat(segments, len(rows), 0)))
        return np.abs(logits[:-1] - logits[-1:]).max(axis=-1).T  # (T, S)

    return {name: moved(*told(columns, *given)) for name, given in KNOWN.items()}


def told(columns: Columns, segments: bool, positions: bool) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions [1, T] of row 0: as packed, or those of one long text."""
    shape = columns["tokens"][:1].shape
    plain = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return (
        columns["segment_ids"][:1] if segments else np.ones(shape, np.int32),
        columns["positions"][:1] if positions else plain,
    )


def answer_losses(definition: ModelDefinition, params: Tree, columns: Columns, segment: int) -> dict[str, float]:
    """{situation: mean loss of the segment's trained tokens}: alone in its row, and packed as in `KNOWN`."""
    own = np.flatnonzero(columns["segment_ids"][0] == segment)
    run = jax.jit(lambda weights, t, p, s: jax.nn.log_softmax(definition.merge(weights)(t, p, segment_ids=s)[0]))

    def loss(tokens: Any, segments: Any, positions: Any, at: np.ndarray) -> float:
        logps = np.asarray(run(params, tokens, positions, segments))[0, at]
        picked = logps[np.arange(len(at)), columns["targets"][0, own]]
        mask = columns["loss_mask"][0, own]
        return float(-(mask * picked).sum() / mask.sum())

    row = columns["tokens"][:1]
    # Moved to the front of an otherwise empty row of the same length.
    alone = np.roll(row, -own[0], axis=1)
    segments = (np.arange(row.shape[1]) < len(own)).astype(np.int32)[None]
    front = np.arange(row.shape[1], dtype=np.int32)[None]
    losses = {"alone": loss(alone, segments, front, np.arange(len(own)))}
    return losses | {name: loss(row, *told(columns, *given), own) for name, given in KNOWN.items()}


# --- pictures ---------------------------------------------------------------------------------


def tokens_figure(words: Sequence[str], mask: Sequence[int], *, title: str) -> Figure:
    """The tokens of a conversation in reading order; those that the assistant wrote are coloured."""
    width, lines, x = 100.0, 0, 0.0
    boxes = []
    for word, own in zip(words, mask, strict=True):
        size = 1.55 * len(word) + 2.2
        if x + size > width:
            lines, x = lines + 1, 0.0
        boxes.append((x, lines, size, word, own))
        x += size + 0.5
        if word == "↵" and x > 55:
            lines, x = lines + 1, 0.0
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(7.2, 1.1 + 0.36 * (lines + 1)), layout="constrained", facecolor="white")
        canvas.suptitle(title, x=0.012, ha="left", fontweight="bold", fontsize=12)
        axes = canvas.add_subplot(facecolor="white")
        for left, line, size, word, own in boxes:
            colour = SEGMENTS[2] if own else GREY
            axes.add_patch(Rectangle((left, line + 0.08), size, 0.84, facecolor=colour, edgecolor=INK, lw=0.7))
            axes.text(
                left + size / 2, line + 0.5, word.strip(" "), ha="center", va="center", fontsize=8.5, family="monospace"
            )
        axes.set(xlim=(-0.5, width + 0.5), ylim=(lines + 1, 0))
        axes.axis("off")
        keys = [Patch(facecolor=SEGMENTS[2], edgecolor=INK, label="the assistant's: mask 1"),
                Patch(facecolor=GREY, edgecolor=INK, label="template and user: mask 0")]  # fmt: skip
        canvas.legend(handles=keys, frameon=False, fontsize=9, loc="outside lower left", ncols=2)
        return finish(canvas, f"Diagram, {title}: {len(words)} tokens, of which the assistant wrote {sum(mask)}.")


def row_figure(columns: Columns, words: Sequence[str], targets: Sequence[str], *, title: str) -> Figure:
    """Row 0 of a batch, column by column: token, target, trained or not, segment, position."""
    segments, positions = columns["segment_ids"][0], columns["positions"][0]
    mask = columns["loss_mask"][0]
    tracks = {"token": 3.3, "target": 3.3, "loss_mask": 0.8, "segment_ids": 0.8, "positions": 0.8}
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(7.2, 3.5), layout="constrained", facecolor="white")
        canvas.suptitle(title, x=0.012, ha="left", fontweight="bold", fontsize=12)
        axes = canvas.add_subplot(facecolor="white")
        tops = np.cumsum([0, *tracks.values()])
        for place in range(len(words)):
            base = SEGMENTS[segments[place] % len(SEGMENTS)]
            texts = (words[place], targets[place], f"{mask[place]:.0f}", str(segments[place]), str(positions[place]))
            for track, (top, height, text) in enumerate(zip(tops, tracks.values(), texts, strict=False)):
                strong = track in (1, 2) and mask[place] > 0
                colour = COLOURS[0] if strong else base
                axes.add_patch(Rectangle((place, top), 1, height, facecolor=colour, edgecolor="white", lw=0.8))
                if track == 1 and not mask[place]:
                    continue  # not trained: what stands there does not matter
                style: dict[str, Any] = {"rotation": 90, "family": "monospace"} if track < 2 else {}
                axes.text(place + 0.5, top + height / 2, text.strip(" "), ha="center", va="center",
                          color="white" if strong else INK, fontsize=6.6, **style)  # fmt: skip
        axes.set(xlim=(0, len(words)), ylim=(tops[-1], 0), xticks=[])
        axes.set_yticks((tops[:-1] + tops[1:]) / 2, list(tracks), family="monospace", fontsize=8.5)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        count = int(segments.max())
        padding = int((segments == 0).sum())
        told = f"{len(words)} places, {count} segments, {padding} of padding, {int(mask.sum())} trained targets"
        return finish(canvas, f"Diagram, {title}: {told}.")


def leaks(measured: np.ndarray, segments: np.ndarray) -> tuple[int, int]:
    """(pairs of tokens of two different texts where one moves the other, those of them from later in the row)."""
    real = segments > 0
    foreign = (segments[:, None] != segments[None, :]) & real[:, None] & real[None, :] & (measured > 0)
    return int(foreign.sum()), int(np.triu(foreign).sum())


def influence_figure(measured: Mapping[str, np.ndarray], segments: np.ndarray, *, title: str) -> Figure:
    """A panel per situation: blue where a token moves another of its own text, orange where of another text."""
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(7.2, 3.35), layout="constrained", facecolor="white")
        canvas.suptitle(title, x=0.012, ha="left", fontweight="bold", fontsize=12)
        own = segments[:, None] == segments[None, :]
        told = []
        places = canvas.subplots(1, len(measured), squeeze=False).flat
        for axes, (name, values) in zip(places, measured.items(), strict=True):
            kinds = np.where(values > 0, np.where(own, 1, 2), 0)
            colours = matplotlib.colors.ListedColormap(["#f1f3f4", COLOURS[0], COLOURS[1]])
            axes.imshow(kinds, cmap=colours, vmin=0, vmax=2, interpolation="nearest")
            for edge in np.flatnonzero(np.diff(segments)) + 0.5:
                axes.axhline(edge, color=INK, lw=0.8, ls=":")
                axes.axvline(edge, color=INK, lw=0.8, ls=":")
            axes.set(xticks=[], yticks=[], xlabel="token that is changed")
            axes.set_title(name, fontsize=10)
            across, ahead = leaks(values, segments)
            told.append(f"{name} {across} leaks, {ahead} from ahead")
        canvas.axes[0].set_ylabel("token that notices")
        keys = [Patch(color=COLOURS[0], label="within a text"), Patch(color=COLOURS[1], label="between texts: a leak")]
        canvas.legend(handles=keys, frameon=False, fontsize=9, loc="outside lower left", ncols=2)
        return finish(canvas, f"Matrices, {title}: " + "; ".join(told) + ".")
