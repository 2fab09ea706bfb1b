"""Running a workflow script: its log, and errors that a user can read."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from greencode.errors import UserError


def run(main: Callable[[Any], None], snakemake: Any, online: bool = False) -> None:
    """Run `main(snakemake)` with its output in the rule's log.

    Only a job that fetches something is `online`; the others never ask the hub, since compute nodes
    cannot.

    An error that the user can mend ends the job with one sentence, in the log and on the terminal; any
    other error leaves its traceback in the log. A log that cannot be written, as on a full disk, takes
    the sentence away from no one.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not online:
        _go_offline()
    sentence = f"{snakemake.log[0]} cannot be written."
    with (
        contextlib.suppress(OSError),
        open(snakemake.log[0], "w", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        try:
            main(snakemake)
            return
        except UserError as error:
            sentence = str(error)
        except OSError as error:
            sentence = f"{error.strerror or error}: {error.filename or 'while writing results'}."
            traceback.print_exc(file=log)
        except Exception as error:
            sentence = f"{type(error).__name__}: {error} (traceback in {snakemake.log[0]})"
            traceback.print_exc(file=log)
        log.write(f"{sentence}\n")
    print(f"{snakemake.rule}: {sentence}", file=sys.stderr)
    sys.exit(1)


def _go_offline() -> None:
    """Keep the hub's libraries from asking the hub, whether they are imported by now or will be."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    for module in ("huggingface_hub.constants", "datasets.config"):
        if module in sys.modules:
            sys.modules[module].HF_HUB_OFFLINE = True
