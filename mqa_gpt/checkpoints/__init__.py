"""Checkpoints: from a hub name or a folder to a model, and back to a folder."""
