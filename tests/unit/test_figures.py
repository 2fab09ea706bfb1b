"""Figures of made-up results: the files, their numbers, their labels."""

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.text import Text

from greencode import figures, tables
from greencode.errors import UserError
from greencode.exits import exit_points, lite_weights
from greencode.results import Evaluation, Interval, Provenance

# A layout that does not fit warns.
pytestmark = pytest.mark.filterwarnings("error::UserWarning")

PUBLISHED = Path(__file__).parents[2] / "resources" / "published_values.csv"
STYLE = {"dpi": 40, "palette": "colorblind", "font_size": 8, "formats": ["pdf", "png"]}
CSV = {"dpi": 40, "formats": []}
QUALITY = ("rougeL", "bleu", "chrf", "codebleu", "codebleu_syntax", "codebleu_dataflow", "token_accuracy")


def evaluation(
    method: str, depth: float, layers: int, model: str, dataset: str, source: str | None
) -> Evaluation:
    seconds = 0.1 + depth / layers
    cost = {"seconds": seconds, "tokens_per_second": 15 / seconds, "layers": depth}
    if source:
        cost["joules"] = 20 * seconds
    return Evaluation(
        model=model,
        dataset=dataset,
        language=dataset,
        method=method,
        layers=layers,
        exit_points=list(exit_points(layers)),
        samples=5,
        quality={n: Interval(*(0.4 * depth / layers * f for f in (1, 0.9, 1.2))) for n in QUALITY},
        cost={name: Interval(value, 0.9 * value, 1.1 * value) for name, value in cost.items()},
        depth_counts={},
        energy_source=source,
        energy_note="",
        provenance=Provenance("abc", "2025-01-01T00:00:00+00:00", None, {}, kv="deferred"),
        threshold=tables.parse_method(method).threshold,
    )


def study(
    layers: int = 28, model: str = "tiny", dataset: str = "java", source: str | None = "estimate",
    agents: tuple[str, ...] = ("agent",),
) -> list[Evaluation]:  # fmt: skip
    depths = {"base": layers, "full": layers} | {f"fixed-{d}": d for d in exit_points(layers)[:-1]}
    for place, agent in enumerate(agents):
        depths |= {f"{agent}-T{t}": layers * t * 0.9**place for t in (0.5, 0.9)}
    return [evaluation(name, depth, layers, model, dataset, source) for name, depth in depths.items()]


def loss_curve(layers: int) -> dict:
    points = exit_points(layers)
    curve: list[dict] = []
    for step in range(10, 60, 10):
        curve.append({"step": step, "loss": 9 / step, "learning_rate": 1e-5})
        curve[-1] |= {f"exit_{p}": 9 / step + 1 / p for p in points}
    curve.append({"step": 30, "eval_loss": 0.5})
    curve.append({"step": 40} | {f"eval_exit_{p}": 0.25 for p in points})
    return {
        "exit_points": list(points), "weights": list(lite_weights(points)), "steps": 50, "tokens_seen": 9,
        "validation_before": {"loss": 2.0}, "validation_after": {"loss": 0.2}, "curve": curve,
    }  # fmt: skip


def learning(model: str = "tiny", dataset: str = "java", agent: str = "agent", episodes: int = 120) -> dict:
    return {
        "model": model, "dataset": dataset, "agent": agent,
        "episode_reward": [math.tanh(i / 40) for i in range(episodes)],
        "optimal_exits": {"4": 60, "28": 10, "6": 30},
    }  # fmt: skip


def texts(figure) -> str:
    return "\n".join(found.get_text() for found in figure.findobj(Text))


def read(stem: Path) -> pd.DataFrame:
    return pd.read_csv(stem.with_name(f"{stem.name}.csv"))


def models() -> list[dict]:
    return [{"name": "tiny", "layers": 16, "exit_points": [4, 16], "weights": [0.25, 0.75]}]


ALL = {
    "fig01_fixed_exit": lambda stem: figures.fig01_fixed_exit(study(), STYLE, stem),
    "fig03_exit_weights": lambda stem: figures.fig03_exit_weights(models(), STYLE, stem),
    "fig04_loss_curves": lambda stem: figures.fig04_loss_curves(
        {("tiny", "java"): loss_curve(28)}, STYLE, stem
    ),
    "fig06_agent_reward": lambda stem: figures.fig06_agent_reward([learning()], STYLE, stem),
    "fig06_with_seeds": lambda stem: figures.fig06_agent_reward([learning(), learning()], STYLE, stem),
    "frontier_tiny_java": lambda stem: figures.frontier([frontier(seeds=(1, 2))], STYLE, stem),
    "fig07_optimal_exits": lambda stem: figures.fig07_optimal_exits([learning()], STYLE, stem),
    "fig08_tiny_java": lambda stem: figures.pair_figures(study(), STYLE, stem),
    "published_vs_measured": lambda stem: figures.published_vs_measured(
        study(), tables.read_published(PUBLISHED), STYLE, stem
    ),
}


@pytest.mark.parametrize("name", ALL)
def test_same_input_same_bytes(name, tmp_path) -> None:
    ALL[name](tmp_path / "a" / name)
    ALL[name](tmp_path / "b" / name)
    made = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert made == [f"{name}.csv", f"{name}.pdf", f"{name}.png"]
    for file in made:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_fig01_numbers(tmp_path) -> None:
    pairs = [*study(28), *study(32, "big", "python")]
    figures.fig01_fixed_exit(pairs, CSV, tmp_path / "f")
    found = read(tmp_path / "f")
    assert set(found["metric"]) == {"rougeL", "codebleu", "joules", "seconds"}
    big = found[(found["model"] == "big") & (found["metric"] == "joules")]
    assert big["depth"].tolist() == list(exit_points(32))
    assert big["method"].tolist()[-1] == "full"
    expected = {one.method: one.cost["joules"] for one in pairs if one.model == "big"}
    for row in big.itertuples():
        assert (row.value, row.low, row.high) == (
            expected[row.method].value, expected[row.method].low, expected[row.method].high,
        )  # fmt: skip


def test_fig01_needs_fixed_exits(tmp_path) -> None:
    with pytest.raises(UserError, match="No fixed exit of tiny on java"):
        figures.fig01_fixed_exit(study()[:2], CSV, tmp_path / "f")


@pytest.mark.parametrize("draw", [figures.fig01_fixed_exit, figures.pair_figures])
def test_energy_says_what_it_is(draw, tmp_path) -> None:
    estimate = texts(draw(study(), CSV, tmp_path / "f"))
    assert "Energy (estimate)\n[J per completion]" in estimate
    measured = texts(draw(study(source="nvml"), CSV, tmp_path / "f"))
    assert "Energy\n[J per completion]" in measured
    assert "estimate" not in measured
    mixed = [one if one.method == "full" else replace(one, energy_source="nvml") for one in study()]
    assert "Energy (partly an estimate)" in texts(draw(mixed, CSV, tmp_path / "f"))
    assert "not measured" not in estimate + measured
    none = texts(draw(study(source=None), CSV, tmp_path / "f"))
    assert "not measured" in none
    assert "joules" not in set(read(tmp_path / "f")["metric"])


def test_fig03(tmp_path) -> None:
    figures.fig03_exit_weights([*models(), {"name": "big", "layers": 32}], CSV, tmp_path / "f")
    found = read(tmp_path / "f")
    assert found[found["model"] == "tiny"]["weight"].tolist() == [0.25, 0.75]
    paper = found[found["model"].str.contains("paper")]
    assert paper["exit"].tolist() == list(exit_points(28))
    assert paper.groupby("part")["weight"].sum().to_dict() == pytest.approx(
        {"first half": 0.7, "second half": 0.2, "final layer": 0.1}
    )
    assert (found[found["model"] == "big"]["exit"] == exit_points(32)).all()


def test_fig04(tmp_path) -> None:
    curves = {("tiny", "java"): loss_curve(16), ("big", "java"): loss_curve(32), ("x", "y"): loss_curve(28)}
    figures.fig04_loss_curves(curves, CSV, tmp_path / "f")
    found = read(tmp_path / "f")
    big = found[found["model"] == "big"].groupby("series")
    validation = big.get_group("validation").set_index("step")["loss"].to_dict()
    assert validation == pytest.approx({0: 2.0, 30: 0.5, 40: 0.25, 50: 0.2})
    assert big.get_group("train")["loss"].tolist() == [9 / step for step in range(10, 60, 10)]
    assert big.get_group("exit_28")["loss"].tolist() == [9 / s + 1 / 28 for s in range(10, 60, 10)]


def test_fig06_is_a_moving_average(tmp_path) -> None:
    records = [learning(), learning(agent="odd-T1_name"), learning(dataset="python", episodes=7)]
    figure = figures.fig06_agent_reward(records, CSV, tmp_path / "f")
    found = read(tmp_path / "f")
    one = found[(found["agent"] == "agent") & (found["dataset"] == "java")]
    expected = pd.Series(records[0]["episode_reward"]).rolling(50).mean().dropna()
    assert one["episode"].tolist() == list(range(50, 121))
    assert one["reward"].to_numpy() == pytest.approx(expected.to_numpy())
    assert len(found[found["dataset"] == "python"]) == 1
    assert "tiny, odd-T1_name" in texts(figure)


def test_fig06_shows_seeds_as_their_mean_and_range(tmp_path) -> None:
    seeds = [learning(), learning(episodes=90), learning()]
    for record, shift in zip(seeds, (0.0, 0.3, -0.1), strict=True):
        record["episode_reward"] = [reward + shift for reward in record["episode_reward"]]
    records = [seeds[0], learning(model="other"), *seeds[1:]]
    figure = figures.fig06_agent_reward(records, CSV, tmp_path / "f")
    found = read(tmp_path / "f")
    several, one = (found[found["model"] == model] for model in ("tiny", "other"))
    assert several["episode"].tolist() == list(range(50, 91))
    assert set(several["seeds"]) == {3}
    average = pd.Series(seeds[0]["episode_reward"]).rolling(50).mean()[49:90].to_numpy()
    assert several["reward"].to_numpy() == pytest.approx(average + 0.2 / 3)
    assert several["low"].to_numpy() == pytest.approx(average - 0.1)
    assert several["high"].to_numpy() == pytest.approx(average + 0.3)
    assert one["reward"].notna().all()
    assert one[["low", "high"]].isna().all(axis=None)
    assert "tiny, 3 seeds" in texts(figure)
    assert "other, " not in texts(figure)
    assert len(figure.axes[0].collections) == 1


def test_fig06_thins_long_curves_and_keeps_the_end(tmp_path) -> None:
    figures.fig06_agent_reward([learning(episodes=9000)], CSV, tmp_path / "f")
    found = read(tmp_path / "f")
    assert len(found) <= 2000
    assert found["episode"].iloc[-1] == 9000


def test_fig07(tmp_path) -> None:
    records = [learning(), learning(agent="second"), learning("other")]
    figures.fig07_optimal_exits(records, CSV, tmp_path / "f")
    found = read(tmp_path / "f")
    tiny = found[found["model"] == "tiny"]
    assert tiny["exit"].tolist() == [4, 6, 28]
    assert tiny["count"].tolist() == [120, 60, 20]
    assert tiny["share_percent"].tolist() == [60, 30, 10]
    assert tiny["running_percent"].tolist() == [60, 90, 100]


@pytest.mark.parametrize("layers", [28, 32])
def test_pair_figure_numbers(layers, tmp_path) -> None:
    evaluations = study(layers)
    figure = figures.pair_figures(evaluations, CSV, tmp_path / "f")
    found = read(tmp_path / "f").groupby(["panel", "method", "metric"])
    agent = next(one for one in evaluations if one.method == "agent-T0.9")
    full = next(one for one in evaluations if one.method == "full")
    bleu = found.get_group(("a", "agent-T0.9", "bleu"))
    assert bleu["value"].item() == agent.quality["bleu"].value
    seconds = found.get_group(("b", "agent-T0.9", "seconds"))
    assert seconds["low"].item() == agent.cost["seconds"].low
    assert seconds["high"].item() == agent.cost["seconds"].high
    change = 100 * (agent.cost["seconds"].value / full.cost["seconds"].value - 1)
    assert seconds["change_percent"].item() == pytest.approx(change)
    assert sorted(found.get_group(("c", "fixed-6", "rougeL"))["against"]) == ["layers", "seconds"]
    assert not [key for key in found.groups if key[0] == "b" and key[1].startswith("fixed")]
    shown = texts(figure)
    assert "GC(T=0.9)" in shown
    assert "−10 %" in shown
    assert "with KV cache" in shown


def test_promises_are_told_from_thresholds(tmp_path) -> None:
    known = study()
    kept = evaluation("agent-saving0.3", 20, 28, "tiny", "java", "estimate")
    figure = figures.pair_figures([*known, replace(kept, threshold=0.4321)], CSV, tmp_path / "f")
    shown = texts(figure)
    assert "GC(saving ≥ 0.3)" in shown
    assert "GC at a promise" in shown
    assert "GC(T=0.5)" in shown
    found = read(tmp_path / "f")
    assert "agent-saving0.3" in set(found["method"])


def test_pair_figure_of_odd_agents_and_few_metrics(tmp_path) -> None:
    names = ("fixed", "full-T1", "x/y", "a_very_long_name_of_an_agent", "fifth")
    few = [replace(one, quality={"rougeL": one.quality["rougeL"]}) for one in study(agents=names)]
    shown = texts(figures.pair_figures(few, CSV, tmp_path / "f"))
    assert all(f"{name}(T=0.5)" in shown for name in names)
    assert "CodeBLEU: not measured" in shown


def test_pair_figure_of_full_alone(tmp_path) -> None:
    figures.pair_figures([one for one in study() if one.method == "full"], CSV, tmp_path / "f")
    assert set(read(tmp_path / "f")["method"]) == {"full"}


def test_pair_figure_where_one_method_lacks_joules(tmp_path) -> None:
    some = [
        replace(one, cost={k: v for k, v in one.cost.items() if k != "joules"})
        if one.method == "base"
        else one
        for one in study()
    ]
    assert texts(figures.pair_figures(some, CSV, tmp_path / "f")).count("not measured") == 1


def test_pair_figure_refuses(tmp_path) -> None:
    with pytest.raises(UserError, match="'full' of tiny on java"):
        figures.pair_figures([one for one in study() if one.method != "full"], CSV, tmp_path / "f")
    with pytest.raises(UserError, match="one model and dataset, not 2"):
        figures.pair_figures([*study(), *study(model="big")], CSV, tmp_path / "f")


def test_published_vs_measured(tmp_path) -> None:
    published = tables.read_published(PUBLISHED)
    pairs = [*study(), *study(32, "big"), *study(dataset="cobol", source=None)]
    figure = figures.published_vs_measured(pairs, published, CSV, tmp_path / "f")
    found = read(tmp_path / "f").set_index(["model", "dataset", "method"]).sort_index()
    llama = found.loc[("llama3.2-3b", "java", "gc-T0.9")]
    assert llama["relative_energy"] == pytest.approx(288.18 / 427.199)
    assert llama["relative_rougeL"] == pytest.approx(0.391841 / 0.425607)
    assert (llama["origin"], llama["kv"]) == ("paper", "none")
    big = found.loc[("big", "java", "agent-T0.5")]
    assert big["relative_energy"] == pytest.approx(0.6 / 1.1)
    assert big["relative_rougeL_high"] == pytest.approx(0.5 * 1.2)
    assert "cobol" not in found.index.get_level_values("dataset")
    shown = texts(figure)
    assert "published: Llama 3.2 3B / OPT 2.7B,\nRTX 8000, no KV cache" in shown
    assert "this study: tiny, big,\nKV cache" in shown
    assert "Other models and another protocol" in shown
    assert "Energy (estimate)" in shown
    assert "nothing published" in shown
    assert "Energy: not measured" in shown


def test_style(tmp_path) -> None:
    style = {"dpi": 40, "palette": {"fixed": "#ff0000"}, "formats": ["svg"]}
    for name in ("a", "b"):
        figures.fig01_fixed_exit(study(), style, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.svg", "b.csv", "b.svg"]
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "#ff0000" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize(
    ("style", "message"),
    [
        ({"palette": "sunset"}, "Palette 'sunset'"),
        ({"palette": {"full": "nocolour"}}, "'nocolour' of 'full'"),
        ({"formats": ["docx"]}, "'docx'"),
    ],
)
def test_wrong_style(style, message, tmp_path) -> None:
    with pytest.raises(UserError, match=message):
        figures.pair_figures(study(), style, tmp_path / "f")


def rule_point(rule: str, share: float, depth: float, agreement: float) -> dict:
    quality = dict.fromkeys(("agreement", "token_accuracy", "rougeL", "codebleu"), agreement / 2)
    cost = {"layers": depth, "seconds": depth / 10}
    values = quality | cost | {"forced_layers": depth, "forced_agreement": agreement}
    metrics = {name: {"value": v, "low": v * 0.9, "high": v * 1.1} for name, v in values.items()}
    return {"method": f"{rule}-D{share}", "rule": rule, "share": share, "metrics": metrics}


def frontier(seeds: tuple[int, ...] = ()) -> dict:
    shares = {0.5: 0.6, 0.8: 0.9}
    points = [rule_point("full", 1.0, 16, 1.0), rule_point("fixed", 0.25, 4, 0.2)]
    points += [
        rule_point(rule, s, 16 * s, agreement)
        for rule in ("margin", "ppo")
        for s, agreement in shares.items()
    ]
    return {
        "model": "tiny", "dataset": "java", "samples": 5, "energy_source": "estimate",
        "rules": {"margin": "margin", "ppo": "agent"}, "verified": {}, "points": points,
        "seeds": [
            {"rule": "ppo", "seed": seed, "share": share, "threshold": 0.5}
            | {"forced_layers": 16 * share + seed, "forced_agreement": agreement + seed / 100}
            for seed in seeds
            for share, agreement in shares.items()
        ],
    }  # fmt: skip


def test_frontier_has_a_line_for_each_other_seed(tmp_path) -> None:
    several = figures.frontier([frontier(seeds=(3, 1, 2))], CSV, tmp_path / "f")
    found = read(tmp_path / "f")
    seeds = found[found["seed"].notna()]
    assert set(zip(seeds["cost"], seeds["metric"], strict=True)) == {("forced_layers", "forced_agreement")}
    rows = seeds[["rule", "seed", "share", "x", "value"]].to_dict("split")["data"]
    assert rows == [
        ["ppo", seed, share, pytest.approx(16 * share + seed), pytest.approx(agreement + seed / 100)]
        for seed in (1, 2)
        for share, agreement in ((0.5, 0.6), (0.8, 0.9))
    ]
    assert "another seed" in texts(several)
    one = figures.frontier([frontier()], CSV, tmp_path / "g")
    assert "another seed" not in texts(one)
    assert "seed" not in read(tmp_path / "g")

    def lines(figure):
        axis = next(axis for axis in figure.axes if axis.get_ylabel().startswith("Agreement along"))
        return len(axis.lines)

    assert lines(several) == lines(one) + 2
    measured = read(tmp_path / "g")
    forced = measured[measured["metric"] == "forced_agreement"]
    assert forced[forced["rule"] == "ppo"]["x"].tolist() == pytest.approx([8, 12.8])


def test_a_verified_rule_looks_like_the_rule_that_decides(tmp_path) -> None:
    record = frontier() | {"verified": {"ppo verified": "ppo"}}
    record["points"].append(rule_point("ppo verified", 0.7, 16, 1.0))
    drawn = figures.frontier([record], CSV, tmp_path / "f")
    assert "ppo verified" in texts(drawn)
    colour = figures._rule_looks(["margin", "ppo"])["ppo"]["color"]
    ppo, verified = (line for line in drawn.axes[0].lines if line.get_color() == colour)
    assert (ppo.get_markerfacecolor(), verified.get_markerfacecolor()) == (colour, "white")
    assert ppo.get_marker() == verified.get_marker()
    assert "ppo verified" in read(tmp_path / "f")["rule"].tolist()


@pytest.mark.parametrize(
    "draw",
    [
        lambda stem: figures.fig04_loss_curves({}, CSV, stem),
        lambda stem: figures.fig06_agent_reward([], CSV, stem),
        lambda stem: figures.fig06_agent_reward([learning(episodes=0)], CSV, stem),
        lambda stem: figures.fig06_agent_reward([learning(), learning(episodes=0)], CSV, stem),
        lambda stem: figures.fig07_optimal_exits([], CSV, stem),
        lambda stem: figures.fig07_optimal_exits([learning() | {"optimal_exits": {}}], CSV, stem),
        lambda stem: figures.fig01_fixed_exit([], CSV, stem),
    ],
)
def test_nothing_to_draw(draw, tmp_path) -> None:
    with pytest.raises(UserError):
        draw(tmp_path / "f")
    assert not list(tmp_path.iterdir())
