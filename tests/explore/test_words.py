"""Words of captions are what a slow reading of the same rules finds, and always harmless text."""

from __future__ import annotations

import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.explore.words import CHARACTERS, RUNS, words_in


def slow_words(caption: str | None) -> set[str]:
    """Words character by character."""
    text = unicodedata.normalize("NFKC", (caption or "")[:CHARACTERS]).lower()
    runs: list[str] = [""]
    for one in text:
        if unicodedata.category(one)[0] in "LMN":
            runs[-1] += one
        elif runs[-1]:
            runs.append("")
    return {run for run in [run for run in runs if run][:RUNS] if 1 < len(run) <= 40 and not run.isdigit()}


def found(captions: list[str | None]) -> list[set[str]]:
    words, word_W, row_W = words_in(pa.array(captions, pa.string()))
    assert (np.diff(row_W) >= 0).all()
    assert len({*zip(word_W.tolist(), row_W.tolist(), strict=True)}) == len(word_W)
    return [{words[int(w)].as_py() for w in word_W[row_W == i]} for i in range(len(captions))]


@given(
    st.lists(
        st.none() | st.text(st.characters(codec="ascii") | st.sampled_from("àéßΩжÄı\u0301\u202e\u200d🎉")), max_size=8
    )
)
def test_words_are_runs_of_letters_marks_and_digits(captions: list[str | None]) -> None:
    got = found(captions)
    for caption, words in zip(captions, got, strict=True):
        slow = {word for word in slow_words(caption) if word.isascii() or any(map(str.isalpha, word))}
        assert words == slow


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("Flag of Côte d’Ivoire", {"flag", "of", "côte", "ivoire"}),
        ("中国国旗 flag", {"中国", "国国", "国旗", "flag"}),
        ("猫", {"猫"}),
        ("カメラとりんご", {"カメラ", "とり", "りん", "んご"}),
        ("สวัสดี", {"สวัส", "วัสดี"}),
        ("हिन्दी में", {"हिन्दी", "में"}),
        ("한국 국기", {"한국", "국기"}),
        ("علم مصر", {"علم", "مصر"}),
        ("iPhone手机", {"iphone", "手机"}),
        ("ＦＬＡＧ 2024 x", {"flag"}),
        ("<script>alert('x')</script>\u202egnp.exe", {"script", "alert", "gnp", "exe"}),
        ("a" * 100_000, set()),
        ("word " * 100_000, {"word"}),
        (None, set()),
    ],
)
def test_words_in_any_language(caption: str | None, words: set[str]) -> None:
    assert found([caption, None, caption]) == [words, set(), words]


def test_a_long_caption_has_a_limited_number_of_words() -> None:
    (words,) = found([" ".join(f"w{i}" for i in range(10_000))])
    assert words == {f"w{i}" for i in range(RUNS)}
    (pairs,) = found(["".join(chr(0x4E00 + i) for i in range(5_000))])
    assert len(pairs) == RUNS


def test_captions_may_be_bytes_lists_dictionaries_and_not_quite_utf_8() -> None:
    plain = ["red cat", None, "blue dog"]
    for column in (
        pa.array([b"red cat", None, b"blue dog"]),
        pa.array([["red", "cat"], None, ["blue dog", None]]),
        pa.array(plain).dictionary_encode(),
        pa.array(plain, pa.large_string()),
        pa.chunked_array([plain[:1], plain[1:]]),
    ):
        words, word_W, row_W = words_in(column)
        assert words.to_pylist() == ["blue", "cat", "dog", "red"]
        assert sorted(zip(row_W.tolist(), word_W.tolist(), strict=True)) == [(0, 1), (0, 3), (2, 0), (2, 2)]
    broken = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 6, 9], "i4")), pa.py_buffer(b"cat \xff\xfedog"))
    assert words_in(broken)[0].to_pylist() == ["cat", "dog"]
