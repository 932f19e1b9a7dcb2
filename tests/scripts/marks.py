"""What the tests of the GPU scripts have in common: they run in small, without a GPU."""

import pytest
import torch

WITHOUT_GPU = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="these are tests without a GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter meets poisoned slots
    pytest.mark.usefixtures("undone_poisoning"),
]
