"""Real clients over a real socket: huggingface_hub, openai, and text-generation's bodies and parse rules."""

import asyncio
import json
import os
import subprocess

import httpx2
import openai
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import GenerationError, OverloadedError, UnknownError, ValidationError

PROMPT = "def add(a, b):\n    return "
HUB_PATHS = ["/", "/generate", "/models/tiny"]


@pytest.fixture(scope="module")
def hub(live):
    """A hub client of a path."""
    return lambda path="/", **more: InferenceClient(live.url + path, **more)


@pytest.mark.parametrize("path", HUB_PATHS)
@pytest.mark.parametrize("details", [False, True])
def test_the_hub_client_completes(hub, path, details):
    reply = hub(path).text_generation(PROMPT, max_new_tokens=6, details=details)
    if not details:
        assert isinstance(reply, str)
        return
    found = reply.details
    assert (found.finish_reason, found.generated_tokens, found.seed) == ("length", 6, None)
    assert "".join(token.text for token in found.tokens) == reply.generated_text
    assert found.early_exit["policy"] == "rl"
    assert len(found.early_exit["exit_layers"]) == 6
    assert found.energy["source"] in (None, "rapl")
    assert found.timing["total_s"] > 0


@pytest.mark.parametrize("path", [*HUB_PATHS, "/generate_stream"])
@pytest.mark.parametrize("details", [False, True])
def test_the_hub_client_streams(hub, path, details):
    whole = hub("/").text_generation(PROMPT, max_new_tokens=6)
    client = hub(path)  # a stream ends with its client
    events = list(client.text_generation(PROMPT, max_new_tokens=6, stream=True, details=details))
    assert len(events) == 6
    if not details:
        assert "".join(events) == whole
        return
    assert "".join(event.token.text for event in events) == whole == events[-1].generated_text
    assert [event.generated_text for event in events[:-1]] == [None] * 5
    assert [event.index for event in events] == [1, 2, 3, 4, 5, 6]
    assert events[-1].details.generated_tokens == 6
    assert events[-1].details.input_length > 4
    depths = [event.token.exit_layer for event in events]
    assert depths == events[-1].details.early_exit["exit_layers"]


def test_the_hub_client_asks_asynchronously(live):
    async def ask():
        client = AsyncInferenceClient(live.url)
        whole = await client.text_generation(PROMPT, max_new_tokens=4)
        stream = await client.text_generation(PROMPT, max_new_tokens=4, stream=True)
        parts = [part async for part in stream]
        await client.close()
        return whole, parts

    whole, parts = asyncio.run(ask())
    assert "".join(parts) == whole
    assert len(parts) == 4


def test_the_hub_client_gives_thresholds_in_headers(live, hub):
    reply = hub(headers={"X-Exit-Threshold": "0.25"}).text_generation(PROMPT, details=True)
    assert reply.details.early_exit["threshold"] == 0.25
    reply = hub(headers={"X-Exit-Policy": "none"}).text_generation(PROMPT, details=True)
    assert reply.details.early_exit["exit_layers"] == [8] * 15
    assert [threshold for _, threshold in live.engine.seen[-2:]] == [0.25, None]


def test_the_hub_client_sees_stops_samples_and_the_prompts_tokens(hub):
    whole = hub().text_generation(PROMPT, max_new_tokens=12)
    stop = whole[3:5]
    reply = hub().text_generation(PROMPT, max_new_tokens=12, stop=[stop], details=True)
    assert reply.details.finish_reason == "stop_sequence"
    assert reply.generated_text == whole[: whole.index(stop)]
    reply = hub().text_generation(
        PROMPT, do_sample=True, temperature=0.7, top_k=9, top_p=0.9, repetition_penalty=1.1, seed=7,
        return_full_text=True, decoder_input_details=True, details=True, truncate=5,
    )  # fmt: skip
    assert reply.details.seed == 7
    assert reply.generated_text.startswith(PROMPT)
    assert len(reply.details.prefill) == 5


def test_the_hub_client_raises_by_the_kind_of_error(hub, live):
    with pytest.raises(ValidationError, match="temperature"):
        hub().text_generation(PROMPT, temperature=-1)
    with pytest.raises(UnknownError, match="No such model"):
        hub("/models/other").text_generation(PROMPT)
    live.engine.fault = RuntimeError(PROMPT)
    try:
        with pytest.raises(GenerationError):
            hub().text_generation(PROMPT)
        live.engine.steps = 0
        client = hub()
        with pytest.raises(GenerationError):  # after the stream has begun
            list(client.text_generation(PROMPT, stream=True))
    finally:
        live.engine.fault = None


def test_the_hub_client_learns_that_the_server_is_full(listen):
    with listen(max_concurrent_requests=1) as endpoint:
        endpoint.engine.pause = 0.05
        client = InferenceClient(endpoint.url)
        first = client.text_generation(PROMPT, stream=True)
        assert endpoint.wait(lambda: endpoint.worker.in_flight == 1)
        with pytest.raises(OverloadedError):
            client.text_generation(PROMPT)
        first.close()


def test_the_hub_client_knows_health_and_model(live):
    client = InferenceClient(base_url=live.url, provider="hf-inference")
    assert client.health_check()
    info = client.get_endpoint_info()
    assert info["model_id"] == "tiny"
    assert info["greencode"]["exit_points"] == [2, 4, 6, 8]


@pytest.fixture(scope="module")
def openai_client(live):
    """OpenAI's client."""
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


def test_openais_client_completes(openai_client):
    reply = openai_client.completions.create(
        model="any", prompt=PROMPT, max_tokens=5, temperature=0, extra_body={"exit_threshold": 0.35}
    )
    assert reply.object == "text_completion"
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 5
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 5
    assert reply.greencode["early_exit"]["threshold"] == 0.35
    assert reply._request_id
    assert not hasattr(reply, "error")


def test_openais_client_streams(openai_client):
    whole = openai_client.completions.create(model="m", prompt=[PROMPT], max_tokens=5).choices[0].text
    chunks = list(
        openai_client.completions.create(
            model="m", prompt=PROMPT, max_tokens=5, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 4 + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 5
    assert len(chunks[-2].greencode["early_exit"]["exit_layers"]) == 5
    assert len({chunk.id for chunk in chunks}) == 1
    without = list(openai_client.completions.create(model="m", prompt=PROMPT, max_tokens=2, stream=True))
    assert len(without) == 2


def test_openais_client_stops(openai_client):
    whole = openai_client.completions.create(model="m", prompt=PROMPT, max_tokens=12).choices[0].text
    reply = openai_client.completions.create(model="m", prompt=PROMPT, max_tokens=12, stop=whole[3:5])
    assert reply.choices[0].text == whole[: whole.index(whole[3:5])]
    assert reply.choices[0].finish_reason == "stop"


def test_openais_client_raises_with_code_and_field(openai_client):
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        openai_client.completions.create(model="m", prompt=PROMPT, extra_body={"exit_threshold": 2})
    assert (caught.value.code, caught.value.param) == ("validation", "exit_threshold")
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.UnprocessableEntityError, match="prompt"):
        openai_client.completions.create(model="m", prompt=[[1, 2]])
    with pytest.raises(openai.NotFoundError, match="Chat is not offered"):
        openai_client.chat.completions.create(model="m", messages=[])


def test_openais_client_sees_a_failure_in_a_stream(openai_client, live):
    live.engine.steps, live.engine.fault = 0, RuntimeError("x")
    try:
        with pytest.raises(openai.APIError, match="The model failed"):
            list(openai_client.completions.create(model="m", prompt=PROMPT, stream=True))
    finally:
        live.engine.fault = None


def test_openais_client_waits_and_tries_again_when_full(listen):
    with listen(max_concurrent_requests=1) as endpoint:
        endpoint.engine.pause = 0.05
        client = openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=3)
        stream = client.completions.create(model="m", prompt=PROMPT, stream=True, max_tokens=8)
        assert client.completions.create(model="m", prompt=PROMPT, max_tokens=1).usage.completion_tokens == 1
        stream.close()
        assert endpoint.metric("requests_total", route="/v1/completions", status="429") >= 1


def test_openais_client_lists_the_model(openai_client):
    assert [model.id for model in openai_client.models.list()] == ["tiny"]


def test_keys_are_asked_for(listen):
    with listen(api_key="secret") as endpoint:
        InferenceClient(endpoint.url, token="secret").text_generation(PROMPT, max_new_tokens=1)
        good = openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="secret", max_retries=0)
        assert good.models.list().data
        bad = openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="Secret", max_retries=0)
        for ask in (bad.models.list, lambda: bad.completions.create(model="m", prompt="x")):
            with pytest.raises(openai.AuthenticationError):
                ask()
        with pytest.raises(UnknownError, match="bearer token"):
            InferenceClient(endpoint.url).text_generation(PROMPT)
        for header in ({}, {"authorization": "secret"}, {"authorization": "Basic secret"}):
            reply = httpx2.post(f"{endpoint.url}/generate", json={"inputs": "x"}, headers=header)
            assert reply.status_code == 401
            assert reply.headers["www-authenticate"] == "Bearer"
            assert isinstance(reply.json()["error"], str)
        assert httpx2.get(f"{endpoint.url}/health").status_code == 200


# Hugging Face's JavaScript client sends parameters at the top level, and its address as the model.
def test_the_body_of_the_javascript_client(live):
    body = {
        "model": live.url, "prompt": PROMPT, "max_tokens": 3, "exit_threshold": 0.5, "do_sample": False,
        "repetition_penalty": 1.0, "return_full_text": False,
    }  # fmt: skip
    reply = httpx2.post(f"{live.url}/v1/completions", json=body).json()
    assert reply["usage"]["completion_tokens"] == 3
    assert reply["greencode"]["early_exit"]["threshold"] == 0.5


# text-generation 0.7.0 asks for a huggingface_hub below 1, which cannot stand beside transformers 5: its
# bodies, as it sends them, and what its models demand of replies.
TEXT_GENERATION = {
    "inputs": PROMPT,
    "parameters": {
        "do_sample": False, "max_new_tokens": 4, "repetition_penalty": None, "frequency_penalty": None,
        "return_full_text": False, "stop": [], "seed": None, "temperature": None, "top_k": None,
        "top_p": None, "truncate": None, "typical_p": None, "best_of": None, "watermark": False,
        "details": True,
        "decoder_input_details": False, "top_n_tokens": None, "grammar": None,
    },
    "stream": False,
}  # fmt: skip


def test_the_bodies_of_text_generation(live):
    replies = httpx2.post(live.url, json=TEXT_GENERATION).json()
    details = replies[0]["details"]
    assert isinstance(replies[0]["generated_text"], str)
    assert details["finish_reason"] in ("length", "eos_token", "stop_sequence")
    assert isinstance(details["prefill"], list)
    for token in details["tokens"]:
        assert isinstance(token["id"], int)
        assert isinstance(token["text"], str)
        assert isinstance(token["special"], bool)
    with httpx2.stream("POST", live.url, json={**TEXT_GENERATION, "stream": True}) as reply:
        lines = [line for line in reply.iter_lines() if line]
    # It strips the letters of "data:" from the left and parses the rest, whatever that is.
    events = [json.loads(line.lstrip("data:").rstrip("/n")) for line in lines]  # noqa: B005
    text = "".join(event["token"]["text"] for event in events if not event["token"]["special"])
    assert text == replies[0]["generated_text"] == events[-1]["generated_text"]


@pytest.mark.skipif("TEXT_GENERATION_PYTHON" not in os.environ, reason="needs a Python with text-generation")
def test_text_generation_itself(live):
    script = """
import asyncio, sys
from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError
url, prompt = sys.argv[1:]
client = Client(url, headers={"X-Exit-Threshold": "0.6"})
whole = client.generate(prompt, max_new_tokens=4)
assert whole.details.generated_tokens == 4
events = list(client.generate_stream(prompt, max_new_tokens=4))
assert "".join(e.token.text for e in events if not e.token.special) == whole.generated_text
assert events[-1].generated_text == whole.generated_text and events[-1].details.generated_tokens == 4
async def ask():
    client = AsyncClient(url)
    reply = await client.generate(prompt, max_new_tokens=2)
    return reply, [e async for e in client.generate_stream(prompt, max_new_tokens=2)]
reply, events = asyncio.run(ask())
assert len(events) == reply.details.generated_tokens == 2
try:
    client.generate(prompt, max_new_tokens=10_000)
except ValidationError as error:
    assert "max_new_tokens" in str(error)
else:
    raise SystemExit("not refused")
"""
    command = [os.environ["TEXT_GENERATION_PYTHON"], "-c", script, live.url, PROMPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_events_are_byte_for_byte_what_clients_read(live):
    with httpx2.stream(
        "POST", f"{live.url}/generate_stream", json={"inputs": "x", "max_new_tokens": 2}
    ) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["cache-control"] == "no-cache"
        assert reply.headers["x-accel-buffering"] == "no"
        raw = reply.read()
    frames = raw.split(b"\n\n")
    assert frames.pop() == b""
    assert len(frames) == 2
    assert all(frame.startswith(b'data: {"index": ') and b"\n" not in frame for frame in frames)
    assert b"[DONE]" not in raw
    with httpx2.stream(
        "POST", f"{live.url}/v1/completions", json={"prompt": "x", "max_tokens": 2, "stream": True}
    ) as reply:
        raw = reply.read()
    assert raw.endswith(b"\n\ndata: [DONE]\n\n")
