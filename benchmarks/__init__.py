"""One script per question about speed or memory; see README.md."""
