"""Kneser-Ney smoothing, on a case computed by hand."""

import numpy as np
import pytest

from greencode.ngram import KneserNey


def test_a_bigram_model_by_hand():
    """Blocks 0 1 0 2 and 0 1 1 2: bigrams 01 twice, 10, 02, 11, 12 once; none across blocks."""
    model = KneserNey(np.array([[0, 1, 0, 2], [0, 1, 1, 2]]), vocabulary=3, order=2)
    # Tokens seen before 0: {1}; before 1: {0, 1}; before 2: {0, 1}.
    assert model.counts[0].tolist() == [1, 2, 2]
    assert model.discounts == pytest.approx([1 / (1 + 2 * 2), 4 / (4 + 2 * 1)])
    low = np.array([0.8, 1.8, 1.8]) / 5 + 0.6 / 5 / 3
    after_0 = np.array([0, 2 - 2 / 3, 1 - 2 / 3]) / 3 + 2 * (2 / 3) / 3 * low
    (p,) = model.distributions([0, 1])
    assert p == pytest.approx(after_0)


def test_every_distribution_sums_to_one_and_covers_all_tokens():
    blocks = np.random.default_rng(1).integers(0, 7, (20, 12))
    model = KneserNey(blocks, vocabulary=9, order=4)
    unseen = [8, 8, 0, 1, 2, 8, 3]
    for tokens in (blocks[0].tolist(), unseen):
        rows = list(model.distributions(tokens))
        assert len(rows) == len(tokens) - 1
        for p in rows:
            assert p.sum() == pytest.approx(1)
            assert (p > 0).all()


def test_longer_contexts_know_more():
    """The token after next: only a trigram can tell."""
    blocks = np.array([[0, 2, 1, 3], [1, 2, 0, 3]] * 5)
    rows = list(KneserNey(blocks, vocabulary=4, order=3).distributions([0, 2, 1]))
    assert rows[1].argmax() == 1
    rows = list(KneserNey(blocks, vocabulary=4, order=3).distributions([1, 2, 0]))
    assert rows[1].argmax() == 0
