# SPDX-License-Identifier: Apache-2.0
"""The entropy bars against counting with dictionaries, and the laws that they must obey."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from maxkit.data.entropy import bigram_entropy, empirical_bigram_entropy, unigram_entropy

VOCAB = 12


def draw(seed, count, high=VOCAB):
    return np.random.default_rng(seed).zipf(1.6, count) % high


def unigram_probability(train):
    counts = Counter(train.tolist())
    return lambda word: (counts[word] + 1) / (len(train) + VOCAB)


def bigram_probability(train):
    follows, base = defaultdict(Counter), unigram_probability(train)
    for history, word in zip(train[:-1].tolist(), train[1:].tolist(), strict=True):
        follows[history][word] += 1

    def probability(word, history):
        seen = follows.get(history)
        if not seen:
            return base(word)
        kinds = len(seen)
        return (seen[word] + kinds * base(word)) / (seen.total() + kinds)

    return probability


@pytest.mark.parametrize("seed", range(4))
def test_against_dictionaries(seed):
    # The training stream leaves out three ids, so unseen words and unseen histories both occur.
    train, held_out = draw(seed, 300, VOCAB - 3), draw(seed + 100, 80)
    base, pair = unigram_probability(train), bigram_probability(train)
    words, histories = held_out[1:].tolist(), held_out[:-1].tolist()
    expected = -sum(math.log(base(w)) for w in words) / len(words)
    assert unigram_entropy(train, held_out, VOCAB) == pytest.approx(expected, rel=1e-12)
    expected = -sum(math.log(pair(w, h)) for w, h in zip(words, histories, strict=True)) / len(words)
    assert bigram_entropy(train, held_out, VOCAB) == pytest.approx(expected, rel=1e-12)
    pairs = Counter(zip(histories, words, strict=True))
    expected = -sum(n * math.log(n / Counter(histories)[h]) for (h, _), n in pairs.items()) / len(words)
    assert empirical_bigram_entropy(held_out, VOCAB) == pytest.approx(expected, rel=1e-12)


def test_the_reference_bigram_is_a_distribution():
    probability = bigram_probability(draw(0, 300, VOCAB - 3))
    for history in range(VOCAB):
        assert sum(probability(word, history) for word in range(VOCAB)) == pytest.approx(1)


def test_a_cycle_is_certain_given_its_last_token_and_uniform_without():
    cycle = np.tile(np.arange(4), 500)
    assert empirical_bigram_entropy(cycle, 4) == pytest.approx(0, abs=1e-12)
    assert bigram_entropy(cycle, cycle, 4) < 0.01
    assert unigram_entropy(cycle, cycle, 4) == pytest.approx(math.log(4), abs=1e-6)


def test_no_bigram_model_beats_the_streams_own_counts():
    for seed in range(5):
        stream, other = draw(seed, 200), draw(seed + 50, 400)
        floor = empirical_bigram_entropy(stream, VOCAB)
        assert floor <= bigram_entropy(stream, stream, VOCAB)
        assert floor <= bigram_entropy(other, stream, VOCAB)


def test_one_training_token_falls_back_to_the_unigram():
    held_out = draw(3, 50)
    assert bigram_entropy(np.array([1]), held_out, VOCAB) == unigram_entropy(np.array([1]), held_out, VOCAB)
