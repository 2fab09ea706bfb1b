"""What a rule writes by itself on recorded episodes' contexts, and its ROUGE-L.

Episodes are recorded along the full model's text; once a rule leaves with another token its own text goes on
elsewhere, and what that is worth cannot be replayed. So it is written, in batches and with all layers, to the
same tokens but without any saving of time (`Engine.trace`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from greencode import metrics
from greencode.corpus import read_split
from greencode.engine import Engine
from greencode.episodes import Episodes
from greencode.errors import UserError
from greencode.models import fingerprint, load, pick_device
from greencode.progress import progress
from greencode.rules import Rule
from greencode.tokenise import encode, load_tokenizer


class Rollouts:
    """A trained rule's own text on the contexts of recorded episodes.

    Args:
        engine: of the episodes' model, with its tokenizer.
        rule: with a network.
        episodes: whose contexts are continued.
        files: model tokens of each file, by its id.
        batch: completions made at once.

    Attributes:
        full: ROUGE-L of the full model's text against the file's own, float64 [episodes].

    Raises:
        UserError: a file that the episodes name is not there, or is another one.
    """

    def __init__(
        self,
        engine: Engine,
        rule: Rule,
        episodes: Episodes,
        files: Mapping[int, Sequence[int]],
        batch: int = 16,
    ) -> None:
        self._engine, self._rule, self._batch = engine, rule, batch
        self._new_tokens = episodes.shape[0]
        self._contexts, references = [], []
        for file, length in zip(episodes.files.tolist(), episodes.contexts.tolist(), strict=True):
            tokens = files.get(file, ())
            if len(tokens) < length + self._new_tokens:
                raise UserError(
                    f"File {file} of the recorded episodes is not in these data; name the split that they "
                    "were recorded from."
                )
            self._contexts.append(list(tokens[:length]))
            references.append(tokens[length : length + self._new_tokens])
        self._references = self._decoded(references)
        self.full = self._score(episodes.tokens[..., -1])

    @classmethod
    def of_split(
        cls,
        rule: Rule,
        episodes: Episodes,
        weights: str | Path,
        split: str | Path,
        device: str = "auto",
        batch: int = 16,
    ) -> Rollouts:
        """From the model's folder, and the file of the split that the episodes were recorded from."""
        if fingerprint(weights) != episodes.fingerprint:
            raise UserError(f"{weights} is another model than that of the recorded episodes.")
        tokenizer = load_tokenizer(weights)
        engine = Engine(load(weights, pick_device(device)), episodes.exit_points, tokenizer)
        records = read_split(split)
        tokens = encode(tokenizer, (one.code for one in records))
        files = {record.id: ids for record, ids in zip(records, tokens, strict=True)}
        return cls(engine, rule, episodes, files, batch)

    @functools.cache  # noqa: B019 - targets share candidates, and the object goes with them
    def rouge(self, threshold: float) -> np.ndarray:
        """ROUGE-L of the rule's own text at a threshold, float64 [episodes]."""
        if threshold >= 1:  # nothing leaves
            return self.full
        assert self._rule.network is not None
        network, temperature = self._rule.network, self._rule.temperature

        def leaves(observations: np.ndarray) -> np.ndarray:
            return network.probability(observations, temperature) > threshold

        written = np.empty((len(self._contexts), self._new_tokens), np.int64)
        by_length = sorted(range(len(written)), key=lambda number: len(self._contexts[number]))
        for start in progress(range(0, len(written), self._batch), f"write at {threshold:.3g}"):
            rows = by_length[start : start + self._batch]
            states, tokens, _ = self._engine.trace(
                [self._contexts[row] for row in rows], self._new_tokens, leaves
            )
            left = leaves(states)
            place = np.where(left.any(axis=-1), left.argmax(axis=-1), left.shape[-1])
            written[rows] = np.take_along_axis(tokens, place[..., None], axis=-1)[..., 0]
        return self._score(written)

    def _score(self, tokens: np.ndarray) -> np.ndarray:
        return np.array(metrics.rouge_l(self._decoded(tokens), self._references))

    def _decoded(self, rows: Sequence[Sequence[int]] | np.ndarray) -> list[str]:
        return [self._engine.tokenizer.decode(row) for row in rows]
