"""How good completions are: corpus scores of predictions against references, each with its interval.

Texts are code tokens joined by blanks, as CodeXGLUE writes them; a Python line ends with `<EOL>`. Every
score lies in 0..1. A corpus score is a function of sums over samples (n-gram matches, subtrees, ...), so
the sums are kept per sample and the bootstrap only adds them up anew.

What each metric reads:
- ROUGE-L, BLEU: the text as it is; `<EOL>` is one token. The rouge-score package lower-cases and drops
  punctuation, so `x >= 0` equals `x <= 0` and a text of punctuation alone scores 0; `rougeL_code` does not.
- chrF, CodeBLEU: the text with `<EOL>` as a line break. CodeXGLUE drops Python's indentation, so the parser
  sees the body of a block at the left margin, in predictions and references alike: scores compare with
  one another and with the published ones, which were also computed on the completions alone, but not with
  CodeBLEU of indented source.
- exact match, edit similarity: the first line only (see `first_line`).
- token accuracy: the model's token ids.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from greencode.errors import UserError
from greencode.results import Interval

QUALITY = {
    "rougeL": "ROUGE-L",
    "rougeL_code": "ROUGE-L (code tokens)",
    "bleu": "BLEU",
    "chrf": "chrF",
    "codebleu": "CodeBLEU",
    "codebleu_ngram": "CodeBLEU: n-grams",
    "codebleu_weighted_ngram": "CodeBLEU: weighted n-grams",
    "codebleu_syntax": "CodeBLEU: syntax",
    "codebleu_dataflow": "CodeBLEU: data flow",
    "exact_match": "Exact match (line)",
    "edit_similarity": "Edit similarity (line)",
    "token_accuracy": "Token accuracy",
}
"""Metric name -> label for people, in the order of tables and figures."""

LANGUAGES = ("java", "python")

_CODEBLEU = [name for name in QUALITY if name.startswith("codebleu")]


@dataclass(frozen=True)
class Statistic:
    """A corpus score as sums over samples.

    Attributes:
        values: (samples, k) what each sample adds.
        combine: (m, k) sums -> (m,) scores; NaN where a score is undefined.
    """

    values: np.ndarray
    combine: Callable[[np.ndarray], np.ndarray]


def mean(values: Sequence[float]) -> Statistic:
    """The plain mean over samples."""
    return ratio(values, np.ones(len(values)))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Statistic:
    """Sum over sum, e.g. tokens per second; undefined where the denominators add up to 0."""
    return Statistic(np.column_stack([numerators, denominators]).astype(float), _ratio)


def intervals(statistics: dict[str, Statistic], seed: int = 0, resamples: int = 1000) -> dict[str, Interval]:
    """Corpus value and 95 % percentile bootstrap interval over samples.

    All statistics must come from the same samples: they share the resamples, and the same seed draws the
    same ones. A statistic that is undefined on the corpus is left out; resamples where it is undefined are
    not counted.

    Raises:
        UserError: no samples, or no resamples.
    """
    sizes = {len(statistic.values) for statistic in statistics.values()}
    if not sizes:
        return {}
    if len(sizes) > 1:
        raise ValueError(f"statistics of {sorted(sizes)} samples cannot share resamples")
    samples = sizes.pop()
    if samples == 0:
        raise UserError("There are no samples to score; check the sample count and the test data.")
    if resamples < 1:
        raise UserError(f"The number of bootstrap resamples is {resamples}; use 1 or more, usually 1000.")
    rng = np.random.default_rng(seed)
    # How often each sample is drawn is all that a sum needs to know of a resample.
    draws = rng.multinomial(samples, np.full(samples, 1 / samples), size=resamples).astype(float)
    result = {}
    for name, statistic in statistics.items():
        value = float(statistic.combine(statistic.values.sum(axis=0, keepdims=True))[0])
        if np.isnan(value):
            continue
        low, high = np.nanpercentile(statistic.combine(draws @ statistic.values), [2.5, 97.5])
        result[name] = Interval(value, float(low), float(high))
    return result


def quality(
    predictions: Sequence[str],
    references: Sequence[str],
    language: str,
    token_ids: Sequence[Sequence[int]] | None = None,
    reference_ids: Sequence[Sequence[int]] | None = None,
    *,
    metrics: Sequence[str] | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Interval]:
    """Scores in 0..1 of a corpus of predictions, each with its 95 % interval.

    Args:
        predictions, references: one text per sample.
        language: `java` or `python`.
        token_ids, reference_ids: the same completions as token ids, for `token_accuracy`.
        metrics: names from `QUALITY`; all that the arguments allow if None.
        seed, resamples: of the bootstrap.

    Raises:
        UserError: no samples, an unknown metric or an unknown language.
    """
    wanted = statistics(predictions, references, language, token_ids, reference_ids, metrics=metrics)
    return intervals(wanted, seed, resamples)


def statistics(
    predictions: Sequence[str],
    references: Sequence[str],
    language: str,
    token_ids: Sequence[Sequence[int]] | None = None,
    reference_ids: Sequence[Sequence[int]] | None = None,
    *,
    metrics: Sequence[str] | None = None,
) -> dict[str, Statistic]:
    """What `quality` resamples: metric name -> statistic, in the order of `QUALITY`."""
    if language not in LANGUAGES:
        raise UserError(f"Language {language!r} cannot be scored; use one of {', '.join(LANGUAGES)}.")
    if unknown := sorted(set(metrics or ()) - set(QUALITY)):
        raise UserError(f"Metric {unknown[0]!r} is unknown; use some of {', '.join(QUALITY)}.")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    if not predictions:
        raise UserError("There are no samples to score; check the sample count and the test data.")
    if metrics is None:
        metrics = [name for name in QUALITY if name != "token_accuracy" or token_ids is not None]

    found: dict[str, Statistic] = {}
    if "rougeL" in metrics:
        found["rougeL"] = mean(rouge_l(predictions, references))
    if "rougeL_code" in metrics:
        found["rougeL_code"] = mean(rouge_l(predictions, references, code_tokens=True))
    if "bleu" in metrics:
        found["bleu"] = _bleu(predictions, references)
    if "chrf" in metrics:
        found["chrf"] = _chrf(predictions, references)
    if set(metrics) & set(_CODEBLEU):
        found |= _codebleu(predictions, references, language)
    if {"exact_match", "edit_similarity"} & set(metrics):
        exact, similar = line_scores(predictions, references, language)
        found |= {"exact_match": mean(exact), "edit_similarity": mean(similar)}
    if "token_accuracy" in metrics:
        if token_ids is None or reference_ids is None:
            raise ValueError("token_accuracy needs token ids")
        found["token_accuracy"] = mean(token_accuracy(token_ids, reference_ids))
    return {name: found[name] for name in QUALITY if name in metrics}


# --- scores of single samples ---------------------------------------------------------------------------


def rouge_l(predictions: Sequence[str], references: Sequence[str], code_tokens: bool = False) -> list[float]:
    """ROUGE-L F-measure of each sample (rouge-score), over words or over code tokens."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_CodeTokens() if code_tokens else None)
    pairs = zip(references, predictions, strict=True)
    return [float(scorer.score(reference, prediction)["rougeL"].fmeasure) for reference, prediction in pairs]


class _CodeTokens:
    """rouge-score's tokenizer interface, for text that is tokens joined by blanks."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()


def first_line(text: str, language: str) -> list[str]:
    """Code tokens of the line that a completion begins with, as in CodeXGLUE's line completion.

    A Python line ends before `<EOL>`, a Java one at the first `;` or `}`, which belongs to it.
    """
    tokens = text.split()
    ends, inclusive = (("<EOL>",), 0) if language == "python" else ((";", "}"), 1)
    end = next((i + inclusive for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:end]


def line_scores(
    predictions: Sequence[str], references: Sequence[str], language: str
) -> tuple[list[float], list[float]]:
    """Exact match (0 or 1) and edit similarity (0..1, `fuzz.ratio`) of each sample's first line.

    Literal placeholders are un-normalised first, as in CodeXGLUE's evaluator. A prediction without any
    token scores 0 even where the reference line is empty: it did not predict the line's end.
    """
    from rapidfuzz import fuzz

    from greencode.lexing import unnormalise

    exact, similar = [], []
    for prediction, reference in zip(predictions, references, strict=True):
        ours, theirs = (
            unnormalise(" ".join(first_line(text, language))).split() for text in (prediction, reference)
        )
        said = bool(prediction.strip())
        exact.append(float(said and ours == theirs))
        similar.append(fuzz.ratio(" ".join(ours), " ".join(theirs)) / 100 if said else 0.0)
    return exact, similar


def token_accuracy(token_ids: Sequence[Sequence[int]], reference_ids: Sequence[Sequence[int]]) -> list[float]:
    """Share of each reference's positions where the predicted id is the same; a missing one is wrong."""
    return [
        sum(a == b for a, b in zip(ids, reference, strict=False)) / max(1, len(reference))
        for ids, reference in zip(token_ids, reference_ids, strict=True)
    ]


# --- corpus scores --------------------------------------------------------------------------------------


def _bleu(predictions: Sequence[str], references: Sequence[str]) -> Statistic:
    """Corpus BLEU over code tokens (sacrebleu); orders longer than every completion are left out."""
    from sacrebleu.metrics import BLEU

    return _sacrebleu(BLEU(tokenize="none", effective_order=True, force=True), predictions, references)


def _chrf(predictions: Sequence[str], references: Sequence[str]) -> Statistic:
    """Corpus chrF (sacrebleu), character 6-grams without blanks."""
    from sacrebleu.metrics import CHRF

    return _sacrebleu(CHRF(), [as_code(text) for text in predictions], [as_code(text) for text in references])


def _sacrebleu(metric: Any, predictions: Sequence[str], references: Sequence[str]) -> Statistic:
    values = np.array(metric._extract_corpus_statistics(list(predictions), [list(references)]), dtype=float)
    return Statistic(
        values,
        lambda sums: np.array([metric._compute_score_from_stats(row).score for row in sums.tolist()]) / 100,
    )


def as_code(text: str) -> str:
    """The text as a parser should see it: `<EOL>` is a line break, with no blanks around it."""
    return re.sub(r"\s*<EOL>\s*", "\n", text).strip()


def _codebleu(predictions: Sequence[str], references: Sequence[str], language: str) -> dict[str, Statistic]:
    """CodeBLEU and its four parts, from the codebleu package's own counts of each sample.

    The corpus values equal `calc_codebleu(references, predictions, language)` of the same texts, quirks
    included: its weighted n-grams take every reference for 2 tokens long, so shortness costs nothing
    there, and completions of fewer than 4 tokens keep it below 1 when all are equal. Two edge cases differ.
    The package counts a data-flow score of 0 as 1 (`dataflow or 1`), so that predicting nothing scores .25;
    here 0 is 0. Where the references have no data flow at all, its part is undefined and left out of the
    results, and the other three share its weight.

    The package also numbers variables in the order of a set of strings, so that its data flow changes with
    PYTHONHASHSEED. Here names hash alike in every run (see `_Name`): one of the package's possible values,
    always the same one.
    """
    from codebleu.utils import get_tree_sitter_language
    from tree_sitter import Parser

    parser = Parser()
    parser.language = get_tree_sitter_language(language)
    keywords = _keywords(language)
    values = np.array(
        [
            _codebleu_counts(as_code(prediction), as_code(reference), language, parser, keywords)
            for prediction, reference in zip(predictions, references, strict=True)
        ],
        dtype=float,
    )

    def ngram(sums: np.ndarray) -> np.ndarray:
        return _nltk_bleu(sums[:, 0:4], sums[:, 4:8], sums[:, 16], sums[:, 17])

    def weighted(sums: np.ndarray) -> np.ndarray:
        return _nltk_bleu(sums[:, 8:12], sums[:, 12:16], sums[:, 16], sums[:, 18])

    def syntax(sums: np.ndarray) -> np.ndarray:
        return _ratio(sums[:, 19:21])

    def dataflow(sums: np.ndarray) -> np.ndarray:
        return _ratio(sums[:, 21:23])

    def total(sums: np.ndarray) -> np.ndarray:
        return np.nanmean([part(sums) for part in (ngram, weighted, syntax, dataflow)], axis=0)

    parts = (total, ngram, weighted, syntax, dataflow)
    return {name: Statistic(values, part) for name, part in zip(_CODEBLEU, parts, strict=True)}


def _keywords(language: str) -> set[str]:
    from codebleu.codebleu import PACKAGE_DIR

    return set((PACKAGE_DIR / "keywords" / f"{language}.txt").read_text(encoding="utf-8").split())


def _codebleu_counts(
    prediction: str, reference: str, language: str, parser: Any, keywords: set[str]
) -> list[float]:
    """What one sample adds: 4 matches and 4 totals of n-grams, the same weighted, 3 lengths, subtrees
    matched and in all, data flows matched and in all."""
    from codebleu import bleu, weighted_ngram_match

    ours, theirs = prediction.split(), reference.split()
    weights = {token: 1 if token in keywords else 0.2 for token in theirs}
    plain = [bleu.modified_precision([theirs], ours, n) for n in (1, 2, 3, 4)]
    heavy = [[theirs, weights]]
    weighted = [weighted_ngram_match.modified_recall(heavy, ours, n) for n in (1, 2, 3, 4)]
    return [
        *(matches for matches, _ in plain),
        *(count for _, count in plain),
        *(matches for matches, _ in weighted),
        *(count for _, count in weighted),
        len(ours),
        bleu.closest_ref_length([theirs], len(ours)),
        weighted_ngram_match.closest_ref_length(heavy, len(ours)),
        *_syntax_counts(prediction, reference, language, parser),
        *_dataflow_counts(prediction, reference, language, parser),
    ]


def _syntax_counts(prediction: str, reference: str, language: str, parser: Any) -> tuple[int, int]:
    from codebleu.syntax_match import corpus_syntax_match

    share = corpus_syntax_match([[reference]], [prediction], language, parser.language)
    # The package returns the share alone; its total is the root and every other node that has children.
    root = parser.parse(_uncommented(reference, language).encode()).root_node
    nodes, subtrees = [root], 1
    while nodes:
        inner = [child for child in nodes.pop().children if child.children]
        subtrees += len(inner)
        nodes += inner
    return round(share * subtrees), subtrees


def _dataflow_counts(prediction: str, reference: str, language: str, parser: Any) -> tuple[int, int]:
    from codebleu.dataflow_match import dfg_function, get_data_flow, normalize_dataflow

    def extract(root: Any, index_to_code: dict, states: dict) -> Any:
        for index, (position, name) in index_to_code.items():
            index_to_code[index] = position, _Name(name)
        return dfg_function[language](root, index_to_code, states)

    ours, theirs = (
        normalize_dataflow(get_data_flow(_uncommented(text, language), (parser, extract)))
        for text in (prediction, reference)
    )
    matched = 0
    for flow in theirs:
        if flow in ours:
            ours.remove(flow)
            matched += 1
    return matched, len(theirs)


class _Name(str):
    """A variable's name whose hash is the same in every run, as that of `str` is not."""

    __slots__ = ()

    def __hash__(self) -> int:
        return zlib.crc32(self.encode())


def _uncommented(text: str, language: str) -> str:
    """The package's own first step, which leaves text that it cannot tokenize as it is."""
    from codebleu.parser import remove_comments_and_docstrings

    try:
        return remove_comments_and_docstrings(text, language)
    except Exception:
        return text


def _nltk_bleu(matches: np.ndarray, totals: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """BLEU as in the codebleu package: orders without a match count as .1 matches; (m, 4) counts -> (m,)."""
    with np.errstate(divide="ignore"):
        brevity = np.where(ours > theirs, 1.0, np.exp(1 - theirs / np.maximum(ours, 1)))
        score = brevity * np.exp(np.log(np.where(matches == 0, 0.1, matches) / totals).mean(axis=1))
    return np.where(matches[:, 0] == 0, 0.0, score)


def _ratio(sums: np.ndarray) -> np.ndarray:
    """(m, 2) numerators and denominators -> (m,), NaN where the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[:, 1] > 0, sums[:, 0] / sums[:, 1], np.nan)
