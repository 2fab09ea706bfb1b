"""Quality metrics: worked examples, edge cases, and equality with the packages on whole corpora."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from greencode import metrics
from greencode.errors import UserError
from greencode.metrics import QUALITY, intervals, mean, quality, ratio

OFF_LINE = [name for name in QUALITY if name not in ("exact_match", "edit_similarity", "token_accuracy")]
CODEBLEU = [name for name in QUALITY if name.startswith("codebleu")]

# (prediction, reference), code tokens as CodeXGLUE writes them.
JAVA = [
    ("int total = count + 1 ; return total ;", "int total = count + 1 ; return total ;"),
    ("if ( name == null ) { return ; }", "if ( name != null ) { return name ; }"),
    (
        "for ( int i = 0 ; i < n ; i ++ ) sum = sum + i ;",
        "for ( int i = 0 ; i < size ; i ++ ) { sum += i ; }",
    ),
    ("this . value = value ; }", "this . value = value ; this . key = key ; }"),
    ("throw new IllegalStateException ( ) ;", "throw new IllegalArgumentException ( message ) ;"),
    ("", "public int size ( ) { return size ; }"),
    ("return list . get ( 0 ) ;", "List < String > list = new ArrayList < > ( ) ; return list . get ( 0 ) ;"),
]
PYTHON = [
    ("self . name = name <EOL> self . size = 0 <EOL>", "self . name = name <EOL> self . size = size <EOL>"),
    (
        "if key in self . data : <EOL> return self . data [ key ]",
        "if key not in self . data : <EOL> return None",
    ),
    (
        "for line in lines : <EOL> total += len ( line ) <EOL>",
        "for row in rows : <EOL> total += len ( row ) <EOL>",
    ),
    ("return x", "x = compute ( y ) <EOL> return x + y"),
    ("", "def get ( self , key ) : <EOL> return self . data [ key ]"),
    ("import os <EOL> import sys", "import os <EOL> import sys"),
]
CORPORA = {"java": JAVA, "python": PYTHON}


def split(language: str) -> tuple[list[str], list[str]]:
    predictions, references = zip(*CORPORA[language], strict=True)
    return list(predictions), list(references)


def value(name: str, prediction: str, reference: str, language: str = "java") -> float:
    return quality([prediction], [reference], language, metrics=[name], resamples=1)[name].value


# --- against the packages -------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["java", "python"])
def test_codebleu_equals_the_package_on_the_corpus(language):
    from codebleu import calc_codebleu

    predictions, references = split(language)
    ours = quality(predictions, references, language, metrics=CODEBLEU, resamples=10)
    code = [[metrics.as_code(text) for text in texts] for texts in (references, predictions)]
    theirs = calc_codebleu(*code, lang=language)
    assert 0 < theirs["dataflow_match_score"] < 1  # so that the two edge cases do not apply
    for name, package_name in zip(CODEBLEU, theirs, strict=True):
        assert ours[name].value == pytest.approx(theirs[package_name], abs=1e-9), name


@pytest.mark.parametrize("language", ["java", "python"])
def test_bleu_and_chrf_equal_sacrebleu_on_the_corpus(language):
    import sacrebleu

    predictions, references = split(language)
    ours = quality(predictions, references, language, metrics=["bleu", "chrf"], resamples=10)
    bleu = sacrebleu.BLEU(tokenize="none", effective_order=True, force=True)
    assert ours["bleu"].value == pytest.approx(bleu.corpus_score(predictions, [references]).score / 100)
    code = [[metrics.as_code(text) for text in texts] for texts in (predictions, references)]
    assert ours["chrf"].value == pytest.approx(sacrebleu.corpus_chrf(code[0], [code[1]]).score / 100)


def test_resampled_sums_equal_scoring_the_resampled_corpus():
    predictions, references = split("java")
    chosen = [0, 0, 2, 3, 3, 6, 1]
    statistics = metrics.statistics(predictions, references, "java", metrics=OFF_LINE)
    again = quality(
        [predictions[i] for i in chosen],
        [references[i] for i in chosen],
        "java",
        metrics=OFF_LINE,
        resamples=1,
    )
    for name, statistic in statistics.items():
        sums = statistic.values[chosen].sum(axis=0, keepdims=True)
        assert statistic.combine(sums)[0] == pytest.approx(again[name].value), name


# Variables fed by several others in a loop, and the same with other names: here the package's data flow
# depends on the hash seed (14/17 with seed 1 and 16/17 with seed 4, in Python 3.11).
TANGLED = "for ( int i = 0 ; i < n ; i ++ ) { a = b + c + d ; b = a + c + e ; c = d + e + f ; }"
RENAMED = "for ( int i = 0 ; i < n ; i ++ ) { u = v + w + x ; v = u + w + y ; w = x + y + z ; }"
SEEDED = """
from greencode.metrics import quality
found = quality([{!r}], [{!r}], "java", metrics=["codebleu_dataflow"], resamples=1)
print(found["codebleu_dataflow"].value)
"""


def test_data_flow_does_not_depend_on_the_hash_seed():
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", SEEDED.format(RENAMED, TANGLED)],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "4")
    ]
    values = {float(run.communicate()[0]) for run in runs}
    assert len(values) == 1
    assert 0 < values.pop() <= 1


def test_no_warning_of_missing_data_flow(caplog):
    with caplog.at_level(logging.WARNING):
        found = quality(["break ;"], ["break ;"], "java", metrics=CODEBLEU, resamples=5)
    assert "codebleu_dataflow" not in found  # undefined, not 0 and not 1
    assert not caplog.records


# --- worked examples ------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["java", "python"])
def test_equal_predictions_score_one(language):
    # Four code tokens or more: below that CodeBLEU's n-grams of a perfect text stay under 1.
    references = [reference for _, reference in CORPORA[language]]
    found = quality(references, references, language, metrics=OFF_LINE, resamples=50)
    assert list(found) == OFF_LINE
    for name, interval in found.items():
        assert (interval.value, interval.low, interval.high) == pytest.approx((1, 1, 1)), name


@pytest.mark.parametrize("language", ["java", "python"])
def test_empty_predictions_score_zero(language):
    references = [reference for _, reference in CORPORA[language]]
    found = quality([""] * len(references), references, language, metrics=OFF_LINE, resamples=50)
    assert {name: interval.value for name, interval in found.items()} == dict.fromkeys(OFF_LINE, 0.0)


def test_empty_prediction_scores_zero_without_data_flow_too():
    assert value("codebleu", "", "break ;") == 0  # .25 in the package


def test_data_flow_of_zero_is_zero():
    # Reference: total <- count. Prediction: no data flow. The package counts this as 1.
    found = quality(["foo ( ) ;"], ["int total = count ;"], "java", metrics=CODEBLEU, resamples=5)
    parts = [found[name].value for name in CODEBLEU[1:]]
    assert parts[-1] == 0
    assert found["codebleu"].value == pytest.approx(sum(parts) / 4)


def test_rouge_by_hand():
    # Words: x y z against x q z y. Longest common subsequence 2: P 2/3, R 2/4, F 4/7.
    assert value("rougeL", "x y z", "x q z y") == pytest.approx(4 / 7)
    assert value("rougeL_code", "x y z", "x q z y") == pytest.approx(4 / 7)


def test_rouge_drops_punctuation_and_rouge_of_code_tokens_does_not():
    assert value("rougeL", "X >= 0", "x <= 0") == 1
    assert value("rougeL_code", "X >= 0", "x <= 0") == pytest.approx(1 / 3)
    assert value("rougeL", ") ;", ") ;") == 0
    assert value("rougeL_code", ") ;", ") ;") == 1


def test_rouge_of_a_corpus_is_the_plain_mean():
    found = quality(["a b", "a"], ["a b", "b"], "java", metrics=["rougeL"])
    assert found["rougeL"].value == 0.5


def test_bleu_by_hand():
    # 4 of 5 unigrams, 3 of 4 bigrams, 2 of 3 trigrams, 1 of 2 fourgrams, same length.
    expected = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)
    assert value("bleu", "a b c d x", "a b c d e") == pytest.approx(expected)
    assert value("codebleu_ngram", "a b c d x", "a b c d e") == pytest.approx(expected)


def test_bleu_of_short_texts_leaves_long_orders_out():
    assert value("bleu", "return ;", "return ;") == pytest.approx(1)
    assert value("bleu", "a b", "a b c d") == pytest.approx(np.exp(1 - 4 / 2))  # brevity penalty


def test_weighted_ngrams_by_hand():
    # Unigrams of the reference: `return` is a keyword (1), `x` and `;` weigh .2; `x` is missed.
    # Bigrams and longer: none of 2, none of 1, none of max(1, 0); each none counts as .1.
    expected = (1.2 / 1.4 * 0.1 / 2 * 0.1 / 1 * 0.1 / 1) ** (1 / 4)
    assert value("codebleu_weighted_ngram", "return y ;", "return x ;") == pytest.approx(expected)


def test_eol_becomes_a_line_break():
    assert metrics.as_code("<EOL> x = 1 <EOL> y = 2 <EOL>") == "x = 1\ny = 2"
    assert metrics.as_code("") == ""
    assert value("chrf", "x = 1 <EOL> y", "x = 1 y", "python") == pytest.approx(1)


def test_token_accuracy_counts_missing_positions_as_wrong():
    assert metrics.token_accuracy([[1, 2, 9], [1], [], [1, 2, 3, 4, 5]], [[1, 2, 3, 4]] * 4) == [
        0.5,
        0.25,
        0,
        1,
    ]
    found = quality(["a", "b"], ["a", "b"], "java", [[1], [2]], [[1], [3]], metrics=["token_accuracy"])
    assert found["token_accuracy"].value == 0.5


# --- lines ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "language", "line"),
    [
        ("x = 1 <EOL> y = 2", "python", "x = 1"),
        ("x = { 1 ; }", "python", "x = { 1 ; }"),
        ("<EOL> y = 2", "python", ""),
        ("return x ; }", "java", "return x ;"),
        ("if ( a ) { b ( ) ; }", "java", "if ( a ) { b ( ) ;"),
        ("} else {", "java", "}"),
        ("a . b (", "java", "a . b ("),
        ("", "java", ""),
    ],
)
def test_first_line(text, language, line):
    assert metrics.first_line(text, language) == line.split()


def test_line_scores_by_hand():
    pytest.importorskip("greencode.lexing")
    predictions = ["return x ; int y", "abcd ;", "", "f ( <NUM_LIT:1> ) ;", "abcd ;"]
    references = ["return x ; }", "abce ;", "a ;", "f ( 1 ) ;", "wxyz }"]
    exact, similar = metrics.line_scores(predictions, references, "java")
    assert exact == [1, 0, 0, 1, 0]
    # "abcd ;" and "abce ;": 5 of 6 characters each way; the last pair shares the blank alone.
    assert similar == pytest.approx([1, 10 / 12, 0, 1, 2 / 12])


def test_predicting_nothing_is_not_predicting_the_end_of_a_line():
    pytest.importorskip("greencode.lexing")
    exact, similar = metrics.line_scores(["", "<EOL> x"], ["<EOL> y", "<EOL> y"], "python")
    assert (exact, similar) == ([0, 1], [0, 1])


def test_every_metric_in_order():
    pytest.importorskip("greencode.lexing")
    predictions, references = split("python")
    ids = [[1, 2]] * len(predictions)
    assert list(quality(predictions, references, "python", ids, ids, resamples=5)) == list(QUALITY)
    assert list(quality(predictions, references, "python", resamples=5)) == list(QUALITY)[:-1]


# --- the bootstrap --------------------------------------------------------------------------------------


def test_interval_of_a_mean_covers_what_theory_says():
    scores = np.random.default_rng(5).random(400)
    found = intervals({"x": mean(scores)}, seed=1, resamples=4000)["x"]
    half = 1.96 * scores.std() / 20
    assert found.value == pytest.approx(scores.mean())
    assert found.low == pytest.approx(scores.mean() - half, abs=half / 10)
    assert found.high == pytest.approx(scores.mean() + half, abs=half / 10)


def test_same_seed_same_interval():
    first, second, third = (intervals({"x": mean(range(30))}, seed=s, resamples=100) for s in (3, 3, 4))
    assert first == second != third


def test_one_sample_has_an_interval_of_no_width():
    found = intervals({"x": mean([0.25])})["x"]
    assert (found.value, found.low, found.high) == (0.25, 0.25, 0.25)


def test_ratio_is_sum_over_sum_and_undefined_over_zero():
    found = intervals({"x": ratio([10, 10], [1, 4]), "none": ratio([1, 1], [0, 0])})
    assert found["x"].value == 4  # the mean of ratios would be 6.25
    assert (found["x"].low, found["x"].high) == (2.5, 10)
    assert "none" not in found


def test_resamples_where_a_score_is_undefined_are_not_counted():
    found = intervals({"x": ratio([1, 0], [2, 0])}, resamples=200)["x"]
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


# --- what a user can mend -------------------------------------------------------------------------------


def test_no_samples():
    with pytest.raises(UserError, match="no samples"):
        quality([], [], "java")
    with pytest.raises(UserError, match="no samples"):
        intervals({"x": mean([])})


def test_unknown_language_metric_and_no_resamples():
    with pytest.raises(UserError, match="'cobol'"):
        quality(["a"], ["a"], "cobol")
    with pytest.raises(UserError, match="'meteor'"):
        quality(["a"], ["a"], "java", metrics=["meteor"])
    with pytest.raises(UserError, match="resamples is 0"):
        quality(["a"], ["a"], "java", metrics=["bleu"], resamples=0)


def test_lengths_must_match():
    with pytest.raises(ValueError, match="2 predictions for 1"):
        quality(["a", "b"], ["a"], "java")
    with pytest.raises(ValueError, match="token ids"):
        quality(["a"], ["a"], "java", metrics=["token_accuracy"])
