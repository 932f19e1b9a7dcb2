"""RunConfig: everything that decides what a training run computes, read from one TOML file.

Each section of the file is a frozen dataclass that lives beside the code it configures; a key of
the file is a field of it. How a run is executed (device, ranks, folder) is not in the file: it is
said on the command line, and may change when the run is resumed.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import ConfigError, InputError, require_int, require_number, shown
from mqa_gpt.training.averaging import AveragingConfig
from mqa_gpt.training.optimizers import OptimizerConfig
from mqa_gpt.training.samples import DataConfig
from mqa_gpt.training.schedules import ScheduleConfig
from mqa_gpt.training.toml_file import TomlFile, read_toml
from mqa_gpt.training.vocabulary import TokenizerConfig


@dataclass(frozen=True)
class ModelConfig:
    """Which model is trained. Sizes may also be given as keys of `GPTConfig`: `n_layer = 6`.

    Attributes:
        pretrained: a hub name or folder whose weights training starts from; its sizes are used.
        preset: a published checkpoint whose sizes are used, with random weights.
        induction: begin with an induction circuit (see `mqa_gpt.training.induction`).
        backend: attention (see `mqa_gpt.attention`).
        sizes: keys of `GPTConfig` that differ from those of `preset` or, with `pretrained`, the
            dropout rates. The vocabulary's size defaults to the tokenizer's.
    """

    pretrained: str | None = None
    preset: str | None = None
    induction: bool = False
    backend: Literal["auto", "sdpa", "reference", "triton"] = "auto"
    sizes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.pretrained is not None and self.preset is not None:
            raise ConfigError("pretrained and preset are both given: choose one")
        if self.pretrained is not None and self.induction:
            raise ConfigError("pretrained and induction are both given: choose one")
        known = [f.name for f in dataclasses.fields(GPTConfig) if f.name != "extra"]
        if self.pretrained is not None:
            known = [name for name in known if name.endswith("_pdrop")]
        for key in self.sizes:
            if key not in known:
                raise ConfigError(
                    f"{key} is not a setting: expected pretrained, preset, induction, backend, "
                    f"{', '.join(known)}"
                )
        if self.pretrained is None:
            self.gpt_config()  # fail early on a wrong size

    def gpt_config(self, **defaults: Any) -> GPTConfig:
        """The sizes of a model with random weights.

        Args:
            defaults: keys of `GPTConfig`, for those that neither the file nor a preset gives.
        """
        if self.preset is not None:
            return dataclasses.replace(GPTConfig.preset(self.preset), **self.sizes)
        return GPTConfig(**{**defaults, **self.sizes})


@dataclass(frozen=True)
class LoopConfig:
    """The section `[run]`: how long, in what batches, and what is written on the way.

    Attributes:
        steps: optimizer steps in all.
        batch_size: sequences per step, over all ranks.
        micro_batch_size: sequences per forward pass on one rank; divides `batch_size`.
        repeat_batch: read the first batch in every step: a run that must learn it by heart.
        seed: of weights, data order and dropout.
        clip: the largest norm of the gradient; 0 does not clip.
        dtype: of matrix products. "bfloat16" is autocast: weights and moments stay float32.
        compile: run the blocks through `torch.compile`.
        recompute: keep no activations of a block for its backward pass, but compute them again.
        reduce: how gradients are added up. "sum" is fastest; "ordered" adds those of single
            micro-batches in a fixed tree, so that the result has the same bits on 1, 2 or 4 ranks.
        on_bad_step: what a step does whose loss or gradient is not finite, or spikes.
        spike_factor: a gradient norm above this multiple of the median of the last 64 is a spike; 0
            turns this off.
        evaluate_every: steps between held-out losses; 0 means only at the end.
        evaluate_samples: held-out sequences of an evaluation, rounded up to whole batches; if there
            are fewer, they are read again with other holes.
        save_every: steps between checkpoints; 0 means only at the end.
        keep: number of latest checkpoints that stay, besides the best by held-out loss.
        sample_every: steps between texts that the model writes for `prompts` and `holes`; 0 means
            only at the end.
        sample_tokens: new tokens of each.
        prompts: texts to continue.
        holes: pairs of texts, before and after a hole to fill.
        export_dtype: of the weights in `RUN/model`.
    """

    steps: int = 1000
    batch_size: int = 8
    micro_batch_size: int = 8
    repeat_batch: bool = False
    seed: int = 0
    clip: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    recompute: bool = False
    reduce: Literal["sum", "ordered"] = "sum"
    on_bad_step: Literal["stop", "skip"] = "stop"
    spike_factor: float = 0.0
    evaluate_every: int = 200
    evaluate_samples: int = 32
    save_every: int = 200
    keep: int = 2
    sample_every: int = 0
    sample_tokens: int = 48
    prompts: tuple[str, ...] = ()
    holes: tuple[tuple[str, str], ...] = ()
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        for key, least in _LEAST.items():
            require_int(ConfigError, key, getattr(self, key), least)
        for key in ("clip", "spike_factor"):
            require_number(ConfigError, key, getattr(self, key), "0 or above", lambda x: x >= 0)
        if self.batch_size % self.micro_batch_size:
            raise ConfigError(
                f"batch_size is {self.batch_size} and micro_batch_size is "
                f"{self.micro_batch_size}: the first must be a multiple of the second"
            )


_LEAST = {
    "steps": 1,
    "batch_size": 1,
    "micro_batch_size": 1,
    "seed": 0,
    "evaluate_every": 0,
    "evaluate_samples": 1,
    "save_every": 0,
    "keep": 1,
    "sample_every": 0,
    "sample_tokens": 1,
}

# In a run's folder: every setting, and what is made of the documents.
CONFIG_FILE, TOKENIZER_FOLDER, DATA_FOLDER = "config.toml", "tokenizer", "data"
SIZES_FILE = "config.json"  # of its model, as in a checkpoint: `read_config` reads it

# What may differ when a run is resumed: it has no influence on the steps that are done.
FREE_ON_RESUME = tuple(
    f"run.{key}"
    for key in (
        "save_every", "keep", "on_bad_step", "sample_every", "sample_tokens", "prompts", "holes",
        "export_dtype",
    )
)  # fmt: skip

# What may differ when a run goes on from another one's checkpoint: what changes no tensor's shape
# and not which samples a step reads.
FREE_IN_BRANCH = (
    *FREE_ON_RESUME,
    *(f"schedule.{f.name}" for f in dataclasses.fields(ScheduleConfig)),
    *(f"run.{key}" for key in ("steps", "clip", "spike_factor")),
    *(f"run.{key}" for key in ("evaluate_every", "evaluate_samples")),
    *(f"optimizer.{key}" for key in ("lr", "weight_decay")),
    "data.infilling.end_in_context",
)


@dataclass(frozen=True)
class RunConfig:
    """One training run. See each section's class for its keys.

    Raises:
        ConfigError: a value of a wrong type or out of range, named by section and key.
    """

    model: ModelConfig
    data: DataConfig
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    run: LoopConfig = field(default_factory=LoopConfig)

    def to_dict(self) -> dict[str, Any]:
        """Every setting, as JSON and TOML can express it; None where there is none."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        values["model"] = {**values["model"].pop("sizes"), **values["model"]}
        return typing.cast(dict[str, Any], values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The inverse of `to_dict`, and the contents of a TOML file.

        Raises:
            ConfigError: an unknown section or key, or a value that cannot be used.
        """
        values = dict(values)
        if isinstance(model := values.get("model"), dict):
            own = {f.name for f in dataclasses.fields(ModelConfig)} - {"sizes"}
            sizes = {key: value for key, value in model.items() if key not in own}
            values["model"] = {key: value for key, value in model.items() if key in own}
            values["model"]["sizes"] = sizes
        return typing.cast(RunConfig, _build(cls, values, ""))


def read_run_config(file: str | PathLike[str], overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run's TOML file.

    Args:
        file: such as `configs/demo.toml`.
        overrides: settings that replace the file's, such as "optimizer.lr=1e-3". The value is
            written as in TOML; text needs no quotes.

    Raises:
        ConfigError: the file cannot be read or parsed, or a setting is unknown or unusable; names
            the file and the key.
    """
    read = read_toml(Path(file))
    overrides = list(overrides)
    for override in overrides:
        _override(read.values, override)
    try:
        return RunConfig.from_dict(read.values)
    except ConfigError as error:
        raise located(error, read, overrides) from None


def located(error: ConfigError, file: TomlFile, overrides: Iterable[str]) -> ConfigError:
    """An error that begins with a setting, with the place of this setting before it."""
    message = str(error)
    for override in overrides:
        key = override.partition("=")[0].strip()
        if re.match(rf"{re.escape(key)}(?!\w)", message):
            return ConfigError(f"--set {override}: {message}")
    return file.error(message)


def require_run(folder: Path) -> None:
    """Raise InputError unless a folder holds a run."""
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(
            f"{folder} holds no run: name a folder that `mqa-gpt train CONFIG --out FOLDER` made"
        )


def differences(
    old: RunConfig, new: RunConfig, free: Collection[str] = FREE_ON_RESUME
) -> list[str]:
    """The settings in which two runs differ, as text, without those that are free to."""
    was, now = _flat(old.to_dict()), _flat(new.to_dict())
    return [
        f"{key} was {shown(was.get(key))} and is {shown(now.get(key))}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key) and key not in free
    ]


def settings_text(config: RunConfig) -> str:
    """The settings that are not the defaults, one a line; `to_toml` has all."""
    defaults = _flat(RunConfig(ModelConfig(), DataConfig()).to_dict())
    return "\n".join(
        f"{key} = {_toml_value(value)}"
        for key, value in _flat(config.to_dict()).items()
        if value != defaults.get(key)
    )


def to_toml(config: RunConfig) -> str:
    """A run's settings as the text of a TOML file; those that are None are left out."""
    lines = []
    for section, values in config.to_dict().items():
        lines.append(f"[{section}]")
        lines += [
            f"{key} = {_toml_value(value)}" for key, value in values.items() if value is not None
        ]
        lines.append("")
    return "\n".join(lines)


def _override(values: dict[str, Any], override: str) -> None:
    """Set one value of the nested `values` from text such as "run.steps=10"."""
    key, equals, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(
            f"--set {override}: expected SECTION.KEY=VALUE, for example optimizer.lr=1e-3"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # text without quotes
    for part in parts[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override}: {part} is not a section")
    values[parts[-1]] = value


def _build(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """An instance of a dataclass from the table of a TOML file.

    Args:
        where: name of the table with a dot at its end, or "" for the whole file.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where[:-1]} is {shown(values)}: it must be a table")
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    for key in values:
        if key not in names:
            what = "setting" if where else "section"
            raise ConfigError(f"{where}{key} is not a {what}: expected one of {', '.join(names)}")
    for f in dataclasses.fields(kind):
        is_required = f.default is f.default_factory is dataclasses.MISSING
        if is_required and f.name not in values:
            raise ConfigError(f"{where}{f.name} is missing")
    built = {key: _convert(hints[key], value, where + key) for key, value in values.items()}
    try:
        return kind(**built)
    except ConfigError as error:
        message = str(error)
        if where and not message.startswith(where[:-1]):
            is_key = re.match(r"\w+ (?:is|and) ", message)
            message = f"{where}{message}" if is_key else f"{where[:-1]}: {message}"
        raise ConfigError(message) from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    """The value of a TOML key as its field's type; ConfigError if it is of another."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, f"{where}.")
    if origin in (types.UnionType, typing.Union):
        options = [a for a in arguments if a is not types.NoneType]
        if value is None and len(options) < len(arguments):
            return None
        if len(options) == 1:
            return _convert(options[0], value, where)
        for option in options:
            try:
                return _convert(option, value, where)
            except ConfigError:
                continue
        raise _mismatch(where, value, " or ".join(_name(option) for option in options))
    if origin is Literal:
        if value not in arguments:
            raise _mismatch(where, value, f"one of {', '.join(map(str, arguments))}")
        return value
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise _mismatch(where, value, "a list")
        is_open = origin is list or arguments[-1] is Ellipsis
        if not is_open and len(value) != len(arguments):
            raise _mismatch(where, value, f"a list of {len(arguments)}")
        kinds = [arguments[0]] * len(value) if is_open else list(arguments)
        items = enumerate(zip(kinds, value, strict=True))
        return origin(_convert(k, item, f"{where}[{i}]") for i, (k, item) in items)
    if origin is dict:
        if not isinstance(value, dict):
            raise _mismatch(where, value, "a table")
        return {str(k): _convert(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise _mismatch(where, value, _name(hint))
    return value


def _name(hint: Any) -> str:
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    return names.get(hint, str(hint))


def _mismatch(where: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"{where} is {shown(value)}: it must be {expected}")


def _flat(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{where}{key}.")
        else:
            flat[where + key] = value
    return flat


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        inside = ", ".join(f"{key} = {_toml_value(v)}" for key, v in value.items() if v is not None)
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    # TOML writes text, numbers and booleans as JSON does, but never U+007F as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", r"\u007f")
