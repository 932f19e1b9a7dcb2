"""Questions about this machine's CPU."""
