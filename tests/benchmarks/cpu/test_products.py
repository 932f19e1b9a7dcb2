"""benchmarks/cpu/products.py: the products are right, and what cannot run says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.cpu import products
from benchmarks.cpu.products import Product
from tests.helpers import relative_error


@pytest.mark.slow
@pytest.mark.parametrize("name", products.PRODUCTS)
def test_a_product_is_that_of_the_weight(name: str):
    # Rows of 8 bits have a scale each or, with FBGEMM, one together.
    tolerance = {"float32": 1e-5, "bfloat16": 0.02, "int8": 0.03}[name.split()[0]]
    weight, x = torch.randn(40, 64), torch.randn(17, 64)
    try:
        run = products.PRODUCTS[name].make(weight, 3)
    except (ModuleNotFoundError, ValueError) as error:  # no numba, or not this processor
        pytest.skip(str(error))
    with torch.inference_mode():
        for rows in (1, 2, 17):
            assert relative_error(run(x[:rows]), x[:rows] @ weight.T) < tolerance


def test_products_are_timed_and_what_is_not_there_is_said(tmp_path: Path, monkeypatch, capsys):
    def absent(weight: torch.Tensor, copies: int) -> products.Walk:
        raise RuntimeError("not in this PyTorch\nand more")

    ways = {"float32 plain": products.PRODUCTS["float32 plain"], "absent": Product(4, absent)}
    monkeypatch.setattr(products, "PRODUCTS", ways)
    output = tmp_path / "products.json"
    arguments = ["--sizes", "64x32", "--rows", "1", "3", "--repeats", "2", "--megabytes", "1"]
    assert products.main([*arguments, "--output", str(output)]) == 0
    *timed, reason = json.loads(output.read_text())["figures"]
    assert [(row["rows"], row["product"]) for row in timed] == [
        (1, "float32 plain"), (3, "float32 plain"),
    ]  # fmt: skip
    for row in timed:
        assert (row["K"], row["N"], row["copies"]) == (64, 32, 1_000_000 // (4 * 64 * 32))
        assert row["gb_per_s"] == pytest.approx(4 * 64 * 32 / row["ms"] / 1e6)
        assert row["min_ms"] <= row["ms"] <= row["max_ms"]
    assert reason == {"K": 64, "N": 32, "product": "absent", "reason": "not in this PyTorch"}
    assert "64 x 32, absent: not in this PyTorch" in capsys.readouterr().out
