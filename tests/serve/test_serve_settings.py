"""Settings: flags, environment, a study's results, and what is said of a wrong one."""

import json
import logging
import shutil

import pytest
import yaml

from greencode import serve
from greencode.errors import UserError


@pytest.fixture
def flags(weights):
    """Flags for the tiny model and its agent."""
    return ["--weights", str(weights), "--policy", str(weights.parent / "agent/policy.safetensors")]


def test_flags_go_before_the_environment(flags, monkeypatch):
    monkeypatch.setenv("GREENCODE_PORT", "8123")
    monkeypatch.setenv("GREENCODE_EXIT_THRESHOLD", "0.4")
    monkeypatch.setenv("GREENCODE_API_KEY", "secret")
    settings = serve.read_settings([*flags, "--exit-threshold", "0.7"])
    assert (settings.port, settings.exit_threshold) == (8123, 0.7)
    assert settings.api_key.get_secret_value() == "secret"
    assert "secret" not in repr(settings)
    assert settings.host == "127.0.0.1"
    assert settings.exit_points == (2, 4, 6, 8)  # the agent's
    assert settings.prompt_format == "tokens"  # no language was named
    assert serve.read_settings([*flags, "--language", "java"]).prompt_format == "source"
    assert settings.default_policy(agent=True) == "rl"


def test_lists_are_written_with_commas_or_repeated(weights):
    settings = serve.read_settings(["--weights", str(weights), "--exit-points", "2,8"])
    assert settings.exit_points == (2, 8)
    assert settings.default_policy(agent=False) == "none"
    origins = ["--cors-origins", "https://a", "--cors-origins", "https://b"]
    assert serve.read_settings(["--weights", str(weights), *origins]).cors_origins == [
        "https://a",
        "https://b",
    ]


WRONG = {
    "nothing to serve": ([], "Say what to serve"),
    "an unknown flag": (["--colour", "red"], "unrecognized arguments: --colour red"),
    "no number": (["--port", "many"], "--port (or GREENCODE_PORT): Input should be a valid integer"),
    "beyond its range": (["--exit-threshold", "1.5"], "--exit-threshold (or GREENCODE_EXIT_THRESHOLD): "),
    "an unknown word": (["--on-long-input", "pad"], "--on-long-input"),
    "no folder": (["--weights", "nowhere"], "nowhere is not a model directory"),
    "no agent": (["FLAGS", "--policy", "nowhere"], "nowhere does not exist"),
    "rl without an agent": (["MODEL", "--exit-policy", "rl"], "--exit-policy rl needs an agent"),
    "a fixed default": (["MODEL", "--exit-policy", "fixed"], "--exit-policy fixed needs a depth"),
    "points beyond the model": (["MODEL", "--exit-points", "4,9"], "Exit 9 is outside"),
    "points of another agent": (["FLAGS", "--exit-points", "4,8"], "was trained for the exit points"),
    "source without language": (["MODEL", "--prompt-format", "source"], "needs --language java or python"),
    "more than the limit": (["MODEL", "--max-new-tokens", "999"], "is above --max-new-tokens-limit"),
    "more than the window": (
        ["MODEL", "--max-new-tokens", "300", "--max-new-tokens-limit", "300"], "leaves no room",
    ),
    "no target": (["FLAGS", "--exit-target", "0.4"], "--exit-target (or GREENCODE_EXIT_TARGET): write "),
    "a target that is not promised": (
        ["FLAGS", "--calibration", "PROMISES", "--exit-target", "saving=0.7"], "at most 0.4 is",
    ),
    "a target without promises": (["FLAGS", "--exit-target", "saving=0.4"], "is not calibrated"),
    "promises without an agent": (["MODEL", "--calibration", "PROMISES"], "need an agent"),
    "promises at another temperature": (
        ["FLAGS", "--calibration", "PROMISES", "--agent-temperature", "2"], "--agent-temperature 1, not 2",
    ),
    "no study": (["--study", "nowhere.yaml"], "nowhere.yaml cannot be read"),
    "study and weights": (["MODEL", "--study", "config/config.yaml"], "Give either --study"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_setting_is_one_sentence(weights, flags, fault, capsys):
    given, said = WRONG[fault]
    arguments = []
    for word in given:
        known = {"MODEL": ["--weights", str(weights)], "FLAGS": flags}
        known["PROMISES"] = [str(weights.parent / "agent/calibration.json")]
        arguments += known.get(word, [word])
    with pytest.raises(SystemExit) as ended:
        serve.main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 1
    assert error.startswith("serve: ")
    assert said in error
    assert error.count("\n") == 1


@pytest.fixture
def logs():
    """The logging as it was, after a server has set up its own."""
    root, access = logging.getLogger(), logging.getLogger("uvicorn.access")
    handlers, level, disabled = root.handlers, root.level, access.disabled
    yield
    root.handlers, access.disabled = handlers, disabled
    root.setLevel(level)


@pytest.mark.usefixtures("logs")
def test_a_port_that_is_taken_is_said_to_be(flags, capsys):
    with serve.listen("127.0.0.1", 0) as taken, pytest.raises(SystemExit):
        serve.main([*flags, "--port", str(taken.getsockname()[1])])
    error = capsys.readouterr().err
    assert "cannot be listened at (Address already in use); choose another --port" in error.splitlines()[-1]


@pytest.mark.usefixtures("logs")
def test_a_model_that_cannot_be_loaded_ends_the_server(weights, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(weights, broken)
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(SystemExit) as ended:
        serve.main(["--weights", str(broken), "--port", "0"])
    error = capsys.readouterr().err
    assert ended.value.code == 1
    assert error.splitlines()[-1].startswith("serve: No usable tokenizer in ")
    assert "Traceback" not in error


@pytest.fixture
def study(weights, tmp_path, monkeypatch):
    """The results of a study, and a folder to serve them from; the study's configuration by its changes."""
    monkeypatch.chdir(tmp_path)
    for model, dataset in (("tiny", "code"), ("tiny", "more")):
        shutil.copytree(weights, f"results/models/{model}/{dataset}")
        folder = tmp_path / f"results/agents/{model}/{dataset}/first"
        shutil.copytree(weights.parent / "agent", folder)
    manifest = tmp_path / "results/data/code/manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"literals": {"str": ["a"], "num": ["1"], "char": []}}))

    def write(**more):
        source = {"kind": "tree", "path": "src"}
        config = {
            "datasets": {
                "code": {"language": "python", "source": source},
                "more": {"language": "java", "source": source},
            },
            "models": {"tiny": {"path": "base", "layers": 8, "exit_points": [2, 4, 6, 8]}},
            "agents": {"first": {}},
            **more,
        }
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(config))
        return ["--study", "study.yaml"]

    return write


def test_a_study_is_served_as_it_was_measured(study):
    settings = serve.read_settings(study(generate={"threads": 2, "cpu_watts": 7.0, "temperature": 1.5}))
    assert settings.weights.as_posix() == "results/models/tiny/code"
    assert settings.policy.as_posix() == "results/agents/tiny/code/first/policy.safetensors"
    assert (settings.language, settings.variant, settings.prompt_format) == ("python", "raw", "source")
    assert (settings.threads, settings.cpu_watts, settings.agent_temperature) == (2, 7.0, 1.5)
    assert settings.names == ["tiny-code", "tiny", "tiny/code"]
    assert serve.read_settings([*study(), "--dataset", "more"]).language == "java"
    assert serve.read_settings([*study(), "--threads", "3"]).threads == 3


def test_what_a_studys_agent_promises_is_served(study, tmp_path, weights):
    assert serve.read_settings(study()).promises is None
    folder = tmp_path / "results/calibration/tiny/code"
    folder.mkdir(parents=True)
    shutil.copy(weights.parent / "agent/calibration.json", folder / "first.json")
    assert serve.read_settings(study()).promises.most("saving") == 0.4
    assert serve.read_settings([*study(), "--exit-target", "saving=0.3"]).threshold == 0.45
    # An agent that was trained again has promised nothing yet.
    with open(tmp_path / "results/agents/tiny/code/first/policy.safetensors", "ab") as policy:
        policy.write(b" ")
    with pytest.raises(UserError):
        serve.read_settings(study())


def test_a_study_of_normalised_literals_is_served_with_them(study):
    settings = serve.read_settings(study(data={"variant": "norm"}))
    assert settings.variant == "norm"
    assert settings.allow == {"str": ["a"], "num": ["1"], "char": []}


@pytest.mark.parametrize("kind", ["model", "dataset", "agent"])
def test_a_name_that_the_study_does_not_have_is_said_so(study, kind):
    with pytest.raises(UserError, match=f"--{kind} other is not in the study; it has "):
        serve.read_settings([*study(), f"--{kind}", "other"])


def test_a_study_that_has_not_run_is_said_so(study, tmp_path):
    shutil.rmtree(tmp_path / "results/agents")
    with pytest.raises(UserError, match=r"policy.safetensors does not exist; run the study first"):
        serve.read_settings(study())


@pytest.mark.parametrize("text", ["[]", "a: [", "datasets: 3"])
def test_what_is_no_study_is_refused(tmp_path, text):
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(UserError):
        serve.read_settings(["--study", str(tmp_path / "study.yaml")])


def test_the_help_lists_every_setting_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as ended:
        serve.main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    for name in serve.Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in shown
