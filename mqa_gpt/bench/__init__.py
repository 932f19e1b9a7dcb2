"""Measuring: speed beside the machine's limits and beside other programs."""
