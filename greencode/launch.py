"""A function in several processes of one machine, through `accelerate launch`."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from greencode.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def launch(
    function: Callable[..., None], arguments: dict[str, Any], processes: int, threads: int, folder: str | Path
) -> None:
    """Call `function(**arguments)` in each of `processes` processes, and wait for all of them.

    What they print goes where this process' `sys.stdout` goes. They end when this process does, however
    it ends.

    Args:
        function: of an importable module; its arguments can be pickled.
        threads: OpenMP threads of each process.
        folder: where the arguments lie meanwhile.

    Raises:
        UserError, OSError: as the first process that failed raised it.
        RuntimeError: any other failure; its traceback is in the output.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="launch-") as exchange:
        call, failure = _exchange(exchange)
        call.write_bytes(pickle.dumps((function, arguments)))
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        # Not for GPUs alone: it stands for a torchrun on this machine. Without, processes on CPUs need MPI.
        command += ["--multi_gpu"] if processes > 1 else []
        for option, value in {
            "num_processes": processes,
            "num_machines": 1,
            "num_cpu_threads_per_process": threads,
            "main_process_port": 0,  # any free one: another job may be launched beside this one
            "mixed_precision": "no",  # the caller's affair, as is compilation
            "dynamo_backend": "no",
        }.items():
            command += [f"--{option}", str(value)]
        command += ["--module", "greencode.launch", exchange]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        # torchrun's own folder; a launcher that is killed leaves it.
        environment = os.environ | {"PYTHONPATH": path, "TMPDIR": exchange, "OMP_NUM_THREADS": str(threads)}
        sys.stdout.flush()
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=sys.stdout, stderr=subprocess.STDOUT, env=environment
        ) as launcher:
            code = launcher.wait()
        if failure.exists():
            raise pickle.loads(failure.read_bytes())
        if code:
            raise RuntimeError(f"accelerate launch ended with exit code {code}")


def _exchange(folder: str | Path) -> tuple[Path, Path]:
    """The files by which launcher and processes talk: what to call, and the first failure."""
    return Path(folder, "call"), Path(folder, "failure")


def _end_with_the_job() -> None:
    """End this process when its standard input does.

    The other end of that pipe is held by the process that called `launch`, and by no other. A signal
    would not do: torchrun puts each process into a session of its own, and SIGKILL is not handed on.
    """
    while os.read(0, 1):
        pass
    os._exit(1)


def _work(folder: str) -> None:
    """What each process runs."""
    threading.Thread(target=_end_with_the_job, daemon=True).start()
    call, failure = _exchange(folder)
    try:
        function, arguments = pickle.loads(call.read_bytes())
        function(**arguments)
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc()
        known = error if isinstance(error, UserError | OSError) else RuntimeError(f"{error!r}")
        # One tells; the others fail because it did.
        with contextlib.suppress(FileExistsError), open(failure, "xb") as stream:
            stream.write(pickle.dumps(known))
            stream.flush()
            # It would report the same in forty lines, and last.
            os.kill(os.getppid(), signal.SIGKILL)
        sys.exit(1)


if __name__ == "__main__":
    _work(sys.argv[1])
