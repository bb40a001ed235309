"""Paged attention, decode and prefill, against the reference; on CPU in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lora_kernels import attention, reference
from tests.kernels.paged_rows import DEVICE, PICKING_SCALE, Rows, counting, make_rows, picking

# In float32 a score is a sum of 64 to 256 products, scaled by up to 0.5. In another order it is off
# by some 1e-5, and with it the weight of a value of size 1; a key too many or too few makes 1e-2.
# The other types round the weights and the result: two units in the last place, for values to 4.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


# Around the borders of pages and of blocks of keys.
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 100)


# The reference


@pytest.mark.parametrize("window", [None, 5])
def test_the_reference_is_what_torch_computes(window: int | None) -> None:
    rows = make_rows([40], [12], heads=4, kv_heads=2)
    pages = rows.table[0, :3].long()
    keys, values = (
        side[pages].transpose(0, 1).flatten(1, 2)[:, :40].repeat_interleave(2, 0)
        for side in (rows.keys, rows.values)
    )
    position = torch.arange(28, 40)[:, None]
    seen = (torch.arange(40) <= position) & (torch.arange(40) > position - (window or 40))
    expected = F.scaled_dot_product_attention(
        rows.q.transpose(0, 1).cpu(), keys.cpu(), values.cpu(), attn_mask=seen, scale=0.3
    )
    torch.testing.assert_close(rows.expected(0.3, window).cpu(), expected.transpose(0, 1))


# Decode


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (8, 1)])
def test_decode_with_1_4_and_8_heads_a_kv_head(
    heads: int, kv_heads: int, kernel_dtype: torch.dtype
) -> None:
    rows = make_rows(LENGTHS, heads=heads, kv_heads=kv_heads, dtype=kernel_dtype)
    assert_close(rows.decoded(0.125), rows.expected(0.125))


def test_decode_with_more_heads_a_kv_head_than_a_tile_has_rows() -> None:
    rows = make_rows([17, 40], heads=40, kv_heads=2)
    assert_close(rows.decoded(0.125), rows.expected(0.125))


@pytest.mark.parametrize("head_dim", [80, 96, 128, 256])
def test_decode_and_prefill_of_other_head_sizes(head_dim: int) -> None:
    rows = make_rows([17, 40], head_dim=head_dim)
    assert_close(rows.decoded(0.1), rows.expected(0.1))
    rows = make_rows([17, 40], [17, 9], head_dim=head_dim)
    assert_close(rows.prefilled(0.1), rows.expected(0.1))


@pytest.mark.parametrize("page_tokens", [1, 4, 16, 64])
def test_decode_and_prefill_with_pages_of_other_sizes(page_tokens: int) -> None:
    rows = make_rows([1, 63, 64, 70], page_tokens=page_tokens)
    assert_close(rows.decoded(0.125), rows.expected(0.125))
    rows = make_rows([1, 64, 70], [1, 9, 70], page_tokens=page_tokens)
    assert_close(rows.prefilled(0.125), rows.expected(0.125))


@pytest.mark.parametrize(
    ("window", "softcap"), [(1, None), (16, None), (40, None), (None, 3.0), (40, 3.0)]
)
def test_decode_with_a_sliding_window_and_softcap(
    window: int | None, softcap: float | None
) -> None:
    rows = make_rows(LENGTHS)
    assert_close(rows.decoded(0.5, window, softcap), rows.expected(0.5, window, softcap))


@pytest.mark.parametrize("window", [None, 300])
def test_long_rows_are_cut_into_segments_and_short_ones_beside_them_are_not(
    window: int | None,
) -> None:
    lengths = [1, 128, 129, 517, 900]
    rows = make_rows(lengths, heads=2, kv_heads=1, pages_max=64)
    assert attention.split(len(lengths), 1, 64 * 16).segments == 8
    assert_close(rows.decoded(0.125, window), rows.expected(0.125, window))


def test_segments_are_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_SEGMENT_KEYS", 20)
    rows = make_rows([19, 20, 21, 333], heads=2, kv_heads=1)
    assert attention.split(4, 1, rows.table.shape[1] * 16) == attention.Split(18, 20)
    assert_close(rows.decoded(0.125), rows.expected(0.125))


def test_many_rows_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention.split(64, 8, 2048).segments == 1
    monkeypatch.setattr(attention, "_PROGRAMS", 9)
    rows = make_rows([3, 130, 17, 1, 200], heads=2, kv_heads=1)
    assert_close(rows.decoded(0.125, scratch=torch.empty(0, device=DEVICE)), rows.expected(0.125))


def test_many_rows_in_a_wide_table_are_cut_coarsely(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention.split(64, 8, 131_072) == attention.Split(8, 8192)
    # Eight thousand keys are too many for the interpreter.
    monkeypatch.setattr(attention, "_PROGRAMS", 1)
    monkeypatch.setattr(attention, "_LONG_SEGMENT_KEYS", 64)
    rows = make_rows([1, 64, 65, 200], heads=2, kv_heads=1, pages_max=20)
    assert_close(rows.decoded(0.125), rows.expected(0.125))


def test_the_split_depends_on_shapes_alone_and_its_results_fit_the_scratch() -> None:
    for rows in (1, 2, 4, 8, 16, 24, 64, 128, 256):
        for programs in (1, 2, 8, 32):
            for keys_max in (16, 1024, 8192, 131_072):
                cut = attention.split(rows, programs, keys_max)
                assert 1 <= cut.segments <= 64
                scratch = attention.decode_scratch(rows, 2, 4, torch.device("cpu"))
                assert rows * cut.segments * 2 * (4 + 2) <= scratch.numel()


def test_any_number_of_rows_is_joined_as_some_bucket_of_a_graph_is() -> None:
    """What was compiled for graphs is all that decode needs beside them."""

    def joined(rows: int, keys_max: int) -> int | None:
        segments = attention.split(rows, 8, keys_max).segments
        return attention.join_size(segments) if segments > 1 else None

    for keys_max in (1024, 8192, 131_072):
        captured = {joined(rows, keys_max) for rows in (1, 2, 4, *range(8, 257, 8))}
        assert {joined(rows, keys_max) for rows in range(1, 257)} <= captured


def test_one_scratch_serves_other_rows_and_lengths_as_a_replayed_graph_would() -> None:
    scratch = attention.decode_scratch(3, 2, 64, DEVICE).fill_(float("nan"))
    for seed, lengths in enumerate(([900, 300, 1], [1, 1, 1], [130, 0, 700], [512, 256, 513])):
        rows = make_rows(lengths, heads=2, kv_heads=1, pages_max=64, seed=seed)
        got = rows.decoded(0.125, scratch=scratch)
        assert_close(got, rows.expected(0.125))
        # A row by itself is cut into more.
        alone = replace(rows, q=rows.q[2:], table=rows.table[2:], lengths=rows.lengths[2:])
        assert_close(alone.decoded(0.125, scratch=scratch), got[2:])


def test_what_lies_before_the_window_is_not_read() -> None:
    """Its pages may be another row's by now."""
    window = 20
    rows = make_rows([90, 70], [12, 1])
    prefilled = rows.expected(0.125, window)
    last = replace(rows, q=rows.q[11:], starts=torch.arange(3, device=DEVICE).int())
    decoded = last.expected(0.125, window)
    for row, (length, chunk) in enumerate(((90, 12), (70, 1))):
        gone = length - chunk + 1 - window
        nothing = torch.full((gone, 2, 64), float("nan"))
        rows.place(row, nothing, nothing)
    assert_close(rows.prefilled(0.125, window), prefilled)
    assert_close(last.decoded(0.125, window), decoded)
    rows.table[:, :2] = 2**30
    assert_close(rows.prefilled(0.125, window), prefilled)


def test_padding_rows_give_zeros() -> None:
    rows = make_rows([0, 5, 0], pages_max=20)
    got = rows.decoded(0.125)
    assert not got[0].any() and not got[2].any()
    assert_close(got, rows.expected(0.125))
    rows = make_rows([0, 30, 0], [0, 5, 1])
    assert_close(rows.prefilled(0.125), rows.expected(0.125))


def test_offsets_beyond_two_to_the_31_elements() -> None:
    """Pages lie far apart, in memory that is reserved but never touched."""
    if DEVICE.type != "cpu":
        pytest.skip("a card may not have the memory")
    heads, head_dim, page_tokens, stride = 2, 64, 16, 2**28
    memory = torch.empty(9 * stride, dtype=torch.float16)
    keys = memory.as_strided((9, 1, page_tokens, head_dim), (stride, 2048, head_dim, 1))
    values = memory[1024:].as_strided(keys.shape, keys.stride())
    generator = torch.Generator().manual_seed(0)
    for side in (keys, values):
        side[8] = torch.randn(side[8].shape, generator=generator)
    q = torch.randn(1, heads, head_dim, generator=generator).half()
    table = torch.tensor([[8, 0]], dtype=torch.int32)
    rows = Rows(q, keys, values, table, torch.tensor([0, 1]).int(), torch.tensor([16]).int())
    assert_close(rows.decoded(0.125), rows.expected(0.125))
    assert_close(rows.prefilled(0.125), rows.expected(0.125))


# Prefill


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (8, 1), (6, 2)])
def test_prefill_of_ragged_chunks_with_and_without_context(
    heads: int, kv_heads: int, kernel_dtype: torch.dtype
) -> None:
    rows = make_rows(
        [1, 16, 17, 40, 33, 70], [1, 16, 3, 33, 1, 70], heads, kv_heads, dtype=kernel_dtype
    )
    assert_close(rows.prefilled(0.125), rows.expected(0.125))


@pytest.mark.parametrize(
    ("window", "softcap"), [(1, None), (7, None), (16, None), (200, None), (None, 3.0), (40, 3.0)]
)
def test_prefill_with_a_sliding_window_and_softcap(
    window: int | None, softcap: float | None
) -> None:
    rows = make_rows([90, 120, 20], [90, 30, 1])
    assert_close(rows.prefilled(0.5, window, softcap), rows.expected(0.5, window, softcap))


def test_prefill_of_one_row_and_of_many_tiny_ones() -> None:
    rows = make_rows([50], [50])
    assert_close(rows.prefilled(0.125), rows.expected(0.125))
    chunks = [1 + row % 3 for row in range(21)]
    rows = make_rows([chunk + 5 for chunk in chunks], chunks)
    assert_close(rows.prefilled(0.125), rows.expected(0.125))


def test_prefill_with_more_heads_a_kv_head_than_a_tile_has_rows() -> None:
    rows = make_rows([20], [5], heads=71, kv_heads=1)
    assert_close(rows.prefilled(0.125), rows.expected(0.125))


@pytest.mark.parametrize("window", [None, 10])
def test_prefill_in_two_chunks_equals_one(window: int | None) -> None:
    whole = make_rows([60], [60])
    at_once = whole.prefilled(0.125, window)
    for cut in (1, 16, 37):
        starts = torch.tensor([0, cut, 60], dtype=torch.int32, device=DEVICE)
        table = whole.table.repeat(2, 1)
        halves = replace(whole, table=table, starts=starts, lengths=starts[1:])
        assert_close(halves.prefilled(0.125, window), at_once)


def test_the_last_token_prefilled_equals_it_decoded() -> None:
    chunk = make_rows([20, 65], [20, 65], heads=8)
    last = chunk.starts[1:].long() - 1
    decode = Rows(chunk.q[last], chunk.keys, chunk.values, chunk.table, chunk.starts, chunk.lengths)
    assert_close(decode.decoded(0.125), chunk.prefilled(0.125)[last])


def test_large_tiles_are_for_long_chunks_that_fill_the_device() -> None:
    def queries(tokens: int, chunk: int) -> int:
        return attention.prefill_tile(2, 128, tokens, 32, chunk * 4).queries

    assert queries(8192, 8192) == 128
    assert queries(256, 256) == 64
    assert queries(8192, 16) == 64


# Exact results


# The interpreter has time for little; on a GPU, what fills the largest tiles many times.
SIZES = (
    ([300, 65, 1], [70, 65, 1], 6, 2)
    if DEVICE.type == "cpu"
    else ([4096, 3000], [4096, 900], 32, 8)
)


@pytest.mark.parametrize("window", [None, 40])
def test_integers_that_pick_one_value_come_out_exactly(
    window: int | None, kernel_dtype: torch.dtype
) -> None:
    """A miscompiled matmul shows here (Triton issue 9433: wrong by a few in a hundred)."""
    lengths, chunks, heads, kv_heads = SIZES
    rows, expected = picking(
        make_rows(lengths, chunks, heads, kv_heads, dtype=kernel_dtype), window
    )
    assert torch.equal(rows.prefilled(PICKING_SCALE, window), expected)
    rows, expected = picking(make_rows(lengths, None, heads, kv_heads, dtype=kernel_dtype), window)
    assert torch.equal(rows.decoded(PICKING_SCALE, window), expected)


def test_each_key_is_counted_once(kernel_dtype: torch.dtype) -> None:
    # All but one division is exact. A GPU divides to two units in the last place of float32; then
    # the result is rounded.
    rounding = 2 * torch.finfo(torch.float32).eps + torch.finfo(kernel_dtype).eps / 2
    lengths, chunks, heads, kv_heads = SIZES
    rows, expected = counting(make_rows(lengths, chunks, heads, kv_heads, dtype=kernel_dtype))
    torch.testing.assert_close(rows.prefilled(1.0).double(), expected, rtol=rounding, atol=0)
    rows, expected = counting(make_rows(lengths, None, heads, kv_heads, dtype=kernel_dtype))
    torch.testing.assert_close(rows.decoded(1.0).double(), expected, rtol=rounding, atol=0)


# torch's own


def test_torchs_own_attention_is_left_alone_where_it_cannot_read_pages() -> None:
    assert attention.paging_varlen(torch.empty(1, 1, 64)) is None


@pytest.mark.parametrize("window", [None, 5])
def test_torchs_own_attention_is_told_the_same(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def varlen(
        out: torch.Tensor,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        starts: torch.Tensor,
        key_starts: None,
        queries_max: int,
        keys_max: int,
        *,
        scale: float,
        window_size: tuple[int, int],
        enable_gqa: bool,
        seqused_k: torch.Tensor,
        block_table: torch.Tensor,
    ) -> None:
        """As torch documents it: pages of [page_tokens, kv_heads, head_dim], window (left, 0)."""
        left, right = window_size
        assert right == 0 and enable_gqa and key_starts is None
        assert queries_max >= 12 and keys_max >= 30
        over = (q, keys.transpose(1, 2), values.transpose(1, 2), block_table, starts, seqused_k)
        out.copy_(reference.attention(*over, scale, None if left < 0 else left + 1))
        calls.append(1)

    rows = make_rows([30, 12], [4, 12])
    ours = rows.prefilled(0.125, window)
    monkeypatch.setattr(attention, "paging_varlen", lambda q: varlen)
    assert_close(rows.prefilled(0.125, window), ours)
    assert calls == [1]
    assert_close(rows.prefilled(0.125, window, 3.0), rows.expected(0.125, window, 3.0))
    assert calls == [1]
