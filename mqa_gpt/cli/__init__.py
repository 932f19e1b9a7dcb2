"""The `mqa-gpt` command, one file a sub-command."""
