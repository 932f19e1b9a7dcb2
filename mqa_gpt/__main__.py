"""`mqa-gpt`, the same as `python -m mqa_gpt`: Ctrl-C from the start, then the command line."""

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # not where the caller has Ctrl-C ignored
        signal.signal(signal.SIGINT, _stop)
    from mqa_gpt import cli  # and torch, which takes seconds

    signal.signal(signal.SIGINT, before)
    cli.main()


def _stop(number: int, frame: FrameType | None) -> None:
    """End the process at once: an exception in the middle of torch's import may abort or get lost,
    and there is nothing yet to be tidied up."""
    if sys.stderr is not None:  # the caller has closed it
        print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


if __name__ == "__main__":
    main()
