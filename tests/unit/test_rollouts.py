"""A rule's own text on recorded contexts is what the engine writes for it, and is scored as such."""

from dataclasses import replace

import numpy as np
import pytest
from test_trajectories import DRAW, POINTS, make_files, record_some

from greencode.calibrate import calibrate
from greencode.engine import Engine
from greencode.errors import UserError
from greencode.metrics import rouge_l
from greencode.policies import AgentExit
from greencode.rollouts import Rollouts
from greencode.rules import Rule


class Words:
    """A tokenizer whose text is its ids."""

    def decode(self, ids):
        return " ".join(f"t{one}" for one in ids)


@pytest.fixture
def engine(tiny):
    return Engine(tiny("llama"), POINTS, Words())


@pytest.fixture
def rule(make_agent):
    return Rule("agent", "agent", make_agent(32, POINTS, seed=5))


def rollouts(engine, rule, episodes, files):
    return Rollouts(engine, rule, episodes, {10 + number: file for number, file in enumerate(files)}, batch=4)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.6, 1.0])
def test_texts_are_those_of_the_engine(engine, rule, threshold, temperature):
    files, words = make_files(), Words()
    episodes = record_some(engine, files)
    rule = replace(rule, temperature=temperature)
    texts = rollouts(engine, rule, episodes, files)
    expected, full = [], []
    for file, length in zip(episodes.files, episodes.contexts, strict=True):
        context, reference = files[file - 10][:length], files[file - 10][length : length + DRAW.new_tokens]
        policy = AgentExit(rule.network, threshold, temperature)
        for found, kv, who in ((expected, "deferred", policy), (full, "full", None)):
            done = engine.complete(context, DRAW.new_tokens, who, kv)
            found += rouge_l([words.decode(done.tokens)], [words.decode(reference)])
    np.testing.assert_array_equal(texts.rouge(threshold), expected)
    np.testing.assert_array_equal(texts.full, full)


def test_other_files_are_refused(engine, rule):
    files = make_files()
    episodes = record_some(engine, files)
    with pytest.raises(UserError, match=r"File \d+ of the recorded episodes is not in these data"):
        rollouts(engine, rule, episodes, files[:2])


def test_rouge_is_promised_from_texts(engine, rule):
    """Files that repeat what the model writes: all is lost or kept with the rule's text."""
    files = make_files(count=200)
    training = record_some(engine, files, episodes=20, seed=1)
    episodes = record_some(engine, files, episodes=300)
    for file, length, text in zip(episodes.files, episodes.contexts, episodes.tokens[..., -1], strict=True):
        files[file - 10][length : length + DRAW.new_tokens] = text.tolist()
    episodes = record_some(engine, files, episodes=300)
    texts = rollouts(engine, rule, episodes, files)
    targets = [("rougeL", 0.3), ("rougeL", 0.8), ("agreement", 0.8)]
    mild, strong, _ = calibrate(rule, training, episodes, targets, 0.9, texts)
    assert mild.threshold <= strong.threshold <= 1
    for one in (mild, strong):
        kept = texts.rouge(one.threshold).mean() / texts.full.mean()
        assert one.rougeL == pytest.approx(kept)
        assert kept >= one.target
    with pytest.raises(UserError, match="ROUGE-L is promised from texts"):
        calibrate(rule, training, episodes, targets[:1])
