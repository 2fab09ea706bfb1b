"""Numbers of the frontier on cases computed by hand."""

import numpy as np
import pytest
from test_rules import POINTS, make

from greencode.errors import UserError
from greencode.frontier import (
    agreements,
    comparisons,
    holm,
    hypervolume,
    measure,
    per_sample,
    saving_at,
    seeds,
    sign_flip_p,
    summaries,
    teacher_forced,
)
from greencode.policies import ExitPolicy
from greencode.results import Completion, Generation, Provenance, read_generations, write_generations
from greencode.rules import Rule, operating_points, replay, verified_points


def generation(method, tokens, depths, seconds):
    """Completions of samples whose reference is 1 2 3 4."""
    completions = [
        Completion(
            id=index, context_tokens=9, tokens=ids, reference=[1, 2, 3, 4],
            text=" ".join(map(str, ids)), reference_text="1 2 3 4", depths=depth, seconds=time,
            cpu_seconds=time, joules=None, layer_positions=0, checks=0,
        )
        for index, (ids, depth, time) in enumerate(zip(tokens, depths, seconds, strict=True))
    ]  # fmt: skip
    return Generation(
        "m", "d", "python", method, 8, [4, 8], None, "", Provenance("", "", None, {}), completions
    )


FULL = generation("full", [[1, 2, 3, 9], [1, 2, 3, 4]], [[8] * 4] * 2, [1.0, 3.0])
HALF = generation("fixed-4", [[1, 2, 3, 4], [1, 9, 9, 9]], [[4] * 4] * 2, [0.5, 1.5])


def test_measured():
    assert agreements(HALF, FULL) == [0.75, 0.25]
    found = measure(HALF, FULL, per_sample(HALF, FULL))
    assert found["agreement"].value == 0.5
    assert found["token_accuracy"].value == 0.625
    assert found["time_saved"].value == 0.5
    assert found["layers_saved"].value == 0.5
    assert found["seconds"].value == 1
    assert "joules" not in found
    assert measure(FULL, FULL, per_sample(FULL, FULL))["agreement"].low == 1
    fewer = generation("full", [[1, 2, 3, 4]], [[8] * 4], [1.0])
    with pytest.raises(UserError, match="different samples"):
        agreements(HALF, fewer)


def test_several_methods_in_one_file(tmp_path):
    path = tmp_path / "generations.jsonl.gz"
    write_generations([FULL, HALF], path)
    assert read_generations(path) == [FULL, HALF]
    with pytest.raises(UserError, match="of one method; it has 2"):
        Generation.read(path)


def test_seeds_at_equal_depth_with_thresholds_of_their_own():
    def network(seed, factor):
        """Reads what tells whether an exit point is right, and trusts it as much as the factor says."""
        weight = factor * np.eye(3, 6)[:, None]
        return ExitPolicy(
            [(weight, np.zeros((3, 1)))], POINTS, "final_norm", "abc", {"settings": {"seed": seed}}
        )

    validation, test = make(count=400), make(count=100, seed=1)
    rules = [Rule("one", "agent", network(4, 1.0)), Rule("two", "agent", network(4, 1.0))]
    others = {"two": [network(9, 0.5), network(6, -1.0)]}
    chosen = operating_points(rules, validation, [0.5, 0.8])
    rows = seeds(rules, others, validation, test, chosen)
    assert [(row["rule"], row["seed"], row["share"]) for row in rows] == [
        ("two", seed, share) for seed in (4, 9, 6) for share in (0.5, 0.8)
    ]
    for first, sure, wrong, point in zip(rows[:2], rows[2:4], rows[4:], chosen[2:], strict=True):
        assert first["threshold"] == point["threshold"]
        depths, agreement = replay(test, rules[1].scores(test), point["threshold"])
        assert (first["forced_layers"], first["forced_agreement"]) == (depths.mean(), agreement.mean())
        # Half as sure in everything, it has the same ranks and so leaves at the same places.
        odds = [row["threshold"] / (1 - row["threshold"]) for row in (first, sure)]
        assert odds[0] == pytest.approx(odds[1] ** 2, rel=1e-3)
        for name in ("forced_layers", "forced_agreement"):
            assert sure[name] == pytest.approx(first[name], abs=1e-3)
        assert wrong["forced_layers"] == pytest.approx(6 * wrong["share"], abs=0.3)
        assert wrong["forced_agreement"] < first["forced_agreement"] - 0.1
    assert seeds(rules, {}, validation, test, chosen) == []


def test_savings_between_points():
    points = [(0.5, 0.8), (0.25, 0.96)]
    assert saving_at(points, 0.95) == pytest.approx(0.25 + 0.25 * 0.01 / 0.16)
    assert saving_at(points, 0.99) == pytest.approx(0.25 * 0.25)
    assert saving_at(points, 0.7) == 0.5
    assert saving_at([(-0.1, 0.99)], 0.99) == 0
    assert saving_at([(0.3, 1.02)], 0.99) == 0.3
    # Neither a dip before nor a dip behind hides a point that is good enough.
    assert saving_at([(0.2, 0.9), (0.4, 0.97)], 0.95) == pytest.approx(0.4)


def test_hypervolume_is_the_area_under_the_best_points():
    assert hypervolume([]) == 0
    assert hypervolume([(0.5, 1.0)]) == 0.5
    assert hypervolume([(0.5, 0.8), (0.25, 0.9)]) == pytest.approx(0.5 * 0.8 + 0.25 * 0.1)
    assert hypervolume([(0.5, 0.8), (0.4, 0.7)]) == pytest.approx(0.4)  # the second is dominated
    assert hypervolume([(0.5, 1.2)]) == 0.5


def test_summaries_of_known_samples():
    def method(agreement, seconds):
        good = np.full(10, agreement)
        return {"agreement": good, "token_accuracy": good, "rougeL": good, "seconds": np.full(10, seconds)}

    samples = {"full": method(1.0, 2.0), "a": method(0.95, 1.0), "b": method(0.5, 0.5)}
    rows = summaries(samples, {"rule": ["a", "b"]}, resamples=20)
    found = {(row["quality"], row["summary"]): row for row in rows}
    assert found["agreement", "saving at 95%"]["value"] == pytest.approx(0.5)
    assert found["agreement", "saving at 99%"]["value"] == pytest.approx(0.1)
    assert found["rougeL", "hypervolume"]["value"] == pytest.approx(0.75 * 0.5 + 0.5 * 0.45)
    assert all(row["low"] == pytest.approx(row["value"]) == row["high"] for row in rows)


def test_tests_of_pairs():
    rng = np.random.default_rng(0)
    same = rng.normal(size=40)
    assert sign_flip_p(np.zeros(5)) == 1
    assert sign_flip_p(np.full(20, 0.1)) < 0.001
    assert sign_flip_p(same - same.mean()) == 1
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    good, bad = np.ones(30), np.zeros(30)
    samples = {
        "a": {"agreement": good, "seconds": good},
        "b": {"agreement": bad, "seconds": good},
    }
    first, second = comparisons(samples, {"x": {0.5: "a"}, "y": {0.5: "b", 0.8: "a"}})
    assert (first["rule"], first["against"], first["share"], first["value"]) == ("x", "y", 0.5, 1.0)
    assert first["p_holm"] == pytest.approx(2 * first["p"])
    assert second["p"] == 1


def test_rules_are_put_at_equal_depth():
    validation = make(count=400)
    rules = [Rule("c", "random", seed=1), Rule("r", "random", seed=2)]
    points = operating_points(rules, validation, [0.5, 0.8])
    assert [point["method"] for point in points] == ["c-D0.5", "c-D0.8", "r-D0.5", "r-D0.8"]
    for point in points:
        assert point["depth"] == pytest.approx(6 * point["share"], abs=0.1)
    verified = verified_points(rules, validation, {"r": [0.8]})
    assert verified == [points[3] | {"method": "r-V0.8", "rule": "r verified", "kv": "verified"}]
    forced = teacher_forced(validation, rules[0].scores(validation), points[0]["threshold"])
    assert forced["forced_layers"].value == pytest.approx(points[0]["depth"])
    assert forced["forced_agreement"].value == pytest.approx(points[0]["agreement"])
