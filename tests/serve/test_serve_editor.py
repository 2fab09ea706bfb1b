"""llm-ls, which completes for llm-vscode and llm.nvim: its bodies, and its rules for replies.

It never looks at the status: a reply that fits none of its shapes is an error popup. Every kind of reply
goes through these rules here, and so do the settings of docs/editor.md.
"""

import copy
import json
import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from starlette.testclient import TestClient

from greencode import serve

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/editor.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEFAULTS = {"parameters": {"max_new_tokens": 60, "temperature": 0.2, "top_p": 0.95}}
PROMPT = "def add(a, b):\n    return "


def merged(defaults, own):
    """Settings over defaults, as both editors merge them."""
    if isinstance(defaults, dict) and isinstance(own, dict):
        return {
            key: merged(defaults.get(key), own.get(key, defaults.get(key))) for key in {**defaults, **own}
        }
    return copy.deepcopy(own)


def url_of(backend, base, model):
    """Where llm-ls posts."""
    if backend == "huggingface":
        return f"{base}/models/{model}"
    suffix = {"tgi": "/generate", "openai": "/v1/completions", "ollama": "/api/generate"}[backend]
    if base.endswith(suffix):
        return base
    for known in ("/v1", "/api"):
        if suffix.startswith(f"{known}/") and base.endswith((known, f"{known}/")):
            return base.removesuffix("/").removesuffix(known) + suffix
    return base.removesuffix("/") + suffix


def body_of(backend, prompt, request_body, model="m"):
    """What llm-ls posts."""
    body = copy.deepcopy(request_body)
    if backend in ("huggingface", "tgi"):
        if isinstance(body.get("parameters"), dict):
            body["parameters"]["return_full_text"] = False
        else:
            body["parameters"] = {"parameters": {"return_full_text": False}}
        return body | {"inputs": prompt}
    return body | {"prompt": prompt, "model": model, "stream": False}


def parsed(backend, reply):
    """("text" or "error", the text) that llm-ls reads; None where it would complain of the shape."""
    try:
        value = json.loads(reply)
    except ValueError:
        return None
    one = value[0] if backend == "huggingface" and isinstance(value, list) and value else value
    if not isinstance(one, dict):
        return None
    if backend == "openai":
        choices = one.get("choices")
        if isinstance(choices, list) and all(isinstance(choice.get("text"), str) for choice in choices):
            return "text", choices[0]["text"]
        details = one.get("detail")
        if isinstance(details, list) and all(_is_detail(detail) for detail in details):
            return "error", "; ".join(detail["msg"] for detail in details)
        return None
    name = "response" if backend == "ollama" else "generated_text"
    if isinstance(one.get(name), str):
        return "text", one[name]
    return ("error", one["error"]) if isinstance(one.get("error"), str) else None


def _is_detail(detail):
    return (
        isinstance(detail, dict)
        and isinstance(detail.get("loc"), str | int)
        and isinstance(detail.get("msg"), str)
        and isinstance(detail.get("type"), str)
    )


ROUTES = {
    "huggingface": "/models/tiny",
    "tgi": "/generate",
    "ollama": "/api/generate",
    "openai": "/v1/completions",
}


@pytest.mark.parametrize("backend", ROUTES)
@pytest.mark.parametrize(
    "own",
    [
        {},
        {"parameters": {"exit_threshold": 0.5, "num_predict": 4}},
        {"options": {"RL_agent_thresh": 0.5, "num_predict": 4}},
        {"exit_threshold": 0.5, "max_tokens": 4},
    ],
)
@pytest.mark.parametrize("defaults", [DEFAULTS, {}])
def test_every_backend_gets_a_completion(client, backend, own, defaults):
    body = body_of(backend, PROMPT, merged(defaults, own))
    reply = client.post(url_of(backend, "", "tiny"), json=body)
    assert parsed(backend, reply.text)[0] == "text"
    assert int(reply.headers["x-generated-tokens"]) == (4 if own else 60 if defaults else 15)
    assert client.endpoint.engine.seen[-1][1] == (0.5 if own else 0.9)


@pytest.mark.parametrize(
    ("backend", "base"),
    [
        ("huggingface", ""), ("huggingface", "/"), ("tgi", ""), ("tgi", "/"), ("tgi", "/generate"),
        ("openai", "/v1"), ("openai", "/v1/"), ("openai", "/v1/completions"), ("openai", ""),
        ("ollama", "/api"), ("ollama", "/api/"), ("ollama", "/api/generate"), ("ollama", ""),
    ],
)  # fmt: skip
def test_every_address_that_llm_ls_makes_is_served(client, backend, base):
    path = url_of(backend, base, "tiny") if backend != "huggingface" else f"{base}/models/tiny"
    reply = client.post(f"http://testserver{path}", json=body_of(backend, PROMPT, DEFAULTS))
    assert parsed(backend, reply.text)[0] == "text"


def test_the_settings_of_the_papers_authors_are_served(client):
    body = {
        "inputs": PROMPT, "options": {"RL_agent_thresh": 0.9, "num_predict": 10},
        "parameters": {"max_new_tokens": 60, "return_full_text": False, "temperature": 0.2, "top_p": 0.95},
    }  # fmt: skip
    for path in ("/api/generate/models/", "/api/generate/", "/models/"):
        reply = client.post(path, json=body)
        assert parsed("huggingface", reply.text)[0] == "text", path
        assert reply.headers["x-generated-tokens"] == "10"


def errors(client):
    """(status, reply) of every kind of error, by path."""
    endpoint, engine = client.endpoint, client.endpoint.engine
    worker, service = endpoint.worker, endpoint.app.state.service
    for path in ROUTES.values():
        name = "prompt" if path.startswith("/v1") else "inputs"
        good = {name: PROMPT}

        def post(path=path, good=good, **more):
            return client.post(path, **({"json": good} | more))

        text = {"headers": {"content-type": "application/json"}, "json": None}
        yield 400, path, post(content="{", **text)
        yield 404, path, post(path=path.rstrip("/") + "/no/such/thing")
        yield 405, path, client.delete(path)
        yield 413, path, post(json={name: "x" * 1_100_000})
        yield 415, path, post(content="x", headers={"content-type": "text/plain"}, json=None)
        yield 422, path, post(json={name: ""})
        yield 422, path, post(json={name: 3, "exit_threshold": 7, "n": 2})
        engine.fault, engine.steps = RuntimeError(PROMPT), 1
        yield 424, path, post()
        engine.fault = None
        worker.capacity = 0
        yield 429, path, post()
        worker.capacity = 8
        prepare, service.prepare = service.prepare, None  # a fault of our own
        yield 500, path, post()
        service.prepare = prepare
        for state in ("loading", "failed", "stopped"):
            worker.state, before = state, worker.state
            yield 503, path, post()
            worker.state = before
        service.draining = True
        yield 503, path, post()
        service.draining = False
        service.settings.request_timeout, engine.pause = 0.02, 0.05
        yield 504, path, post()
        service.settings.request_timeout, engine.pause = 60, 0
        assert endpoint.wait(lambda: worker.in_flight == 0)
        assert post().status_code == 200


def test_every_error_can_be_read_by_every_backend_of_its_route(client):
    seen = set()
    for status, path, reply in errors(client):
        assert reply.status_code == status, (path, reply.text)
        body = reply.json()
        assert body["request_id"] == reply.headers["x-request-id"]
        assert PROMPT not in reply.text
        for backend, route in ROUTES.items():
            if route == path:
                kind, text = parsed(backend, reply.text)
                assert kind == "error"
                assert text
        if path != "/v1/completions":
            assert all(parsed(backend, reply.text)[0] == "error" for backend in ROUTES)
        if status in (429, 503):
            assert ("retry-after" in reply.headers) is (body["error_type"] != "unhealthy")
        seen.add((status, path))
    assert len(seen) == 11 * len(ROUTES)


@pytest.mark.parametrize("backend", ROUTES)
@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "k", "Basic k"])
def test_a_missing_key_is_said_so_that_every_backend_reads_it(make_endpoint, backend, header):
    with TestClient(make_endpoint(api_key="k").app) as client:
        headers = {"authorization": header} if header else {}
        reply = client.post(ROUTES[backend], json=body_of(backend, PROMPT, DEFAULTS), headers=headers)
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert parsed(backend, reply.text)[0] == "error"


def test_a_loading_model_is_said_to_be_loading(client):
    client.endpoint.worker.state = "loading"
    reply = client.post("/generate", json={"inputs": "x"})
    client.endpoint.worker.state = "ready"
    assert "is currently loading" in reply.json()["error"]  # the words the extension looks for


def fenced(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def vscode():
    (block,) = fenced("jsonc")
    settings = json.loads(re.sub(r"\s//.*", "", block))
    return {
        "backend": settings["llm.backend"], "url": settings["llm.url"], "model": settings["llm.modelId"],
        "fim": settings["llm.fillInTheMiddle.enabled"], "body": settings["llm.requestBody"],
    }  # fmt: skip


def neovim():
    (block,) = fenced("lua")
    table = re.fullmatch(r'require\("llm"\)\.setup\((.*)\)\n', block, re.DOTALL)[1]
    table = re.sub(r",(\s*\})", r"\1", re.sub(r"(\w+) =", r'"\1":', table))
    settings = json.loads(table.replace('"tokens_to_clear": {}', '"tokens_to_clear": []'))
    return {
        "backend": settings["backend"], "url": settings["url"], "model": settings["model"],
        "fim": settings["fim"]["enabled"], "body": settings["request_body"],
    }  # fmt: skip


@pytest.mark.parametrize("editor", [vscode, neovim])
def test_the_settings_of_the_page_complete(client, editor):
    settings = editor()
    assert settings["fim"] is False
    url = urlsplit(url_of(settings["backend"], settings["url"], settings["model"]))
    assert url.netloc == "127.0.0.1:8000"
    body = body_of(settings["backend"], PROMPT, merged(DEFAULTS, settings["body"]))
    assert body["parameters"]["temperature"] == 0.2  # merged in by the editor
    replies = [client.post(url.path, json=body) for _ in range(2)]
    assert [parsed(settings["backend"], reply.text)[0] for reply in replies] == ["text"] * 2
    assert replies[0].json() == replies[1].json()  # greedy all the same
    assert replies[0].headers["x-generated-tokens"] == "15"
    assert replies[0].headers["x-exit-threshold"] == "0.9"


CURL = [
    line
    for page in (PAGE, README)
    for block in re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line.startswith("curl ")
]


@pytest.mark.parametrize("command", CURL)
def test_the_curl_commands_of_the_pages_are_answered(client, command):
    words, headers, data, url = shlex.split(command.partition(" #")[0])[1:], {}, None, None
    while words:
        word = words.pop(0)
        if word == "-H":
            name, _, value = words.pop(0).partition(": ")
            headers[name] = value
        elif word == "-d":
            data = words.pop(0)
        elif not word.startswith("-"):
            url = urlsplit(word)
    assert url.netloc == "127.0.0.1:8000"
    reply = client.request("POST" if data else "GET", url.path, content=data, headers=headers)
    assert reply.status_code == 200, reply.text
    if data:
        assert "x-ignored-parameters" not in reply.headers


def test_the_pages_have_curl_commands():
    assert len(CURL) >= 8


def test_the_python_example_of_the_page_runs(live, capsys):
    (example,) = fenced("python")
    exec(compile(example.replace("http://127.0.0.1:8000", live.url), "docs/editor.md", "exec"), {})
    assert "'policy': 'rl'" in capsys.readouterr().out


def test_the_flags_of_the_page_exist():
    flags = {"--help"} | {f"--{name.replace('_', '-')}" for name in serve.Settings.model_fields}
    assert set(re.findall(r"--[a-z][a-z-]+", PAGE)) <= flags
