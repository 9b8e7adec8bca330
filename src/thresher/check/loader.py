"""What the loader of open_clip makes of tars: the samples that it trains on, and why it leaves others out.

Only headers, captions, JSON and numbers are read: an image that cannot be decoded is not found here.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from thresher.data.parts import Part
from thresher.data.trainable import PICTURES, can_decode, is_decoded, why_left_out
from thresher.io.open import open_file
from thresher.io.paths import visible
from thresher.io.tar import NOTES, tar_samples
from thresher.io.tar_fast import window_of


@dataclass
class Loader:
    """Counts of what the loader trains on.

    Attributes:
        trained: Samples that it trains on, if their images can be decoded.
        left_out: Samples that it leaves out, by reason, see :func:`thresher.data.trainable.why_left_out`; also "apart",
            samples whose image and caption are there, but not next to each other, and "undecodable".
        first: The key of the first of each, and its tar.
    """

    trained: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    first: dict[str, tuple[str, str]] = field(default_factory=dict)

    def read(self, part: Part) -> None:
        """Add the samples of a tar.

        Raises:
            PoolError: The tar is damaged; raised after the samples before the damage.
            UnreachedError: It was not reached.
        """
        incomplete: dict[str, list[tuple[str, ...]]] = {}
        complete = set[str]()
        try:
            with open_file(part.protocol, part.path) as file:
                window = window_of(file, part.protocol, part.path)
                for sample in tar_samples(window, part.path):
                    endings = tuple(sample.members)
                    if why_left_out(endings):
                        incomplete.setdefault(sample.key, []).append(endings)
                    elif all(
                        can_decode(ending, window.read(member.offset, member.size))
                        for ending, member in sample.members.items()
                        if is_decoded(ending) and member.size <= NOTES
                    ):
                        self.trained += 1
                        complete.add(sample.key)
                    else:
                        self._leave_out("undecodable", sample.key, part.path)
        finally:
            for key, pieces in incomplete.items():
                self._add_incomplete(key, pieces, key in complete, part.path)

    def _add_incomplete(self, key: str, pieces: list[tuple[str, ...]], complete: bool, path: str) -> None:
        """Add the samples of one key that lack an image or a caption."""
        with_image = sum(any(ending in PICTURES for ending in piece) for piece in pieces)
        why = why_left_out(tuple(dict.fromkeys(ending for piece in pieces for ending in piece)))
        if not why and not complete:
            self._leave_out("apart", key, path)
        elif with_image or not complete:  # else only members that lie apart from a complete sample
            self._leave_out(why or "no_txt", key, path, max(1, with_image))

    def _leave_out(self, why: str, key: str, path: str, times: int = 1) -> None:
        self.left_out[why] += times
        self.first.setdefault(why, (visible(key), path))
