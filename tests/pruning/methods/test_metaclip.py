from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from thresher import BudgetError, MissingExtraError, PoolError, UsageError, build
from thresher.pruning.entries import CHARACTERS, Matcher, frequent, read_entries, words_of

WORDS = ["dog", "Dog", "cat", "red", "red dog", "tree", "a", "skin tone", "tone", "new york"]


def sentences(n: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    odds = 1 / np.arange(1, len(WORDS) + 1)
    pick = rng.choice(WORDS, (n, 6), p=odds / odds.sum())
    marks = rng.choice([" ", "  ", ", ", ".", "\n", "-", " is "], (n, 6))
    return ["".join(f"{word}{mark}" for word, mark in zip(*row, strict=True)) for row in zip(pick, marks, strict=True)]


def matched(text: str, entries: list[str]) -> list[int]:
    """The entries of a caption, one after the other, as the paper has it."""
    for mark in ",.;:?!`":
        text = text.replace(mark, f" {mark} ")
    text = f" {' '.join(text.split())} "
    return [i for i, entry in enumerate(entries) if f" {entry} " in text]


def probabilities(captions: list[str], entries: list[str], t: float) -> list[float]:
    """The probability of each row, one after the other."""
    found = [matched(text, entries) for text in captions]
    counts = Counter(i for row in found for i in row)
    return [1 - math.prod(1 - min(1.0, t / counts[i]) for i in row) for row in found]


@pytest.fixture
def entry_file(tmp_path):
    def write(entries: list[str], name: str = "entries.txt") -> str:
        (tmp_path / name).write_text("\n".join(entries), encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture
def captioned(pool, rows):
    def made(captions: list[str], name: str = "pool", **more):
        return pool(rows(len(captions)), table={"caption": captions, **more}, name=name)

    return made


@pytest.mark.parametrize("t", [0.5, 5.0, 40.0])
def test_rows_are_kept_by_the_probabilities_of_the_paper(captioned, entry_file, select, t) -> None:
    captions = [*sentences(400), "", "nothing here", "tones of dogs"]
    entries = ["dog", "cat", "red dog", "skin tone", "tone", "unheard of"]
    selection = select(captioned(captions), build("metaclip", {"t": t, "entries": entry_file(entries)}))
    step, expected = selection.steps[0], np.array(probabilities(captions, entries, t))
    np.testing.assert_allclose(step.rows["score"], expected, rtol=1e-6)
    assert step.rows["entries"].tolist() == [len(matched(text, entries)) for text in captions]
    np.testing.assert_array_equal(selection.mask(), step.rows["drawn"] < step.rows["score"])
    assert expected[-3:].tolist() == [0, 0, 0]
    assert not selection.mask()[-3:].any()
    assert step.why(len(captions) - 1) == "its caption contains no entry"


@pytest.mark.parametrize("seeds", [40, pytest.param(150, marks=pytest.mark.slow)])
def test_over_seeds_every_row_is_kept_as_often_as_its_probability_says(captioned, entry_file, select, seeds) -> None:
    captions, entries = sentences(60, seed=3), ["dog", "cat", "tree", "new york"]
    store, method = captioned(captions), build("metaclip", {"t": 3.0, "entries": entry_file(entries)})
    kept = sum(select(store, method, seed=seed).mask().astype(int) for seed in range(seeds)) / seeds
    expected = np.array(probabilities(captions, entries, 3.0))
    assert 0.05 < expected[(expected > 0) & (expected < 1)].mean() < 0.95
    spread = np.sqrt(expected * (1 - expected) / seeds)
    assert (np.abs(kept - expected) <= 5 * spread).all()  # without spread, exact: all rows, or none


@pytest.mark.parametrize("keep", [1, 37, 150, 290])
def test_a_budget_is_met_by_the_smallest_t_that_keeps_so_many(captioned, entry_file, select, keep) -> None:
    captions, entries = sentences(300, seed=1), ["dog", "cat", "a", "red", "tone"]
    store, file = captioned(captions), entry_file(entries)
    selection = select(store, build("metaclip", {"keep": keep, "entries": file}))
    drawn = selection.steps[0].rows["drawn"].astype(np.float64)

    def count(t: float) -> int:
        return int((drawn < np.array(probabilities(captions, entries, t))).sum())

    low, high = 0.0, 1000.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if count(middle) < keep else (low, middle)
    assert len(selection) == keep
    expected = drawn < np.array(probabilities(captions, entries, high * (1 + 1e-6)))
    np.testing.assert_array_equal(selection.mask(), expected)
    again = select(store, build("metaclip", {"t": high * (1 + 1e-6), "entries": file}))
    np.testing.assert_array_equal(again.mask(), selection.mask())


def test_a_smaller_budget_is_a_part_of_a_larger_one(captioned, select) -> None:
    store = captioned(sentences(300))
    masks = [select(store, build("metaclip", {"keep": k, "least": 5})).mask() for k in (20, 100, 250)]
    assert not (masks[0] & ~masks[1]).any()
    assert not (masks[1] & ~masks[2]).any()


def test_every_language_has_the_t_with_the_same_share_of_matches_in_the_tail(captioned, entry_file, select) -> None:
    captions, entries = sentences(900, seed=5), ["dog", "Dog", "cat", "red", "tree", "a", "tone"]
    language = np.where(np.arange(900) % 6 < 4, "en", np.where(np.arange(900) % 6 == 4, "de", "fr")).tolist()
    language[6] = None
    t = 250.0
    given = {"entries": entry_file(entries), "language": "language"}
    selection = select(captioned(captions, language=language), build("metaclip", {"t": t, **given}))
    found = [matched(text, entries) for text in captions]
    names = ["none" if name is None else name for name in language]
    counts = {
        name: Counter(i for row, own in zip(found, names, strict=True) if own == name for i in row) for name in names
    }

    def points(name: str) -> tuple[list[float], list[float]]:
        values = sorted(counts[name].values())
        levels = [0, *sorted(set(values))]
        return levels, [sum(value for value in values if value <= level) / sum(values) for level in levels]

    own = {"en": t}
    share = np.interp(t, *points("en"))
    assert 0.1 < share < 0.9
    for name in ("de", "fr", "none"):
        levels, shares = points(name)
        own[name] = float(np.interp(share, shares, levels))
    expected = [
        1 - math.prod(1 - min(1.0, own[name] / counts[name][i]) for i in row)
        for row, name in zip(found, names, strict=True)
    ]
    np.testing.assert_allclose(selection.steps[0].rows["score"], expected, rtol=1e-5)
    assert "1 row has no language" in " ".join(selection.steps[0].notes)
    exact = select(captioned(captions, "again", language=language), build("metaclip", {"keep": 411, **given}))
    assert len(exact) == 411
    rows = exact.steps[0].rows
    torn = exact.mask() != (rows["drawn"] < rows["score"])
    np.testing.assert_allclose(rows["score"][torn], rows["drawn"][torn], rtol=1e-5)  # only at the cut itself
    assert torn.sum() <= 1


def test_a_language_without_a_match_does_not_count(captioned, entry_file, select) -> None:
    captions, language = ["x"] * 50 + sentences(30), ["many"] * 50 + ["few"] * 30
    entries = ["dog", "cat", "a"]
    given = {"keep": 10, "entries": entry_file(entries), "language": "language"}
    selection = select(captioned(captions, language=language), build("metaclip", given))
    alone = [matched(text, entries) for text in captions]
    assert len(selection) == 10
    assert all(alone[row] for row in selection.rows())
    assert selection.steps[0].rows["score"][selection.mask()].min() > 0


def phrases_of(text: str, longest: int) -> set[str]:
    words = words_of(text, False)
    found = {" ".join(words[i : i + size]) for size in range(1, longest + 1) for i in range(len(words) - size + 1)}
    return {phrase for phrase in found if not set(phrase) & set(",.;:?!`")}


@pytest.mark.parametrize(("longest", "least"), [(1, 1), (2, 30), (3, 8)])
def test_without_a_file_the_entries_are_the_frequent_phrases(captioned, select, longest, least) -> None:
    captions = sentences(200, seed=2)
    counts = Counter(phrase for text in captions for phrase in phrases_of(text, longest))
    expected = sorted(phrase for phrase, count in counts.items() if count >= least)
    assert 0 < len(expected) < len(counts) or least == 1
    assert frequent(lambda: [captions[:70], captions[70:]], longest, least, False) == (expected, least)
    selection = select(captioned(captions), build("metaclip", {"t": 4.0, "words": longest, "least": least}))
    np.testing.assert_allclose(selection.steps[0].rows["score"], probabilities(captions, expected, 4.0), rtol=1e-6)


@pytest.mark.parametrize("held", [10, 40, 150])
def test_with_little_memory_the_counts_are_exact_above_what_is_told(held) -> None:
    rng = np.random.default_rng(0)
    captions = [" ".join(f"w{int(i)}" for i in rng.zipf(1.3, 5) % 500) for _ in range(600)]
    counts = Counter(phrase for text in captions for phrase in phrases_of(text, 2))
    for size in (1, 100):  # however the captions are split
        blocks = [captions[lo : lo + size] for lo in range(0, len(captions), size)]
        found, least = frequent(lambda blocks=blocks: blocks, 2, 3, False, held=held)
        assert found == sorted(phrase for phrase, count in counts.items() if count >= least)
        assert 3 < least < 400


@pytest.mark.parametrize(
    ("text", "place", "ignore", "found"),
    [
        ("a dog, asleep", "words", False, ["dog"]),
        ("dogs", "words", False, []),
        ("dogs", "anywhere", False, ["dog"]),
        ("hot\t dog", "words", False, ["dog", "hot dog"]),
        ("hot, dog", "words", False, ["dog"]),
        ("HOT DOG", "words", False, []),
        ("HOT DOG", "words", True, ["dog", "hot dog"]),
        ("dog dog dog", "words", False, ["dog", "dog dog"]),
        ("dog-cat", "words", False, []),
        ("猫が好き", "words", False, []),
        ("猫が好き", "anywhere", False, ["猫"]),
        ("cafe\u0301", "words", False, ["café"]),
        ("U.S. flag", "words", False, ["U . S ."]),
        ("", "words", False, []),
    ],
)
def test_where_an_entry_matches(text, place, ignore, found) -> None:
    entries = ["dog", "hot dog", "dog dog", "猫", "café", "U . S ."]
    assert [entries[i] for i in Matcher(entries, ignore, place)(text)] == found


def test_long_captions_are_cut_and_counted(captioned, entry_file, select) -> None:
    captions = ["cat " * (CHARACTERS // 4) + "dog", "cat dog"]
    selection = select(captioned(captions), build("metaclip", {"t": 1.0, "entries": entry_file(["cat", "dog"])}))
    assert selection.steps[0].rows["entries"].tolist() == [1, 2]
    assert "1 caption has more than 10,000 characters" in " ".join(selection.steps[0].notes)


def test_a_file_of_entries(tmp_path) -> None:
    path = tmp_path / "entries.txt"
    path.write_text("\ufeffhot  dog\r\nCat\n\n cat\nhot dog\nU.S.\n", encoding="utf-8")
    assert read_entries(str(path), False) == (["Cat", "U . S .", "cat", "hot dog"], 1)
    assert read_entries(str(path), True) == (["cat", "hot dog", "u . s ."], 2)


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe\x00", b"caf\xe9\n", b"x" * 100_000])
def test_a_bad_file_of_entries_is_named(tmp_path, content) -> None:
    path = Path(tmp_path / "entries.txt")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PoolError, match=r"entries\.txt"):
        read_entries(str(path), False)


LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by  \n"
WORDNET = {
    "noun": "hot_dog n 3 4 @ ~ #m + 3 1 07676602 10187710 07692347  \ndog n 7 5 @ ~ #m #p %p 7 1 02084071  \n",
    "verb": "dog v 1 1 @ 1 1 02001858  \n",
    "adj": "U.S. a 1 1 \\ 1 0 03018498  \n",
    "adv": "a_cappella r 1 1 ! 1 0 00120223  \n",
}


def test_the_words_of_wordnet_are_entries(tmp_path: Path) -> None:
    for name, lines in WORDNET.items():
        (tmp_path / f"index.{name}").write_text(LICENCE + lines)
    assert read_entries(str(tmp_path), True) == (["a cappella", "dog", "hot dog", "u . s ."], 1)
    (tmp_path / "index.verb").write_text(LICENCE + "dog barks\n")
    with pytest.raises(PoolError, match=r"index.verb: line 2 is not one of an index of WordNet"):
        read_entries(str(tmp_path), True)
    (tmp_path / "index.verb").unlink()
    with pytest.raises(PoolError, match=r"is a folder; give a text file .* or the folder with index.noun, index.verb"):
        read_entries(str(tmp_path), True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "either keep"),
        ({"keep": 5, "t": 3.0}, "not both"),
        ({"t": 0.0}, "above 0"),
        ({"keep": 5, "words": 6}, "from 1 to 5"),
        ({"keep": 5, "least": 0}, "at least 1"),
        ({"keep": 5, "entries": "x.txt", "least": 7}, "leave them out"),
    ],
)
def test_bad_parameters(given, said) -> None:
    with pytest.raises(UsageError, match=said):
        build("metaclip", given)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"keep": 4, "least": 1}, BudgetError, "only 2 of 4 captions contain an entry"),
        ({"keep": 1, "least": 50}, UsageError, "no word is in so many captions"),
        ({"keep": 1, "least": 1, "language": "langauge"}, UsageError, "langauge"),
        ({"t": 1e-12, "least": 1}, UsageError, "keeps no row"),
    ],
)
def test_what_a_pool_cannot_give(captioned, select, given, error, said) -> None:
    store = captioned(["dog", "", "dog cat", None])
    with pytest.raises(error, match=said):
        select(store, build("metaclip", given))


def test_no_entry_in_any_caption(captioned, entry_file, select) -> None:
    with pytest.raises(UsageError, match="no caption contains an entry"):
        select(captioned(["dog", "cat"]), build("metaclip", {"keep": 1, "entries": entry_file(["Dog"])}))


def test_a_pool_without_captions(pool, rows, select) -> None:
    with pytest.raises(UsageError, match="needs captions"):
        select(pool(rows(5)), build("metaclip", {"keep": 1}))


def test_the_package_that_is_missing_is_named_with_the_command(captioned, select, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ahocorasick_rs", None)
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[metaclip\]'"):
        select(captioned(["dog"]), build("metaclip", {"keep": 1, "least": 1}))
