"""Thresholds that keep a promise: the guarantee holds on fresh draws, and what cannot be promised is said."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from test_rules import HIDDEN, heads, make

from greencode.__main__ import main as commands
from greencode.calibrate import calibrate, candidates, main, outcomes, p_value
from greencode.errors import UserError
from greencode.policies import ExitPolicy
from greencode.promises import Calibration
from greencode.results import Provenance
from greencode.rules import Rule
from greencode.stopping import Settings, train


@pytest.fixture(scope="module")
def rule():
    settings = Settings(hidden=(), price=0.0, dropout=0.0, epochs=5, batch_size=64)
    return Rule("classifier", "classifier", train(make(seed=9), settings))


def test_p_values_by_hand():
    alpha = 0.1
    assert p_value(np.full(100, 0.7), 0.8, alpha) == 1
    # One bet, of 0.9 / level.
    assert p_value(np.array([1.0]), 0.9, alpha) == pytest.approx(1 / 1.1)
    assert p_value(np.array([1.0] * 9 + [0.0]), 0.5, alpha) < 0.1
    assert p_value(np.array([1.0] * 9 + [0.0] * 10), 0.5, alpha) == 1
    assert p_value(np.array([]), 0.9, alpha) == 1
    rng = np.random.default_rng(0)
    few, many = (rng.normal(0.85, 0.1, size).clip(0, 1) for size in (30, 300))
    assert p_value(many, 0.8, alpha) < p_value(few, 0.8, alpha) < 1
    # Equal means, but one is certain.
    assert p_value(np.full(60, 0.85), 0.8, alpha) < p_value(rng.random(60) < 0.85, 0.8, alpha)


@pytest.mark.parametrize("level", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_p_values_are_small_as_seldom_as_they_say(level, alpha):
    """Where the expected value is just what was asked, coins being the hardest case."""
    rng = np.random.default_rng(1)
    small = sum(p_value((rng.random(60) < level).astype(float), level, alpha) <= alpha for _ in range(1000))
    assert small <= 1000 * alpha + 3 * (1000 * alpha) ** 0.5
    beta = rng.beta(8 * level, 8 * (1 - level), size=(1000, 60))
    small = sum(p_value(values, level, alpha) <= alpha for values in beta)
    assert small <= 1000 * alpha + 3 * (1000 * alpha) ** 0.5


@pytest.mark.parametrize("wanted", ["saving", "agreement"])
def test_promises_hold_as_often_as_stated(rule, wanted):
    """On 60 calibration sets of 80 files the true value falls short at most as often as allowed."""
    training, population = make(count=200, seed=1), make(count=20_000, seed=2)
    grid = candidates(rule, training)
    depth, kept = (values.mean(axis=0) for values in outcomes(rule, population, grid))
    truth = dict(zip(grid.tolist(), 1 - depth if wanted == "saving" else kept, strict=True))
    target = 0.3 if wanted == "saving" else 0.9
    short = given = 0
    for seed in range(60):
        (one,) = calibrate(rule, training, make(count=80, seed=100 + seed), [(wanted, target)], 0.8)
        if one.threshold is not None:
            given += 1
            short += truth[one.threshold] < target
            assert getattr(one, wanted) >= target
    assert given > 40
    # Binomial(60, 0.2) is above 20 once in 500 times.
    assert short <= 20


def test_more_files_promise_more(rule):
    training = make(count=200, seed=1)
    few, many = (
        calibrate(rule, training, make(count=count, seed=3), [("agreement", 0.9)])[0] for count in (60, 2000)
    )
    assert many.saving > few.saving


def test_what_cannot_be_promised_is_said(rule):
    training, validation = make(count=200, seed=1), make(count=20, seed=3)
    (one,) = calibrate(rule, training, validation, [("saving", 0.95)])
    assert one.threshold is None
    assert one.saving is None
    assert "a saving of 95% cannot be promised with 90% confidence" in one.reason
    # Four files: even a rule that never leaves and so keeps everything proves little.
    (one,) = calibrate(rule, training, make(count=4, seed=3), [("agreement", 0.99)], 0.95)
    assert one.threshold is None


def test_files_are_the_independent_units(rule):
    validation = make(count=40, seed=3)
    validation.files[:] = np.arange(40) // 4
    depth, kept = outcomes(rule, validation, np.array([0.0, 0.5, 1.0]))
    assert depth.shape == kept.shape == (10, 3)
    assert depth[:, 2].tolist() == [1.0] * 10
    assert kept[:, 2].tolist() == [1.0] * 10


def test_a_calibration_is_kept_as_a_file(rule, tmp_path):
    training, validation = make(count=200, seed=1), make(count=300, seed=3)
    targets = [("saving", 0.2), ("saving", 0.1), ("agreement", 0.8), ("saving", 0.99)]
    promises = tuple(calibrate(rule, training, validation, targets))
    made = Calibration("classifier", "of a model", "of a network", 1.0, promises)
    path = tmp_path / "calibration.json"
    made.save(path, Provenance.now({}))
    assert Calibration.load(path) == made
    # The mildest promise that is enough.
    assert made.find("saving", 0.1).target == 0.1
    assert made.find("saving", 0.15).target == 0.2
    assert made.find("saving", 0.2).threshold <= made.find("saving", 0.1).threshold
    assert made.find("saving", 0.5) is None
    assert made.most("saving") == 0.2
    assert made.most("speed") is None
    path.write_text("{}")
    with pytest.raises(UserError, match=r"calibration.json is not a calibration .*; run `calibrate` again"):
        Calibration.load(path)


def test_a_threshold_holds_for_its_temperature(rule):
    training, validation = make(count=200, seed=1), make(count=200, seed=3)
    warm = replace(rule, temperature=2.0)
    (cool, warmed) = (calibrate(one, training, validation, [("saving", 0.2)])[0] for one in (rule, warm))
    assert warmed.saving == cool.saving
    # The same order of scores, closer to one half.
    assert abs(warmed.threshold - 0.5) < abs(cool.threshold - 0.5)
    odds = math.log(cool.threshold / (1 - cool.threshold))
    assert warmed.threshold == pytest.approx(1 / (1 + math.exp(-odds / 2)), abs=1e-5)


def test_faults(rule):
    training = make(count=20, seed=1)
    with pytest.raises(UserError, match="Target 'speed' is unknown"):
        calibrate(rule, training, training, [("speed", 0.5)])
    with pytest.raises(UserError, match="not between 0 and 1; ask for a share"):
        calibrate(rule, training, training, [("saving", 40)])
    with pytest.raises(UserError, match="Confidence 90"):
        calibrate(rule, training, training, [("saving", 0.4)], 90)
    with pytest.raises(UserError, match="no validation episodes"):
        calibrate(rule, training, make(count=0), [("saving", 0.4)])


def test_command(tmp_path, capsys, rule):
    make(seed=1).save(tmp_path / "train.safetensors")
    make(seed=2).save(tmp_path / "validation.safetensors")
    rule.network.save(tmp_path / "policy.safetensors")
    policy = ["--policy", str(tmp_path / "policy.safetensors")]
    assert main([str(tmp_path), *policy, "--saving", "0.3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["saving"] > 0.3
    assert 0 < found["threshold"] < 1
    assert main([str(tmp_path), "--rule", "confidence", "--agreement", "0.999"]) == 1
    assert "cannot be promised" in capsys.readouterr().err
    for arguments, fault in (
        ([], "Name either --policy"),
        ([*policy, "--rule", "margin"], "Name either --policy"),
        (["--rule", "margin"], "Ask for --saving, --agreement or --rougeL"),
        ([*policy, "--rougeL", "0.9"], "--rougeL needs --policy, --weights and --files"),
    ):
        assert main([str(tmp_path), *arguments]) == 1
        assert fault in capsys.readouterr().err
    ExitPolicy(heads(size=HIDDEN).layers, (1, 2, 4, 6), "final_norm", "other", {}).save(tmp_path / "other")
    assert main([str(tmp_path), "--policy", str(tmp_path / "other"), "--saving", "0.3"]) == 1
    assert "another model" in capsys.readouterr().err


def test_commands_by_name(capsys, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["greencode", "calibrate", "nowhere", "--rule", "margin", "--saving", "0.3"]
    )
    assert commands() == 1
    assert "nowhere/train.safetensors does not exist" in capsys.readouterr().err
    for arguments in ([], ["bake"]):
        monkeypatch.setattr("sys.argv", ["greencode", *arguments])
        assert commands() == 2
        assert "calibrate" in capsys.readouterr().err
