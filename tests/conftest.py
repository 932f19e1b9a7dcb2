"""Set before any test module is imported: quiet, offline, one thread, repeatable."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests of the hub talk to a loopback server instead
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import hypothesis
import pytest
import torch

# Without a GPU the kernels run under Triton's interpreter, which has to be chosen before Triton is
# imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# For every module. After the lines above, since they import Triton.
pytest_plugins = ["tests.fake_cuda", "tests.fast_interpreter"]

# One thread is fastest for models this small, and lets pytest-xdist use the other cores.
torch.set_num_threads(1)

# The same examples on every run and every machine; deadlines would measure the machine.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
