"""The repository's own rules: style, environments, sizes, targets."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LOCK = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines()]
RULES = {
    name: body
    for path in sorted((ROOT / "workflow/rules").glob("*.smk"))
    for name, body in re.findall(r"^rule (\w+):\n(.*?)(?=^\S|\Z)", path.read_text(), re.MULTILINE | re.DOTALL)
}
# Rules that share a script; every other one has a script of its own name.
SHARED = {
    "generate_method": {f"generate_{which}" for which in ("base", "full", "fixed", "agent", "promise")},
    "draw_figure": {name for name in RULES if name.startswith("figure_")},
}


def run(*command, folder=ROOT):
    """A command's output and exit code."""
    return subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True)


def of_rule(name):
    """Environment and script of a rule."""
    environment, script = (
        re.search(r"envs/(\w+)\.yaml", RULES[name]),
        re.search(r"scripts/(\w+)\.py", RULES[name]),
    )
    assert environment, f"rule {name} has no conda"
    assert script, f"rule {name} has no script"
    return environment[1], script[1]


def test_python_is_in_style():
    for command in (["check"], ["format", "--check"]):
        done = run(BIN / "ruff", *command, ".")
        assert done.returncode == 0, done.stdout + done.stderr


def test_rules_are_in_style():
    done = run(BIN / "snakefmt", "--check", "Snakefile", "workflow")
    assert done.returncode == 0, done.stdout + done.stderr


def test_snakemake_has_nothing_to_complain_of(new_study):
    study = new_study("lint")
    (study.folder / "resources/models").symlink_to(ROOT / "resources/models")
    done = study.snakemake("--lint")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in a good condition" in done.stdout + done.stderr
    graph = study.snakemake("figures", "frontier", "--rulegraph").stdout
    drawn = set(re.findall(r'label = "(\w+)"', graph))
    others = {"train_tokenizer", "pack_corpus", "pretrain_model", "validate_ngrams", "validate_model"}
    others.add("record_along")  # no agent of the default study learns along another's text
    assert drawn == set(RULES) - others | {"figures", "frontier", "write_frontier_manifest"}


@pytest.mark.parametrize("name", RULES)
def test_every_rule_says_what_it_does_where_and_with_what(name):
    for directive in ("log", "conda", "message", "script", "params"):
        assert re.search(rf"^    {directive}:", RULES[name], re.MULTILINE), directive
    assert f'code=code("{of_rule(name)[1]}")' in RULES[name]


@pytest.mark.parametrize("name", RULES)
def test_scripts_have_the_names_of_their_rules(name):
    script = of_rule(name)[1]
    assert script == name or name in SHARED[script]
    assert (ROOT / f"workflow/scripts/{script}.py").is_file()


def test_measured_rules_run_alone_here_and_on_a_cluster():
    measured = {name for name, body in RULES.items() if "meter=1" in body}
    assert measured
    for said in ("    threads: measured_threads\n", '    group:\n        "measure_{model}_{dataset}"\n'):
        assert {name for name, body in RULES.items() if said in body} == measured
    assert not any("workflow.cores" in body for body in RULES.values()), "a cluster has no number of cores"
    profile = yaml.safe_load((ROOT / "profiles/slurm/profile.yaml").read_text())
    own = {name for name, resources in profile["set-resources"].items() if "exclusive" in str(resources)}
    assert own == measured


def test_no_script_is_left_over():
    assert {path.stem for path in (ROOT / "workflow/scripts").glob("*.py")} == {of_rule(n)[1] for n in RULES}


def test_figures_are_drawn_without_torch():
    code = "import sys; from greencode import figures, job, tables; print(sorted(sys.modules))"
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert "matplotlib" in done.stdout
    assert not re.search("torch|transformers", done.stdout)


def test_library_modules_are_imported_in_the_form_that_is_tracked():
    for path in (*(ROOT / "greencode").glob("*.py"), *(ROOT / "workflow/scripts").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("greencode") for alias in node.names), path
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, path


def test_the_lock_has_every_requirement_at_one_version():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert all(re.match(r"[a-z0-9-]+==[\w.]+( ; |$)", line) for line in lines)
    wanted = (line.partition("#")[0].strip() for line in (ROOT / "requirements.in").read_text().splitlines())
    locked = {one.name: one for one in LOCK if one.marker is None or one.marker.evaluate()}
    for requirement in map(Requirement, filter(None, wanted)):
        version = str(locked[canonicalize_name(requirement.name)].specifier).removeprefix("==")
        assert requirement.specifier.contains(version)


@pytest.mark.parametrize("target", re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
def test_make_knows_its_targets(target):
    done = run("make", "--dry-run", target)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert re.search(rf"^\.PHONY:.* {target}\b", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_files_are_small():
    kept = [path for path in ROOT.iterdir() if path.name not in (".git", ".venv", ".snakemake", "results")]
    files = [path for top in kept for path in ([top] if top.is_file() else top.rglob("*")) if path.is_file()]
    large = [path for path in files if path.stat().st_size > 12_000_000 and "downloads" not in path.parts]
    assert large == []


@pytest.mark.parametrize("path", sorted((ROOT / "resources/models").iterdir()), ids=lambda path: path.name)
def test_bundled_models_are_small_and_complete(path):
    files = list(path.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        file.name for file in files
    }
    assert sum(file.stat().st_size for file in files) <= 12_000_000


# What envs/setup.py finds, and what it says of it.
FAULTY = {
    "sys.version_info = (3, 10, 4)": "setup: Python 3.10 is too old; install Python 3.11 or newer",
    "shutil.disk_usage = lambda _: types.SimpleNamespace(free=2**30)": "setup: 1.0 GiB are free here and 4",
    "venv.create = lambda *_, **__: os.listdir('no such folder')": "setup: Python's venv cannot make ",
}


@pytest.mark.parametrize("fault", FAULTY)
def test_set_up_says_what_is_missing(new_study, fault):
    folder = new_study("setup").folder
    for name in ("requirements.in", "requirements.lock"):
        (folder / name).write_text((ROOT / name).read_text())
    run_set_up = "runpy.run_path('envs/setup.py', {}, '__main__')"
    script = f"import os, runpy, shutil, sys, types, venv\n{fault}\n{run_set_up}"
    done = run(sys.executable, "-c", script, folder=folder)
    assert done.returncode == 1
    said = done.stderr.removeprefix("setup: installing into .venv (minutes, once) ...\n")
    assert said.startswith(FAULTY[fault])
    assert said.count("\n") == 1
    assert not (folder / ".venv").exists()


def test_an_old_python_can_read_the_set_up():
    ast.parse((ROOT / "envs/setup.py").read_text(), feature_version=(3, 7))
