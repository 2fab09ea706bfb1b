"""Environments: pinned as the lock, complete for their scripts, and the image that uses the set-up."""

import ast
import fnmatch
import json
import re
import subprocess
import sys
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rattler import MatchSpec
from test_repository import LOCK, ROOT, RULES, of_rule

ENVIRONMENTS = sorted(path.stem for path in (ROOT / "envs").glob("*.yaml"))
MODELS = {"finetune", "trajectories", "generate", "pretrain"}
# Imported within functions that only rules of these environments call.
WITHIN = {
    ("corpus", "datasets"): {"data"},  # sources of kind hub
    ("hub", "huggingface_hub"): {"data", "models"},  # downloads
    ("models", "torch"): MODELS,  # models.load
    ("models", "transformers"): MODELS,
    ("results", "torch"): MODELS,  # the name of the GPU in the provenance
}
INSTALLED = metadata.packages_distributions()


def specifications(environment):
    """conda's specs and pip's requirements of an environment."""
    parts = yaml.safe_load((ROOT / f"envs/{environment}.yaml").read_text())["dependencies"]
    pip = [one for part in parts if isinstance(part, dict) for one in part["pip"]]
    return [part for part in parts if isinstance(part, str)], pip


def packages(environment):
    """Names and versions that an environment pins; conda's name for Python's matplotlib is another."""
    conda, pip = specifications(environment)
    pairs = (re.fullmatch(r"([\w-]+?)(?:-base)?==?([\w.]+)", pin) for pin in [*conda, *pip] if pin != "pip")
    return dict(pair.groups() for pair in pairs)


def closure(names):
    """Packages with all that they depend on."""
    found, todo = set(), list(names)
    while todo:
        name = canonicalize_name(todo.pop())
        if name in found or name == "python":
            continue
        found.add(name)
        needed = map(Requirement, metadata.requires(name) or [])
        todo += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def imports(script):
    """(module, top-level name) of everything imported by a script and the greencode modules under it."""
    todo, seen, found = [ROOT / f"workflow/scripts/{script}.py"], set(), set()
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        tree = ast.parse(path.read_text())
        typing = [
            n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)
        ]
        skipped = {inner for node in typing for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if node in skipped or not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [f"greencode.{n}" for n in names] if node.module == "greencode" else [node.module]
            for top, _, below in (name.partition(".") for name in names):
                if top == "greencode":
                    todo.append(ROOT / f"greencode/{below}.py")
                elif top not in sys.stdlib_module_names:
                    found.add((path.stem, top))
    return found


def scripts(environment):
    """Scripts of the rules that name an environment."""
    return sorted({script for named, script in map(of_rule, RULES) if named == environment})


def needed(environment, script):
    """Top-level names that a script imports in an environment."""
    return {
        imported
        for module, imported in imports(script)
        if environment in WITHIN.get((module, imported), {environment})
    }


def test_every_stage_has_its_environment():
    stages = {path.stem for path in (ROOT / "workflow/rules").glob("*.smk")} - {"common"}
    assert set(ENVIRONMENTS) == stages
    for name in RULES:
        assert f"rule {name}:" in (ROOT / f"workflow/rules/{of_rule(name)[0]}.smk").read_text()


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_conda_and_pip_can_read_the_environment(environment):
    conda, pip = specifications(environment)
    assert conda[0] == "python=3.11", "one Python in all, or Snakemake's pickles would not do"
    for one in conda:
        assert MatchSpec(one).name
    assert ("pip" in conda) == bool(pip)
    assert all(str(Requirement(one).specifier).startswith("==") for one in pip)


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_environments_pin_what_the_lock_has_for_their_python(environment):
    pins = packages(environment)
    python = pins.pop("python")
    where = {"python_version": python, "python_full_version": f"{python}.0"}
    lock = {one.name: str(one.specifier) for one in LOCK if one.marker is None or one.marker.evaluate(where)}
    assert {name: f"=={version}" for name, version in pins.items()}.items() <= lock.items()


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_an_environment_has_all_that_its_scripts_import(environment):
    there = closure(packages(environment))
    for script in scripts(environment):
        for imported in needed(environment, script):
            assert there & {canonicalize_name(package) for package in INSTALLED[imported]}, (script, imported)


def test_figures_need_no_torch():
    assert "torch" not in closure(packages("report"))


# Imports in the environment's own Python and gives where each came from.
PROBE = """
import importlib, json, runpy, sys
root, scripts, names = json.loads(sys.argv[1])
sys.path.append(root)
for script in scripts:
    runpy.run_path(script, run_name="script")
print(json.dumps([sys.prefix, {name: importlib.import_module(name).__file__ for name in names}]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_an_environment_installs_and_imports_by_itself(environment, tmp_path):
    """With pip for conda, at the same versions. Isolated, so that nothing comes from elsewhere."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the environments are for Python 3.11")
    pins = packages(environment)
    del pins["python"]
    folder, python = tmp_path / "venv", tmp_path / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    wanted = [f"{name}=={version}" for name, version in pins.items()]
    command = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "requirements.lock", *wanted]
    subprocess.run(command, check=True)
    names = sorted(set().union(*(needed(environment, script) for script in scripts(environment))))
    paths = [str(ROOT / f"workflow/scripts/{script}.py") for script in scripts(environment)]
    call = [python, "-I", "-c", PROBE, json.dumps([str(ROOT), paths, names])]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    prefix, found = json.loads(done.stdout.splitlines()[-1])
    assert prefix == str(folder)
    assert all(path.startswith(f"{folder}/") for path in found.values()), found
    assert (environment == "report") <= (not (folder / "lib/python3.11/site-packages/torch").exists())


DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
INSTRUCTIONS = [tuple(line.split(None, 1)) for line in DOCKERFILE.splitlines() if re.match("[A-Z]+ ", line)]


def left_out(path):
    """Whether .dockerignore keeps a path out of the image."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line.removeprefix("**/") for line in lines if line and not line.startswith("#")]
    parts = path.split("/")
    tops = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    return any(fnmatch.fnmatch(one, pattern) for one in [*tops, *parts[1:]] for pattern in patterns)


def test_the_image_copies_what_there_is():
    sources = [
        source
        for name, arguments in INSTRUCTIONS
        if name == "COPY"
        for source in arguments.split()[:-1]
        if not source.startswith("--")
    ]
    assert {"requirements.in", "requirements.lock", "Makefile", "envs", "."} == set(sources)
    assert all((ROOT / source).exists() and not left_out(source) for source in sources if source != ".")
    # What a run reads, and what it writes.
    tracked = ["Snakefile", "greencode/job.py", "config/config.yaml", "profiles/default/profile.yaml",
               "workflow/rules/data.smk", "resources/models/opt-code/model.safetensors",
               "resources/published_values.csv"]  # fmt: skip
    assert all((ROOT / path).exists() and not left_out(path) for path in tracked)
    for path in (
        "results/figures/a.png",
        "logs/a.log",
        ".git/HEAD",
        "greencode/__pycache__/a.pyc",
        ".venv/bin",
    ):
        assert left_out(path)


def test_the_image_is_set_up_as_the_readme_says_and_is_no_root():
    names = [name for name, _ in INSTRUCTIONS]
    of = {name: [arguments for one, arguments in INSTRUCTIONS if one == name] for name in names}
    assert of["FROM"] == ["python:3.11-slim-bookworm"]
    assert of["RUN"][-1] == "make setup"
    assert json.loads(of["CMD"][0]) == ["make", "figures"]
    assert {"figures", "setup"} <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert of["USER"] == ["study"]
    assert INSTRUCTIONS.index(("USER", "study")) < INSTRUCTIONS.index(("RUN", "make setup"))
    assert "TORCH=cpu" in of["ARG"]
    assert any("UV_TORCH_BACKEND=$TORCH" in line for line in of["ENV"])
