"""Requests: where parameters may stand, which wins, and what is refused."""

import json

import pytest

from greencode.choices import choose_sampling
from greencode.parameters import Parameters, ServiceError
from greencode.replies import error_body

PROMPT = {"inputs": "def add(a, b):\n"}
EDITOR = {"max_new_tokens": 60, "temperature": 0.2, "top_p": 0.95}  # what the extension merges into a body


def post(client, path="/generate", headers=None, **body):
    """A completion's details, and the reply's headers."""
    body = {**PROMPT, "details": True, **body}
    reply = client.post(path, json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    return reply.json()["details"], reply.headers


def refused(client, path="/generate", headers=None, **body):
    """The fields that a refusal names."""
    headers = {"content-type": "application/json", **(headers or {})}
    reply = client.post(path, content=json.dumps({**PROMPT, **body}), headers=headers)
    assert reply.status_code == 422, reply.text
    answer = reply.json()
    assert answer["error_type"] == "validation"
    assert isinstance(answer["error"], str)
    return [detail["loc"] for detail in answer["detail"]]


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({}, 15),
        ({"parameters": {"max_new_tokens": 3}}, 3),
        ({"parameters": {"max_new_tokens": None}}, 15),
        ({"parameters": None, "options": None}, 15),
        ({"parameters": {"num_predict": 4}}, 4),
        ({"parameters": EDITOR | {"num_predict": 5, "do_sample": False}}, 5),  # an alias of the user's own
        ({"parameters": {"max_new_tokens": 60}, "max_new_tokens": 6}, 6),
        ({"parameters": {"max_new_tokens": 60}, "max_tokens": 7}, 7),
        ({"parameters": {"max_new_tokens": 60}, "options": {"num_predict": 8}}, 8),
        ({"max_tokens": 9, "options": {"n_predict": 2}, "parameters": {"max_new_tokens": 60}}, 2),
        ({"max_new_tokens": 60, "options": {"max_new_tokens": None}}, 60),
        ({"parameters": {"parameters": {"return_full_text": False}}}, 15),  # llm-ls without parameters
    ],
)
def test_the_number_of_tokens_is_found_wherever_it_stands(client, body, tokens):
    assert post(client, **body)[0]["generated_tokens"] == tokens


@pytest.mark.parametrize(
    ("body", "headers", "expected"),
    [
        ({}, {}, ("rl", 0.9)),
        ({"exit_threshold": 0.3}, {}, ("rl", 0.3)),
        ({"RL_agent_thresh": 0.4}, {}, ("rl", 0.4)),
        ({"RL_agent_thresh": 0.4, "exit_threshold": 0.9}, {}, ("rl", 0.4)),
        ({"options": {"RL_agent_thresh": 0.5}, "exit_threshold": 0.9}, {}, ("rl", 0.5)),
        ({"exit_threshold": 0.5, "parameters": {"exit_threshold": 0.9}}, {}, ("rl", 0.5)),
        ({}, {"X-Exit-Threshold": "0.7"}, ("rl", 0.7)),
        ({"parameters": {"exit_threshold": 0.2}}, {"X-Exit-Threshold": "0.7"}, ("rl", 0.2)),
        ({}, {"X-Exit-Policy": "none"}, ("none", None)),
        ({"exit_threshold": 0.6}, {"X-Exit-Policy": "none"}, ("rl", 0.6)),
        ({"exit_policy": "rl"}, {"X-Exit-Policy": "none", "X-Exit-Threshold": "0.1"}, ("rl", 0.1)),
        ({"exit_threshold": 0}, {}, ("rl", 0.0)),
        ({"exit_threshold": 1}, {}, ("rl", 1.0)),
    ],
)
def test_the_exit_is_found_wherever_it_stands(client, body, headers, expected):
    details, replied = post(client, headers=headers, **body)
    early = details["early_exit"]
    assert (early["policy"], early["threshold"]) == expected
    assert replied["x-exit-policy"] == expected[0]
    seen = client.endpoint.engine.seen[-1][1]
    assert seen == (expected[1] if expected[0] == "rl" else None)


@pytest.mark.parametrize(
    ("body", "headers", "threshold", "target"),
    [
        ({"exit_target": {"saving": 0.4}}, {}, 0.45, {"saving": 0.4}),
        # The mildest promise that is enough.
        ({"exit_target": {"saving": 0.15}}, {}, 0.6, {"saving": 0.15}),
        ({"options": {"exit_target": {"agreement": 0.5}}}, {}, 0.7, {"agreement": 0.5}),
        ({"exit_policy": "rl"}, {"X-Exit-Target": "saving=0.3"}, 0.45, {"saving": 0.3}),
        ({}, {"X-Exit-Target": "agreement = 0.9"}, 0.7, {"agreement": 0.9}),
        ({"exit_target": {"saving": 0.2}}, {"X-Exit-Threshold": "0.1"}, 0.6, {"saving": 0.2}),
        ({"exit_threshold": 0.1}, {"X-Exit-Target": "saving=0.2"}, 0.1, None),
    ],
)
def test_a_target_is_answered_by_the_threshold_that_promises_it(client, body, headers, threshold, target):
    details, replied = post(client, headers=headers, **body)
    early = details["early_exit"]
    assert (early["policy"], early["threshold"]) == ("rl", threshold)
    asked = early["target"] and {name: share for name, share in early["target"].items() if share is not None}
    assert asked == target
    assert client.endpoint.engine.seen[-1][1] == threshold
    assert replied["x-exit-threshold"] == str(threshold)


@pytest.mark.parametrize(
    ("body", "headers", "said"),
    [
        (
            {"exit_target": {"saving": 0.5}},
            {},
            "a saving of 0.5 is not promised by the agent; at most 0.4 is",
        ),
        (
            {"exit_target": {"agreement": 0.95}},
            {},
            "an agreement of 0.95 is not promised by the agent; at most",
        ),
        (
            {"exit_target": {"saving": 0.2, "agreement": 0.9}},
            {},
            "ask for one of saving, agreement and rougeL",
        ),
        ({"exit_target": {}}, {}, "ask for one of"),
        ({"exit_target": {"speed": 0.2}}, {}, "exit_target: "),
        ({"exit_target": {"saving": 1}}, {}, "exit_target: "),
        ({"exit_target": 0.4}, {}, "exit_target: "),
        ({"exit_target": {"saving": 0.2}, "exit_threshold": 0.5}, {}, "exclude each other"),
        ({"exit_target": {"saving": 0.2}, "exit_layer": 4}, {}, "exclude each other"),
        ({}, {"X-Exit-Target": "0.4"}, "x-exit-target: write saving=0.4 or agreement=0.9"),
        ({}, {"X-Exit-Target": "saving=much"}, "x-exit-target: write"),
        ({}, {"X-Exit-Target": "saving=0.2", "X-Exit-Threshold": "0.5"}, "exclude each other"),
    ],
)
def test_a_target_that_is_not_promised_is_refused(client, body, headers, said):
    reply = client.post("/generate", json={**PROMPT, **body}, headers=headers)
    assert reply.status_code == 422
    assert said in reply.json()["error"]


def test_a_target_that_nothing_uses_is_named(client):
    _, headers = post(client, exit_policy="none", exit_target={"saving": 0.2})
    assert headers["x-ignored-parameters"] == "exit_target"


def test_what_is_promised_is_public(client):
    told = client.get("/info").json()["greencode"]["exit_targets"]
    given = [(one["wanted"], one["target"], one["threshold"]) for one in told]
    assert given == [("saving", 0.2, 0.6), ("saving", 0.4, 0.45), ("agreement", 0.9, 0.7)]
    assert {one["confidence"] for one in told} == {0.9}


def test_a_server_may_keep_a_promise_by_default(make_endpoint):
    from starlette.testclient import TestClient

    endpoint = make_endpoint(exit_target="saving=0.4")
    with TestClient(endpoint.app) as client:
        assert endpoint.wait(lambda: endpoint.worker.state == "ready")
        early = client.post("/generate", json={**PROMPT, "details": True}).json()["details"]["early_exit"]
        assert (early["threshold"], early["target"]["saving"]) == (0.45, 0.4)
        default = client.get("/info").json()["greencode"]["default"]
        assert (default["exit_threshold"], default["exit_target"]["saving"]) == (0.45, 0.4)
    endpoint = make_endpoint(calibration=None)
    with TestClient(endpoint.app) as client:
        assert endpoint.wait(lambda: endpoint.worker.state == "ready")
        assert client.get("/info").json()["greencode"]["exit_targets"] == []
        reply = client.post("/generate", json={**PROMPT, "exit_target": {"saving": 0.2}})
        assert "the agent of this server is not calibrated; send exit_threshold" in reply.json()["error"]


def test_a_depth_asks_for_a_fixed_exit(client):
    details, _ = post(client, exit_layer=4)
    assert details["early_exit"]["policy"] == "fixed"
    assert details["early_exit"]["exit_layers"] == [4] * 15
    assert details["early_exit"]["layers_skipped"] == 15 * 4
    assert details["early_exit"]["skipped_fraction"] == 0.5


def test_a_threshold_that_nothing_uses_is_named(client):
    _, headers = post(client, exit_policy="none", exit_threshold=0.5, parameters={"colour": "red"}, wat=1)
    assert headers["x-ignored-parameters"] == "colour, exit_threshold, wat"


def test_parameters_out_of_place_are_named(client):
    body = {"parameters": {"stream": True, "parameters": {"details": True}}, "options": {"prompt": "x"}}
    _, headers = post(client, **body)
    assert headers["x-ignored-parameters"] == "options.prompt, parameters.stream"


@pytest.mark.parametrize(
    ("path", "more", "listed"),
    [
        ("/generate", {"details": True}, False),
        ("/generate", {}, True),
        ("/generate", {"details": True, "stream": True}, True),
        ("/v1/completions", {"details": True, "prompt": "x"}, True),
    ],
)
def test_the_prompts_tokens_are_listed_or_the_wish_is_named(client, path, more, listed):
    reply = client.post(path, json={**PROMPT, "decoder_input_details": True, **more})
    ignored = reply.headers.get("x-ignored-parameters", "").split(", ")
    assert ("decoder_input_details" in ignored) is listed
    assert listed or reply.json()["details"]["prefill"]


def test_a_route_of_two_prompts_takes_either_and_says_so(client):
    for name in ("inputs", "prompt"):
        assert client.post("/api/generate", json={name: "x = 1"}).status_code == 200
    reply = client.post("/api/generate", json={"stream": False})
    assert (reply.status_code, reply.json()["error"]) == (422, "body: inputs or prompt is required")


def test_harmless_parameters_are_passed_over(client):
    _, headers = post(
        client, user="me", use_cache=True, options={"wait_for_model": True}, n=1, best_of=1, watermark=False,
        typical_p=1, echo=False, suffix="", logit_bias={}, grammar=None, top_n_tokens=0, presence_penalty=0,
    )  # fmt: skip
    assert "x-ignored-parameters" not in headers


def test_names_that_do_not_belong_in_a_header_are_left_out(client):
    _, headers = post(client, **{"a\r\nset-cookie: x": 1, "é": 2, "plain": 3, "long" * 30: 4})
    assert headers["x-ignored-parameters"] == "plain"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"exit_threshold": 1.5}, "exit_threshold"),
        ({"RL_agent_thresh": -0.1}, "exit_threshold"),
        ({"exit_threshold": True}, "exit_threshold"),
        ({"exit_threshold": "0.5"}, "exit_threshold"),
        ({"exit_policy": "magic"}, "exit_policy"),
        ({"exit_layer": 5}, "exit_layer"),
        ({"exit_layer": 4, "exit_policy": "rl"}, "exit_layer"),
        ({"exit_layer": 4, "exit_threshold": 0.5}, "exit_policy"),
        ({"exit_policy": "fixed"}, "exit_layer"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": -2}, "max_new_tokens"),
        ({"max_new_tokens": 129}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"options": {"num_predict": 1.5}}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"parameters": []}, "parameters"),
        ({"options": "fast"}, "options"),
        ({"inputs": ""}, "inputs"),
        ({"inputs": []}, "inputs"),
        ({"inputs": ["a", "b"]}, "inputs"),
        ({"inputs": 3}, "inputs"),
        ({"inputs": None}, "inputs"),
        ({"inputs": "\ud800"}, "inputs"),
        ({"inputs": "x = 1\n" * 200}, "inputs"),
        ({"prompt_format": "html"}, "prompt_format"),
        ({"n": 2}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"typical_p": 0.9}, "typical_p"),
        ({"watermark": True}, "watermark"),
        ({"echo": True}, "echo"),
        ({"suffix": "}"}, "suffix"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"grammar": {"type": "json", "value": "x"}}, "grammar"),
        ({"adapter_id": "a"}, "adapter_id"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"top_n_tokens": 2}, "top_n_tokens"),
        ({"logprobs": 3}, "logprobs"),
    ],
)
def test_what_is_wrong_is_named(client, body, field):
    assert field in refused(client, **body)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(client, number):
    text = f'{{"inputs": "x", "exit_threshold": {number}}}'
    reply = client.post("/generate", content=text, headers={"content-type": "application/json"})
    assert reply.status_code == 422
    assert reply.json()["detail"][0]["loc"] == "exit_threshold"


@pytest.mark.parametrize("value", ["1.1", "nan", "inf", "half", ""])
def test_a_wrong_header_is_named(client, value):
    assert refused(client, headers={"X-Exit-Threshold": value}) == ["x-exit-threshold"]


@pytest.mark.parametrize("text", ["", "{", "not json", '{"inputs": "x"} tail', "[" * 100_000, "\xff"])
def test_what_is_no_json_is_said_to_be_none(client, text):
    reply = client.post("/generate", content=text, headers={"content-type": "application/json"})
    assert reply.status_code in (400, 422)
    assert reply.json()["error_type"] == "validation"


@pytest.mark.parametrize("text", ["null", "[]", "3", '"x"'])
def test_what_is_no_object_is_refused(client, text):
    reply = client.post("/generate", content=text, headers={"content-type": "application/json"})
    assert reply.status_code == 422
    assert isinstance(reply.json()["error"], str)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, None),
        ({"temperature": 0}, None),
        ({"temperature": 1}, None),
        ({"temperature": 0.001, "do_sample": True}, None),
        ({"temperature": 0.2, "top_p": 0.95, "do_sample": False}, None),
        ({"top_p": 1, "top_k": 0}, None),
        ({"temperature": 0.2}, {"temperature": 0.2, "top_k": None, "top_p": None}),
        ({"top_p": 0.9}, {"temperature": 1.0, "top_k": None, "top_p": 0.9}),
        ({"top_k": 5}, {"temperature": 1.0, "top_k": 5, "top_p": None}),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": None, "top_p": None}),
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
    ],
)
def test_when_is_sampled(parameters, expected):
    chosen = choose_sampling(Parameters(**parameters))
    if expected and "temperature" in expected:
        expected = expected | {"repetition_penalty": 1.0}
        assert 0 <= chosen.pop("seed") < 2**31
    assert chosen == expected


def test_a_seed_repeats_a_sample_and_is_reported(client):
    sample = {"do_sample": True, "temperature": 1.5}
    first, _ = post(client, parameters=sample)
    again, _ = post(client, parameters=sample | {"seed": first["seed"]})
    other, _ = post(client, parameters=sample | {"seed": first["seed"] + 1})
    ids = [[token["id"] for token in details["tokens"]] for details in (first, again, other)]
    assert ids[0] == ids[1] != ids[2]
    assert post(client)[0]["seed"] is None


def test_errors_have_the_dialect_of_their_path():
    error = ServiceError.invalid([{"loc": ("body", "seed"), "msg": "no", "type": "t"}])
    plain, openai = error_body("/generate", error, "id"), error_body("/v1/completions", error, "id")
    assert plain["error"] == "seed: no"
    assert openai["error"] == {
        "message": "seed: no", "type": "invalid_request_error", "param": "seed", "code": "validation",
    }  # fmt: skip
    assert plain["detail"] == openai["detail"] == [{"loc": "seed", "msg": "no", "type": "t"}]
