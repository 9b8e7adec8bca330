"""Tokenizers that other processes can be given: they pickle, and do without torch.

Each is a twin of the tokenizer of a library, and :func:`twin` has tried on a few odd texts that it is one.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from thresher.embed.encoders.base import library

if TYPE_CHECKING:
    from thresher.embed.encoders import Tokens

Clean = Literal["", "whitespace", "lower", "canonicalize"]
_PUNCTUATION = str.maketrans("", "", "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
_TRIED = (
    "a photo of a cat",
    "",
    " Don't  PANIC!!\n\tR&amp;B&lt;3 schÃ¶n 日本語 12345 ½ \u00a0 é\u0301 🦊-tail_end ",
    "it is long " * 200,
)


class ClipTokens:
    """The byte-pair encoding of CLIP, as open_clip's ``SimpleTokenizer`` does it."""

    def __init__(self, original: Any, clean: Clean) -> None:
        """Take over the tables of a ``SimpleTokenizer``."""
        self.ids: Mapping[str, int] = original.encoder
        self.ranks: Mapping[tuple[str, str], int] = original.bpe_ranks
        self.letters: Mapping[int, str] = original.byte_encoder
        self.pattern: str = original.pat.pattern
        self.ends: tuple[int, int] = original.sot_token_id, original.eot_token_id
        self.length: int = original.context_length
        self.special = {name: [original.encoder[name]] for name, kept in original.cache.items() if name == kept}
        self.clean = clean
        self._start()

    def _start(self) -> None:
        regex = library("regex", "captions for CLIP")
        self._find = regex.compile(self.pattern, regex.IGNORECASE).findall
        self._known = dict(self.special)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made anew."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Go on elsewhere."""
        vars(self).update(state)
        self._start()

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Return {"tokens": (B, length) int32}, filled up with 0; texts that are too long end early."""
        found = np.zeros((len(texts), self.length), np.int32)
        first, last = self.ends
        for row, text in zip(found, texts, strict=True):
            ids = [first]
            for word in self._find(cleaned(text, self.clean)):
                ids += self._word(word)
                if len(ids) >= self.length:
                    break
            ids = [*ids[: self.length - 1], last]
            row[: len(ids)] = ids
        return {"tokens": found}

    def _word(self, word: str) -> list[int]:
        letters = "".join(self.letters[byte] for byte in word.encode("utf-8"))
        known = self._known.get(letters)
        if known is None:
            parts = [*letters[:-1], letters[-1] + "</w>"]
            while len(parts) > 1:
                ranks = [self.ranks.get(two, len(self.ranks)) for two in zip(parts, parts[1:], strict=False)]
                best = min(ranks)
                if best == len(self.ranks):
                    break
                first, second = parts[ranks.index(best)], parts[ranks.index(best) + 1]
                merged, i = [], 0
                while i < len(parts):
                    both = parts[i] == first and i + 1 < len(parts) and parts[i + 1] == second
                    merged.append(first + second if both else parts[i])
                    i += 2 if both else 1
                parts = merged
            known = [self.ids[part] for part in parts]
            if len(self._known) < 2**18:  # captions of a whole pool have millions of words
                self._known[letters] = known
        return known


class FastTokens:
    """A tokenizer of transformers that is written in Rust: arrays (B, T) int32 by name."""

    def __init__(
        self,
        original: Any,
        *,
        names: Mapping[str, str],
        length: int | None,
        filled: bool,
        clean: Clean = "",
        prefix: str = "",
    ) -> None:
        """Take over the tokenizer.

        Args:
            original: Of transformers, with a ``backend_tokenizer``.
            names: What to return, by what it is to be called: "input_ids", "attention_mask", "token_type_ids".
            length: Most tokens of a text, None for any number.
            filled: Fill texts up to ``length``; else to the longest of a call.
            clean: What is done to texts before.
            prefix: What they begin with.
        """
        tokenizers = library("tokenizers", "captions")
        self.names, self.clean, self.prefix = dict(names), clean, prefix
        self.tokenizer = tokenizers.Tokenizer.from_str(original.backend_tokenizer.to_str())
        if length is None:
            self.tokenizer.no_truncation()
        else:
            self.tokenizer.enable_truncation(length, direction=original.truncation_side)
        self.tokenizer.enable_padding(
            direction=original.padding_side,
            pad_id=original.pad_token_id or 0,
            pad_type_id=original.pad_token_type_id,
            pad_token=original.pad_token or "[PAD]",
            length=length if filled else None,
        )

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Return the arrays."""
        found = self.tokenizer.encode_batch([self.prefix + cleaned(text, self.clean) for text in texts])
        places = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        return {
            called: np.array([getattr(one, places[name]) for one in found], np.int32).reshape(len(found), -1)
            for called, name in self.names.items()
        }


class Foreign:
    """A tokenizer that can only be called as it is: picklable, but loads its library wherever it goes."""

    def __init__(self, call: Callable[[list[str]], Any], names: Mapping[str, str] | None = None) -> None:
        """Take what returns tensors; ``names`` where it returns several by name, else it is called "tokens"."""
        self.call, self.names = call, None if names is None else dict(names)

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Return the arrays."""
        found = self.call(list(texts))
        if self.names is None:
            return {"tokens": np.asarray(found, np.int32)}
        return {called: np.asarray(found[name], np.int32) for called, name in self.names.items()}


class Slow:
    """A call of a tokenizer of transformers with what it is to be told; see :class:`Foreign`."""

    def __init__(self, original: Any, **told: Any) -> None:
        """Take both."""
        self.original, self.told = original, told

    def __call__(self, texts: list[str]) -> Any:
        """Return NumPy arrays by name."""
        return self.original(texts, return_tensors="np", **self.told)


def twin(make: Callable[[], Callable[[Sequence[str]], Tokens]], original: Foreign) -> Callable[[Sequence[str]], Tokens]:
    """Return what ``make`` makes if it does the same as the original on a few texts, else the original."""
    try:
        made = make()
        same = all(_alike(made(texts), original(texts)) for texts in (_TRIED, _TRIED[:1]))
    except Exception:  # made for another tokenizer: there is always the original
        return original
    return made if same else original


def _alike(a: Tokens, b: Tokens) -> bool:
    return set(a) == set(b) and all(np.array_equal(a[name], b[name]) for name in a)


def cleaned(text: str, clean: Clean) -> str:
    """Return a text as open_clip cleans it before it is cut into tokens."""
    if not clean:
        return text
    text = library("ftfy", "captions for CLIP").fix_text(text)
    text = html.unescape(html.unescape(text)).strip()
    if clean == "canonicalize":
        text = text.replace("_", " ").translate(_PUNCTUATION).lower()
    text = " ".join(text.split())
    return text.lower() if clean == "lower" else text
