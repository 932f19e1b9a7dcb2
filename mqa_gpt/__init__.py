"""GPT-2 with multi-query attention, the architecture of StarCoder: read it, run it, prove it."""

from mqa_gpt.cache import KVCache
from mqa_gpt.completion import Completion
from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import CheckpointError, ConfigError, InputError, PromptError
from mqa_gpt.generate import generate
from mqa_gpt.llm import LLM
from mqa_gpt.model import GPT
from mqa_gpt.speculation import DraftModel, PromptLookup
from mqa_gpt.tokenizer import Tokenizer

__all__ = [
    "GPT",
    "LLM",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "DraftModel",
    "GPTConfig",
    "InputError",
    "KVCache",
    "PromptError",
    "PromptLookup",
    "Tokenizer",
    "generate",
]
