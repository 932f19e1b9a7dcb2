"""benchmarks/cpu/products.py: the products are right, and what cannot run says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.cpu import products
from mqa_gpt.fast.packing import can_pack
from tests.helpers import relative_error


@pytest.mark.parametrize(
    "name", [name for name in products.PRODUCTS if name.startswith(("float32", "bfloat16"))]
)
def test_a_product_without_integers_is_that_of_the_weight(name: str):
    dtype = torch.float32 if name.startswith("float32") else torch.bfloat16
    if name != str(dtype).removeprefix("torch.") and not can_pack(nn.Linear(1, 1, dtype=dtype)):
        pytest.skip(f"no packed {dtype} products here")
    weight = torch.randn(32, 64)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02  # bfloat16 has 8 bits
    with torch.inference_mode():
        bytes_, product = products.PRODUCTS[name](weight)
        assert bytes_ == weight.numel() * dtype.itemsize
        for rows in (1, 2, 5):
            x = torch.randn(rows, 64)
            assert relative_error(product(x), x @ weight.t()) < tolerance


@pytest.mark.slow
def test_products_are_timed_and_what_is_not_there_is_said(tmp_path: Path, monkeypatch):
    def absent(weight: torch.Tensor) -> products.Copy:
        raise RuntimeError("not in this PyTorch")

    monkeypatch.setitem(products.PRODUCTS, "absent", absent)
    output = tmp_path / "products.json"
    arguments = [
        "--sizes",
        "64x32",
        "--rows",
        "1",
        "3",
        "--repeats",
        "2",
        "--megabytes",
        "1",
        "--output",
    ]
    products.main([*arguments, str(output)])
    figures = json.loads(output.read_text())["figures"]
    timed = [row for row in figures if "ms" in row]
    assert {"float32", "float32 packed"} <= {row["product"] for row in timed}
    assert {(row["K"], row["N"]) for row in timed} == {(64, 32)}
    assert {row["rows"] for row in timed} == {1, 3}
    plain = next(row for row in timed if row["product"] == "float32")
    assert plain["copies"] == 1_000_000 // (4 * 64 * 32)
    assert plain["gb_per_s"] == pytest.approx(4 * 64 * 32 / plain["ms"] / 1e6)
    assert [row for row in figures if row["product"] == "absent"] == [
        {"K": 64, "N": 32, "product": "absent", "reason": "not in this PyTorch"}
    ]


def test_a_size_that_pytorchs_8_bit_product_does_not_check_is_refused_before_it_is_called():
    with pytest.raises(ValueError, match="K is 33: it takes multiples of 16 only"):
        products.int8_weights_only(torch.ones(7, 33))
    _, product = products.int8_weights_only(torch.ones(7, 48))
    assert product(torch.ones(3, 48)).shape == (3, 7)


@pytest.mark.slow
def test_a_product_that_does_not_take_a_size_is_skipped_with_its_reason(tmp_path: Path, capsys):
    output = tmp_path / "products.json"
    arguments = ["--sizes", "33x7", "--rows", "1", "--repeats", "1", "--megabytes", "1"]
    assert products.main([*arguments, "--output", str(output)]) == 0
    figures = json.loads(output.read_text())["figures"]
    reasons = {row["product"]: row["reason"] for row in figures if "reason" in row}
    assert "multiples of 16" in reasons["int8 weights only, bfloat16"]
    assert "float32" in {row["product"] for row in figures if "ms" in row}
    assert "33 x 7, int8 weights only, bfloat16: K is 33" in capsys.readouterr().out


def test_tiny_weights_are_not_copied_without_end(monkeypatch):
    monkeypatch.setattr(products, "MOST_COPIES", 5)
    assert len(products.copies(products.plain_float32, torch.ones(1, 1), 1000)) == 6
    assert len(products.copies(products.plain_float32, torch.ones(5, 5), 300)) == 3
    assert len(products.copies(products.plain_float32, torch.ones(9, 9), 1)) == 2
