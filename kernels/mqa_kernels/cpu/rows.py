"""What happens to one row of numbers: exponentials, activations, layer norm."""

from __future__ import annotations

from typing import Any

from mqa_kernels.cpu.simd import (
    LANES,
    clamp,
    fma,
    keep,
    load,
    nearest,
    part,
    power_of_two,
    splat,
    store,
    total,
)

INFINITY = float("inf")

NONE, GELU, GELU_TANH, RELU = range(4)  # activations


@part
def exp(x: Any) -> Any:
    """e^x of a vector, within two units in the last place; 1.6e-38 below -87.

    x = n ln 2 + r with |r| <= ln 2 / 2, so e^x = 2^n e^r; e^r by Taylor's series up to r^7 / 7!.
    """
    x = clamp(x, splat(-87.0), splat(88.0))
    n = nearest(x * splat(1.4426950408889634))
    r = fma(n, splat(-0.693145751953125), x)  # ln 2 in two parts, the first exact in n
    r = fma(n, splat(-1.428606765330187e-06), r)
    y = fma(r, splat(1 / 5040), splat(1 / 720))
    y = fma(r, y, splat(1 / 120))
    y = fma(r, y, splat(1 / 24))
    y = fma(r, y, splat(1 / 6))
    y = fma(r, y, splat(0.5))
    y = fma(r, y, splat(1.0))
    y = fma(r, y, splat(1.0))
    return y * power_of_two(n)


@part
def activate(x: Any, activation: int) -> Any:
    """The MLP's nonlinearity of a vector."""
    if activation == RELU:
        return clamp(x, splat(0.0), splat(INFINITY))
    if activation == GELU_TANH:  # x (1 + tanh u) / 2 = x / (1 + e^-2u), u = sqrt(2/pi) (x + ...)
        u = splat(0.7978845608028654) * fma(splat(0.044715) * x, x * x, x)
        return x / (splat(1.0) + exp(splat(-2.0) * u))
    # x Phi(x); erfc(z) = e^(-z^2) times a polynomial of 1 / (1 + p z) for z >= 0
    # (Abramowitz and Stegun 7.1.26, within 1.5e-7).
    zero = splat(0.0)
    z = splat(0.7071067811865476) * clamp(x, zero - x, splat(INFINITY))
    t = splat(1.0) / fma(splat(0.3275911), z, splat(1.0))
    y = fma(t, splat(1.061405429), splat(-1.453152027))
    y = fma(t, y, splat(1.421413741))
    y = fma(t, y, splat(-0.284496736))
    y = fma(t, y, splat(0.254829592))
    tail = splat(0.5) * t * y * exp(zero - z * z)  # Phi(-|x|)
    negative = clamp(x, splat(-INFINITY), zero)
    positive = clamp(x, zero, splat(INFINITY))
    return fma(negative - positive, tail, positive)


@part
def layer_norm(x: Any, weight: Any, bias: Any, out: Any, C: int, epsilon: float) -> None:
    """out = (x - mean) / sqrt(variance + epsilon) * weight + bias, over C numbers."""
    sums = splat(0.0)
    for i in range(0, C, LANES):
        sums = sums + load(x, i, C)
    mean = splat(total(sums) / C)
    squares = splat(0.0)
    for i in range(0, C, LANES):
        d = keep(load(x, i, C) - mean, C - i)
        squares = fma(d, d, squares)
    rstd = splat(1 / (total(squares) / C + epsilon) ** 0.5)
    for i in range(0, C, LANES):
        y = fma((load(x, i, C) - mean) * rstd, load(weight, i, C), load(bias, i, C))
        store(out, i, y, C)
