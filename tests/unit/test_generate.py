"""Measured completions: which samples, what is timed, what is written; the agent's overhead by difference."""

import re
import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from greencode import generate
from greencode.energy import Meter
from greencode.engine import Engine, as_policy
from greencode.errors import UserError
from greencode.policies import FixedExit
from greencode.tokenise import load_tokenizer, train_tokenizer

torch.set_num_threads(1)

POINTS = [2, 4, 6]
SETTINGS = {
    "samples": 5, "context": 0.2, "max_context": 30, "min_context": 10, "new_tokens": 4, "warmup": 2,
    "idle_seconds": 0.0,
}  # fmt: skip
ABOUT = {"model": "tiny", "dataset": "java", "language": "java", "method": "full"}


class Watched(Engine):
    """An engine that notes its requests in a list shared with the meter."""

    events: list

    def complete(self, context, new_tokens, policy=None, **other):
        self.events.append("plain" if policy is None else "asked")
        return super().complete(context, new_tokens, policy, **other)


class WatchedMeter(Meter):
    """A meter that notes its windows and keeps what the last one cost."""

    events: list

    def begin(self):
        self.events.append("begin")
        super().begin()

    def end(self):
        self.last = super().end()
        self.events.append("end")
        return self.last


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["int x = 1 ; return x ;"] * 9, 300, 64, folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=16, num_hidden_layers=6, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=64, initializer_range=0.5,
        )
    ).eval()  # fmt: skip
    return model, load_tokenizer(folder)


@pytest.fixture
def events():
    return []


@pytest.fixture
def engine(parts, events):
    model, tokenizer = parts
    engine = Watched(model, POINTS, tokenizer)
    engine.events = events
    return engine


@pytest.fixture
def meter(events):
    meter = WatchedMeter("estimate", cpu_watts=20.0)
    meter.events = events
    return meter


def files(count):
    """Files of 40, 60, 80, ... tokens."""
    return [[3 + (index + place) % 290 for place in range(40 + 20 * index)] for index in range(count)]


def samples():
    return generate.choose_samples(files(8), list(range(100, 108)), SETTINGS, seed=0)


def run(engine, meter, policy=None, kv="full", **other):
    settings = SETTINGS | other
    provenance = generate.provenance_of(engine, settings, kv, 7, 1)
    return generate.run(engine, samples(), policy, settings, meter, kv, ABOUT, provenance)


def test_samples_are_cut_from_files_that_are_long_enough():
    chosen = samples()
    assert len(chosen) == 5
    assert [sample.id for sample in chosen] == sorted({sample.id for sample in chosen})
    assert {sample.id for sample in chosen} <= set(range(101, 108))  # 8 tokens are no context
    for sample in chosen:
        file = files(8)[sample.id - 100]
        length = min(int(len(file) * 0.2), 30)
        assert (sample.context, sample.reference) == (file[:length], file[length : length + 4])


def test_samples_are_chosen_by_seed():
    def ids(seed):
        chosen = generate.choose_samples(files(40), list(range(40)), SETTINGS, seed)
        return [sample.id for sample in chosen]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


def test_all_usable_files_may_be_asked_for():
    chosen = generate.choose_samples(files(6), list(range(6)), SETTINGS, seed=3)
    assert [sample.id for sample in chosen] == [1, 2, 3, 4, 5]


def test_too_few_files_are_named():
    with pytest.raises(UserError, match=r"Only 4 of 5 test files are long enough .* 10 tokens at 20% .* 5 "):
        generate.choose_samples(files(5), list(range(5)), SETTINGS, seed=0)


def test_completions_are_the_engines_own(engine, meter):
    generation = run(engine, meter)
    decode = engine.tokenizer.decode
    assert len(generation.completions) == 5
    for sample, done in zip(samples(), generation.completions, strict=True):
        expected = engine.complete(sample.context, 4, kv="full")
        assert (done.id, done.context_tokens, done.reference) == (
            sample.id, len(sample.context), sample.reference,
        )  # fmt: skip
        assert done.tokens == expected.tokens
        assert done.depths == [6] * 4
        assert (done.text, done.reference_text) == (decode(expected.tokens), decode(sample.reference))
        assert done.layer_positions == 6 * (len(sample.context) + 3)
        assert done.checks == 0
        assert done.seconds > 0
        assert done.cpu_seconds > 0


def test_the_head_tells_what_was_run(engine, meter):
    generation = run(engine, meter)
    assert {key: getattr(generation, key) for key in ABOUT} == ABOUT
    assert (generation.layers, generation.exit_points) == (6, POINTS)
    assert generation.energy_source == "estimate"
    assert "20 W" in generation.energy_note
    provenance = generation.provenance
    assert (provenance.kv, provenance.seed, provenance.threads) == ("full", 7, 1)
    assert provenance.dtype == "float32"
    assert provenance.device.startswith("cpu")
    assert provenance.settings == SETTINGS


@pytest.mark.parametrize("kv", ["deferred", "none"])
def test_a_policy_decides_the_depth_in_each_mode(engine, meter, kv):
    generation = run(engine, meter, FixedExit(4), kv)
    for sample, done in zip(samples(), generation.completions, strict=True):
        assert done.depths == [4] * 4
        assert done.checks == 2 * 4  # asked at 2 and at 4
        lengths = range(len(sample.context), len(sample.context) + 4)
        assert done.layer_positions == 4 * (sum(lengths) if kv == "none" else lengths[-1])


def test_warm_up_is_neither_timed_nor_written(engine, meter, events):
    generation = run(engine, meter)
    assert events == ["plain", "plain", "begin", *["plain"] * 5, "end"]
    assert len(generation.completions) == 5


def test_warm_up_may_be_left_out(engine, meter, events):
    run(engine, meter, warmup=0)
    assert events == ["begin", *["plain"] * 5, "end"]


def test_joules_are_the_windows_shared_by_time(engine, meter):
    done = run(engine, meter).completions
    assert sum(one.joules for one in done) == pytest.approx(meter.last.joules)
    assert meter.last.joules == pytest.approx(20 * meter.last.cpu_seconds)
    assert meter.last.seconds >= sum(one.seconds for one in done)
    per_second = [one.joules / one.seconds for one in done]
    assert per_second == pytest.approx([per_second[0]] * 5)


def test_joules_that_nothing_measures_are_none(engine):
    generation = run(engine, Meter(None, missing="there is no meter"))
    assert [done.joules for done in generation.completions] == [None] * 5
    assert generation.energy_source is None
    assert generation.energy_note == "Energy was not measured: there is no meter."


@pytest.mark.parametrize(("counts", "block"), [(False, 1), (True, 10)])
def test_methods_take_turns_over_the_same_samples(engine, meter, monkeypatch, counts, block):
    monkeypatch.setattr(WatchedMeter, "counts", counts)
    methods = {
        "full": generate.Decoding("full", lambda number: None),
        "early": generate.Decoding("deferred", lambda number: FixedExit(2), 0.5),
        "exact": generate.Decoding("verified", lambda number: FixedExit(2), 0.5),
    }
    many = samples() * 4
    done = generate.run_side_by_side(
        engine, many, methods, SETTINGS, meter, {k: v for k, v in ABOUT.items() if k != "method"},
        generate.provenance_of(engine, SETTINGS, "deferred", 1, 1),
    )  # fmt: skip
    assert {name: one.provenance.kv for name, one in done.items()} == {
        name: decoding.kv for name, decoding in methods.items()
    }
    for one in done.values():
        assert [c.id for c in one.completions] == [sample.id for sample in many]
    full, early, exact = (done[name].completions for name in methods)
    assert [c.tokens for c in exact] == [c.tokens for c in full] != [c.tokens for c in early]
    assert sum(c.drafts for c in exact) > 0
    # p: a plain completion, a: one whose policy is asked; empty windows measure the idle machine.
    windows = re.findall("b([ap]+)e", "".join(event[0] for event in engine.events))
    assert len(windows) == len(methods) * len(many) // block
    for start in range(0, len(windows), len(methods)):
        assert sorted(windows[start : start + 3]) == ["a" * block, "a" * block, "p" * block]
    assert len({tuple(windows[start : start + 3]) for start in range(0, len(windows), 3)}) > 1


def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return False


def overhead(engine, policy, repeats=3):
    return generate.measure_overhead(engine, samples()[:3], policy, 4, repeats, resamples=200, seed=0)


def test_overhead_is_the_difference_per_check(engine):
    record = overhead(engine, as_policy(lambda view: burn(0.002)))
    assert set(record) == {
        "full_cpu_seconds", "checking_cpu_seconds", "checks", "seconds_per_check", "seconds_per_check_low",
        "seconds_per_check_high", "repeats", "samples",
    }  # fmt: skip
    assert (record["checks"], record["repeats"], record["samples"]) == (4 * 2, 3, 3)
    difference = record["checking_cpu_seconds"] - record["full_cpu_seconds"]
    assert record["seconds_per_check"] == pytest.approx(difference / 8)
    assert record["seconds_per_check_low"] <= record["seconds_per_check"] <= record["seconds_per_check_high"]
    assert 0.0018 < record["seconds_per_check"] < 0.006


def test_a_dearer_check_costs_more(engine):
    cheap, dear = (overhead(engine, as_policy(lambda view, s=s: burn(s))) for s in (0.0, 0.003))
    assert dear["seconds_per_check"] > cheap["seconds_per_check"] + 0.002


def test_overhead_takes_both_in_turn_and_in_changing_order(engine, events):
    overhead(engine, as_policy(lambda view: False), repeats=2)
    assert events == ["plain", "asked", "asked", "plain", "plain", "asked"] * 3
