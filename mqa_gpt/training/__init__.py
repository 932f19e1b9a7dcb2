"""Training: one readable file per run, infilling, exact resume, one or many ranks."""
