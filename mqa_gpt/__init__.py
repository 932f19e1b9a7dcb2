"""GPT-2 with multi-query attention, the architecture of StarCoder: read it, run it, prove it.

The public names are imported when they are first used: torch takes seconds, and `mqa-gpt --help`
does not need it.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mqa_gpt.cache import KVCache
    from mqa_gpt.config import GPTConfig
    from mqa_gpt.errors import CheckpointError, ConfigError, PromptError
    from mqa_gpt.generate import generate
    from mqa_gpt.llm import LLM, Completion
    from mqa_gpt.model import GPT
    from mqa_gpt.tokenizer import Tokenizer

__all__ = [
    "GPT",
    "LLM",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "GPTConfig",
    "KVCache",
    "PromptError",
    "Tokenizer",
    "generate",
]

_HOME = {
    "GPT": "model",
    "LLM": "llm",
    "CheckpointError": "errors",
    "Completion": "llm",
    "ConfigError": "errors",
    "GPTConfig": "config",
    "KVCache": "cache",
    "PromptError": "errors",
    "Tokenizer": "tokenizer",
    "generate": "generate",
}


class _Package(ModuleType):
    """A package whose `generate` stays the function when the module `generate` is imported."""

    def __getattr__(self, name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{self.__name__}.{_HOME[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOME or not isinstance(value, ModuleType):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
