"""What goes wrong because of the input: one sentence that says what, where and what to do.

Every error of these kinds ends a command with exit code 2 and no traceback (`--debug` shows it).
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


class UserError(Exception):
    """The input, not the program, is at fault; the message is shown to the user as it is."""


class BadFile(UserError):
    """A file cannot be used. The message starts with its path, and the line where there is one."""

    def __init__(self, path: str | Path, what: str, line: int | None = None) -> None:
        where = f"{path}, line {line}" if line is not None else str(path)
        super().__init__(f"{where}: {what}")


class OutputExists(UserError):
    """The output is there already; it is never overwritten without being told to."""


class DoesNotFit(UserError):
    """Artifacts that do not belong together: another base, another tokenizer, a wrong order."""


class Interrupted(UserError):
    """Stopped by the user between two steps; the message says how to go on. Exit code 130."""


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean NAME?)' for the known name closest to `name`, else ''."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def printable(text: str) -> str:
    """`text` without what a terminal would obey: names and values come from files of others."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def report(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Run `main(argv)` and return its exit code, telling errors of this module in one sentence.

    `--debug` among the arguments shows the traceback instead.
    """
    debug = "--debug" in argv
    try:
        main([word for word in argv if word != "--debug"])
    except UserError as error:
        if debug:
            raise
        told = str(error) if isinstance(error, Interrupted) else f"Error: {error}"
        if (
            not isinstance(error, Interrupted) or os.environ.get("RANK", "0") == "0"
        ):  # else each process says it
            print(printable(told), file=sys.stderr)
        return 130 if isinstance(error, Interrupted) else 2
    except OSError as error:
        if debug or error.strerror is None:
            raise
        print(f"Error: {error.filename or 'a file'}: {error.strerror}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print("Stopped; nothing half-written is left. Give the same command again.", file=sys.stderr)
        return 130
    return 0
