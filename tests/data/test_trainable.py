"""Why the loader of open_clip leaves samples out; tests/check/test_loader.py compares it with its own pipeline."""

from __future__ import annotations

import pytest

from thresher.data.trainable import TAKEN, can_decode, described, is_decoded, why_left_out


@pytest.mark.parametrize(
    ("endings", "why"),
    [
        (("jpg", "txt"), ""),
        (("txt", "json", "webp"), ""),
        (("gif", "png", "txt"), ""),
        (("jpg", "json"), "no_txt"),
        (("gif", "txt"), "format.gif"),
        (("jfif",), "format.jfif"),
        (("txt", "json"), "no_image"),
        (("seg.jpg", "txt"), "no_image"),
        ((), "no_image"),
    ],
)
def test_reasons(endings: tuple[str, ...], why: str) -> None:
    assert why_left_out(endings) == why


def test_the_filter_is_that_of_open_clip() -> None:
    from open_clip_train.data import filter_no_caption_or_no_image

    for ending in (*TAKEN, "gif", "jfif", "bmp", "JPG"):
        for caption in ("txt", "text"):
            sample = {ending: b"", caption: b""}
            assert filter_no_caption_or_no_image(sample) == (why_left_out(tuple(sample)) == "")


def test_what_cannot_be_decoded() -> None:
    good = {"txt": "é".encode(), "json": b'{"a": NaN}', "cls": b" 3\n", "jpg": b"\xff"}
    bad = {"txt": b"\xff", "json": b"", "cls": b"x", "meta.json": b"{"}
    assert all(can_decode(ending, content) for ending, content in good.items())
    assert not any(can_decode(ending, content) for ending, content in bad.items())
    assert [is_decoded(ending) for ending in ("txt", "a.json", "jpg", "json.gz")] == [True, True, False, False]


def test_described() -> None:
    assert described([("no_txt", 1), ("format.gif", 1200)]) == "1 has no .txt, 1,200 have their image as .gif"
    assert described([("apart", 2), ("format.bmp", 1)]) == "2 have their members apart, 1 has its image as .bmp"
