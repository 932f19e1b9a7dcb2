"""Questions about a GPU."""
