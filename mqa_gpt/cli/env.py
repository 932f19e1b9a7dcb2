"""`mqa-gpt env`: versions and hardware."""

from __future__ import annotations

from mqa_gpt.cli.options import Json
from mqa_gpt.cli.output import print_environment, print_json
from mqa_gpt.machine import describe


def env(as_json: Json = False) -> None:
    """Show versions and hardware, for a bug report.

    \b
    Example:
      mqa-gpt env --json
    """
    found = describe()
    if as_json:
        print_json(found)
    else:
        print_environment(found)
