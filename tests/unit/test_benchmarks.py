import csv
import itertools
import json
import runpy
import sys

import pytest
import torch

from benchmarks import gpu_paper_scale, table, verified
from benchmarks.engine import NEW_TOKENS, Floor, Machine, Script, mixed_depths
from benchmarks.gpu_paper_scale import GraphDecoder, Rhythm
from greencode.engine import Engine
from greencode.exits import exit_points
from greencode.policies import FixedExit

POINTS = (1, 2, 4, 6)


@pytest.mark.parametrize("layers", [28, 32])
def test_mixed_depths(layers):
    points = exit_points(layers)
    depths = mixed_depths(points)
    assert len(depths) == NEW_TOKENS
    assert set(depths) == set(points)
    assert sum(depths) / NEW_TOKENS == pytest.approx(layers / 2, rel=0.03)


@pytest.mark.parametrize("kv", ["deferred", "none"])
def test_floor_counts_what_the_engine_runs(tiny, kv):
    engine, depths = Engine(tiny("llama"), POINTS), [4, 1, 6, 2, 1]
    done = engine.complete(list(range(9)), len(depths), Script(depths, 1), kv=kv)
    passes = list(Floor(engine, Machine(1.0, 1.0)).passes(depths, 9, cached=kv == "deferred"))
    assert len(passes) == done.usage.layer_calls
    assert sum(count for _, count in passes) == done.usage.layer_positions


def test_floor_is_what_the_slower_of_arithmetic_and_reading_takes(tiny):
    engine = Engine(tiny("opt"), POINTS)
    weights = sum(weight.numel() for weight in engine.family.layers[0].parameters())
    head = engine.family.lm_head.weight.numel()
    many_flops = Floor(engine, Machine(flops=1e30, bytes=1.0))
    # Seven positions of one layer: its weights once, seven keys and values of 32 numbers; then the head.
    assert many_flops.seconds([1], 7) == pytest.approx(4 * (weights + 2 * 32 * 7 + head))
    many_bytes = Floor(engine, Machine(flops=1.0, bytes=1e30))
    attention = 2 * 2 * 32 * 7 * 7 / 2
    assert many_bytes.seconds([1], 7) == pytest.approx(2 * weights * 7 + attention + 2 * head)


@pytest.mark.parametrize(
    ("row", "target", "met"),
    [
        (table.Row("m", "a", "b", 1.01, most=1.02), "<= 1.02", "yes"),
        (table.Row("m", "a", "b", 1.03, most=1.02), "<= 1.02", "NO"),
        (table.Row("m", "a", "b", 99, least=100), ">= 100", "NO"),
        (table.compare("m", "a", "b", 3.0, 1.5), "", ""),
    ],
)
def test_rows_know_their_target(row, target, met, tmp_path, capsys):
    assert (row.target, row.met) == (target, met)
    table.write([row], tmp_path / "t.csv")
    with open(tmp_path / "t.csv") as stream:
        (found,) = csv.DictReader(stream)
    assert float(found["ratio"]) == pytest.approx(row.ratio)
    assert (found["target"], found["met"], found["peer"]) == (target, met, "b")
    table.show([row])
    assert target in capsys.readouterr().out


def test_interleaved_runs_everything_equally_often():
    calls = []
    actions = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = table.interleaved(actions, 4, "test")
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    assert calls[:2] == ["a", "b"]  # the warm-up
    for start in range(2, 14, 3):
        assert sorted(calls[start : start + 3]) == ["a", "b", "c"]


def test_segments_over_a_static_cache_are_the_engine(model):
    # What is captured on a GPU; here the same segments run one by one.
    engine, context = Engine(model, POINTS), list(range(11))
    decoder = GraphDecoder(engine, capacity=32)
    for depth in POINTS:
        wanted = engine.complete(context, 9, FixedExit(depth)).tokens
        assert list(decoder.stream(context, 9, depth)) == wanted
    shorter = engine.complete(context[:4], 9, kv="full").tokens
    assert list(decoder.stream(context[:4], 9, 6)) == shorter  # nothing is left of the longer texts


def test_asking_the_agent_changes_nothing(tiny, make_agent):
    engine, context = Engine(tiny("llama"), POINTS), list(range(7))
    plain, asking = GraphDecoder(engine, 24), GraphDecoder(engine, 24, make_agent(32, POINTS))
    assert list(asking.stream(context, 8, 6)) == list(plain.stream(context, 8, 6))


def test_rhythm_leaves_everywhere_in_turn(tiny):
    done = Engine(tiny("opt"), POINTS).complete(list(range(5)), 8, Rhythm(POINTS))
    assert done.depths == list(itertools.islice(itertools.cycle(POINTS), 8))


@pytest.mark.parametrize("model_name", ["llama", "opt"])
def test_the_gpu_benchmark_at_micro_scale(tmp_path, capsys, model_name):
    gpu_paper_scale.main(["--micro", "--model", model_name, "--out", str(tmp_path)])
    with open(tmp_path / f"{model_name}.csv") as stream:
        rows = list(csv.DictReader(stream))
    points = exit_points(28 if model_name == "llama" else 32)
    for engine, what, count in (
        ("eager", "full", 1), ("eager", "fixed", len(points) - 1), ("eager", "none", len(points)),
        ("eager", "first", len(points)), ("eager", "deferred", 1), ("eager", "agent", 1),
        ("graphs", "full", 1), ("graphs", "fixed", len(points) - 1), ("graphs", "agent", 1),
        *(("eager", f"verified {drafts}", 1) for drafts in verified.DRAFTS),
    ):  # fmt: skip
        assert sum((row["engine"], row["what"]) == (engine, what) for row in rows) == count
    assert all(float(row["seconds"]) > 0 for row in rows)
    about = json.loads((tmp_path / f"{model_name}.json").read_text())
    assert about["summary"]["roofline_share_at_full_depth"] > 0
    assert (tmp_path / f"{model_name}.png").stat().st_size > 10_000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_gpu_benchmark_asks_for_a_gpu():
    with pytest.raises(SystemExit, match="no GPU"):
        gpu_paper_scale.main([])


@pytest.mark.slow
def test_the_benchmark_of_verified_exits_runs(tmp_path):
    verified.main(["--quick", "--out", str(tmp_path)])
    with open(tmp_path / "verified.csv") as stream:
        rows = list(csv.DictReader(stream))
    same = [row for row in rows if row["what"].strip() == "tokens that differ"]
    assert len(same) == 2 * 2 * len(verified.DRAFTS)
    assert {row["met"] for row in same} == {"yes"}
    right = [row for row in rows if "100% right" in row["what"] and row["peer"] == "full"]
    assert len(right) == 2 * len(verified.DRAFTS)


@pytest.mark.slow
def test_the_benchmarks_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick", "--out", str(tmp_path)])
    runpy.run_module("benchmarks", run_name="__main__")
    with open(tmp_path / "benchmarks.csv") as stream:
        subjects = {row["subject"] for row in csv.DictReader(stream)}
    assert len(subjects) == 4  # two shapes, two bundled models
    assert (tmp_path / "engine.png").stat().st_size > 10_000
