"""What counting alone predicts: an n-gram model with interpolated Kneser-Ney smoothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


class KneserNey:
    """Counts of all n-grams up to `order` within blocks [n, block] of token ids below `vocabulary`.

    The highest order counts occurrences, lower ones the distinct tokens seen before them; each order gives
    the mass of one absolute discount, n1 / (n1 + 2 n2), to the order below, the lowest to the uniform
    distribution. An n-gram's key is its context's row in the table of the order below, times `vocabulary`,
    plus its last token: all continuations of a context lie side by side.
    """

    def __init__(self, blocks: np.ndarray, vocabulary: int, order: int = 5):
        self.vocabulary, self.order = vocabulary, order
        self.keys: list[np.ndarray] = []
        self.counts: list[np.ndarray] = []
        stream = blocks.reshape(-1).astype(np.int64)
        offset = np.arange(stream.size) % blocks.shape[1]
        rows = np.zeros_like(stream)  # of the n-gram that ends at each position
        for length in range(1, order + 1):
            ends = np.flatnonzero(offset >= length - 1)  # n-grams that lie within a block
            contexts = rows[ends - 1] if length > 1 else 0
            keys, first, inverse, counts = np.unique(
                contexts * vocabulary + stream[ends],
                return_index=True, return_inverse=True, return_counts=True,
            )  # fmt: skip
            if length > 1:
                self.counts[-1] = np.bincount(rows[ends[first]], minlength=len(self.keys[-1]))
            rows = np.zeros_like(stream)
            rows[ends] = inverse
            self.keys.append(keys)
            self.counts.append(counts)
        self.discounts = [_discount(counts) for counts in self.counts]

    def distributions(self, tokens: Sequence[int]) -> Iterator[np.ndarray]:
        """P(next token) [vocabulary] after each of `tokens` but the last."""
        contexts = self._contexts(np.asarray(tokens, dtype=np.int64))
        for position in range(len(tokens) - 1):
            p = np.full(self.vocabulary, 1 / self.vocabulary)
            for length in range(self.order):
                context = contexts[length][position]
                if context < 0:  # never seen, and so no longer one either
                    break
                start = context * self.vocabulary
                low, high = np.searchsorted(self.keys[length], [start, start + self.vocabulary])
                counts = self.counts[length][low:high]
                total = counts.sum()
                if total:
                    kept = np.maximum(counts - self.discounts[length], 0)
                    p *= 1 - kept.sum() / total
                    p[self.keys[length][low:high] - start] += kept / total
            yield p

    def _contexts(self, tokens: np.ndarray) -> list[np.ndarray]:
        """Row of the 0-, 1-, ... (order - 1)-gram that ends at each position; -1 where there is none."""
        rows = [np.zeros_like(tokens)]
        for keys in self.keys[:-1]:
            before = np.zeros_like(tokens) if len(rows) == 1 else np.concatenate([[-1], rows[-1][:-1]])
            wanted = before * self.vocabulary + tokens
            found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            rows.append(np.where((before >= 0) & (keys[found] == wanted), found, -1))
        return rows


def _discount(counts: np.ndarray) -> float:
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    return once / (once + 2 * twice) if once else 0.5
