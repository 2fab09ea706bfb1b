"""Set up `.venv` with everything the study needs; run by `make setup`, safe to repeat.

Standard library only, since it runs before anything is installed. Versions come from
requirements.lock, as constraints.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
NEEDED_BYTES = 4 * 2**30


def stop(sentence: str) -> None:
    """End with one sentence and a failing exit code."""
    print(f"setup: {sentence}", file=sys.stderr)
    sys.exit(1)


def run(*command: str, **environment: str) -> bool:
    """True if the command succeeds."""
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment).returncode == 0


def find_links() -> str:
    """Folders of wheels that pip is configured to look in; uv must be told."""
    shown = subprocess.run(
        [str(PYTHON), "-m", "pip", "config", "list"], capture_output=True, text=True, cwd=ROOT
    ).stdout
    values = [line.split("=", 1)[1].strip("'\" ") for line in shown.splitlines() if "find-links" in line]
    return " ".join(dict.fromkeys(" ".join(values).replace("\\n", " ").split()))


def install() -> bool:
    """Install with uv, which is fast; with pip where uv cannot be had or does not manage."""
    wanted = ["-r", "requirements.in", "-c", "requirements.lock"]
    if run(str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"):
        links = find_links()
        environment = {"UV_COMPILE_BYTECODE": "1"} | ({"UV_FIND_LINKS": links} if links else {})
        if run(str(PYTHON), "-m", "uv", "pip", "install", "--python", str(PYTHON), *wanted, **environment):
            return True
        print("setup: uv did not manage; trying pip.", file=sys.stderr)
    return run(str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted)


def main() -> None:
    """Create or update the environment; nothing to do if it is current."""
    if sys.version_info < (3, 11):  # noqa: UP036 - any Python may start this
        found = ".".join(map(str, sys.version_info[:2]))
        stop(f"Python {found} is too old; install Python 3.11 or newer, or run `make PYTHON=python3.11 ...`.")
    files = [ROOT / "requirements.in", ROOT / "requirements.lock", Path(__file__)]
    state = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    stamp = VENV / ".installed"
    if stamp.exists() and stamp.read_text() == state and PYTHON.exists():
        return
    free = shutil.disk_usage(ROOT).free
    if free < NEEDED_BYTES:
        stop(f"{free / 2**30:.1f} GiB are free here and {NEEDED_BYTES / 2**30:.0f} are needed; make room.")
    print("setup: installing into .venv (minutes, once) ...", file=sys.stderr)
    # A set-up that was killed can leave a Python without pip.
    has_pip = "import importlib.util as u; exit(not u.find_spec('pip'))"
    if not PYTHON.exists() or not run(str(PYTHON), "-c", has_pip):
        try:
            venv.create(VENV, with_pip=True, clear=True)
        except (OSError, subprocess.CalledProcessError) as error:
            stop(f"Python's venv cannot make {VENV} ({error}); on Debian install python3-venv.")
    if not install():
        stop("the packages could not be installed; the lines above say which, usually for want of a network.")
    stamp.write_text(state)
    print("setup: done.", file=sys.stderr)


if __name__ == "__main__":
    main()
