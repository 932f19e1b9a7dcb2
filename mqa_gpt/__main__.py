"""`mqa-gpt`, the same as `python -m mqa_gpt`: the command line, and Ctrl-C from the moment Python
runs this.
"""

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line."""
    # Not where the caller has Ctrl-C ignored, or handled by what is not Python, which is None.
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_default:
        signal.signal(signal.SIGINT, _stop)
    from mqa_gpt.cli import app  # and torch, which takes seconds

    if is_default:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    app.main()


def _stop(number: int, frame: FrameType | None) -> None:
    """End the process at once: an exception in the middle of torch's import may abort or get lost,
    and there is nothing yet to be tidied up."""
    if sys.stderr is not None:  # as it is where the caller has closed it
        print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


if __name__ == "__main__":
    main()
