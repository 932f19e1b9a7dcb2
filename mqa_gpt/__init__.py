"""GPT-2 with multi-query attention, the architecture of StarCoder: read it, run it, prove it."""

from mqa_gpt.cache import KVCache
from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import CheckpointError, ConfigError, PromptError
from mqa_gpt.model import GPT

__all__ = ["GPT", "CheckpointError", "ConfigError", "GPTConfig", "KVCache", "PromptError"]
