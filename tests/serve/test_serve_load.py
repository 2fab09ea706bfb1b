"""Many clients at once, of all kinds: nobody gets another's threshold, no slot is lost."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import httpx2
import psutil
import pytest

SOURCES = [
    "x = 1",
    "def add(a, b):\n    return ",
    "for i in range(10):\n    print(i)\n" * 4,
    "class A:\n" * 12,
]
BAD = [
    "{",
    "[]",
    '{"inputs": ""}',
    '{"inputs": "x", "exit_threshold": 2}',
    '{"inputs": "x", "max_new_tokens": 1000}',
    '{"inputs": "x", "stop": 3}',
    '{"prompt": "x", "n": 2}',
]
JSON = {"content-type": "application/json"}


def one(client, number):
    """Ask in a way that the number decides; what the reply says of it, or a fault."""
    rng = random.Random(number)
    threshold, count = round(rng.random(), 6), rng.randrange(1, 16)
    parameters = {"exit_threshold": threshold, "max_new_tokens": count}
    body = {"inputs": rng.choice(SOURCES), "parameters": parameters | {"details": True}}
    kind = rng.choices(["plain", "openai", "stream", "cancel", "bad", "info"], [5, 2, 3, 3, 2, 1])[0]
    if kind == "bad":
        path = rng.choice(["/", "/generate", "/v1/completions"])
        reply = client.post(path, content=rng.choice(BAD), headers=JSON)
        assert reply.status_code in (400, 422, 429)
        assert isinstance(reply.json(), dict)
        return kind
    if kind == "info":
        assert client.get("/info").json()["model_id"] == "tiny"
        return kind
    if kind == "cancel":
        with client.stream("POST", "/generate_stream", json=body) as reply:
            if reply.status_code == 200:
                next(reply.iter_lines())
        return kind
    if kind == "stream":
        with client.stream("POST", "/generate_stream", json=body) as reply:
            lines = [line for line in reply.iter_lines() if line]
        if reply.status_code == 429:
            return "full"
        events = [json.loads(line.removeprefix("data: ")) for line in lines]
        early, tokens = events[-1]["details"]["early_exit"], len(events)
    elif kind == "openai":
        asked = {"prompt": body["inputs"], "max_tokens": count, "exit_threshold": threshold}
        reply = client.post("/v1/completions", json=asked)
        if reply.status_code == 429:
            return "full"
        early, tokens = reply.json()["greencode"]["early_exit"], reply.json()["usage"]["completion_tokens"]
    else:
        reply = client.post("/generate", json=body)
        if reply.status_code == 429:
            assert reply.headers["retry-after"] == "1"
            return "full"
        details = reply.json()["details"]
        early, tokens = details["early_exit"], details["generated_tokens"]
    assert reply.status_code == 200
    assert early["threshold"] == threshold
    assert len(early["exit_layers"]) == tokens <= count
    return kind


@pytest.mark.parametrize(("capacity", "requests"), [(64, 200), (4, 80)])
def test_two_hundred_requests_of_sixteen_clients(listen, capacity, requests):
    with listen(max_concurrent_requests=capacity) as endpoint:
        clients = [httpx2.Client(base_url=endpoint.url, timeout=60) for _ in range(16)]
        with ThreadPoolExecutor(16) as pool:
            kinds = list(pool.map(lambda number: one(clients[number % 16], number), range(requests)))
        for client in clients:
            client.close()
        assert endpoint.wait(lambda: endpoint.worker.in_flight == 0)
        assert endpoint.worker.queued == 0
        every = {"plain", "openai", "stream", "cancel", "bad", "info"}
        assert set(kinds) == every if capacity == 64 else "full" in kinds
        assert httpx2.post(f"{endpoint.url}/generate", json={"inputs": "x"}).status_code == 200


@pytest.mark.slow
def test_memory_stays_flat_over_two_thousand_requests(listen):
    process = psutil.Process()
    with listen(max_concurrent_requests=64) as endpoint, ThreadPoolExecutor(4) as pool:
        clients = [httpx2.Client(base_url=endpoint.url, timeout=60) for _ in range(4)]

        def ask(numbers):
            list(pool.map(lambda number: one(clients[number % 4], number), numbers))

        ask(range(300))
        before = process.memory_info().rss
        ask(range(300, 2300))
        grown = process.memory_info().rss / before - 1
        print(f"{before / 2**20:.0f} MiB, {grown:+.2%}")
        assert grown < 0.05
        for client in clients:
            client.close()
