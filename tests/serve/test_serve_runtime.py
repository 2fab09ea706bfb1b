"""Cancelling, waiting, limits, logs and the end of the server, over real sockets."""

import contextlib
import dataclasses
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx2
import pytest

from greencode import serve
from greencode.worker import Exit, Order, Worker

PROMPT = "def add(a, b):\n    return "


def opened(url):
    """A socket to the endpoint."""
    where = urlsplit(url)
    return socket.create_connection((where.hostname, where.port), timeout=10)


def head(path, *headers):
    """The beginning of a request."""
    lines = (f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", *headers, "", "")
    return "\r\n".join(lines).encode()


def sent(endpoint, path="/generate", **body):
    """A socket on which a request was sent."""
    data = json.dumps({"inputs": PROMPT, **body}).encode()
    connection = opened(endpoint.url)
    connection.sendall(head(path, f"content-length: {len(data)}") + data)
    return connection


def read_all(connection):
    """(status, body) of what comes until the connection is closed."""
    data = b""
    while part := connection.recv(65536):
        data += part
    return int(data.split()[1]), data.partition(b"\r\n\r\n")[2]


@pytest.fixture(scope="module")
def slow(listen):
    """An endpoint whose tokens take 30 ms, for three requests."""
    with listen(max_concurrent_requests=3, max_new_tokens_limit=100) as endpoint:
        endpoint.engine.pause = 0.03
        yield endpoint
        endpoint.engine.pause = 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_running_request_stops_when_its_client_is_gone(slow, stream):
    slow.engine.steps, before = 0, slow.metric("requests_cancelled_total", reason="disconnect")
    connection = sent(slow, max_new_tokens=100, stream=stream)
    assert slow.wait(lambda: slow.engine.steps >= 2)
    connection.close()
    at = slow.engine.steps
    assert slow.wait(lambda: slow.worker.in_flight == 0)
    assert slow.engine.steps <= at + 3
    assert slow.wait(lambda: slow.metric("requests_cancelled_total", reason="disconnect") == before + 1)
    about = {"route": "/generate", "status": "200" if stream else "499"}
    assert slow.wait(lambda: slow.metric("requests_total", **about) >= 1)


def test_a_waiting_request_leaves_the_queue_when_its_client_is_gone(slow):
    slow.engine.seen.clear()
    first = sent(slow, max_new_tokens=60)
    assert slow.wait(lambda: len(slow.engine.seen) == 1)
    second = sent(slow)
    assert slow.wait(lambda: slow.worker.queued == 1)
    second.close()
    assert slow.wait(lambda: slow.worker.queued == 0 and slow.worker.in_flight == 1)
    first.close()
    assert slow.wait(lambda: slow.worker.in_flight == 0)
    assert len(slow.engine.seen) == 1  # the second never ran


def test_a_full_server_says_so_and_takes_requests_again(slow):
    connections = [sent(slow, max_new_tokens=100) for _ in range(3)]
    assert slow.wait(lambda: slow.worker.in_flight == 3)
    reply = httpx2.post(f"{slow.url}/generate", json={"inputs": PROMPT})
    assert (reply.status_code, reply.json()["error_type"]) == (429, "overloaded")
    assert reply.headers["retry-after"] == "1"
    for connection in connections:
        connection.close()
    assert slow.wait(lambda: slow.worker.in_flight == 0)
    assert (
        httpx2.post(f"{slow.url}/generate", json={"inputs": PROMPT, "max_new_tokens": 1}).status_code == 200
    )


def test_each_of_many_at_once_has_its_own_threshold(live):
    thresholds = [n / 12 for n in range(13)]

    def ask(threshold):
        body = {"inputs": PROMPT, "exit_threshold": threshold, "details": True}
        return httpx2.post(f"{live.url}/generate", json=body).json()["details"]["early_exit"]

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(ask, thresholds))
    assert [reply["threshold"] for reply in replies] == thresholds
    alone = [ask(threshold) for threshold in thresholds]
    assert [reply["exit_layers"] for reply in replies] == [reply["exit_layers"] for reply in alone]
    assert len({tuple(reply["exit_layers"]) for reply in replies}) > 2


def test_the_server_has_a_deadline_of_its_own(listen):
    with listen(request_timeout=0.3, max_new_tokens_limit=100) as endpoint:
        endpoint.engine.pause = 0.05
        reply = httpx2.post(f"{endpoint.url}/generate", json={"inputs": PROMPT, "max_new_tokens": 100})
        assert (reply.status_code, reply.json()["error_type"]) == (504, "timeout")
        body = {"inputs": PROMPT, "max_new_tokens": 100}
        with httpx2.stream("POST", f"{endpoint.url}/generate_stream", json=body) as reply:
            events = [json.loads(line[6:]) for line in reply.iter_lines() if line]
        assert reply.status_code == 200
        assert events[-1]["error_type"] == "timeout"
        assert endpoint.wait(lambda: endpoint.worker.in_flight == 0)
        assert endpoint.wait(lambda: endpoint.metric("requests_cancelled_total", reason="timeout") == 2)


def test_no_exit_is_the_plain_full_model(live, served):
    body = {"inputs": "x = 1", "exit_policy": "none", "details": True, "max_new_tokens": 20}
    details = httpx2.post(f"{live.url}/generate", json={**body, "prompt_format": "tokens"}).json()["details"]
    context = served.tokenizer("x = 1")["input_ids"]
    assert [token["id"] for token in details["tokens"]] == served.engine.complete(
        context, 20, kv="full"
    ).tokens
    assert {token["exit_layer"] for token in details["tokens"]} == {8}


def chunked(endpoint, chunks):
    """(status, body) of a body sent in chunks."""
    connection = opened(endpoint.url)
    connection.sendall(head("/generate", "transfer-encoding: chunked", "connection: close"))
    try:
        for chunk in chunks:
            connection.sendall(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
    except OSError:
        pass  # the server has had enough
    return read_all(connection)


def test_bodies_are_counted_whether_stated_or_chunked(listen):
    with listen(max_body_bytes=2000) as endpoint:
        small = json.dumps({"inputs": PROMPT, "max_new_tokens": 1}).encode()
        assert chunked(endpoint, [small[:9], small[9:]])[0] == 200
        status, body = chunked(endpoint, [b"x" * 1000] * 3)
        assert (status, json.loads(body)["error_type"]) == (413, "payload_too_large")
        with contextlib.suppress(ConnectionResetError):  # far too long to be read to its end
            assert chunked(endpoint, [b"x" * 1000] * 1000)[0] == 413
        assert endpoint.wait(lambda: endpoint.metric("requests_total", route="unmatched", status="413") == 2)
        for size in (2001, 30_000):
            reply = httpx2.post(f"{endpoint.url}/generate", json={"inputs": "x" * size})
            assert (reply.status_code, reply.json()["error_type"]) == (413, "payload_too_large")
        assert endpoint.worker.in_flight == 0
        assert len(endpoint.engine.seen) == 1


def test_long_prompts_are_refused_or_lose_their_beginning(live, listen):
    long = "x = 1\n" * 300
    reply = httpx2.post(f"{live.url}/generate", json={"inputs": long})
    assert (reply.status_code, reply.json()["detail"][0]["loc"]) == (422, "inputs")
    body = {"inputs": long, "truncate": 20, "details": True}
    details = httpx2.post(f"{live.url}/generate", json=body).json()["details"]
    assert details["input_length"] == 20
    assert details["truncated"] > 500
    with listen(on_long_input="truncate", max_input_tokens=100) as endpoint:
        body = {"inputs": long * 50, "details": True, "max_new_tokens": 5}
        details = httpx2.post(f"{endpoint.url}/generate", json=body).json()["details"]
        assert details["input_length"] == 100
        body = {"inputs": "x = 1\n" * 20, "max_new_tokens": -1, "details": True}
        assert httpx2.post(f"{endpoint.url}/generate", json=body).status_code == 200


def test_stops_are_cut_and_end_early(live):
    body = {"inputs": PROMPT, "max_new_tokens": 30, "prompt_format": "tokens", "details": True}

    def ask(**more):
        return httpx2.post(f"{live.url}/generate", json=body | more).json()

    whole = ask()["generated_text"]
    for stop in (whole[5:6], whole[4:9], whole[10:12]):
        for stops in (stop, ["never there", stop]):
            reply = ask(stop=stops)
            assert reply["generated_text"] == whole[: whole.index(stop)]
            assert reply["details"]["finish_reason"] == "stop_sequence"
            assert reply["details"]["generated_tokens"] <= 30
    assert ask(stop="never there")["generated_text"] == whole


def text_of(tokenizer, text, **order):
    """(text, whether stopped, tokens used) of a completion that would be `text`."""
    from greencode.worker import _Text

    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    made, count = _Text(tokenizer, Order([0], 99, Exit("none"), **order)), 0
    parts = []
    for one in ids:
        parts.append(made.add(one))
        count += 1
        if made.stopped:
            break
    return "".join([*parts, made.close()]), made.stopped, count < len(ids)


def test_one_line_ends_with_the_line(served):
    from greencode.prompts import read

    text = " <EOL> return a <EOL> x = b <EOL> y"
    writer = read("def f():", "python").writer
    assert text_of(served.tokenizer, text, writer=writer, single_line=True) == ("\n    return a", True, True)
    assert text_of(served.tokenizer, text, single_line=True) == (" <EOL> return a ", True, True)
    writer = read("", "java").writer
    assert text_of(served.tokenizer, " int x ; int y ; }", writer=writer, single_line=True)[:2] == (
        "int x;",
        True,
    )


def test_half_characters_are_held_back(served):
    text = " x = 'é→𝒳' ; ü"
    assert text_of(served.tokenizer, text)[0] == text
    from greencode.worker import _Text

    made = _Text(served.tokenizer, Order([0], 99, Exit("none")))
    ids = served.tokenizer.backend_tokenizer.encode("𝒳", add_special_tokens=False).ids
    assert [made.add(one) for one in ids] == [""] * (len(ids) - 1) + ["𝒳"]


def test_a_completion_where_there_is_nothing_to_complete_is_empty(live):
    seen = len(live.engine.seen)
    for path, name in (("/generate", "inputs"), ("/v1/completions", "prompt")):
        body = {name: 'def f():\n    """Return the ', "details": True}
        reply = httpx2.post(f"{live.url}{path}", json=body)
        assert reply.status_code == 200
        assert reply.headers["x-generated-tokens"] == "0"
        with httpx2.stream("POST", f"{live.url}{path}", json={**body, "stream": True}) as reply:
            events = [line for line in reply.iter_lines() if line and "DONE" not in line]
        assert len(events) == 1
    assert len(live.engine.seen) == seen


def test_an_empty_prompt_is_no_error_for_a_model_without_a_first_token(weights, listen, served):
    from tokenizers.processors import TemplateProcessing

    from greencode.tokenise import load_tokenizer

    tokenizer = load_tokenizer(weights)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A")
    with listen(load=lambda: dataclasses.replace(served, tokenizer=tokenizer)) as endpoint:
        reply = httpx2.post(f"{endpoint.url}/generate", json={"inputs": "# a comment", "details": True})
        assert (reply.status_code, reply.json()["generated_text"]) == (200, "")
        assert reply.json()["details"]["input_length"] == 0
        reply = httpx2.post(f"{endpoint.url}/generate", json={"inputs": "x = 1"})
        assert reply.headers["x-generated-tokens"] == "15"


def test_the_account_agrees_with_the_engine(live):
    body = {"inputs": PROMPT, "exit_threshold": 0.5, "details": True, "max_new_tokens": 12}
    before = live.metric("generated_tokens_total")
    reply = httpx2.post(f"{live.url}/generate", json=body)
    details, headers = reply.json()["details"], reply.headers
    early, timing, energy = details["early_exit"], details["timing"], details["energy"]
    assert early["exit_layers"] == [token["exit_layer"] for token in details["tokens"]]
    assert early["layers_executed"] == sum(early["exit_layers"])
    assert early["layers_skipped"] == 8 * 12 - sum(early["exit_layers"])
    assert early["mean_exit_layer"] == pytest.approx(sum(early["exit_layers"]) / 12)
    assert early["layer_positions"] >= early["layers_executed"]
    assert early["checks"] >= 12
    assert timing["total_s"] == pytest.approx(
        timing["queue_s"] + timing["prefill_s"] + timing["decode_s"], abs=1e-6
    )
    if energy["source"] is None:
        assert energy == {"joules": None, "joules_per_token": None, "source": None, "shared": False}
        assert "x-energy-joules" not in headers
    assert headers["x-layers-skipped"] == str(early["layers_skipped"])
    assert float(headers["x-total-time"]) == pytest.approx(1000 * timing["total_s"], abs=0.01)
    assert live.wait(lambda: live.metric("generated_tokens_total") == before + 12)


def test_an_estimate_of_energy_is_called_one(settings_of, listen):
    with listen(load=lambda: serve.load(settings_of(cpu_watts=10))) as endpoint:
        reply = httpx2.post(f"{endpoint.url}/generate", json={"inputs": PROMPT, "details": True})
        energy = reply.json()["details"]["energy"]
        assert energy["source"] in ("estimate", "rapl")
        assert energy["joules"] > 0
        assert energy["joules_per_token"] == pytest.approx(energy["joules"] / 15)
        assert endpoint.wait(lambda: endpoint.metric("energy_joules_total", source=energy["source"]) > 0)


def test_metrics_move_and_know_routes_only_by_their_template(live):
    httpx2.post(f"{live.url}/models/tiny", json={"inputs": PROMPT})
    httpx2.post(f"{live.url}/models/some/other", json={"inputs": PROMPT})
    httpx2.get(f"{live.url}/nowhere/at/all")
    assert live.wait(lambda: live.metric("time_per_output_token_seconds_count"))
    text = httpx2.get(f"{live.url}/metrics").text
    assert re.search(
        r'^greencode_requests_total\{route="/models/\{model_id:path\}",status="200"\} \d', text, re.M
    )
    assert 'route="unmatched",status="404"' in text
    assert "some/other" not in text
    assert "nowhere" not in text
    for name in (
        "request_duration_seconds", "queue_seconds", "time_to_first_token_seconds",
        "time_per_output_token_seconds", "in_flight", "queue_depth", "prompt_tokens_total",
        "generated_tokens_total", "exit_layer_total", "layers_executed_total", "layers_skipped_total",
    ):  # fmt: skip
        assert f"greencode_{name}" in text


def test_logs_hold_no_prompt_completion_or_token(listen, caplog):
    secret = "verysecretname"
    with caplog.at_level(logging.DEBUG), listen(api_key="topsecretkey") as endpoint:
        headers = {"authorization": "Bearer topsecretkey", "x-request-id": "my-id"}
        ask = httpx2.Client(base_url=endpoint.url, headers=headers)
        reply = ask.post("/generate", json={"inputs": f"{secret} = 1"})
        assert reply.headers["x-request-id"] == "my-id"
        ask.post("/generate", json={"inputs": f"{secret} = 1", secret: 1, "exit_threshold": 3})
        endpoint.engine.steps, endpoint.engine.fault = 1, RuntimeError(secret)
        assert ask.post("/generate", json={"inputs": f"{secret} = 1"}).status_code == 424
        endpoint.engine.fault = None
        service = endpoint.app.state.service
        service.prepare = None
        assert ask.post(f"/models/{secret}", json={"inputs": secret}).status_code == 404
        assert ask.post("/generate", json={"inputs": secret}).status_code == 500
        generated = reply.json()["generated_text"].strip()
    own = [
        record for record in caplog.records if not record.name.startswith(("httpx", "httpcore", "asyncio"))
    ]
    text = "\n".join(str(vars(record)) for record in own)
    assert "my-id" in text
    assert "RuntimeError" in text
    assert "mean_exit_layer" in text
    for hidden in (secret, "topsecretkey", generated):
        assert hidden not in text


def test_a_model_that_cannot_be_loaded_is_not_healthy(listen):
    def load():
        raise RuntimeError("no")

    with listen(ready=False, load=load) as endpoint:
        assert endpoint.wait(lambda: endpoint.worker.state == "failed")
        assert httpx2.get(f"{endpoint.url}/health").json()["error_type"] == "unhealthy"
        assert httpx2.get(f"{endpoint.url}/livez").status_code == 200


def test_the_port_is_open_while_the_model_loads(listen, served):
    go = threading.Event()

    def load():
        go.wait(10)
        return served

    with listen(ready=False, load=load) as endpoint:
        for ask in (lambda: httpx2.get(f"{endpoint.url}/health"), lambda: httpx2.get(f"{endpoint.url}/info")):
            assert (ask().status_code, ask().json()["error_type"]) == (503, "loading")
        assert httpx2.post(f"{endpoint.url}/generate", json={"inputs": "x"}).status_code == 503
        assert httpx2.get(f"{endpoint.url}/livez").status_code == 200
        go.set()
        assert endpoint.wait(lambda: httpx2.get(f"{endpoint.url}/health").status_code == 200)


def test_web_pages_are_answered_only_if_named(listen):
    with listen(cors_origins=["https://page.example"], api_key="k") as endpoint:
        for origin, allowed in (("https://page.example", True), ("https://other.example", False)):
            headers = {"origin": origin, "access-control-request-method": "POST"}
            reply = httpx2.options(f"{endpoint.url}/generate", headers=headers)
            assert ("access-control-allow-origin" in reply.headers) is allowed
        reply = httpx2.post(f"{endpoint.url}/generate", json={}, headers={"origin": "https://page.example"})
        assert reply.status_code == 401
        assert reply.headers["access-control-allow-origin"] == "https://page.example"


def started(weights, *flags, **environment):
    """The command line's server as a process, and its address."""
    policy = weights.parent / "agent/policy.safetensors"
    command = [
        sys.executable, "-m", "greencode.serve", "--weights", weights, "--policy", policy,
        "--language", "python", "--port", "0", "--threads", "1", *flags,
    ]  # fmt: skip
    process = subprocess.Popen(
        [*map(str, command)], stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )
    first = json.loads(process.stderr.readline())
    assert first["message"] == "listening", first
    return process, first["url"]


def test_sigterm_finishes_what_runs(weights):
    process, url = started(weights, GREENCODE_MAX_NEW_TOKENS_LIMIT="200")
    try:
        health = httpx2.get(f"{url}/health")
        assert (health.status_code, health.json()["error_type"]) == (503, "loading")
        end = time.monotonic() + 60
        while httpx2.get(f"{url}/health").status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.1)
        body = {"inputs": PROMPT, "max_new_tokens": 200, "exit_policy": "none"}
        with httpx2.stream("POST", f"{url}/generate_stream", json=body) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            events = [json.loads(line[6:]) for line in lines if line]
        assert events[-1]["details"]["generated_tokens"] == len(events) + 1
        assert events[-1]["details"]["finish_reason"] in ("length", "eos_token")
        log = process.stderr.read()
        assert process.wait(20) == 0
        assert all(isinstance(json.loads(line), dict) for line in log.splitlines())
        assert "Traceback" not in log
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{url}/livez")
    finally:
        process.kill()


def test_a_server_that_ends_takes_nothing_new(make_endpoint):
    from starlette.testclient import TestClient

    endpoint = make_endpoint()
    with TestClient(endpoint.app) as client:
        assert endpoint.wait(lambda: endpoint.worker.state == "ready")
        endpoint.app.state.service.draining = True
        for reply in (client.get("/health"), client.post("/generate", json={"inputs": "x"})):
            assert (reply.status_code, reply.json()["error_type"]) == (503, "shutting_down")
            assert reply.headers["retry-after"] == "1"
    assert endpoint.worker.state == "stopped"
    assert not endpoint.worker._thread.is_alive()


def test_the_application_is_imported_without_torch():
    names = "('torch' in sys.modules, 'fastapi' in sys.modules)"
    code = f"import sys; from greencode import api, serve; print(*{names})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_a_fault_in_the_accounts_ends_nothing(make_endpoint, monkeypatch):
    from starlette.testclient import TestClient

    endpoint = make_endpoint()
    monkeypatch.setattr(endpoint.telemetry, "finished", lambda *_: 1 / 0)
    with TestClient(endpoint.app) as client:
        assert endpoint.wait(lambda: endpoint.worker.state == "ready")
        for _ in range(2):
            assert client.post("/generate", json={"inputs": "x"}).status_code == 200


def test_accounts_are_not_kept_by_the_thread_of_the_model(make_endpoint, monkeypatch):
    from starlette.testclient import TestClient

    endpoint, threads = make_endpoint(), []
    monkeypatch.setattr(
        endpoint.telemetry, "finished", lambda *_: threads.append(threading.current_thread().name)
    )
    with TestClient(endpoint.app) as client:
        assert endpoint.wait(lambda: endpoint.worker.state == "ready")
        client.post("/generate", json={"inputs": "x"})
        assert endpoint.wait(lambda: threads)
    assert "model" not in threads


def test_text_is_the_same_whether_made_at_once_or_at_the_end(live):
    body = {"inputs": PROMPT, "max_new_tokens": 40, "details": True}
    ask = [httpx2.post(f"{live.url}/generate", json=body | more).json() for more in ({}, {"stop": "\0"})]
    for late, at_once in zip(*(reply["details"]["tokens"] for reply in ask), strict=True):
        assert late == at_once
    assert ask[0]["generated_text"] == ask[1]["generated_text"]


def test_a_worker_frees_every_slot_once():
    worker = Worker("m", lambda: None, capacity=2)
    worker.state, worker.served = "ready", object()

    async def ask():
        first, second = worker.admit(60), worker.admit(60)
        with pytest.raises(Exception, match="overloaded"):
            worker.admit(60)
        first.cancel("error")
        first.cancel("error")
        assert worker.in_flight == 1
        second.cancel("timeout")
        second.submit(Order([1], 1, Exit("none")))  # too late
        assert worker.in_flight == 0
        assert worker.queued == 0

    import asyncio

    asyncio.run(ask())
