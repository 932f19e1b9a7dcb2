"""tuning.py: what the choices of tiles and splits promise."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not available on this platform")

import triton

from mqa_kernels import tuning

WIDTHS = (768, 2048, 2816, 4096, 6144)  # C of the official models


def products(C):
    """N and K of the products of a decode step."""
    D = 64 if C == 768 else 128
    return (C + 2 * D, C), (C, C), (4 * C, C), (C, 4 * C), (49_152, C)


def test_no_last_wave_on_an_h200_leaves_most_of_it_idle_for_long():
    """The time that is lost when fewer programs than multiprocessors are left, over the whole."""
    for C, rows, int8 in itertools.product(WIDTHS, (1, 8, 16), (False, True)):
        for N, K in products(C):
            tiles = tuning.linear_tiles(torch.bfloat16, rows, N, K, int8, 132)
            programs = triton.cdiv(N, tiles.BLOCK_N)
            rest = programs % 264
            if programs > 264 and rest:
                assert (132 - rest) / programs < 0.15


@pytest.mark.parametrize("multiprocessors", [78, 108, 114, 128, 142, 148])
def test_other_gpus_get_about_a_program_per_multiprocessor_or_more(multiprocessors):
    for C, rows, int8 in itertools.product(WIDTHS, range(1, 17), (False, True)):
        for N, K in products(C):
            tiles = tuning.linear_tiles(torch.bfloat16, rows, N, K, int8, multiprocessors)
            assert triton.cdiv(N, tiles.BLOCK_N) >= min(0.75 * multiprocessors, N / 16)


def test_an_h200_gets_the_tiles_that_are_known_to_be_good():
    blocks = {
        (C, rows): [
            tuning.linear_tiles(torch.bfloat16, rows, *product).BLOCK_N for product in products(C)
        ]
        for C in WIDTHS
        for rows in (1, 8)
    }
    assert blocks[768, 8] == [16, 16, 16, 16, 32]
    assert blocks[2048, 8] == [16, 16, 64, 16, 64]
    assert blocks[2816, 8] == [16, 16, 64, 16, 64]
    assert blocks[4096, 8] == [32, 32, 64, 32, 64]
    assert blocks[6144, 8] == [32, 32, 64, 32, 64]
    assert blocks[2048, 1] == blocks[2816, 1] == [16] * 5
    # 272 programs of 16 rows would be 8 more than there are places.
    assert blocks[4096, 1] == [32, 16, 16, 16, 16]
    # 400 of them would be 4 more than there are places for three programs per multiprocessor.
    assert blocks[6144, 1] == [32, 16, 16, 16, 16]


def test_keys_are_split_for_two_programs_per_multiprocessor_with_two_steps_or_more():
    decode = tuning.forward_tiles(torch.bfloat16, 128, 32)
    assert tuning.key_splits(1, 128, decode, multiprocessors=132) == 64
    assert tuning.key_splits(1, 16, decode, multiprocessors=132) == 8
    assert tuning.key_splits(16, 128, decode, multiprocessors=132) == 16
    assert tuning.key_splits(8, 128, decode, multiprocessors=132) == 32  # the 33rd would be empty
    assert tuning.key_splits(132, 128, decode, multiprocessors=132) == 1
    assert tuning.key_splits(1, 4, decode, multiprocessors=132) == 1


def test_keys_are_split_for_a_short_chunk_of_a_long_prompt_but_not_for_a_short_prompt():
    prefill = tuning.forward_tiles(torch.bfloat16, 128, 4096)
    for heads in (16, 32, 48):
        assert tuning.key_splits(64 * heads // 128, 8192 // 64, prefill, 132) > 8
        for tokens in (64, 128, 256, 512, 1024, 2048):
            assert tuning.key_splits(tokens * heads // 128, tokens // 64, prefill, 132) == 1


def test_rows_are_split_for_twice_the_programs_that_fit_with_four_steps_or_more():
    wide, narrow = (tuning.key_tiles(torch.bfloat16, D) for D in (128, 64))
    assert tuning.row_splits(64, 8192, wide, multiprocessors=132) == 4
    assert tuning.row_splits(1, 64, wide, multiprocessors=132) == 16
    assert tuning.row_splits(265, 8192, wide, multiprocessors=132) == 1
    assert tuning.row_splits(1, 3, wide, multiprocessors=132) == 1
    assert tuning.row_splits(256, 3072, narrow, multiprocessors=132) == 3


@pytest.mark.parametrize("dropout", [False, True])
def test_long_tiles_have_a_third_stage_where_it_neither_spills_nor_exceeds_the_memory(dropout):
    for architecture, stages in ((80, 2), (86, 2), (90, 3), (100, 3), (120, 2)):
        for rows in (1, 65, 4096):
            tiles = tuning.forward_tiles(torch.bfloat16, 128, rows, dropout, architecture)
            assert tiles.stages == stages


def test_one_token_of_48_heads_has_a_tile_that_is_mostly_full():
    for rows in range(1, 129):
        tiles = tuning.forward_tiles(torch.bfloat16, 128, rows)
        assert min(m for m in (16, 32, 64, 128) if m >= rows) == tiles.M
