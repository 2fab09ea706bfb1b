"""How a job ends: one sentence for the user, the rest in the log."""

import errno
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from greencode import job
from greencode.energy import Meter
from greencode.errors import UserError


@pytest.fixture
def smk(tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))  # as it was, after the test
    return SimpleNamespace(
        log=[str(tmp_path / "rule.log")],
        rule="finetune_model",
        output=["results/a", "results/b"],
        resources={"gpu": 0},
    )


def fail(smk, main, capsys):
    """Run `main`; the sentence on the terminal and the log."""
    with pytest.raises(SystemExit) as ended:
        job.run(main, smk)
    assert ended.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    log = Path(smk.log[0])
    return captured.err, log.read_text() if log.is_file() else None


def raises(error):
    def main(smk):
        raise error

    return main


def test_a_job_that_works_ends_quietly_with_its_output_in_the_log(smk, capsys):
    def main(given):
        assert given is smk
        print("step 1")
        print("step 2", file=sys.stderr)

    job.run(main, smk)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert Path(smk.log[0]).read_text() == "step 1\nstep 2\n"


def cost_of(smk):
    return json.loads(Path(smk.log[0]).with_suffix(".json").read_text())


def test_a_job_leaves_its_cost_beside_its_log(smk):
    def work(_):
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass

    job.run(lambda smk: None, smk)
    before = cost_of(smk)
    job.run(work, smk)
    cost = cost_of(smk)
    assert 0.15 <= cost["cpu_seconds"] - before["cpu_seconds"] < 1
    assert 0.15 <= cost["seconds"] - before["seconds"] < 30
    assert 10 < cost["memory_mb"] < 10_000
    assert (cost["joules"], cost["energy_source"], cost["on_gpu"]) == (None, None, False)
    assert (cost["rule"], cost["output"]) == ("finetune_model", ["results/a", "results/b"])


def test_the_peak_of_memory_is_this_process_own(smk):
    """It grows with what the job takes, and is not that of a larger process that started it."""
    job.run(lambda smk: bytearray(200_000_000), smk)
    grown = cost_of(smk)["memory_mb"]
    program = "from greencode import job; print(job._peak_memory())"
    small = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    assert float(small.stdout) < 100 < 190 < grown


def test_the_meter_of_a_job_counts_all_of_it(smk):
    class Monitor:
        """A GPU that takes 42 J in every window."""

        def begin_window(self, key):
            pass

        def end_window(self, key):
            return SimpleNamespace(time=1.0, gpu_energy={0: 42.0})

    smk.resources["gpu"] = 1
    job.run(lambda smk: None, smk, meter=Meter("nvml", Monitor()))
    cost = cost_of(smk)
    assert (cost["joules"], cost["energy_source"], cost["on_gpu"]) == (42.0, "nvml", True)


def test_a_failed_job_has_no_cost(smk, capsys):
    fail(smk, raises(ValueError("odd")), capsys)
    assert not Path(smk.log[0]).with_suffix(".json").exists()


def test_warnings_are_in_the_log(tmp_path):
    program = (
        "import sys, warnings\nfrom types import SimpleNamespace\nfrom greencode import job\n"
        "smk = SimpleNamespace(log=[sys.argv[1]], rule='r', output=[], resources={})\n"
        "job.run(lambda smk: warnings.warn('mind this'), smk)\n"
    )
    log = tmp_path / "rule.log"
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    ended = subprocess.run(
        [sys.executable, "-c", program, str(log)], capture_output=True, text=True, env=environment
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert "UserWarning: mind this" in log.read_text()


def test_an_error_the_user_can_mend_is_one_sentence_and_no_traceback(smk, capsys):
    terminal, log = fail(smk, raises(UserError("The corpus is missing; name one.")), capsys)
    assert terminal == "finetune_model: The corpus is missing; name one.\n"
    assert log == "The corpus is missing; name one.\n"


def test_any_other_error_leaves_its_traceback_in_the_log_only(smk, capsys):
    terminal, log = fail(smk, raises(ZeroDivisionError("by 0")), capsys)
    assert terminal == f"finetune_model: ZeroDivisionError: by 0 (traceback in {smk.log[0]})\n"
    assert "Traceback (most recent call last)" in log
    assert log.endswith(f"ZeroDivisionError: by 0\n{terminal.removeprefix('finetune_model: ')}")


def test_a_full_disk_is_one_sentence(smk, capsys):
    def main(smk):
        with open("/dev/full", "w") as stream:
            stream.write("results")

    terminal, log = fail(smk, main, capsys)
    assert terminal == "finetune_model: No space left on device: while writing results.\n"
    assert "Traceback" in log


def test_an_error_of_the_system_names_the_file(smk, capsys):
    error = OSError(errno.EACCES, os.strerror(errno.EACCES), "results/a.json")
    terminal, _ = fail(smk, raises(error), capsys)
    assert terminal == "finetune_model: Permission denied: results/a.json.\n"


def test_of_a_copy_the_file_is_named_that_is_written(smk, capsys):
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model/a", None, "results/a")
    terminal, _ = fail(smk, raises(error), capsys)
    assert terminal == "finetune_model: No space left on device: results/a.\n"


def write_safetensors():
    save_file({"a": np.zeros(100_000)}, "weights.safetensors")


def write_checkpoint():
    torch.save({"a": torch.zeros(100_000)}, "checkpoint.pt")


def write_large_checkpoint():
    torch.save({"a": torch.zeros(5_000_000)}, "checkpoint.pt")


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (write_safetensors, "File too large: while writing results."),
        (write_checkpoint, "A checkpoint could not be written whole: is the disk full?"),
        (write_large_checkpoint, "A checkpoint could not be written whole: is the disk full?"),
    ],
)
def test_libraries_that_write_by_themselves_run_out_of_space(
    smk, capsys, tmp_path, monkeypatch, write, sentence
):
    """The limit of a file's size refuses what a full disk does."""
    monkeypatch.chdir(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        terminal, log = fail(smk, lambda smk: write(), capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert terminal == f"finetune_model: {sentence}\n"
    assert "Traceback" in log


def test_an_error_of_the_system_without_a_number_is_told(smk, capsys):
    terminal, _ = fail(smk, raises(OSError("the socket is shut")), capsys)
    assert terminal == "finetune_model: the socket is shut: while writing results.\n"


@pytest.mark.parametrize("error", [UserError("One sentence."), ValueError("odd"), OSError(28, "No space")])
def test_a_log_on_the_full_disk_takes_the_sentence_away_from_no_one(smk, capsys, error):
    smk.log = ["/dev/full"]

    def main(smk):
        print("much output" * 10_000)
        raise error

    with pytest.raises(SystemExit) as ended:
        job.run(main, smk)
    assert ended.value.code == 1
    terminal = capsys.readouterr().err
    assert terminal.startswith("finetune_model: ")
    assert terminal.count("\n") == 1
    assert "Traceback" not in terminal


def test_a_log_that_cannot_be_opened_is_one_sentence(smk, capsys, tmp_path):
    smk.log = [str(tmp_path / "nowhere" / "rule.log")]
    terminal, log = fail(smk, lambda smk: None, capsys)
    assert terminal == f"finetune_model: {smk.log[0]} cannot be written.\n"
    assert log is None


def test_a_stopped_job_is_not_caught(smk):
    with pytest.raises(KeyboardInterrupt):
        job.run(raises(KeyboardInterrupt()), smk)


@pytest.mark.parametrize("online", [False, True])
def test_only_a_job_that_fetches_may_ask_the_hub(smk, monkeypatch, online):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    seen = []
    job.run(lambda smk: seen.append(os.environ["HF_HUB_OFFLINE"]), smk, online=online)
    assert seen == ["0" if online else "1"]
