"""The model that a run starts from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mqa_gpt.errors import InputError
from mqa_gpt.tokenizer import Tokenizer
from mqa_gpt.training.config import RunConfig
from mqa_gpt.training.model import make_model, model_config
from tests.helpers import SPECIALS, assert_same_weights, byte_tokenizer, tiny_model
from tests.training.runs import tiny_run

TOKENIZER = Tokenizer(byte_tokenizer(*SPECIALS))  # 261 entries
CPU = torch.device("cpu")


def run(**changes: object) -> RunConfig:
    return tiny_run(Path("nowhere"), **changes)


def test_sizes_and_end_token_that_the_file_does_not_give_are_the_tokenizers() -> None:
    config = model_config(run(), TOKENIZER)
    assert (config.vocab_size, config.eos_token_id, config.bos_token_id) == (261, 0, 0)
    assert model_config(run(model_vocab_size=300), TOKENIZER).vocab_size == 300


def test_the_seed_decides_the_weights() -> None:
    one, same, other = (make_model(run(run_seed=seed), TOKENIZER, CPU) for seed in (1, 1, 2))
    assert_same_weights(one, same)
    assert not torch.equal(one.transformer.wte.weight, other.transformer.wte.weight)


def test_it_may_start_with_an_induction_circuit() -> None:
    config = run(model_induction=True, model_n_embd=32)
    model = make_model(config, TOKENIZER, CPU)
    assert not model.transformer.h[1].mlp.c_proj.weight.any()


def test_a_model_too_small_for_tokenizer_or_sequences_is_refused() -> None:
    with pytest.raises(InputError, match=r"model\.vocab_size is 200 and the tokenizer has 261"):
        model_config(run(model_vocab_size=200), TOKENIZER)
    with pytest.raises(InputError, match=r"data\.length is 49 and model\.n_positions is 48"):
        model_config(run(data_length=49), TOKENIZER)


def test_a_pretrained_model_has_its_weights_and_the_files_dropout(tmp_path: Path) -> None:
    stored = tiny_model(vocab_size=261)
    stored.half().save_pretrained(tmp_path)
    config = RunConfig.from_dict(
        {
            "model": {"pretrained": str(tmp_path), "attn_pdrop": 0.25, "backend": "reference"},
            "data": {"length": 40},
        }
    )
    model = make_model(config, TOKENIZER, CPU)
    assert_same_weights(model, stored.float())
    assert model.transformer.h[0].attn.attn_pdrop == model.config.attn_pdrop == 0.25
    assert model.transformer.h[0].attn.attend.__name__ == "reference_attention"
