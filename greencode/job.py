"""Running a workflow script: its log, errors that a user can read, and what it cost."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from greencode.errors import UserError
from greencode.files import write_json
from greencode.hub import offline

_STARTED = time.perf_counter()  # scripts import this module first


def run(main: Callable[[Any], None], snakemake: Any, online: bool = False, meter: Any = None) -> None:
    """Run `main(snakemake)` with its output in the rule's log, and leave its cost in a JSON file beside it.

    Only a job that fetches something is `online`; the others never ask the hub, since compute nodes
    cannot.

    An error that the user can mend ends the job with one sentence, in the log and on the terminal; any
    other error leaves its traceback in the log. A log that cannot be written, as on a full disk, takes
    the sentence away from no one.

    Args:
        meter: an `energy.Meter` for the job as a whole, where one can tell the job's energy from that of
            others that run beside it. The manifest estimates the rest from CPU seconds.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sentence = f"{snakemake.log[0]} cannot be written."
    with (
        contextlib.suppress(OSError),
        open(snakemake.log[0], "w", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        try:
            with (
                contextlib.nullcontext() if online else offline(),
                meter.window() if meter else contextlib.nullcontext() as window,
            ):
                main(snakemake)
            _write_cost(snakemake, window and window.energy)
            return
        except UserError as error:
            sentence = str(error)
        except Exception as error:
            sentence = (
                _sentence(error) or f"{type(error).__name__}: {error} (traceback in {snakemake.log[0]})"
            )
            traceback.print_exc(file=log)
        log.write(f"{sentence}\n")
    print(f"{snakemake.rule}: {sentence}", file=sys.stderr)
    sys.exit(1)


def _sentence(error: Exception) -> str | None:
    """What the system refused, also where a library tells it in words of its own."""
    if isinstance(error, OSError):
        # Of a copy the second name is the one that is written.
        name = error.filename2 or error.filename or "while writing results"
        return f"{error.strerror or error}: {name}."
    if refused := re.search(r"I/O error: (.+) \(os error \d+\)", str(error)):  # safetensors
        return f"{refused[1]}: while writing results."
    if re.search("PytorchStreamWriter|unexpected pos", str(error)):  # torch.save
        return "A checkpoint could not be written whole: is the disk full?"
    return None


def _write_cost(snakemake: Any, energy: Any) -> None:
    """Beside the log: the job's outputs and what they cost; seconds count from the script's first line.

    Snakemake's benchmark samples: of a job of two seconds it sees hardly any CPU time and memory, and of
    longer ones it misses up to the last half minute.
    """
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    write_json(
        Path(snakemake.log[0]).with_suffix(".json"),
        {
            "rule": snakemake.rule,
            "output": list(snakemake.output),
            "seconds": round(time.perf_counter() - _STARTED, 2),
            "cpu_seconds": round(sum(one.ru_utime + one.ru_stime for one in used), 2),
            "memory_mb": _peak_memory(),
            "on_gpu": bool(snakemake.resources.get("gpu", 0)),
            "joules": energy.joules if energy else None,
            "energy_source": energy.source if energy else None,
        },
    )


def _peak_memory() -> float | None:
    """Most resident memory of this process so far, in MB; None where the system does not tell.

    getrusage's figure includes that of the process that started this one.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return round(int(found[1]) / 1024, 1) if found else None
