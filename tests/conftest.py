"""A study in a temporary folder, run by the real snakemake on a copy of the repository's code."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
CODE = ("Snakefile", "greencode", "workflow", "config", "profiles", "envs")


class Study:
    """A folder with the repository's code and a config of its own."""

    def __init__(self, folder):
        self.folder = Path(folder)
        for name in CODE:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.folder / name)
        (self.folder / "resources").mkdir()
        shutil.copy(ROOT / "resources/published_values.csv", self.folder / "resources")

    def configure(self, config):
        """Write config/config.yaml."""
        text = config if isinstance(config, str) else yaml.safe_dump(config, sort_keys=False)
        (self.folder / "config/config.yaml").write_text(text)

    def snakemake(self, *arguments, cores=2):
        """Run snakemake to its end; stdout, stderr and exit code."""
        return subprocess.run(
            self.command(*arguments, cores=cores), cwd=self.folder, capture_output=True, text=True
        )

    @staticmethod
    def command(*arguments, cores=2):
        """The command line of `snakemake`."""
        return [sys.executable, "-m", "snakemake", f"-c{cores}", *arguments]

    def pending(self, target="figures"):
        """{output file: rule} of what a run would make anew."""
        done = self.snakemake("--summary", target)
        assert done.returncode == 0, done.stderr
        rows = [line.split("\t") for line in done.stdout.splitlines()[1:]]
        return {row[0]: row[2] for row in rows if row[-1] == "update pending"}

    def outputs(self, target="figures"):
        """Every file that the target needs a rule for."""
        done = self.snakemake("--summary", target)
        assert done.returncode == 0, done.stderr
        return [line.split("\t")[0] for line in done.stdout.splitlines()[1:]]

    @contextlib.contextmanager
    def edited(self, path, text="\n# An edit.\n"):
        """`path` with `text` at its end, and afterwards as before, time stamp included."""
        path = self.folder / path
        before, stat = path.read_text(), path.stat()
        path.write_text(before + text)
        try:
            yield
        finally:
            path.write_text(before)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def stub_model(folder, family="llama", layers=8):
    """A model directory that passes the checks before a run; it holds no real weights."""
    folder.mkdir(parents=True)
    config = {"model_type": family, "num_hidden_layers": layers, "hidden_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"weight": np.zeros((2, 2), np.float32)}, folder / "model.safetensors")


@pytest.fixture(scope="session")
def new_study(tmp_path_factory):
    """Makes studies whose config is still the default study's."""
    return lambda name: Study(tmp_path_factory.mktemp(name))


@pytest.fixture(scope="session")
def new_stub_model():
    """Makes model directories without real weights."""
    return stub_model
