"""The launcher: output, failures, and the end of its processes with the job's."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from greencode.errors import UserError
from greencode.launch import launch

HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The functions of this file, for the launched processes."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))


def fail(folder, only):
    """Rank `only` fails as a user may mend; the others wait for it, as in a collective operation."""
    # Text and line end in one, or those of the other process come between.
    sys.stdout.write(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}\n")
    os.write(1, f"native {os.environ['RANK']}\n".encode())
    Path(folder, os.environ["RANK"]).write_text("up")
    while not all(Path(folder, rank).exists() for rank in "01"):
        time.sleep(0.05)
    if os.environ["RANK"] == only:
        raise UserError("The weights lack a layer; fetch them again.")
    time.sleep(600)


def test_a_failure_is_one_sentence_and_the_output_is_that_of_all(tmp_path, capfd):
    with pytest.raises(UserError, match=r"^The weights lack a layer; fetch them again\.$"):
        launch(fail, {"folder": tmp_path, "only": "1"}, 2, 1, tmp_path / "exchange")
    said = capfd.readouterr()
    assert {f"rank {rank} of 2" for rank in "01"} | {"native 0", "native 1"} <= set(said.out.splitlines())
    assert "Traceback" not in said.out + said.err
    assert list((tmp_path / "exchange").iterdir()) == []


@pytest.mark.slow
def test_a_killed_job_leaves_no_process(tmp_path):
    program = (
        "import sys; from test_launch import fail; from greencode.launch import launch\n"
        "launch(fail, {'folder': sys.argv[1], 'only': None}, 2, 1, sys.argv[1] + '/exchange')"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])}
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env=environment) as job:
        while not all((tmp_path / rank).exists() for rank in "01"):
            assert job.poll() is None
            time.sleep(0.05)
        started = psutil.Process(job.pid).children(recursive=True)
        assert sum("greencode.launch" in one.cmdline() for one in started) >= 2
        job.send_signal(signal.SIGKILL)
    gone, alive = psutil.wait_procs(started, timeout=20)
    assert alive == []
    assert len(gone) == len(started)
