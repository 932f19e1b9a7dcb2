"""Task files for EleutherAI's lm-evaluation-harness: `--include_path` this folder."""
