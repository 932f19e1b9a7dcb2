"""Attention inside documents: each document of a sequence is computed as if it stood alone."""

from __future__ import annotations

import pytest
import torch

from mqa_gpt.training.attention import attend_inside_documents
from tests.helpers import random_ids, relative_error, tiny_model


@pytest.mark.parametrize("multi_query", [True, False])
def test_what_other_documents_say_changes_nothing(multi_query: bool) -> None:
    model = tiny_model(multi_query=multi_query)
    ids = random_ids(model.config, 2, 20)
    attend = attend_inside_documents(model)
    attend.documents = torch.tensor([[0] * 7 + [1] * 13, [0] * 12 + [1] * 8])
    logits = model(ids)
    other = ids.clone()
    other[0, :7], other[1, 12:] = 5, 6
    changed = model(other)
    assert torch.equal(changed[0, 7:], logits[0, 7:])
    assert torch.equal(changed[1, :12], logits[1, :12])
    assert not torch.allclose(changed[0, :7], logits[0, :7])


def test_one_document_is_ordinary_attention() -> None:
    model = tiny_model()
    ids = random_ids(model.config, 2, 20)
    expected = model(ids)
    attend_inside_documents(model).documents = torch.zeros(2, 20, dtype=torch.int32)
    assert relative_error(model(ids), expected) < 1e-5
