"""Entries: words and phrases that captions are searched for, as in the metadata of CLIP and MetaCLIP.

An entry matches where it stands in the caption as whole words. The punctuation ``, . ; : ? ! ``` is split off, as a
word of its own, and white space is one space, in captions and in entries. So "dog" is in "A dog, asleep", but not in
"dogs", and "dog asleep" is not.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from thresher.errors import MissingExtraError, PoolError, UsageError
from thresher.io.csv import Lines
from thresher.io.open import open_file
from thresher.io.places import located
from thresher.pool.layout import texts
from thresher.pool.store import EmbeddingStore

Ints = npt.NDArray[np.int64]
Place = Literal["words", "anywhere"]

CHARACTERS = 10_000  # of a caption that are searched
_MOST_ENTRIES = 2**24
_LINE = 1 << 16  # bytes of an entry
_HELD = 2_000_000  # phrases that are counted at a time
_WORDNET = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
_SPLIT = re.compile(r"([,.;:?!`])")
_MARKS = frozenset(",.;:?!`")


def words_of(text: str, ignore_case: bool) -> list[str]:
    """Return the words of a caption or an entry, with punctuation as words of its own."""
    text = unicodedata.normalize("NFC", text)
    return _SPLIT.sub(r" \1 ", text.casefold() if ignore_case else text).split()


def captions(store: EmbeddingStore, column: str, size: int) -> Iterator[list[str]]:
    """Yield the captions of the view, ``size`` rows at a time, each cut after :data:`CHARACTERS` characters.

    Captions that are cut are one character longer, so that they can be counted.
    """
    held: list[str] = []
    for _, part in store.scan([column]):
        held += texts(part.column(0), CHARACTERS + 1)
        while len(held) >= size:
            yield held[:size]
            held = held[size:]
    if held:
        yield held


def read_entries(path: str, ignore_case: bool) -> tuple[list[str], int]:
    """Return the different entries of a file or of WordNet, sorted, and the number of repeated ones.

    Args:
        path: A file of text with one entry on each line; empty lines are not entries. Or a folder with the files
            index.noun, index.verb, index.adj and index.adv of WordNet: all of its words and phrases.
        ignore_case: Whether case differences are ignored; the entries are then case-folded.

    Raises:
        PoolError: The file is missing, is not text, or has no entry or too many; the folder is not that of WordNet.
    """
    found: set[str] = set()
    repeated = 0
    for text in _wordnet(path) if os.path.isdir(path) else _lines(path):
        if entry := " ".join(words_of(text, ignore_case)):
            repeated += entry in found
            found.add(entry)
        if len(found) > _MOST_ENTRIES:
            raise PoolError(f"{path}: has more than {_MOST_ENTRIES:,} entries; give fewer")
    if not found:
        raise PoolError(f"{path}: has no entry; give a text file with one word or phrase on each line")
    return sorted(found), repeated


def _lines(path: str) -> Iterator[str]:
    with open_file(*located(path)) as file:
        yield from Lines(file, path, most=_LINE)


def _wordnet(folder: str) -> Iterator[str]:
    """Yield the words and phrases of WordNet, each once for every part of speech.

    A line of an index file is a lemma with _ for spaces, the letter of its part of speech, and numbers (wndb(5WN)).
    """
    paths = [os.path.join(folder, f"index.{name}") for name in _WORDNET]
    if not all(os.path.isfile(path) for path in paths):
        raise PoolError(
            f"{folder}: is a folder; give a text file with one word or phrase on each line, or the folder with "
            f"{', '.join(map(os.path.basename, paths))} of WordNet"
        )
    for path, letter in zip(paths, _WORDNET.values(), strict=True):
        for number, line in enumerate(_lines(path), 1):
            if line.startswith("  ") or not line.strip():  # the licence
                continue
            lemma, _, rest = line.partition(" ")
            if not rest.startswith(f"{letter} "):
                raise PoolError(f"{path}: line {number:,} is not one of an index of WordNet; download it again")
            yield lemma.replace("_", " ")


def frequent(
    read: Callable[[], Iterable[list[str]]], longest: int, least: int, ignore_case: bool, held: int = _HELD
) -> tuple[list[str], int]:
    """Return the words and phrases that at least so many captions contain, sorted, and that number of captions.

    Memory is limited: whenever more than ``held`` different phrases are counted, the rarer half is forgotten, and a
    phrase that comes again starts from the highest count that was forgotten. So no count is too low. Then the captions
    are read again to count exactly what is left. If phrases with ``least`` captions may have been forgotten, the
    number returned is the smallest for which none was.

    Args:
        read: Yields the captions; called once, or twice if phrases were forgotten.
        longest: Words of the longest phrase.
        least: Captions that must contain it.
        ignore_case: Whether case differences are ignored.
        held: Different phrases to hold in memory.
    """
    counts: dict[str, int] = {}
    floor = 0  # no phrase that is not in counts is in more captions
    for block in read():
        for text in block:
            for phrase in _phrases(text, longest, ignore_case):
                counts[phrase] = counts.get(phrase, floor) + 1
            if len(counts) > held:
                floor = sorted(counts.values())[len(counts) // 2]
                counts = {phrase: count for phrase, count in counts.items() if count > floor}
    least = max(least, floor + 1)
    counts = {phrase: count for phrase, count in counts.items() if count >= least}
    if floor:
        exact = dict.fromkeys(counts, 0)
        for block in read():
            for text in block:
                for phrase in _phrases(text, longest, ignore_case):
                    if phrase in exact:
                        exact[phrase] += 1
        counts = exact
    return sorted(phrase for phrase, count in counts.items() if count >= least), least


def _phrases(text: str, longest: int, ignore_case: bool) -> set[str]:
    """Return the phrases of up to ``longest`` words of a caption; none contains punctuation."""
    found: set[str] = set()
    words = words_of(text[:CHARACTERS], ignore_case)
    found.update(words)
    for size in range(2, longest + 1):
        found.update(" ".join(words[i : i + size]) for i in range(len(words) - size + 1))
    if not _MARKS.isdisjoint(text):
        return {phrase for phrase in found if _MARKS.isdisjoint(phrase)}
    return found


class Matcher:
    """Finds entries in captions, all at once, with an Aho-Corasick automaton."""

    def __init__(self, entries: Iterable[str], ignore_case: bool, place: Place = "words") -> None:
        """Build the automaton.

        Args:
            entries: Entries, each as :func:`words_of` splits it, joined by spaces.
            ignore_case: Whether case differences are ignored; the entries are then case-folded.
            place: "words" finds whole words, "anywhere" also parts of words, for languages without spaces.

        Raises:
            MissingExtraError: The package ahocorasick_rs is not installed.
        """
        automata = require_matcher()
        self._ignore_case = ignore_case
        patterns = [f" {entry} " for entry in entries] if place == "words" else list(entries)
        self._automaton = automata.AhoCorasick(
            patterns, implementation=automata.Implementation.ContiguousNFA, store_patterns=False
        )

    def __call__(self, text: str) -> list[int]:
        """Return the numbers of the entries in a caption, ascending."""
        words = words_of(text[:CHARACTERS], self._ignore_case)
        found = self._automaton.find_matches_as_indexes(f" {' '.join(words)} ", overlapping=True)
        return sorted({number for number, _, _ in found})


def require_matcher() -> Any:
    """Import ahocorasick_rs.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import ahocorasick_rs
    except ImportError:
        raise MissingExtraError("metaclip", "metaclip") from None
    return ahocorasick_rs


def caption_column(store: EmbeddingStore, why: str) -> str:
    """Return the column of captions of a pool.

    Raises:
        UsageError: It has none.
    """
    if store.layout.caption is None or store.layout.caption not in store.columns:
        raise UsageError(
            f"{why} needs captions; {store.layout.location} has {', '.join(store.columns) or 'no metadata'}. Name "
            "their column with --caption"
        )
    return store.layout.caption
