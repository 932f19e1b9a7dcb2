"""Measuring speed, against the machine's limits and against other programs."""
