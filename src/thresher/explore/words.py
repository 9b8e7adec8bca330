"""Words of captions, in any language: lower case, each once per row.

A word is a run of letters, marks and digits with at least one letter. Scripts that are written without spaces are cut
into pieces: Chinese and Hiragana into pairs of characters, Thai, Lao, Khmer and Burmese into runs of three; Katakana
words stay whole. Everything else, such as punctuation, emoji and control characters, only separates words, so a word is
always harmless text.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.pool.layout import texts

Ints = npt.NDArray[np.int64]

CHARACTERS = 512  # of a caption that are read
RUNS = 64  # of letters, marks and digits that are read of a caption, and pieces of one run
_LONGEST = 40  # characters of a word; longer runs are not words
_KANA = re.compile("[\u30a1-\u30fa\u30fc-\u30fe\u31f0-\u31ff]+")
_CJK = re.compile(
    "[\u2e80-\u2fdf\u3005-\u3007\u3041-\u3096\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
)
_NO_SPACES = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]+")
_SCRIPTS = re.compile(f"({_KANA.pattern}|{_CJK.pattern}|{_NO_SPACES.pattern})")

# Function words of languages that are common in captions. Those of other languages are recognised by their frequency,
# see thresher.explore.names.
STOP_WORDS = frozenset(
    # English
    "a about above after again all also am an and any are as at be because been before being below between both but by "
    "can could did do does doing down during each few for from further had has have having he her here hers him his "
    "how i if in into is it its itself just me more most my no nor not now of off on once only or other our out over "
    "own per s same she should so some such t than that the their them then there these they this those through to "
    "too under until up us very was we were what when where which while who whom why will with would you your "
    # German, Dutch
    "aan als am auch auf aus bei bij das dat de dem den der des die dit door een ein eine einem einen einer eines er "
    "es für haben het hier ich ihr im ist maar mit naar nach nicht niet noch nur ook op sich sie sind te um und uns "
    "uit van vom von voor vor war was wie wir wird zijn zu zum zur über "
    # French, Spanish, Italian, Portuguese
    "al alla au aux avec ce ces che com como con cette d da dans das de degli dei del della delle des di do dos du e "
    "el em en es est et gli il la las le les lo los mais mas nel nella nos o os ou par para pas per plus por pour que "
    "qui sa se ses si son su sua sul sur un una une uno y à às é".split()
)


def caption_texts(column: Any, limit: int) -> Any:
    """Return the captions of a column as Arrow strings without nulls, each cut after ``limit`` characters."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        try:
            column.validate(full=True)
            return pc.utf8_slice_codeunits(column.cast(pa.large_string()), 0, limit).fill_null("")
        except pa.ArrowInvalid:  # a file says that its bytes are UTF-8, and they are not
            column = column.cast(pa.large_binary())
    return pa.array([_valid(text) for text in texts(column, limit)], pa.large_string())


def _valid(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def words_in(column: Any) -> tuple[Any, Ints, Ints]:
    """Return the words of captions.

    Args:
        column: Captions as Arrow text, bytes or lists of texts, (n,). The first 512 characters and 64 words of each are
            read.

    Returns:
        The distinct words, (V,) Arrow strings; for every word of every caption its index among them, (W,) int64, and
        the position of its caption, (W,) int64 ascending. A word is there once per caption.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    text = pc.utf8_lower(pc.utf8_normalize(caption_texts(column, CHARACTERS), "NFKC"))
    text = pc.utf8_trim(pc.replace_substring_regex(text, r"[^\p{L}\p{M}\p{N}]+", " "), " ")
    split = pc.list_slice(pc.split_pattern(text, " "), 0, RUNS)
    coded = pc.list_flatten(split).dictionary_encode()
    rows = np.asarray(pc.list_parent_indices(split), np.int64)
    pieces = [_pieces(run) for run in coded.dictionary.to_pylist()]
    words = sorted({piece for some in pieces for piece in some})
    number = {word: i for i, word in enumerate(words)}
    counts = np.array([len(some) for some in pieces], np.int64)
    flat = np.array([number[piece] for some in pieces for piece in some], np.int64)
    runs = np.asarray(coded.indices, np.int64)
    times = counts[runs] if len(runs) else np.empty(0, np.int64)
    # The pieces of a run are consecutive in ``flat``: all of its pieces, for every time it occurs.
    starts = np.repeat((np.cumsum(counts) - counts)[runs] if len(runs) else runs, times)
    inside = np.arange(int(times.sum())) - np.repeat(np.cumsum(times) - times, times)
    pairs = np.sort(np.repeat(rows, times) * max(len(words), 1) + flat[starts + inside])
    row, word = np.divmod(pairs[np.diff(pairs, prepend=-1) > 0], max(len(words), 1))
    return pa.array(words, pa.large_string()), word, row


def _pieces(run: str) -> list[str]:
    """Return the words of a run of letters, marks and digits."""
    if run.isascii():
        return [run] if 1 < len(run) <= _LONGEST and not run.isdigit() else []
    found: list[str] = []
    for part in _SCRIPTS.split(run):
        if _CJK.fullmatch(part):
            found += [part] if len(part) == 1 else [part[i : i + 2] for i in range(len(part) - 1)]
        elif _NO_SPACES.fullmatch(part):
            found += _threes(part)
        elif 1 < len(part) <= _LONGEST and any(map(str.isalpha, part)):
            found.append(part)
    return found[:RUNS]


def _threes(part: str) -> list[str]:
    """Return the runs of three characters of a text, each character with the marks that belong to it."""
    starts = [i for i, one in enumerate(part) if not unicodedata.category(one).startswith("M")]
    if not starts:
        return []
    ends = [*starts[3:], len(part)] if len(starts) >= 3 else [len(part)]
    return [part[start:end][:_LONGEST] for start, end in zip(starts, ends, strict=False)]
