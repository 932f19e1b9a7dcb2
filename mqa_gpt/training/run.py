"""A run from its config to a model that transformers loads: `train`, read from top to bottom."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mqa_gpt.checkpoints.headers import read_config
from mqa_gpt.errors import ConfigError, InputError
from mqa_gpt.machine import cpu_name
from mqa_gpt.model import GPT
from mqa_gpt.progress import duration_text, progress
from mqa_gpt.tokenizer import Tokenizer
from mqa_gpt.training import checkpoints
from mqa_gpt.training.branch import branch
from mqa_gpt.training.checkpoints import RunState
from mqa_gpt.training.checks import notes, require_runnable
from mqa_gpt.training.config import (
    CONFIG_FILE,
    DATA_FOLDER,
    SIZES_FILE,
    TOKENIZER_FOLDER,
    RunConfig,
    differences,
    read_run_config,
    to_toml,
)
from mqa_gpt.training.data import load_data
from mqa_gpt.training.export import export, gathered, written_texts
from mqa_gpt.training.log import LOG_FILE, LOSSES, RunLog, require_tensorboard
from mqa_gpt.training.loop import Step, Trainer
from mqa_gpt.training.model import make_model
from mqa_gpt.training.parallel import World, on_first, world
from mqa_gpt.training.shards import is_prepared
from mqa_gpt.training.signals import RunInterruptedError, Signals, caught_signals
from mqa_gpt.training.speed import Speed, speed_of

MODEL_FOLDER = "model"

# What a new run may have written before its first step.
CONFIG_PART = f"{CONFIG_FILE}.part"  # while it is written; a killed process may leave it
BEGINNING = (
    *(CONFIG_FILE, TOKENIZER_FOLDER, DATA_FOLDER, SIZES_FILE),
    *(checkpoints.FOLDER, LOG_FILE),
)


def train(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    branch_from: Path | None = None,
    device: str | None = None,
    tensor_parallel: int = 1,
    tensorboard: bool = False,
    say: Callable[[str], None] = print,
) -> RunState:
    """Train as a config says; every rank calls this.

    Args:
        out: the run's folder, empty or to be made. It gets `config.toml`, `config.json` (the
            model's), `log.jsonl`, `tokenizer`, `data`, `checkpoints`, and at the end `model`, a
            checkpoint for transformers.
        resume: continue from the last checkpoint in `out`; what follows is what an uninterrupted
            run would have computed, bit for bit, on the same machine and number of ranks.
        branch_from: the folder of another run from whose last checkpoint this one continues, with
            another length or schedule (see `branch.py`).
        device: None takes CUDA where there is one, else the CPU.
        tensor_parallel: how many neighbouring ranks share each layer (see `tensor_parallel.py`).
        tensorboard: also write TensorBoard's files.
        say: gets a line for each thing worth a line, on the first rank.

    Returns:
        The state at the end.

    Raises:
        ConfigError: settings that cannot work together or here (see `checks.py`); begins with one
            of them.
        InputError: `out` is not empty and `resume` is false; or it holds no run to resume, or one
            with other settings, which are named; or the documents are too few.
        FloatingPointError: a bad step that the config wants to stop at; a checkpoint is written.
        RunInterruptedError: SIGINT or SIGTERM arrived; a checkpoint is written.

    What an error before the first step leaves of a new run is removed; nothing else ever is.
    """
    if resume and branch_from is not None:
        raise InputError("--resume continues this run and --from another one: choose one")
    with world(device, tensor_parallel) as ranks:
        tell = say if ranks.is_first else _say_nothing

        def check() -> None:
            if tensorboard:
                require_tensorboard()
            require_folder(out, config, resume)
            has_data = branch_from is not None or (resume and is_prepared(out / DATA_FOLDER))
            require_runnable(config, ranks, is_prepared=has_data)

        def begin() -> str:
            if branch_from is not None:
                return branch(branch_from, out, config)
            prepare_folder(out, config)
            return ""

        on_first(check)
        with removed_on_error(out, is_new=ranks.is_first and not resume):
            branched = on_first(begin)
            if branched:
                tell(branched)
            data = load_data(config, out, tell, ranks)
            found = checkpoints.complete(out)
            if found:
                model = GPT(read_config(out)).to(ranks.device)
                model.set_backend(config.model.backend)
            else:
                model = make_model(config, data.tokenizer, ranks.device)
            trainer = Trainer(config, model, data.training, data.held_out, ranks)
        for note in notes(config, data.training):
            tell(f"note: {note}")
        if found:
            trainer.load(found[-1])
        tell(
            f"{model.config.parameters:,} parameters on {ranks.ranks} x {ranks.device.type}, "
            f"step {trainer.state.step:,} of {config.run.steps:,}"
        )
        speed = speed_of(model.config, config.data.length, ranks.device, config.run.dtype)
        log = RunLog(out if ranks.is_first else None, trainer.state.step, tensorboard)
        with closing(log), caught_signals() as signals:
            log.write("start", trainer.state.step, **machine_facts(ranks, speed))
            if branched:
                log.write("event", trainer.state.step, message=branched)
            Run(trainer, data.tokenizer, out, log, speed, signals, tell).steps()
        with trainer.averaged():
            final = gathered(trainer.model, ranks)
        if final is not None:
            export(final, data.tokenizer, out / MODEL_FOLDER, config.run.export_dtype)
            tell(f"the model is in {out / MODEL_FOLDER}")
        return trainer.state


@dataclass
class Run:
    """What is done between steps: records, held-out losses, texts, checkpoints.

    Attributes:
        saved: the step of the last checkpoint.
    """

    trainer: Trainer
    tokenizer: Tokenizer
    out: Path
    log: RunLog
    speed: Speed
    signals: Signals
    say: Callable[[str], None]
    saved: int = field(init=False)

    def steps(self) -> None:
        """Take the steps that are left."""
        trainer, run = self.trainer, self.trainer.config.run
        self.saved = trainer.state.step
        with progress(run.steps, "step") as show:
            for batches in trainer.batches():
                try:
                    step = trainer.step(batches)
                except FloatingPointError as error:
                    self.log.write("event", trainer.state.step, message=str(error))
                    self.save()
                    raise
                self.record(step, show)
                done = trainer.state.step
                if _is_due(done, run.evaluate_every, run.steps):
                    self.evaluate(step)
                if _is_due(done, run.sample_every, run.steps):
                    self.write_texts()
                if _is_due(done, run.save_every, run.steps):
                    self.save()
                received = trainer.world.largest(self.signals.received)
                if received and done < run.steps:
                    self.log.write("event", done, message=signal.Signals(received).name)
                    self.save()
                    raise RunInterruptedError(received, done)

    def record(self, step: Step, show: Callable[[int, str], None]) -> None:
        """One line of the log, and the progress bar."""
        done, rate = self.trainer.state.step, step.tokens / step.seconds
        used = self.speed.utilisation(rate / self.trainer.world.ranks)
        self.log.write(
            "train",
            done,
            loss=step.loss,
            grad_norm=step.grad_norm,
            lr=step.lr,
            tokens=self.trainer.state.tokens,
            tokens_per_second=rate,
            **used,
        )
        if step.problem:
            self.log.write("event", done, message=f"skipped: {step.problem}")
            self.say(f"step {done:,} is skipped: {step.problem}")
        held_out = self.trainer.state.held_out
        measured = "" if held_out is None else f", held out {held_out[1]:.3f}"
        show(done, f"loss {step.loss:.3f}{measured}, {rate:,.0f} tok/s, MFU {used['mfu']:.0%}")

    def evaluate(self, step: Step) -> None:
        """Compute and record the held-out losses, if anything is held out, and say how it goes."""
        state, steps = self.trainer.state, self.trainer.config.run.steps
        done, parts = state.step, [f"training loss {step.loss:.4f}"]
        if self.trainer.held_out is not None:
            losses = self.trainer.evaluate()
            self.log.write("held_out", done, **losses)
            known = {LOSSES[key]: loss for key, loss in losses.items() if loss is not None}
            found = ", ".join(f"{name} {loss:.4f}" for name, loss in known.items())
            parts.append(f"held out: {found}")
        if done < steps:
            parts.append(f"{duration_text(state.seconds / done * (steps - done))} left")
        self.say(f"step {done:,} of {steps:,}: {'; '.join(parts)}")

    def write_texts(self) -> None:
        """Let the model write what the config asks it to."""
        run, done = self.trainer.config.run, self.trainer.state.step
        with self.trainer.averaged():
            model = gathered(self.trainer.model, self.trainer.world)
        if model is not None:
            for text in written_texts(model, self.tokenizer, run):
                self.log.write("sample", done, text=text)
                self.say(f"step {done:,}: {text!r}")

    def save(self) -> None:
        """Write a checkpoint, unless this step has one."""
        if self.saved != self.trainer.state.step:
            self.trainer.save(self.out)
            self.saved = self.trainer.state.step


def require_folder(out: Path, config: RunConfig, resume: bool) -> None:
    """Raise InputError unless a run of this config can begin or be resumed in a folder."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is not a folder: choose another --out")
    has_run = holds_run(out)
    if resume and not has_run:
        raise InputError(f"{out} holds no run to resume: leave --resume out")
    if not resume and has_run:
        raise InputError(f"{out} holds a run: pass --resume, or choose another --out")
    if not resume and out.exists() and any(path.name != CONFIG_PART for path in out.iterdir()):
        raise InputError(f"{out} holds something else than a run: choose another --out")
    if resume:
        changed = differences(read_run_config(out / CONFIG_FILE), config)
        if changed:
            raise InputError(
                f"the run in {out} cannot be resumed with other settings: {'; '.join(changed)}"
            )


def holds_run(folder: Path) -> bool:
    """Whether a run has begun in a folder: there is a log, or a config as `to_toml` writes it.

    A `config.toml` in any other form is the user's own and must not be overwritten.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        return False
    if (folder / LOG_FILE).is_file():
        return True
    try:
        config = read_run_config(file)
    except ConfigError:  # of some other program
        return False
    return file.read_text(encoding="utf-8") == to_toml(config)


@contextmanager
def removed_on_error(out: Path, *, is_new: bool) -> Iterator[None]:
    """If the block ends with an error, remove what it has written of a new run.

    Ctrl-C is none: the run can be resumed.
    """
    existed = out.exists()
    absent = [path for name in BEGINNING if not (path := out / name).exists()]
    try:
        yield
    except Exception:
        if is_new:
            for path in absent:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            if not existed:
                with suppress(OSError):  # it was not made, or somebody else has a file in it
                    out.rmdir()
        raise


def prepare_folder(out: Path, config: RunConfig) -> None:
    """Make a run's folder and write the config, unless a resumed run has the same there."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / CONFIG_FILE
    if not file.exists() or read_run_config(file) != config:
        part = out / CONFIG_PART
        part.write_text(to_toml(config), encoding="utf-8")
        part.replace(file)
    checkpoints.tidy(out)


def machine_facts(ranks: World, speed: Speed) -> dict[str, str | int | float]:
    """Where a run is computed: what may change the last bits of its numbers, or its speed."""
    is_gpu = ranks.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(ranks.device) if is_gpu else cpu_name(),
        "ranks": ranks.size,
        "tensor_parallel": ranks.ranks // ranks.size,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "peak_flops": speed.peak,
        "peak_source": speed.source,
    }


def _is_due(done: int, every: int, steps: int) -> bool:
    """Whether something is done after this step: every `every` steps, and after the last one."""
    return done == steps or (every > 0 and done % every == 0)


def _say_nothing(text: str) -> None:
    """What ranks other than the first say."""
