"""The documents hold true: commands run, configurations are valid, links lead somewhere."""

import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from greencode.config import options_markdown

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "config/README.md"]
PAGES += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))


def blocks(text, language):
    """Contents of the fenced blocks of a language, without the indentation of a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


COMMANDS = [line.split(" #")[0].strip() for block in blocks(README, "sh") for line in block.splitlines()]
CONFIGS = {block.split("\n")[0].removeprefix("# "): block for block in blocks(README, "yaml")}


@pytest.fixture(scope="module")
def study(new_study):
    """The default study in a folder of its own, with what the README's examples name."""
    study = new_study("readme")
    (study.folder / "resources/models").symlink_to(ROOT / "resources/models")
    shutil.copy(ROOT / "Makefile", study.folder)
    (study.folder / "path/to/sources").mkdir(parents=True)
    for path, block in CONFIGS.items():
        (study.folder / path).write_text(block, encoding="utf-8")
    return study


@pytest.fixture(scope="module")
def jobs(study):
    """Number of jobs by rule of a `snakemake` command as a dry-run."""

    @functools.cache
    def count(command):
        words = command.split()[1:]
        if "--sdm" in words and not shutil.which("conda"):
            words = words[: words.index("--sdm")]
        done = study.snakemake(*words, "--dry-run", "--quiet", "rules")
        assert done.returncode == 0, done.stderr
        rows = re.findall(r"^(\w+) +(\d+)$", done.stdout, re.MULTILINE)
        return {rule: int(number) for rule, number in rows}

    return count


def test_the_readme_has_the_two_commands():
    assert COMMANDS[:2] == ["make figures", "make test"]


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_commands_of_the_readme(study, jobs, command):
    if command.startswith("make "):
        done = subprocess.run(
            ["make", "-n", *command.split()[1:]], cwd=study.folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    elif not command.startswith("curl "):  # these are tried on an endpoint: tests/serve/test_serve_editor.py
        assert command.startswith("snakemake "), "only make and snakemake, so that this test can try them"
        assert jobs(command)["total"]


def test_make_targets_in_prose_exist():
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = re.findall(r"`make ([a-z-]+)`", (ROOT / page).read_text(encoding="utf-8"))
        assert set(named) <= rules, page


def test_configurations_of_the_readme_are_used_by_its_commands():
    used = {word for command in COMMANDS for word in command.split() if word in CONFIGS}
    assert used == set(CONFIGS)


def test_the_second_agent_of_the_readme_stands_beside_the_first(jobs):
    count = jobs("snakemake --cores all figures --configfile config/mine.yaml")
    assert count["train_agent"] == (3 + 1) * 4  # three seeds of the first
    assert count["generate_agent"] == 2 * 6 * 4


def test_the_papers_study_is_that_of_the_paper(jobs):
    count = jobs("snakemake --cores all figures --configfile config/paper.yaml")
    assert count["fetch_base_model"] == count["prepare_corpus"] == 2
    assert count["train_agent"] == count["figure_pair"] == 4
    assert count["generate_agent"] == 4 * 5
    assert count["generate_fixed"] == 2 * 9 + 2 * 10  # Llama has 9 exits before the last layer, OPT 10


def test_the_medium_study_makes_its_model_first(study, jobs):
    """The folder of files that the config's own commands hold back is there; the model is not."""
    (study.folder / "results/held-back").mkdir(parents=True)
    for language in ("java", "python"):
        (study.folder / f"results/held-back/{language}.jsonl.xz").touch()
    count = jobs("snakemake --cores all figures --configfile config/medium.yaml")
    assert count["pretrain_model"] == count["validate_model"] == count["fetch_base_model"] == 1
    assert count["prepare_corpus"] == count["finetune_model"] == 2
    shutil.rmtree(study.folder / "results")


def test_without_base_models_to_make_pretrain_says_so(study):
    done = study.snakemake("pretrain", "--dry-run")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("pretrain: no base models to make; add --configfile")
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    parts = "config|docs|envs|greencode|profiles|resources|tests|workflow"
    for target in re.findall(rf"`((?:{parts})/[\w./-]+)`", text):
        assert (ROOT / target).exists() or target in CONFIGS, target


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"\{\{\w+\}\}", README)
    assert re.search(r"<!-- results -->\n.+<!-- /results -->", README, re.DOTALL)


def test_the_option_table_is_current():
    mark = "<!-- options -->\n"
    table = (ROOT / "config/README.md").read_text(encoding="utf-8").partition(mark)[2]
    assert table == options_markdown(), "write it anew: see CONTRIBUTING, To add"


def test_the_option_table_has_every_key():
    schema = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text(encoding="utf-8"))

    def keys(path, part):
        for name, inner in part.get("properties", {}).items():
            yield f"{path}{name}"
            yield from keys(f"{path}{name}.", inner)
        if isinstance(part.get("additionalProperties"), dict):
            yield from keys(f"{path}*.", part["additionalProperties"])

    table = set(re.findall(r"^\| `([^`]+)` \|", options_markdown(), re.MULTILINE))
    assert set(keys("", schema)) <= table


def test_the_table_is_written_anew_as_contributing_says(study):
    page = study.folder / "config/README.md"
    current = page.read_text(encoding="utf-8")
    page.write_text(current.partition("<!-- options -->\n")[0] + "<!-- options -->\nold\n", encoding="utf-8")
    (command,) = blocks((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), "sh")
    command = command.replace(".venv/bin/python", sys.executable)
    subprocess.run(["bash", "-c", command], cwd=study.folder, check=True)
    assert page.read_text(encoding="utf-8") == current


def test_the_example_of_the_engine_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (example,) = blocks((ROOT / "docs/engine.md").read_text(encoding="utf-8"), "python")
    exec(compile(example, "docs/engine.md", "exec"), {})
    assert capsys.readouterr().out.rstrip().endswith(str([8] * 15))


@pytest.mark.parametrize(
    "path",
    [
        "CITATION.cff",
        ".pre-commit-config.yaml",
        ".snakemake-workflow-catalog.yml",
        ".github/workflows/ci.yml",
    ],
)
def test_files_about_the_repository_are_yaml(path):
    assert yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_versions_agree():
    version = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
