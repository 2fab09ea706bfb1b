"""`python -m greencode COMMAND ...`: the library's commands by name."""

import importlib
import sys

COMMANDS = {"serve": "completions for editors over HTTP", "calibrate": "the threshold that keeps a promise"}


def main() -> int | None:
    """Run a command with the rest of the arguments; its exit code."""
    name, *arguments = sys.argv[1:] or [""]
    if name not in COMMANDS:
        listed = "".join(f"\n  {command:<10} {meaning}" for command, meaning in COMMANDS.items())
        print(f"Usage: python -m greencode COMMAND ...\nCommands:{listed}", file=sys.stderr)
        return 2
    return importlib.import_module(f"greencode.{name}").main(arguments)


if __name__ == "__main__":
    sys.exit(main())
