"""A study in a temporary folder, run by the real snakemake on a copy of the repository's code."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
CODE = ("Snakefile", "greencode", "workflow", "config", "profiles", "envs")

# To import snakemake takes longer than most of what the tests ask of it: every run is a fork of one process.
SERVER = """
import json, os, sys
import snakemake.cli

for line in sys.stdin:
    folder, arguments, environment = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.chdir(folder)
    os.environ.update(environment)
    for descriptor, name in enumerate((os.devnull, "stdout.txt", "stderr.txt")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.exit(snakemake.cli.main(arguments))
"""


class Study:
    """A folder with the repository's code and a config of its own."""

    def __init__(self, folder, server):
        self.folder, self.server = Path(folder), server
        for name in CODE:
            if (ROOT / name).is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / name, self.folder / name, ignore=ignore)
            else:
                shutil.copy(ROOT / name, self.folder)
        (self.folder / "resources").mkdir()
        shutil.copy(ROOT / "resources/published_values.csv", self.folder / "resources")

    def configure(self, config):
        """Write config/config.yaml."""
        text = config if isinstance(config, str) else yaml.safe_dump(config, sort_keys=False)
        (self.folder / "config/config.yaml").write_text(text)

    def snakemake(self, *arguments, cores=2, environment=None):
        """Run snakemake to its end: its stdout, stderr and returncode. Without cores a cluster decides."""
        arguments = [*([f"-c{cores}"] if cores else []), *arguments]
        call = [str(self.folder), arguments, environment or {}]
        print(json.dumps(call), file=self.server.stdin, flush=True)
        returncode = int(self.server.stdout.readline())
        outputs = {name: (self.folder / f"{name}.txt").read_text() for name in ("stdout", "stderr")}
        return SimpleNamespace(returncode=returncode, **outputs)

    def summary(self, target="figures"):
        """(file, rule, whether a run would make it anew) of every output that the target needs."""
        done = self.snakemake("--summary", target)
        assert done.returncode == 0, done.stderr
        rows = [line.split("\t") for line in done.stdout.splitlines()[1:]]
        return [(row[0], row[2], row[-1] == "update pending") for row in rows]

    @contextlib.contextmanager
    def edited(self, path, edit):
        """A file after `edit` of its bytes, and afterwards as before, time stamp included."""
        path = self.folder / path
        before, stat = path.read_bytes(), path.stat()
        path.write_bytes(edit(before))
        try:
            yield
        finally:
            path.write_bytes(before)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def stub_model(folder, family="llama", layers=8):
    """A model directory that passes the checks before a run; it holds no real weights."""
    folder.mkdir(parents=True)
    config = {"model_type": family, "num_hidden_layers": layers, "hidden_size": 32}
    config |= {"max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"weight": np.zeros((2, 2), np.float32)}, folder / "model.safetensors")


@pytest.fixture(scope="session")
def studies(tmp_path_factory):
    """Makes makers of studies; `command` starts the process that runs them, which runs `first` before."""

    @contextlib.contextmanager
    def within(*command, first=""):
        command = [*command, sys.executable, "-c", first + SERVER]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            yield lambda name: Study(tmp_path_factory.mktemp(name), server)
            server.stdin.close()

    return within


@pytest.fixture(scope="session")
def new_study(studies):
    """Makes studies whose config is still the default study's."""
    with studies() as new:
        yield new


@pytest.fixture(scope="session")
def new_stub_model():
    """Makes model directories without real weights."""
    return stub_model
