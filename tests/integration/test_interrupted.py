"""Runs that are killed, refused or out of space: the same command completes them, to the same results."""

import copy
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from small_study import CONFIG, Named, prepare, run_script, source_files, started

from greencode import config
from greencode.files import read_json, write_text
from greencode.lexing import EOL, encode_tokens, plain_tokens
from greencode.results import Generation

UNTIMED_FIGURES = ("fig03", "fig04", "fig06", "fig07")
TIMED = {"seconds", "steps_per_second", "tokens_per_second", "joules", "energy_note", "resumed", "provenance"}

TIMED_FILES = ("README.md", "training.json")


def comparable(folder):
    """The results of a study by file, without what another run takes another time for."""
    results, found = folder / "results", {}
    for path in sorted(path for path in results.rglob("*") if path.is_file()):
        name, stage = path.relative_to(results).as_posix(), path.relative_to(results).parts[0]
        if stage == "evaluation":
            record = read_json(path)
            found[name] = record["quality"], record["depth_counts"]
        elif stage == "generations":
            found[name] = [(one.id, one.tokens, one.depths) for one in Generation.read(path).completions]
        elif path.name == "info.json":  # with the hashes of the card and the record below
            record = read_json(path)
            files = {one: sha for one, sha in record["files"].items() if one not in TIMED_FILES}
            found[name] = record | {"files": files}
        elif path.name in ("learning.json", "training.json") or stage == "calibration":
            found[name] = {key: value for key, value in read_json(path).items() if key not in TIMED}
        elif stage == "figures":
            if path.suffix == ".csv" and name.startswith(tuple(f"figures/{one}" for one in UNTIMED_FIGURES)):
                found[name] = path.read_bytes()
        elif stage not in ("tables", "overhead", "manifest.json") and path.name != "README.md":
            found[name] = path.read_bytes()
    return found


# --- Jobs killed at their first checkpoint -------------------------------------------------------------


@pytest.fixture(scope="module")
def jobs():
    """Makes processes that run a script and have imported what takes long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["greencode.finetune", "greencode.environment", "greencode.energy"])
    return lambda name, stub: context.Process(target=run_script, args=(name, stub))


def killed_and_completed(jobs, script, folder, checkpoint, inputs, outputs, **params):
    """Kill a script as soon as its checkpoint is there and run it again; the second run's log."""
    (folder / "out").mkdir()
    stub = SimpleNamespace(
        input=Named(**inputs),
        output=Named(**{name: str(folder / "out" / file) for name, file in outputs.items()}),
        params=SimpleNamespace(code="of this commit", **params),
        wildcards=SimpleNamespace(model="tiny", dataset="code", agent="agent"),
        threads=1,
        resources={},
        rule=script,
        log=[str(folder / "rule.log")],
    )
    first, second = jobs(script, stub), jobs(script, stub)
    first.start()
    while not any(folder.glob(f"out/checkpoints/*/{checkpoint}")):
        assert first.is_alive(), Path(stub.log[0]).read_text()
        time.sleep(0.002)
    first.kill()
    first.join()
    assert first.exitcode == -signal.SIGKILL
    assert not any(Path(path).exists() for path in stub.output)
    second.start()
    second.join()
    log = Path(stub.log[0]).read_text()
    assert second.exitcode == 0, log
    assert not any(folder.glob("out/checkpoints*"))
    return log


def test_a_killed_fine_tuning_goes_on_to_the_same_model(study, jobs, tmp_path):
    results, settings = study.folder / "results", config.finetune_of(config.complete(CONFIG), "code")
    log = killed_and_completed(
        jobs,
        "finetune_model",
        tmp_path,
        "checkpoint-2/trainer_state.json",
        {
            "base": str(results / "models/tiny/base/info.json"),
            "train": str(results / "data/code/train.jsonl.gz"),
            "validation": str(results / "data/code/validation.jsonl.gz"),
        },
        {"weights": "model.safetensors", "curve": "loss_curve.json"},
        finetune={"seed": 1, "device": "cpu", "exit_points": [4, 8], **settings},
    )
    assert "Going on from checkpoint-" in log
    for file in (results / "models/tiny/code").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_killed_training_of_the_agent_goes_on_to_the_same_policy(study, jobs, tmp_path):
    results, block = (
        study.folder / "results",
        config.agent_of(config.complete(CONFIG), "agent", "tiny", "code"),
    )
    log = killed_and_completed(
        jobs,
        "train_agent",
        tmp_path,
        "checkpoint.pt",
        {
            split: str(results / f"trajectories/tiny/code/{split}.safetensors")
            for split in ("train", "validation")
        },
        {"policy": "policy.safetensors", "curve": "learning.json"},
        agent={"seed": 1, **block},
    )
    assert 0 < int(log.partition(" steps in ")[0].split()[-1]) < CONFIG["agents"]["agent"]["steps"]
    out, whole = tmp_path / "out", results / "agents/tiny/code/agent"
    assert (out / "policy.safetensors").read_bytes() == (whole / "policy.safetensors").read_bytes()
    learning = [read_json(folder / "learning.json") for folder in (out, whole)]
    assert learning[0].keys() == learning[1].keys()
    assert all(learning[0][key] == learning[1][key] for key in learning[0].keys() - TIMED)


# --- A whole study killed at random --------------------------------------------------------------------

RULES = {
    "data": "prepare_corpus",  # first: it is done beside the other's first steps
    "pretrain": "pretrain_model",
    "finetune": "finetune_model",
    "trajectories": "record_trajectories",
    "agent": "train_agent",
    "generate": "generate_*",
    "figures": "figure_*",
}
PRETRAIN = {
    "corpus": "corpus", "vocabulary": 400, "tokenizer_files": 60, "tokens": 40_000, "context": 1024,
    "batch_tokens": 1024, "log_every": 2, "save_every": 2, "validation_files": 5, "bf16": False,
    "compile": False, "stages": [{"share": 2, "layers": 4, "sequence": 128}, {"share": 1}],
    "models": {"tiny": {"family": "llama", "layers": 8, "hidden": 32, "heads": 4, "feed_forward": 64}},
}  # fmt: skip


def prepare_with_pretraining(study):
    """The small study with a base model that it trains itself."""
    prepare(study)
    shutil.rmtree(study.folder / "model")
    for language in ("java", "python"):
        codes = [encode_tokens(plain_tokens(text, "python"), "python", "raw") for text in source_files()]
        if language == "java":  # which has no line ends
            codes = [[token for token in code if token != EOL] for code in codes]
        for split, part in (("train", codes[:50]), ("validation", codes[50:])):
            rows = [json.dumps({"id": i, "path": str(i), "code": code}) + "\n" for i, code in enumerate(part)]
            write_text(study.folder / f"corpus/{language}/{split}.jsonl.xz", "".join(rows))
    changed = copy.deepcopy(CONFIG) | {"pretrain": PRETRAIN}
    changed["models"]["tiny"]["path"] = "results/pretrain/tiny"
    study.configure(changed)
    return study


def kill(run, victim):
    """Kill a run with all its jobs, only its driver, or only its jobs' scripts; wait until all have ended."""
    family = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
    # Fetching is tried again by the run itself.
    scripts = [
        one for one in family if re.search(r"\.snakemake/scripts/\w+\.(?!fetch)", " ".join(one.cmdline()))
    ]
    if victim == "job" and scripts:
        for script in scripts:
            script.kill()
    elif victim == "driver":
        run.kill()
    else:
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    psutil.wait_procs(family)


def killed_in(study, stage, seconds, draw):
    """Start the study and kill it at a random moment of a stage that takes so long."""
    victim, delay = draw.choice(["run", "driver", "job"]), draw.uniform(0, seconds)
    print(f"{stage}: {victim} killed {delay:.2f} s after a job began")
    began = time.time()
    with started(study) as run:
        while not any(p.stat().st_mtime > began for p in study.folder.glob(f"logs/{RULES[stage]}/**/*.log")):
            assert run.poll() is None, (study.folder / "started.txt").read_text()
            time.sleep(0.01)
        time.sleep(delay)
        assert run.poll() is None
        kill(run, victim)
    assert run.returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_study_killed_at_random_is_completed_by_the_same_command(new_study, seed):
    whole, killed = (prepare_with_pretraining(new_study(name)) for name in ("whole", "killed"))
    done = whole.snakemake("figures")
    assert done.returncode == 0, done.stderr[-4000:]
    draw = random.Random(seed)
    for stage, rule in RULES.items():
        costs = [read_json(path) for path in whole.folder.glob(f"logs/{rule}/**/*.json")]
        killed_in(killed, stage, min(cost["seconds"] for cost in costs), draw)
    # A second run beside the one that completes the study is refused and does no harm.
    began = time.time()
    with started(killed) as run:
        # The killed runs' locks may still be there.
        while not any(lock.stat().st_mtime > began for lock in killed.folder.glob(".snakemake/locks/*.lock")):
            time.sleep(0.01)
        beside = killed.snakemake("figures")
        assert (beside.returncode, run.wait()) == (1, 0), (killed.folder / "started.txt").read_text()
    # It may look at a figure just as the other run deletes it to draw it again; Snakemake then says so.
    assert re.search("Directory cannot be locked|a concurrent process has deleted it", beside.stderr)
    expected, found = comparable(whole.folder), comparable(killed.folder)
    assert found.keys() == expected.keys()  # so nothing temporary and no checkpoint is left either
    assert [name for name, content in found.items() if content != expected[name]] == []
    verified = subprocess.run(
        [sys.executable, "-m", "greencode.manifest", "verify"],
        cwd=killed.folder,
        capture_output=True,
        text=True,
    )
    assert verified.returncode == 0, verified.stderr


def test_a_run_beside_another_is_refused(new_study):
    study = prepare(new_study("beside"))
    with started(study) as first:
        while not any(study.folder.glob("logs/prepare_corpus/*")):
            assert first.poll() is None
            time.sleep(0.02)
        second = study.snakemake("figures")
        assert second.returncode != 0
        assert "Directory cannot be locked" in second.stderr
        assert first.poll() is None


# --- No room, and no permission ------------------------------------------------------------------------


def in_namespace(study, script):
    """Run a shell script in the study's folder that mounts what no one else sees; its stdout."""
    command = ["unshare", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("needs Linux's unshare and user namespaces, to mount without being root")
    script = f'set -e; snakemake() {{ {sys.executable} -m snakemake -c2 "$@"; }}\n{script}'
    done = subprocess.run([*command, "bash", "-c", script], cwd=study.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_folders_that_are_read_only_end_the_run_with_a_sentence(new_study):
    study = prepare(new_study("readonly"))
    said = in_namespace(
        study,
        """
        mkdir results
        mount --bind results results
        mount -o remount,ro,bind results
        ! snakemake results/data/code/manifest.json 2>&1
        mount --bind . .
        cd .
        mount -o remount,ro,bind "$PWD"
        cd "$PWD"
        ! snakemake results/data/code/manifest.json 2>&1
        """,
    )
    assert "Failed to create output directory results/data" in said
    assert "Read-only file system" in said
    assert said.splitlines()[-1].startswith("The study's folder cannot be written: Read-only file system: ")
    assert "Traceback" not in said
    assert list((study.folder / "results").iterdir()) == []


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_a_sentence_and_spoils_nothing(study, new_study):
    full = prepare(new_study("full"))
    said = in_namespace(
        full,
        """
        mkdir results
        mount -t tmpfs -o size=700k tmpfs results  # room for the model, not for a checkpoint
        ! snakemake results/agents/tiny/code/agent/policy.safetensors 2>&1
        mount -o remount,size=64m "$PWD/results"
        snakemake results/agents/tiny/code/agent/policy.safetensors 2>&1
        cp -r results kept
        """,
    )
    assert "finetune_model: No space left on device: while writing results.\n" in said
    (full.folder / "results").rmdir()
    (full.folder / "kept").rename(full.folder / "results")
    expected, found = comparable(study.folder), comparable(full.folder)
    assert len(found) > 12
    assert [name for name, content in found.items() if content != expected[name]] == []
