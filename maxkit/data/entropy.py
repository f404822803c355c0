# SPDX-License-Identifier: Apache-2.0
"""What counting can predict: the bars a trained language model must get under. All in nats per token.

Every figure is a mean over eval[1:], the targets that `packing.chunk_text` makes of the same stream, so it
compares with a loss. Tokens are 1-D integer arrays of ids in [0, vocab_size).
"""

import numpy as np


def unigram_entropy(train: np.ndarray, eval_tokens: np.ndarray, vocab_size: int) -> float:
    """Cross entropy of an add-one unigram model of `train` on `eval_tokens`: p(w) = (c(w) + 1) / (N + V)."""
    counts = _unigram_counts(train, vocab_size)
    return float(-np.log(_unigram(counts)[_targets(eval_tokens)]).mean())


def bigram_entropy(train: np.ndarray, eval_tokens: np.ndarray, vocab_size: int) -> float:
    """Cross entropy of a Witten-Bell bigram model of `train` on `eval_tokens`.

    p(w | h) = (c(h, w) + t(h) p(w)) / (c(h) + t(h)), with t(h) the number of different tokens seen after h
    and p(w) the add-one unigram; p(w) alone after an h that `train` never continues. It has no parameter to
    tune.
    Witten and Bell, "The zero-frequency problem", IEEE Trans. Inf. Theory 37(4), 1991, method C,
    interpolated.
    """
    train = np.asarray(train, np.int64)
    history, target = np.asarray(eval_tokens, np.int64)[:-1], _targets(eval_tokens)
    pairs, pair_counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    seen = np.bincount(train[:-1], minlength=vocab_size)
    kinds = np.bincount(pairs // vocab_size, minlength=vocab_size)
    unigram = _unigram(_unigram_counts(train, vocab_size))[target]
    total = seen[history] + kinds[history]
    pair = _lookup(pairs, pair_counts, history * vocab_size + target)
    probability = np.where(total > 0, (pair + kinds[history] * unigram) / np.maximum(total, 1), unigram)
    return float(-np.log(probability).mean())


def empirical_bigram_entropy(tokens: np.ndarray, vocab_size: int) -> float:
    """Conditional entropy H(next | token) of the stream's own counts: no bigram model does better on it.

    It is a bar that has seen the answers. On a short stream most pairs occur once and it is close to zero, so
    it tells of the stream's length as much as of its language; `bigram_entropy` is the figure for text not
    seen before.
    """
    tokens = np.asarray(tokens, np.int64)
    assert len(tokens) >= 2, "a bigram needs two tokens"
    pairs, counts = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
    history = np.bincount(tokens[:-1], minlength=vocab_size)[pairs // vocab_size]
    return float(-(counts * np.log(counts / history)).sum() / counts.sum())


def _targets(tokens: np.ndarray) -> np.ndarray:
    tokens = np.asarray(tokens, np.int64)
    assert len(tokens) >= 2, "a target needs a token before it"
    return tokens[1:]


def _unigram_counts(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    return np.bincount(np.asarray(tokens, np.int64), minlength=vocab_size)


def _unigram(counts: np.ndarray) -> np.ndarray:
    return (counts + 1) / (counts.sum() + len(counts))


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 where it is absent; `keys` is sorted."""
    if not len(keys):
        return np.zeros(len(wanted), np.int64)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
