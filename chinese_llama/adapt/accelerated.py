"""accelerate's launcher, run as a program. Where one of several processes ends, it has told why: the launcher's own
traceback, which only says that it ended, is left out."""

from __future__ import annotations

import logging
import signal
import sys


def main() -> int:
    """Launch what the command line says; the exit code is 1 where a process failed."""
    from accelerate.commands.launch import main as launch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # of torchrun, whose processes have their own
    try:
        launch()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:  # it had no time to say so
            name = signal.Signals(-failure.exitcode).name
            print(f"Process {rank} was ended by {name}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
