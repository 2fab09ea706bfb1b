"""Verified exits: whatever leaves, the completion is the full model's, on every route."""

import dataclasses
import functools
import json

import httpx2
import pytest

from greencode import serve

PROMPT = "def add(a, b):\n    return "
ROUTES = [
    "/", "/generate", "/generate_stream", "/models/tiny", "/api/generate", "/api/generate/models/tiny",
    "/v1/completions",
]  # fmt: skip
SAMPLE = {"do_sample": True, "temperature": 1.2, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 3}


def completed(client, url, path="/generate", stream=False, headers=None, **body):
    """(text, its parts, depths account, finish) of a completion; OpenAI's replies have one part if whole."""
    openai = path.startswith("/v1")
    body = {"prompt" if openai else "inputs": PROMPT, "max_new_tokens": 24, "details": True, **body}
    if stream or path == "/generate_stream":
        with client.stream("POST", url + path, json={**body, "stream": True}, headers=headers) as reply:
            assert reply.status_code == 200
            lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
        events = [json.loads(line) for line in lines if line != "[DONE]"]
        if openai:
            parts = [event["choices"][0]["text"] for event in events]
            last = events[-1]
            return "".join(parts), parts, last["greencode"]["early_exit"], last["choices"][0]["finish_reason"]
        parts, details = [event["token"] for event in events], events[-1]["details"]
        return events[-1]["generated_text"], parts, details["early_exit"], details["finish_reason"]
    reply = client.post(url + path, json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    if openai:
        choice = answer["choices"][0]
        return choice["text"], [choice["text"]], answer["greencode"]["early_exit"], choice["finish_reason"]
    answer = answer[0] if isinstance(answer, list) else answer
    details = answer["details"]
    return answer["generated_text"], details["tokens"], details["early_exit"], details["finish_reason"]


@pytest.fixture(scope="module")
def ask():
    """`completed` by one client."""
    with httpx2.Client() as client:
        yield functools.partial(completed, client)


@pytest.mark.parametrize("sample", [{}, SAMPLE], ids=["greedy", "seed"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", ROUTES)
def test_the_completion_is_the_full_models(ask, live, path, stream, sample):
    full = ask(live.url, path, stream, exit_policy="none", **sample)
    assert (full[2]["verify"], full[2]["drafts"], full[2]["drafts_accepted"]) == (False, None, None)
    accepted = 0
    for leave in ({"exit_threshold": 0.3}, {"exit_layer": 2}, {"exit_layer": 6}):
        text, parts, early, finish = ask(live.url, path, stream, exit_verify=True, **leave, **sample)
        assert (text, parts, finish) == (full[0], full[1], full[3])
        assert (early["exit_layers"], early["layers_skipped"]) == (full[2]["exit_layers"], 0)
        assert early["verify"] is True
        assert 0 <= early["drafts_accepted"] <= early["drafts"]
        assert early["drafts"] > 0
        accepted += early["drafts_accepted"]
        # Without that the same exits have another text.
        assert sample or ask(live.url, path, stream, **leave)[0] != full[0]
    assert accepted > 0  # some drafts were right, and stood


@pytest.mark.parametrize(
    ("body", "headers", "expected"),
    [
        ({}, {}, False),
        ({"exit_verify": True}, {}, True),
        ({"parameters": {"exit_verify": True}}, {}, True),
        ({"options": {"exit_verify": True}}, {}, True),
        ({"exit_verify": None}, {}, False),
        ({"exit_verify": False, "parameters": {"exit_verify": True}}, {}, False),
        ({"exit_verify": False, "options": {"exit_verify": True}}, {}, True),
        ({}, {"X-Exit-Verify": "true"}, True),
        ({}, {"X-Exit-Verify": "1"}, True),
        ({}, {"X-Exit-Verify": "false"}, False),
        ({}, {"X-Exit-Verify": "0"}, False),
        ({"exit_verify": False}, {"X-Exit-Verify": "true"}, False),
        ({"parameters": {"exit_verify": True}}, {"X-Exit-Verify": "0"}, True),
        ({"exit_threshold": 0.2}, {"X-Exit-Verify": "true"}, True),
        ({"exit_verify": True}, {"X-Exit-Threshold": "0.2"}, True),
        ({"exit_verify": True, "exit_target": {"saving": 0.4}}, {}, True),
        ({"exit_verify": True, "exit_layer": 4}, {}, True),
        ({"exit_verify": True, "exit_policy": "none"}, {}, False),  # nothing to verify
        ({}, {"X-Exit-Verify": "true", "X-Exit-Policy": "none"}, False),
    ],
)
def test_the_wish_is_found_wherever_it_stands(client, body, headers, expected):
    reply = client.post("/generate", json={"inputs": PROMPT, "details": True, **body}, headers=headers)
    early = reply.json()["details"]["early_exit"]
    assert (early["verify"], early["drafts"] is not None) == (expected, expected)
    assert reply.headers["x-exit-verify"] == str(expected).lower()
    modes = {"none": "full", "rl": "deferred", "fixed": "deferred"}
    assert client.endpoint.engine.modes[-1] == ("verified" if expected else modes[early["policy"]])


def test_a_wish_that_changes_nothing_is_named(client):
    body = {"inputs": PROMPT, "exit_policy": "none"}
    for more, headers in (({"exit_verify": True}, {}), ({}, {"X-Exit-Verify": "true"})):
        reply = client.post("/generate", json=body | more, headers=headers)
        assert reply.headers["x-ignored-parameters"] == "exit_verify"
    reply = client.post("/generate", json={"inputs": PROMPT, "exit_verify": True})
    assert "x-ignored-parameters" not in reply.headers


@pytest.mark.parametrize("value", ["true", 1, 0, 0.5, "yes", [], {}])
def test_what_is_no_truth_value_is_refused(client, value):
    for body in ({"exit_verify": value}, {"parameters": {"exit_verify": value}}):
        reply = client.post("/generate", json={"inputs": PROMPT, **body})
        assert reply.status_code == 422
        assert [fault["loc"] for fault in reply.json()["detail"]] == ["exit_verify"]


@pytest.mark.parametrize("value", ["", "yes", "TRUE", "2", "none", "true, false"])
def test_another_word_in_the_header_is_refused(client, value):
    for path in ("/generate", "/v1/completions"):
        body = {"prompt" if path.startswith("/v1") else "inputs": PROMPT}
        reply = client.post(path, json=body, headers={"X-Exit-Verify": value})
        assert reply.status_code == 422
        error = reply.json()["error"]
        message = error["message"] if isinstance(error, dict) else error
        assert message == "x-exit-verify: Input should be 'true', 'false', '1' or '0'"


def test_a_server_may_verify_by_default(ask, listen, weights, monkeypatch):
    agent = ["--weights", str(weights), "--policy", str(weights.parent / "agent/policy.safetensors")]
    assert serve.read_settings(agent).exit_verify is False
    assert serve.read_settings([*agent, "--exit-verify"]).exit_verify is True
    monkeypatch.setenv("GREENCODE_EXIT_VERIFY", "true")
    assert serve.read_settings(agent).exit_verify is True
    assert serve.read_settings([*agent, "--no-exit-verify"]).exit_verify is False
    monkeypatch.setenv("GREENCODE_EXIT_VERIFY", "perhaps")
    with pytest.raises(serve.UserError, match=r"--exit-verify \(or GREENCODE_EXIT_VERIFY\): "):
        serve.read_settings(agent)
    monkeypatch.delenv("GREENCODE_EXIT_VERIFY")
    with listen(exit_verify=True) as endpoint:
        info = httpx2.get(f"{endpoint.url}/info").json()["greencode"]
        assert info["default"]["exit_verify"] is True
        for more, headers, expected in (
            ({}, {}, True),
            ({"exit_threshold": 0.4}, {}, True),
            ({"exit_verify": False}, {}, False),
            ({}, {"X-Exit-Verify": "0"}, False),
            ({"exit_policy": "none"}, {}, False),
        ):
            assert ask(endpoint.url, headers=headers, **more)[2]["verify"] is expected


def test_a_server_without_an_agent_runs_full_or_verifies_a_depth(ask, listen):
    with listen(agent=False, exit_verify=True) as endpoint:
        text, _, early, _ = ask(endpoint.url)
        assert (early["policy"], early["verify"], endpoint.engine.modes[-1]) == ("none", False, "full")
        fixed = ask(endpoint.url, exit_layer=6)
        assert (fixed[0], fixed[2]["verify"], endpoint.engine.modes[-1]) == (text, True, "verified")


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_within_a_group_ends_the_completion(ask, live, stream):
    asked = {"prompt_format": "tokens", "stream": stream}
    whole = ask(live.url, exit_policy="none", **asked)[0]
    for at in range(2, 8):
        stop = whole[at : at + 3]
        full = ask(live.url, exit_policy="none", stop=stop, **asked)
        made = ask(live.url, exit_layer=6, exit_verify=True, stop=stop, **asked)
        assert made[0] == whole[: whole.index(stop)]
        assert (made[0], made[1], made[3]) == (full[0], full[1], full[3])
        assert made[3] == "stop_sequence"


def test_an_end_of_text_within_a_group_ends_the_completion(ask, listen, live, served):
    ids = [token["id"] for token in ask(live.url, exit_policy="none")[1]]
    for end in ids[:4]:
        with listen(load=lambda end=end: dataclasses.replace(served, eos=frozenset([end]))) as endpoint:
            for stream in (False, True):
                full = ask(endpoint.url, stream=stream, exit_policy="none")
                made = ask(endpoint.url, stream=stream, exit_layer=6, exit_verify=True)
                assert [token["id"] for token in made[1]] == ids[: ids.index(end) + 1]
                assert (made[0], made[1], made[3]) == (full[0], full[1], full[3])
                assert made[3] == "eos_token"


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_no_more_tokens_come_than_asked(ask, live, count):
    full = ask(live.url, exit_policy="none", max_new_tokens=count)
    made = ask(live.url, exit_layer=6, exit_verify=True, max_new_tokens=count)
    assert (made[:2], len(made[1])) == (full[:2], count)


def test_a_request_that_is_given_up_leaves_nothing_behind(ask, listen):
    with listen(max_new_tokens_limit=100) as endpoint:
        full = ask(endpoint.url, exit_policy="none")
        endpoint.engine.pause = 0.02
        body = {"inputs": PROMPT, "max_new_tokens": 100, "exit_layer": 6, "exit_verify": True}
        with httpx2.stream("POST", f"{endpoint.url}/generate_stream", json=body) as reply:
            first = json.loads(next(reply.iter_lines()).removeprefix("data: "))
        assert first["token"] == full[1][0]
        assert endpoint.wait(lambda: endpoint.worker.in_flight == 0)
        assert endpoint.wait(lambda: endpoint.metric("requests_cancelled_total", reason="disconnect") == 1)
        endpoint.engine.pause = 0
        assert ask(endpoint.url, exit_layer=6, exit_verify=True)[:2] == full[:2]


def test_the_sums_of_drafts_are_kept(ask, listen):
    with listen() as endpoint:
        ask(endpoint.url, exit_layer=6)
        early = ask(endpoint.url, exit_layer=6, exit_verify=True)[2]
        assert endpoint.wait(lambda: endpoint.metric("generated_tokens_total") == 48)
        assert endpoint.metric("drafts_total") == early["drafts"]
        assert endpoint.metric("drafts_accepted_total") == early["drafts_accepted"] > 0
