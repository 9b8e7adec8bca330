"""Tokenizers for decode processes: they can be pickled and do not need torch.

Each is equivalent to the tokenizer of a library; :func:`twin` checks that on a few unusual texts.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from thresher.embedding.encoders.base import library

if TYPE_CHECKING:
    from thresher.embedding.encoders import Tokens

Clean = Literal["", "whitespace", "lower", "canonicalize"]
_PUNCTUATION = str.maketrans("", "", "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
_TEST_TEXTS = (
    "a photo of a cat",
    "",
    " Don't  PANIC!!\n\tR&amp;B&lt;3 schÃ¶n 日本語 12345 ½ \u00a0 é\u0301 🦊-tail_end ",
    "it is long " * 200,
)


class ClipTokens:
    """The byte-pair encoding of CLIP, equivalent to open_clip's ``SimpleTokenizer``."""

    def __init__(self, original: Any, clean: Clean) -> None:
        """Copy the tables of a ``SimpleTokenizer``."""
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
        """Leave out what ``_start`` makes again."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the tokenizer in another process."""
        vars(self).update(state)
        self._start()

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Return {"tokens": (B, length) int32}, padded with 0; texts that are too long are truncated."""
        tokens = np.zeros((len(texts), self.length), np.int32)
        first, last = self.ends
        for row, text in zip(tokens, texts, strict=True):
            ids = [first]
            for word in self._find(cleaned(text, self.clean)):
                ids += self._word(word)
                if len(ids) >= self.length:
                    break
            ids = [*ids[: self.length - 1], last]
            row[: len(ids)] = ids
        return {"tokens": tokens}

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
            if len(self._known) < 2**18:  # the captions of a pool have millions of different words
                self._known[letters] = known
        return known


class FastTokens:
    """A fast (Rust) tokenizer of transformers: arrays (B, T) int32 by name."""

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
        """Copy the tokenizer.

        Args:
            original: A tokenizer of transformers with a ``backend_tokenizer``.
            names: Which arrays to return, "input_ids", "attention_mask", "token_type_ids", by the name to return each
                under.
            length: Most tokens of a text, None for no limit.
            filled: Pad texts to ``length``; otherwise to the longest text of a call.
            clean: How texts are cleaned first, see :func:`cleaned`.
            prefix: Text to put before every text.
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
        encodings = self.tokenizer.encode_batch([self.prefix + cleaned(text, self.clean) for text in texts])
        attributes = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        return {
            key: np.array([getattr(one, attributes[name]) for one in encodings], np.int32).reshape(len(encodings), -1)
            for key, name in self.names.items()
        }


class Foreign:
    """The tokenizer of a library itself: picklable, but loads the library in every process."""

    def __init__(self, call: Callable[[list[str]], Any], names: Mapping[str, str] | None = None) -> None:
        """Wrap a call that returns one tensor, which gets the name "tokens", or, with ``names``, several by name."""
        self.call, self.names = call, None if names is None else dict(names)

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Return the arrays."""
        result = self.call(list(texts))
        if self.names is None:
            return {"tokens": np.asarray(result, np.int32)}
        return {key: np.asarray(result[name], np.int32) for key, name in self.names.items()}


class Slow:
    """A call of a slow tokenizer of transformers with fixed options; see :class:`Foreign`."""

    def __init__(self, original: Any, **options: Any) -> None:
        """Store the tokenizer and its options."""
        self.original, self.options = original, options

    def __call__(self, texts: list[str]) -> Any:
        """Return NumPy arrays by name."""
        return self.original(texts, return_tensors="np", **self.options)


def twin(make: Callable[[], Callable[[Sequence[str]], Tokens]], original: Foreign) -> Callable[[Sequence[str]], Tokens]:
    """Return the tokenizer that ``make`` returns if it agrees with the original on a few texts, else the original."""
    try:
        made = make()
        same = all(_alike(made(texts), original(texts)) for texts in (_TEST_TEXTS, _TEST_TEXTS[:1]))
    except Exception:  # this kind of tokenizer is not supported: the original always works
        return original
    return made if same else original


def _alike(a: Tokens, b: Tokens) -> bool:
    return set(a) == set(b) and all(np.array_equal(a[name], b[name]) for name in a)


def cleaned(text: str, clean: Clean) -> str:
    """Return a text as open_clip cleans it before tokenisation."""
    if not clean:
        return text
    text = library("ftfy", "captions for CLIP").fix_text(text)
    text = html.unescape(html.unescape(text)).strip()
    if clean == "canonicalize":
        text = text.replace("_", " ").translate(_PUNCTUATION).lower()
    text = " ".join(text.split())
    return text.lower() if clean == "lower" else text
