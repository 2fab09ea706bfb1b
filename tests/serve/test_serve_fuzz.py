"""The service's own OpenAPI, and requests drawn from it and against it: never a fault of the server."""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS
from starlette.testclient import TestClient

from greencode.parameters import ALIASES, CompletionRequest, EitherRequest

NAMES = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)
FUZZ = settings(
    max_examples=24,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)


@pytest.fixture(scope="module")
def endpoint(make_endpoint):
    """An application that runs, and short completions."""
    endpoint = make_endpoint(max_new_tokens=2, max_new_tokens_limit=8)
    with TestClient(endpoint.app) as endpoint.client:
        assert endpoint.wait(lambda: endpoint.worker.state == "ready")
        yield endpoint


@pytest.fixture(scope="module")
def schema(listen):
    """The OpenAPI of a service that listens."""
    with listen(max_new_tokens=2, max_new_tokens_limit=8) as endpoint:
        yield schemathesis.openapi.from_url(f"{endpoint.url}/openapi.json")
        assert endpoint.worker.in_flight == 0
        assert len(endpoint.engine.seen) > 10  # some were completed


def test_requests_after_the_openapi(schema):
    # Not by schemathesis' own parametrization, which does not know this pytest.
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == 12
    for operation in operations:
        modes = [GenerationMode.POSITIVE, *([GenerationMode.NEGATIVE] if operation.body else [])]
        for mode in modes:
            FUZZ(given(operation.as_strategy(generation_mode=mode))(validate))()


def validate(case):
    """Ask, and check the reply against the OpenAPI."""
    case.call_and_validate(checks=CHECKS.get_by_names(NAMES))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
KNOWN = st.sampled_from(sorted({*EitherRequest.model_fields, *CompletionRequest.model_fields, *ALIASES}))
SENSIBLE = st.sampled_from(
    [0, 1, 2, -1, 0.5, 1e-300, 1e300, 2**31, 2**63, 10**40, "", "a", "rl", "fixed", "none", ["a", " "], True]
)
BLOCK = st.dictionaries(KNOWN | st.text(max_size=8), SENSIBLE | VALUES, max_size=5)
TEXTS = st.text(max_size=60) | st.sampled_from(
    ["def f(", "x = '", "}", "#", '"""', "\ud800", "\0", "a" * 3000]
)
PATHS = ("/", "/generate", "/generate_stream", "/models/tiny", "/api/generate", "/v1/completions")


@settings(FUZZ, max_examples=300)
@example("/generate", "x", {"stream_options": {"include_usage": 1}, "model": 3}, None, None)
@given(st.sampled_from(PATHS), TEXTS | VALUES, BLOCK, st.none() | BLOCK, st.none() | BLOCK)
def test_requests_of_any_kind(endpoint, path, prompt, body, parameters, options):
    body = {**body, "inputs": prompt, "prompt": prompt, "parameters": parameters, "options": options}
    headers = {"content-type": "application/json"}
    reply = endpoint.client.post(path, content=json.dumps(body), headers=headers)
    assert reply.status_code in (200, 422), reply.text
    if reply.headers["content-type"] == "application/json":
        assert isinstance(reply.json(), dict | list)
    assert endpoint.worker.in_flight == 0


def test_the_openapi_names_all_routes_and_parameters(endpoint):
    described = endpoint.app.openapi()
    assert set(described["paths"]) == {
        "/", "/generate", "/generate_stream", "/models/{model_id}", "/api/generate",
        "/api/generate/models/{model_id}", "/v1/completions", "/v1/models", "/info", "/health", "/livez",
        "/metrics",
    }  # fmt: skip
    for name in ("GenerateRequest", "CompletionRequest", "EitherRequest"):
        fields = described["components"]["schemas"][name]["properties"]
        assert {
            "exit_threshold",
            "exit_target",
            "exit_policy",
            "exit_layer",
            "exit_verify",
            "max_new_tokens",
            "stop",
        } <= set(fields)
    headers = {one["name"] for one in described["paths"]["/generate"]["post"]["parameters"]}
    assert headers == {"x-exit-threshold", "x-exit-target", "x-exit-policy", "x-exit-verify"}
    assert endpoint.client.get("/docs").status_code == 200
