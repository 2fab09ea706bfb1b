"""Evaluation of a small generation, by hand."""

from dataclasses import replace

import pytest

from greencode.errors import UserError
from greencode.evaluate import cost, evaluate, paired_difference
from greencode.results import Completion, Evaluation, Generation, Provenance

QUICK = ("rougeL_code", "bleu", "token_accuracy")


def completion(
    id: int, tokens: list[int], depths: list[int], seconds: float, joules: float | None
) -> Completion:
    return Completion(
        id=id,
        context_tokens=40,
        tokens=tokens,
        reference=[1, 2, 3, 4],
        text="return x ; }",
        reference_text="return x ; }",
        depths=depths,
        seconds=seconds,
        cpu_seconds=seconds / 2,
        joules=joules,
        layer_positions=100 * (id + 1),
        checks=id,
    )


@pytest.fixture
def generation() -> Generation:
    return Generation(
        model="tiny",
        dataset="java",
        language="java",
        method="agent-T0.9",
        layers=8,
        exit_points=[4, 6, 8],
        energy_source="estimate",
        energy_note="An estimate.",
        provenance=Provenance.now(
            {"threshold": 0.9}, device="cpu", dtype="float32", kv="deferred", threads=1, seed=7
        ),
        completions=[
            completion(0, [1, 2, 3, 4], [4, 4, 8, 8], 1.0, 10.0),
            completion(1, [1, 2], [4, 6], 3.0, 20.0),
        ],
    )


def values(intervals) -> dict[str, float]:
    return {name: interval.value for name, interval in intervals.items()}


def test_cost_by_hand(generation):
    assert values(cost(generation.completions, 8)) == pytest.approx(
        {
            "seconds": 2.0,
            "cpu_seconds": 1.0,
            "joules": 15.0,
            "tokens_per_second": 6 / 4,  # a mean of ratios would be 2.33
            "joules_per_token": 30 / 6,
            "layers": 34 / 6,
            "layers_skipped": 8 - 34 / 6,
            "layer_positions": 150.0,
            "checks": 0.5,
        }
    )


def test_cost_intervals_lie_around_the_value(generation):
    for interval in cost(generation.completions, 8).values():
        assert interval.low <= interval.value <= interval.high


@pytest.mark.parametrize("known", [None, 10.0])
def test_joules_are_left_out_unless_all_samples_have_them(generation, known):
    first, second = generation.completions
    samples = [replace(first, joules=known), replace(second, joules=None)]
    found = cost(samples, 8)
    assert "joules" not in found
    assert "joules_per_token" not in found
    assert "seconds" in found


def test_measured_zero_joules_stay(generation):
    samples = [replace(sample, joules=0.0) for sample in generation.completions]
    assert cost(samples, 8)["joules"].value == 0


def test_no_tokens_no_cost_per_token(generation):
    samples = [replace(sample, tokens=[], depths=[]) for sample in generation.completions]
    found = cost(samples, 8)
    assert not {"layers", "layers_skipped", "joules_per_token"} & set(found)
    assert found["tokens_per_second"].value == 0


def test_evaluation_of_a_generation(generation):
    evaluation = evaluate(generation, seed=3, resamples=50, metrics=QUICK)
    assert values(evaluation.quality) == pytest.approx({"rougeL_code": 1, "bleu": 1, "token_accuracy": 0.75})
    assert evaluation.depth_counts == {4: 3, 6: 1, 8: 2}
    assert list(evaluation.depth_counts) == [4, 6, 8]
    assert (evaluation.samples, evaluation.method, evaluation.layers) == (2, "agent-T0.9", 8)
    assert (evaluation.energy_source, evaluation.energy_note) == ("estimate", "An estimate.")


def test_provenance_tells_how_both_were_made(generation):
    made = evaluate(generation, seed=3, resamples=50, metrics=QUICK).provenance
    assert (made.device, made.dtype, made.kv, made.threads, made.seed) == ("cpu", "float32", "deferred", 1, 7)
    assert (made.settings["seed"], made.settings["resamples"]) == (3, 50)
    assert made.settings["metrics"] == list(QUICK)
    assert made.settings["generation"]["settings"] == {"threshold": 0.9}


def test_config_hash_follows_settings_not_the_clock(generation):
    def hash_of(generation, seed=3):
        return evaluate(generation, seed=seed, resamples=5, metrics=QUICK).provenance.config_hash

    later = replace(
        generation, provenance=replace(generation.provenance, started="2030-01-01T00:00:00+00:00")
    )
    assert hash_of(later) == hash_of(generation)
    assert hash_of(generation, seed=4) != hash_of(generation)


def test_evaluation_survives_its_file(generation, tmp_path):
    evaluation = evaluate(generation, resamples=20, metrics=QUICK)
    evaluation.write(tmp_path / "e.json")
    assert Evaluation.read(tmp_path / "e.json") == evaluation


def test_same_seed_same_scores(generation):
    first, second = (evaluate(generation, seed=1, resamples=30, metrics=QUICK) for _ in range(2))
    assert (first.quality, first.cost) == (second.quality, second.cost)


def test_all_metrics_by_default(generation):
    pytest.importorskip("greencode.lexing")
    evaluation = evaluate(generation, resamples=20)
    assert {"codebleu", "exact_match", "token_accuracy"} <= set(evaluation.quality)


def test_no_completions(generation):
    with pytest.raises(UserError, match="hold no completions"):
        evaluate(replace(generation, completions=[]))


# --- pairs ----------------------------------------------------------------------------------------------


def test_paired_difference_by_hand():
    found = paired_difference([1.0, 2.0, 3.0], [0.5, 1.5, 2.5])
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))  # the same on each sample


def test_paired_difference_has_a_sign():
    found = paired_difference([0, 0, 1, 0], [1, 1, 1, 0], seed=2)
    assert found.value == -0.5
    assert found.low <= found.value <= found.high == 0


def test_paired_difference_needs_the_same_samples():
    with pytest.raises(UserError, match="1 and 2 samples"):
        paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(UserError, match="no samples"):
        paired_difference([], [])
