"""A tiny model behind the endpoint: in process, or under uvicorn on a free port of the loopback."""

import contextlib
import dataclasses
import itertools
import threading
import time

import httpx2
import numpy as np
import pytest
import uvicorn

from greencode import models, serve
from greencode.api import create_app
from greencode.files import sha256
from greencode.policies import ExitPolicy
from greencode.promises import Calibration, Promise
from greencode.results import Provenance
from greencode.telemetry import Telemetry
from greencode.worker import Worker

POINTS = (2, 4, 6, 8)
PROMISES = [
    ("saving", 0.2, 0.6), ("saving", 0.4, 0.45), ("agreement", 0.9, 0.7), ("agreement", 0.99, None),
]  # fmt: skip
WINDOW = 256
TEXTS = [
    "import os <EOL> def add ( a , b ) : <EOL> return a + b <EOL> class Point : <EOL> def f ( self ) :",
    "for i in range ( 10 ) : <EOL> print ( 'x' , i ) <EOL> if x is None : <EOL> raise ValueError ( '' )",
    "public class Point { private int x ; public int get ( ) { return this . x ; } }",
] * 3


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A model of eight layers with random weights and a tokenizer of its own; `agent/` holds an agent."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from greencode.tokenise import train_tokenizer

    folder = tmp_path_factory.mktemp("served") / "tiny"
    train_tokenizer(TEXTS, 400, WINDOW, folder)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=400, hidden_size=32, num_hidden_layers=8, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=48, max_position_embeddings=WINDOW,
            bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                torch.nn.init.normal_(weight, std=1 if "embed" in name else weight.shape[1] ** -0.5)
        # Its end of text is far below the best, so that also a sampled text has its length.
        model.lm_head.weight[1] = 0
    models.save(model, folder)
    rng = np.random.default_rng(0)
    layers = [
        (rng.normal(size=(out, into)) / into**0.5, rng.normal(size=out) / 4)
        for into, out in itertools.pairwise((32, 8, 2))
    ]
    policy = folder.parent / "agent/policy.safetensors"
    ExitPolicy(layers, POINTS, "final_norm", models.fingerprint(folder), {}).save(policy)
    promises = tuple(
        Promise(wanted, target, 0.9, threshold, 0.3, 0.95, 50, None if threshold else "too few files")
        for wanted, target, threshold in PROMISES
    )
    Calibration("agent", models.fingerprint(folder), sha256(policy), 1.0, promises).save(
        policy.with_name("calibration.json"), Provenance.now({})
    )
    return folder


@pytest.fixture(scope="session")
def settings_of(weights):
    """Settings for the tiny model; the rest by name."""

    def make(**more):
        policy = weights.parent / "agent/policy.safetensors"
        known = {
            "weights": weights,
            "policy": policy,
            "calibration": policy.with_name("calibration.json"),
            "language": "python",
            "served_name": "tiny",
            "threads": 1,
        }
        settings = serve.Settings(_cli_parse_args=[], **{**known, **more})
        serve._check(settings)
        return settings

    return make


@pytest.fixture(scope="session")
def served(settings_of):
    """The loaded model. Shared: wrap it, leave it alone."""
    return serve.load(settings_of())


class Throttled:
    """An engine that counts its steps, and waits or fails at each of them."""

    def __init__(self, engine):
        self._engine = engine
        self.pause, self.fault, self.steps, self.seen, self.modes = 0.0, None, 0, [], []

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def stream(self, context, new_tokens, policy=None, **more):
        self.seen.append((list(context), getattr(policy, "threshold", None)))
        self.modes.append(more["kv"])
        for token in self._engine.stream(context, new_tokens, policy, **more):
            if self.pause:
                time.sleep(self.pause)
            if self.fault and self.steps >= 1:
                raise self.fault
            self.steps += 1
            yield token


@dataclasses.dataclass
class Endpoint:
    """An application with its parts; `url` and `server` if it listens."""

    app: object
    worker: Worker
    engine: Throttled
    telemetry: Telemetry
    url: str = ""
    server: object = None

    def metric(self, name, **labels):
        """Value of a metric; 0 if it has none yet."""
        return self.telemetry.registry.get_sample_value(f"greencode_{name}", labels) or 0

    def wait(self, condition, seconds=5):
        """Whether the condition came true in that time."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        return True


@pytest.fixture(scope="session")
def make_endpoint(settings_of, served):
    """Applications by settings; the model is shared, its engine throttled on demand."""

    def make(load=None, agent=True, **settings):
        configured = settings_of(**settings)
        engine = Throttled(served.engine)
        copy = dataclasses.replace(served, engine=engine, agent=served.agent if agent else None)
        telemetry = Telemetry()
        worker = Worker(
            configured.names[0],
            load or (lambda: copy),
            configured.max_concurrent_requests,
            finished=lambda outcome, order: telemetry.finished(outcome, order, POINTS[-1]),
        )
        return Endpoint(create_app(configured, worker, telemetry), worker, engine, telemetry)

    return make


@pytest.fixture(scope="session")
def listen(make_endpoint):
    """`with listen(**settings) as endpoint`: under uvicorn, ready; `load` as for `make_endpoint`."""

    @contextlib.contextmanager
    def run(ready=True, **settings):
        endpoint = make_endpoint(**{"drain_timeout": 5, **settings})
        config = serve.http_config(endpoint.app.state.service.settings, endpoint.app)
        opened = serve.listen("127.0.0.1", 0)
        endpoint.url = f"http://127.0.0.1:{opened.getsockname()[1]}"
        endpoint.server = uvicorn.Server(config)
        thread = threading.Thread(target=endpoint.server.run, args=([opened],))
        thread.start()
        try:
            assert endpoint.wait(lambda: endpoint.server.started)
            if ready:
                assert endpoint.wait(lambda: httpx2.get(f"{endpoint.url}/health").status_code == 200)
            endpoint.engine.steps = 0
            endpoint.engine.seen.clear()
            yield endpoint
        finally:
            endpoint.server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()

    return run


@pytest.fixture(scope="session")
def live(listen):
    """One endpoint that listens, for clients that only ask."""
    with listen(max_concurrent_requests=64) as endpoint:
        yield endpoint


@pytest.fixture
def client(make_endpoint):
    """An HTTP client of a fresh application in this process."""
    from starlette.testclient import TestClient

    endpoint = make_endpoint()
    with TestClient(endpoint.app) as client:
        assert endpoint.wait(lambda: endpoint.worker.state == "ready")
        endpoint.engine.seen.clear()
        client.endpoint = endpoint
        yield client
