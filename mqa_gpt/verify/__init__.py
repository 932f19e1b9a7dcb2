"""The comparison with transformers, number by number."""
