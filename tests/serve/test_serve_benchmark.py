"""What `python -m benchmarks.serving` reckons, and its client against an endpoint that listens."""

import csv
from urllib.parse import urlsplit

import numpy as np
import pytest

from benchmarks.serving import Client, Pairs, Timed, measure, median_interval
from benchmarks.table import write_csv


def test_what_http_adds_is_the_median_of_pairs():
    # The model is slow at the second text, whoever asks: no pair sees it.
    pairs = Pairs(direct=[0.1, 0.5, 0.1], http=[0.102, 0.504, 0.101], http_model=[0.099, 0.499, 0.1])
    row = pairs.row("tokens", "full")
    assert row["overhead_p50_ms"] == pytest.approx(2)
    assert row["outside_p50_ms"] == pytest.approx(3)
    assert row["met"] == "yes"
    assert Pairs([0.1], [0.1031], [0.1]).row("tokens", "full")["met"] == "NO"


def test_the_median_lies_in_its_interval():
    values = np.arange(100.0)
    assert median_interval(values) == (40, 59)
    assert median_interval(np.array([3.0])) == (3, 3)


def test_both_ways_take_turns_and_must_agree():
    calls = []

    def way(name, text):
        return lambda source: calls.append(name) or Timed(text, 0.1, 0.1)

    pairs = measure(way("engine", "x"), way("http", "x"), ["a", "b"], rounds=2)
    assert len(pairs.direct) == len(pairs.http) == 4  # the first round warms up
    assert calls == ["http", "engine", "engine", "http", "engine", "http", "http", "engine", *calls[:4]]
    with pytest.raises(SystemExit, match="disagree"):
        measure(way("engine", "x"), way("http", "y"), ["a"], rounds=1)


def test_the_client_times_a_request(live):
    where = urlsplit(live.url)
    Client.connect(where.hostname, where.port)
    timed = Client.ask({"inputs": "x = 1", "parameters": {"max_new_tokens": 4}})
    assert 0 < timed.model_seconds < timed.seconds
    with pytest.raises(RuntimeError, match="exit_threshold"):
        Client.ask({"inputs": "x = 1", "exit_threshold": 2})
    Client.connection.close()


def test_tables_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "t.csv"
    write_csv([{"a": 1 / 3, "b": None, "c": "x"}], path)
    with open(path) as stream:
        assert list(csv.reader(stream)) == [["a", "b", "c"], ["0.333333", "", "x"]]
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        write_csv([{"a": 1}, None], path)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["t.csv"]
