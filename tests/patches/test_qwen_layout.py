"""What the tokens of Qwen-VL prompts are: read from ids and grids, cut, continued, described for a batch."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_sparse_attn.context import Segment, TokenLayout
from hf_sparse_attn.hosts.vision_layout import IMAGE, TEXT, VIDEO, Tokens, read_tokens, text_tokens
from hf_sparse_attn.hosts.vision_segments import Cut
from hf_sparse_attn.selection import text_blocks
from hf_sparse_attn.span import Span
from tests.support.tiny_qwen import IMAGE as IMAGE_ID
from tests.support.tiny_qwen import KINDS, left_padded, prompt, tiny_qwen
from tests.support.tiny_qwen import VIDEO as VIDEO_ID

PROMPTS = {
    "text": [17],
    "image": [5, (3, 7), 4],
    "video": [3, (7, 13, 9), 1],
    "flat_video": [(5, 1, 3), 2],
    "several": [2, (1, 5), (3, 3), 4, (3, 2, 5), 1, (2, 4, 1), (5, 1), 6],
    "twins": [(2, 3), (2, 3), (2, 2, 3), (2, 2, 3)],
}


def read(inputs) -> Tokens:
    grids = {IMAGE: inputs.get("image_grid_thw"), VIDEO: inputs.get("video_grid_thw")}
    ids = inputs["input_ids"]
    return read_tokens((ids == IMAGE_ID) * IMAGE + (ids == VIDEO_ID) * VIDEO, grids, 2)


def coordinates(tokens: Tokens, row: int = 0) -> torch.Tensor:
    return TokenLayout(tokens.rows[row], is_causal=True).coordinates()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PROMPTS)
def test_coordinates_are_those_of_the_model(kind, name):
    model, inputs = tiny_qwen(kind).model, prompt(kind, PROMPTS[name])
    where = coordinates(read(inputs))
    vision = inputs["mm_token_type_ids"][0] > 0
    assert torch.equal(where[:, 0] >= 0, vision) and bool((where[~vision] == -1).all())
    if name == "text":
        return
    grids = {k: v for k, v in inputs.items() if k.endswith("grid_thw")}
    place = model.get_rope_index(inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"], **grids)[0][:, 0]
    clips, videos = where[vision][:, 0], inputs["mm_token_type_ids"][0][vision] == VIDEO
    assert clips.unique().tolist() == list(range(sum(isinstance(p, tuple) for p in PROMPTS[name])))
    for clip in clips.unique():
        own = where[:, 0] == clip
        frames, position = where[own], place[:, own]
        # Qwen3 starts the positions of every frame anew, after its timestamp.
        starts = frames[:, 1] if kind.startswith("qwen3") else torch.zeros_like(frames[:, 1])
        for start in starts.unique():
            here = starts == start
            first = position[:, here][:, :1]
            assert torch.equal((position[:, here] - first)[1:], frames[here].T[2:])
        if not kind.startswith("qwen3"):
            pace = 3 if kind == "qwen2_5_vl" and bool(videos[clips == clip].all()) else 1
            assert torch.equal(position[0] - position[0, 0], frames[:, 1] * pace)
        # Every cell once, in raster order.
        sizes = (frames[:, 1:].max(0).values + 1).tolist()
        assert torch.equal(frames[:, 1:], torch.cartesian_prod(*(torch.arange(n) for n in sizes)))


def test_layout_says_video_where_it_is_one_piece():
    whole = TokenLayout(read(prompt("qwen2_vl", [4, (3, 2, 5), 6])).rows[0], is_causal=True)
    assert whole.video_part == (5, Segment("video", 30, (3, 2, 5), 0, 0))
    pieces = TokenLayout(read(prompt("qwen3_vl", [4, (3, 2, 5), 6])).rows[0], is_causal=True)
    assert pieces.video_part is None
    assert [(p.grid, p.clip, p.frame) for p in pieces.parts if p.kind == "video"] == [
        ((1, 2, 5), 0, 0),
        ((1, 2, 5), 0, 1),
        ((1, 2, 5), 0, 2),
    ]
    assert str(pieces) == "causal 7 text + 1x2x5 + 4 text + 1x2x5 + 4 text + 1x2x5 + 7 text"
    many = TokenLayout(read(prompt("qwen3_vl", [4, (9, 2, 5), 6])).rows[0], is_causal=True)
    assert str(many) == "causal 7 text + 1x2x5 + 4 text + 15 more + 7 text"


def test_rows_take_the_grids_in_turn():
    rows = [prompt("qwen2_vl", p) for p in ([3, (2, 3)], [(4, 1), 2, (2, 2, 2)], [30])]
    tokens = read(left_padded(rows))
    assert [[p.grid for p in row if p.grid] for row in tokens.rows] == [[(1, 2, 3)], [(1, 4, 1), (2, 2, 2)], []]
    assert [[p.clip for p in row if p.grid] for row in tokens.rows] == [[0], [0, 1], []]
    assert tokens.length == 30 and all(sum(p.length for p in row) == 30 for row in tokens.rows)
    for row, single in enumerate(rows):
        n = single["input_ids"].shape[1]
        cut = TokenLayout(tokens.rows[row], is_causal=True).cut(30 - n, 30)
        assert cut is not None and cut.parts == read(single).rows[0]


GUARDS = {
    "more": ([[VIDEO] * 8], [[2, 4, 2]], "more image or video tokens"),
    "fewer": ([[VIDEO] * 4], [[2, 4, 2], [1, 2, 2]], "fewer image or video tokens"),
    "no_grid": ([[IMAGE]], [], "more image or video tokens"),
    "unknown_kind": ([[3, 3]], [], "more image or video tokens"),
    "inside_a_frame": ([[VIDEO, TEXT, VIDEO, VIDEO, VIDEO]], [[1, 4, 4]], "end inside a frame"),
    "two_rows": ([[VIDEO, VIDEO], [VIDEO, VIDEO]], [[2, 4, 2]], "without all its frames"),
}


@pytest.mark.parametrize("name", GUARDS)
def test_what_fits_no_grid_is_unknown(name):
    kinds, grid, reason = GUARDS[name]
    tokens = read_tokens(torch.tensor(kinds), {IMAGE: None, VIDEO: torch.tensor(grid).view(-1, 3)}, 2)
    assert tokens.rows == () and reason in str(tokens.unknown)
    # What comes after it is unknown as well, and batches then stay text.
    after = tokens.then(text_tokens(len(kinds), 3))
    spans = (Span((0,), (0, 5), (0, 5)),)
    assert after.unknown == tokens.unknown and after.describe(spans, 5) == spans


def test_continued_and_cropped():
    first, second = (read(prompt("qwen2_vl", p)) for p in ([5, (2, 3), 4], [3, (2, 2, 2), (1, 3)]))
    both = first.then(second)
    assert both.length == first.length + second.length
    assert [p.clip for p in both.rows[0] if p.grid] == [0, 1, 2]
    # The texts that meet are one.
    assert [p.length for p in both.rows[0]] == [6, 6, 9, 8, 2, 3, 1]
    assert both.cropped(first.length).rows == first.rows
    assert both.cropped(first.length + 2).rows == first.then(text_tokens(1, 2)).rows
    assert both.cropped(8).unknown == "cache cropped inside an image or video"
    assert both.cropped(6).rows == ((Segment("text", 6),),)
    assert first.then(text_tokens(1, 0)).rows == first.rows and text_tokens(1, 0).then(first).rows == first.rows
    assert copy.deepcopy(both) is both


def test_describe_splits_rows_that_differ():
    same, other = prompt("qwen2_vl", [5, (2, 3), 4]), prompt("qwen2_vl", [4, (2, 3), 5])
    tokens = read(left_padded([same, other, same, prompt("qwen2_vl", [3, (2, 3), 2])]))
    spans = (Span((0, 1, 2), (0, 17), (0, 17)), Span((3,), (0, 13), (4, 17)))
    found = tokens.describe(spans, 17)
    assert [s.rows for s in found] == [(0, 2), (1,), (3,)]
    assert all(s.layout is not None and s.layout.is_causal for s in found)
    assert [s.layout.kv_len for s in found] == [17, 17, 13]
    # Chunks: the last 6 keys are the queries. Worked out once.
    chunk = tokens.describe((Span((1,), (0, 6), (0, 17)),), 17)
    assert chunk[0].layout.query_start == 11 and chunk[0].layout.parts == tokens.rows[1]
    assert tokens.describe(spans, 17) is found
    # Another number of keys, or a sequence that begins inside the image: text.
    assert tokens.describe(spans, 16) == spans
    assert tokens.describe((Span((0,), (0, 9), (8, 17)),), 17) == (Span((0,), (0, 9), (8, 17)),)


def test_causal_text_is_kept_by_no_rule_of_its_own():
    parts = [Segment("text", 20), Segment("video", 64, (1, 8, 8)), Segment("text", 30)]
    for causal in (True, False):
        kept = [t.any().item() for t in text_blocks(TokenLayout.segments(parts, causal=causal), 16, 16)]
        assert kept == [not causal] * 2


@pytest.mark.parametrize("given", [{"clip": 0}, {"frame": 1}])
def test_text_has_neither_clip_nor_frame(given):
    with pytest.raises(ValueError, match="`clip` and `frame` must be left out for text"):
        Segment("text", 3, **given)
    with pytest.raises(ValueError, match=r"must be at least 0"):
        Segment("video", 1, (1, 1, 1), clip=-1)


def test_segments_without_a_number_are_clips_of_their_own():
    parts = [Segment("video", 2, (1, 1, 2)), Segment("video", 1, (1, 1, 1), 4), Segment("video", 1, (1, 1, 1))]
    assert TokenLayout.segments(parts, causal=True).coordinates()[:, 0].tolist() == [5, 5, 4, 6]


def test_order_of_segments_by_length_and_back():
    cut = Cut.at(torch.tensor([0, 4, 4, 6, 10, 11, 13, 14]))
    assert cut.lengths == (4, 2, 4, 1, 2, 1)
    assert cut.by_length.lengths == (1, 1, 2, 2, 4, 4)
    assert cut.by_length.runs == ((2, 1), (2, 2), (2, 4))
    order, back = cut.order(torch.device("cpu"))
    assert order.tolist() == [10, 13, 4, 5, 11, 12, 0, 1, 2, 3, 6, 7, 8, 9]
    assert torch.equal(order[back], torch.arange(14))


def test_no_call_is_larger_than_a_grid():
    runs = Cut((1,) * (2**16 + 3)).runs
    assert runs == ((2**15, 1), (2**15, 1), (3, 1))
