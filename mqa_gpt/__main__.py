"""`python -m mqa_gpt` is the `mqa-gpt` command."""

from mqa_gpt.cli import main

main()
