"""Tables from small made-up evaluations, by hand."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from greencode import tables
from greencode.errors import UserError
from greencode.results import Evaluation, Interval, Provenance

PUBLISHED = Path(__file__).parents[2] / "resources" / "published_values.csv"


def evaluation(method: str, seconds: float, joules: float | None = 10.0, layers: int = 28) -> Evaluation:
    cost = {"seconds": seconds, "cpu_seconds": 2 * seconds, "layers": seconds * 10, "checks": 30.0}
    if joules is not None:
        cost["joules"] = joules
    return Evaluation(
        model="tiny",
        dataset="java",
        language="java",
        method=method,
        layers=layers,
        exit_points=[4, layers],
        samples=5,
        quality={"rougeL": Interval(0.4, 0.3, 0.5), "token_accuracy": Interval(0.2, 0.1, 0.3)},
        cost={name: Interval(value, value - 0.5, value + 0.5) for name, value in cost.items()},
        depth_counts={4: 1, layers: 2},
        energy_source=None if joules is None else "estimate",
        energy_note="",
        provenance=Provenance("abc", "2025-01-01T00:00:00+00:00", "c0ffee", {}, kv="deferred", seed=3),
        threshold=tables.parse_method(method).threshold,
    )


@pytest.fixture
def study() -> list[Evaluation]:
    return [evaluation("agent-T0.9", 1.5, 5.0), evaluation("full", 2.0), evaluation("base", 2.0)]


@pytest.mark.parametrize(
    ("name", "kind", "agent", "threshold", "depth"),
    [
        ("base", "base", None, None, None),
        ("full", "full", None, None, None),
        ("fixed-12", "fixed", None, None, 12),
        ("agent-T0.9", "agent", "agent", 0.9, None),
        ("my-T2-agent-T1", "agent", "my-T2-agent", 1.0, None),
        ("fixed-4-T0.5", "agent", "fixed-4", 0.5, None),
        ("base-T0.5", "agent", "base", 0.5, None),
        ("oracle", "agent", "oracle", None, None),
        ("agent-D0.5", "agent", "agent-D0.5", None, None),
    ],
)
def test_parse_method(name, kind, agent, threshold, depth) -> None:
    assert tables.parse_method(name) == tables.Method(name, kind, agent, threshold, depth)


def test_a_method_that_keeps_a_promise_is_told_from_one_at_a_threshold() -> None:
    method = tables.parse_method("frugal-saving0.3")
    assert method == tables.Method("frugal-saving0.3", "agent", "frugal", wanted="saving", target=0.3)
    names = ["a-saving0.5", "a-T0.9", "a-agreement0.9", "full", "a-saving0.1", "a-T0.1"]
    assert sorted(names, key=lambda name: tables.parse_method(name).order) == [
        "full", "a-T0.1", "a-T0.9", "a-agreement0.9", "a-saving0.1", "a-saving0.5",
    ]  # fmt: skip


def test_methods_are_ordered() -> None:
    names = ["b-T0.6", "b-T0.55", "a-T0.9", "fixed-12", "fixed-4", "full", "base"]
    (methods,) = tables.group(evaluation(name, 1.0) for name in names).values()
    assert list(methods) == ["base", "full", "fixed-4", "fixed-12", "a-T0.9", "b-T0.55", "b-T0.6"]


def test_group_refuses_doubles_and_nothing(study) -> None:
    with pytest.raises(UserError, match="Two evaluations are of full"):
        tables.group([*study, study[1]])
    with pytest.raises(UserError, match="no evaluations"):
        tables.group([])


def test_summary(study) -> None:
    found = tables.summary(study).set_index("method")
    assert list(found.index) == ["base", "full", "agent-T0.9"]
    agent = found.loc["agent-T0.9"]
    assert (agent["rougeL"], agent["rougeL_low"], agent["rougeL_high"]) == (0.4, 0.3, 0.5)
    assert pd.isna(agent["codebleu"])
    assert (agent["seconds"], agent["joules"], agent["energy_source"]) == (1.5, 5.0, "estimate")
    assert agent["seconds_saved_percent"] == pytest.approx(25)
    assert agent["joules_saved_percent"] == pytest.approx(50)
    assert found.loc["full", "joules_saved_percent"] == 0


def test_summary_needs_full(study) -> None:
    with pytest.raises(UserError, match="'full' of tiny on java"):
        tables.summary([study[0]])


def test_summary_without_joules() -> None:
    found = tables.summary([evaluation("full", 2.0, None), evaluation("base", 2.0)])
    assert found.loc[found["method"] == "full", ["joules", "energy_source"]].isna().all(axis=None)
    assert found["joules_saved_percent"].isna().all()
    assert "not measured" in tables.summary_markdown(found)


def test_summary_markdown(study) -> None:
    text = tables.summary_markdown(tables.summary(study))
    head, _, base, full, agent = text.splitlines()
    assert "Energy, J (estimate)" in head
    assert "0.400 (0.300–0.500)" in agent
    assert "5 (−50 %)" in agent
    assert "±0 %" in base
    assert "%" not in full
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_summary_markdown_marks_estimates_among_measurements(study) -> None:
    measured = replace(study[1], energy_source="nvml")
    text = tables.summary_markdown(tables.summary([study[0], measured]))
    assert "Energy, J |" in text
    assert text.count("(estimate)") == 1


def test_all_results(study) -> None:
    found = tables.all_results(study)
    assert len(found) == sum(len(one.quality) + len(one.cost) for one in study)
    row = found[(found["method"] == "agent-T0.9") & (found["metric"] == "joules")].iloc[0]
    assert (row["value"], row["low"], row["high"]) == (5.0, 4.5, 5.5)
    assert (row["agent"], row["threshold"], row["unit"], row["kv"]) == (
        "agent",
        0.9,
        "J/completion",
        "deferred",
    )
    assert row["energy_source"] == "estimate"
    assert found.loc[found["metric"] == "seconds", "energy_source"].isna().all()


OVERHEAD = {"model": "tiny", "dataset": "java", "agent": "agent", "seconds_per_check": 0.001}
OVERHEAD |= {"seconds_per_check_low": 0.0005, "seconds_per_check_high": 0.002}


def test_table4(study) -> None:
    (row,) = tables.table4_overhead(study, [OVERHEAD]).to_dict("records")
    assert row["threshold"] == 0.9
    assert row["time_percent_of_full"] == pytest.approx(100 * 30 * 0.001 / 4.0)
    assert row["time_percent_of_gc"] == pytest.approx(100 * 30 * 0.001 / 3.0)
    assert row["time_percent_of_gc_low"] == pytest.approx(100 * 30 * 0.0005 / 3.0)
    assert row["energy_percent_of_full"] == row["time_percent_of_full"]
    assert row["energy_source"] == "estimate"


def test_table4_measured_energy_is_not_inferred_from_time(study) -> None:
    measured = [replace(one, energy_source="nvml") for one in study]
    (row,) = tables.table4_overhead(measured, [OVERHEAD]).to_dict("records")
    assert row["energy_percent_of_full"] is None
    (row,) = tables.table4_overhead(measured, [OVERHEAD | {"joules_per_check": 0.01}]).to_dict("records")
    assert row["energy_percent_of_gc"] == pytest.approx(100 * 30 * 0.01 / 5.0)


def test_table4_has_the_published_values_beside(study) -> None:
    found = tables.table4_overhead(study, [OVERHEAD], tables.read_published(PUBLISHED))
    paper = found[(found["model"] == "opt-2.7b") & (found["threshold"] == 0.9)].iloc[0]
    assert paper["origin"] == "paper"
    assert (paper["energy_percent_of_gc"], paper["time_percent_of_gc"]) == (18.78, 11.7)


def test_table4_names_what_is_missing(study) -> None:
    with pytest.raises(UserError, match="overhead of agent frugal"):
        tables.table4_overhead(study, [OVERHEAD | {"agent": "frugal"}])
    with pytest.raises(UserError, match="'full'"):
        tables.table4_overhead(study[:1], [OVERHEAD])


def test_table1() -> None:
    splits = {"train": {"files": 3, "tokens": 40, "sha256": "0"}, "test": {"files": 1, "tokens": 9}}
    found = tables.table1_datasets({"mine": {"language": "java", "splits": splits, "other": [1]}})
    assert found.loc[0, ["dataset", "files_train", "tokens_test"]].tolist() == ["mine", 3, 9]
    assert found.loc[found["dataset"] == "JavaCorpus", "files_test"].item() == 8268
    with pytest.raises(UserError, match="mine has no splits"):
        tables.table1_datasets({"mine": {}})


def test_table2() -> None:
    model = {"name": "tiny", "family": "llama", "parameters": 7, "layers": 32, "hidden": 8}
    found = tables.table2_models([model | {"exit_points": [4, 32]}])
    assert found.loc[0, ["layers", "exit_points"]].tolist() == [32, "4 32"]
    assert found["origin"].tolist() == ["this study", "paper", "paper"]


def learning(agent: str, dataset: str, model: str = "tiny", **changes) -> dict:
    settings = {"batch_size": 64, "buffer": 128, "hidden": [32, 16], "steps": 10, "threads": 1} | changes
    return {"agent": agent, "dataset": dataset, "model": model, "settings": settings, "reward": {"beta": 0.5}}


def test_table3() -> None:
    records = [
        learning("plain", "java"),
        learning("plain", "python", threads=8),
        learning("odd, one", "java"),
        learning("odd, one", "python", steps=20),
        learning("odd, one", "python", model="big", steps=20),
    ]
    found = tables.table3_ppo(records).set_index("hyperparameter")
    assert list(found)[:3] == ["plain", "odd, one, java", "odd, one, python"]
    assert found.loc["steps", "odd, one, python"] == 20
    assert found.loc["hidden units", "plain"] == "32 16"
    assert found.loc["reward beta", "plain"] == 0.5
    assert found.loc["buffer"].tolist()[-2:] == [4096, 256]


def seeds(agreements: dict[int, tuple[float, float]], others: dict[str, tuple[float, float]]) -> dict:
    """What the frontier of a pair says of an agent's seeds and of other rules, at half and at 80 %."""
    shares = (0.5, 0.8)
    return {
        "model": "tiny",
        "dataset": "java",
        "rules": dict.fromkeys(["agent", *others.keys() - {"fixed"}], "agent"),
        "seeds": [
            {"rule": "agent", "seed": seed, "share": share, "threshold": 0.5}
            | {"forced_layers": 16 * share + seed, "forced_agreement": value}
            for seed, values in agreements.items()
            for share, value in zip(shares, values, strict=True)
        ],
        "points": [
            {"rule": rule, "share": share, "metrics": {"forced_agreement": {"value": value}}}
            for rule, values in others.items()
            for share, value in zip(shares, values, strict=True)
        ],
    }


def test_frontier_seeds() -> None:
    known = seeds({1: (0.5, 0.8), 2: (0.6, 0.8), 6: (0.7, 0.8)}, {})
    found = tables.frontier_seeds([known, {"model": "other", "dataset": "java", "seeds": []}])
    assert found["share"].tolist() == [0.5, 0.8]
    assert found["seeds"].tolist() == [3, 3]
    half, deep = found.to_dict("records")
    for how, value in {"mean": 0.6, "std": 0.1, "min": 0.5, "max": 0.7}.items():
        assert half[f"forced_agreement_{how}"] == pytest.approx(value)
    for how, value in {"mean": 15.8, "std": 7**0.5, "min": 13.8, "max": 18.8}.items():
        assert deep[f"forced_layers_{how}"] == pytest.approx(value)
    assert deep["forced_agreement_std"] == 0


def test_frontier_seeds_of_none_is_a_head_without_lines(tmp_path) -> None:
    tables.write_table(tables.frontier_seeds([seeds({}, {})]), tmp_path / "none.csv")
    (head,) = (tmp_path / "none.csv").read_text().splitlines()
    assert head.startswith("model,dataset,rule,share,seeds,forced_layers_mean,")


def test_seeds_are_told_against_the_nearest_rule() -> None:
    others = {"agent": (0.61, 0.8), "fixed": (0.6, 0.8), "near": (0.71, 0.9), "far": (0.69, 0.1)}
    # At half of the layers `near` is nearest to the mean, but it is `far` that lies between the seeds.
    known = seeds({1: (0.68, 0.8), 2: (0.73, 0.8), 3: (0.732, 0.83)}, others)
    (sentence,) = tables._seed_sentences(known)
    assert sentence == (
        "Agreement of agent along the full model's text over 3 seeds, by share of the layers: 0.680 to 0.732 "
        "at 50% (nearest rule: near, 0.710), 0.800 to 0.830 at 80% (nearest rule: near, 0.900). At 1 of 2 no "
        "other rule lies between the seeds."
    )
    (alone,) = tables._seed_sentences(seeds({1: (0.5, 0.8), 2: (0.6, 0.8)}, {}))
    assert "nearest" not in alone
    assert list(tables._seed_sentences(seeds({}, others))) == []


def test_what_verified_rules_save_is_told() -> None:
    def point(rule: str, share: float, saved: float, **more: dict[str, float]) -> dict:
        time = dict(zip(("value", "low", "high"), (saved, saved - 0.02, saved + 0.02), strict=True))
        return {"rule": rule, "share": share, "metrics": {"time_saved": time} | more}

    points = [
        point("agent", 0.5, 0.4),
        point("agent verified", 0.5, 0.05, drafts_accepted={"value": 0.75}),
        point("agent verified", 0.65, 0.0),
    ]
    record = {"verified": {"agent verified": "agent"}, "points": points}
    assert list(tables._verified_sentence(record)) == [
        "Where the final layer verifies what leaves early, so that the text is the full model's, time is "
        "saved as follows: 5% (3% to 7%) by agent with drafts at 50% of the layers, 75% of them right; 0% "
        "(-2% to 2%) by agent with drafts at 65% of the layers."
    ]
    assert list(tables._verified_sentence({"verified": {}, "points": points})) == []


def test_write_table_is_exact_and_the_same_each_time(tmp_path) -> None:
    table = pd.DataFrame({"a": [1 / 3, None], "b": ["x", "ü"]})
    tables.write_table(table, tmp_path / "deep" / "one.csv")
    tables.write_table(table, tmp_path / "two.csv")
    assert (tmp_path / "deep" / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    assert pd.read_csv(tmp_path / "two.csv")["a"][0] == 1 / 3


def test_read_published(tmp_path) -> None:
    rouge = tables.published_metric(tables.read_published(PUBLISHED), "rougeL")
    assert rouge["llama3.2-3b", "java", "finetuned", -1.0] == 0.425607
    with pytest.raises(UserError, match="cannot be read"):
        tables.read_published(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="lacks the column"):
        tables.read_published(tmp_path / "other.csv")


def test_imports_are_light() -> None:
    code = (
        "import sys, greencode.figures, greencode.tables; print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
