"""GPT-2 with multi-query attention, the architecture of StarCoder: read it, run it, prove it.

What is public is imported when it is asked for, and PyTorch with it. That takes seconds, in which
the command line is in charge of Ctrl-C already.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mqa_gpt.cache import KVCache
    from mqa_gpt.config import GPTConfig
    from mqa_gpt.errors import CheckpointError, ConfigError, InputError, PromptError
    from mqa_gpt.generation.completion import Completion
    from mqa_gpt.generation.loop import generate
    from mqa_gpt.generation.prompts import Options
    from mqa_gpt.generation.score import Score
    from mqa_gpt.generation.speculative import DraftModel, PromptLookup
    from mqa_gpt.llm import LLM
    from mqa_gpt.model import GPT
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
    "Options",
    "PromptError",
    "PromptLookup",
    "Score",
    "Tokenizer",
    "generate",
]

_MODULES = {
    "cache": ["KVCache"],
    "config": ["GPTConfig"],
    "errors": ["CheckpointError", "ConfigError", "InputError", "PromptError"],
    "generation.completion": ["Completion"],
    "generation.loop": ["generate"],
    "generation.prompts": ["Options"],
    "generation.score": ["Score"],
    "generation.speculative": ["DraftModel", "PromptLookup"],
    "llm": ["LLM"],
    "model": ["GPT"],
    "tokenizer": ["Tokenizer"],
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            globals()[name] = getattr(import_module(f"mqa_gpt.{module}"), name)
            return globals()[name]
    raise AttributeError(f"module 'mqa_gpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
