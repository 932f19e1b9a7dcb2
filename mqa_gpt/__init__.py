"""GPT-2 with multi-query attention, the architecture of StarCoder: read it, run it, prove it."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mqa_gpt.cache import KVCache as KVCache
    from mqa_gpt.completion import Completion as Completion
    from mqa_gpt.completion import Options as Options
    from mqa_gpt.config import GPTConfig as GPTConfig
    from mqa_gpt.errors import CheckpointError as CheckpointError
    from mqa_gpt.errors import ConfigError as ConfigError
    from mqa_gpt.errors import InputError as InputError
    from mqa_gpt.errors import PromptError as PromptError
    from mqa_gpt.generate import generate as generate
    from mqa_gpt.llm import LLM as LLM
    from mqa_gpt.model import GPT as GPT
    from mqa_gpt.speculation import DraftModel as DraftModel
    from mqa_gpt.speculation import PromptLookup as PromptLookup
    from mqa_gpt.tokenizer import Tokenizer as Tokenizer

# The public names, and the modules that they are in.
_MODULES = {
    "GPT": "model",
    "LLM": "llm",
    "CheckpointError": "errors",
    "Completion": "completion",
    "ConfigError": "errors",
    "DraftModel": "speculation",
    "GPTConfig": "config",
    "InputError": "errors",
    "KVCache": "cache",
    "Options": "completion",
    "PromptError": "errors",
    "PromptLookup": "speculation",
    "Tokenizer": "tokenizer",
    "generate": "generate",
}

__all__ = [*_MODULES]


class _Package(ModuleType):
    """This package, which imports what is public, and torch with it, once it is asked for.

    So the command line is in charge of Ctrl-C while torch is imported, which takes seconds.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{self.__name__}.{_MODULES[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # Python makes an attribute of every imported module; here `generate` is the function.
        if name not in _MODULES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
