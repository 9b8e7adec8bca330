"""Feeds mutated files to the readers of raw data, guided by coverage; stops at the first error that is no message.

    python -m tests.fuzz_data tar|parquet|arrow|picture|csv|captions CORPUS [-max_total_time=300 ...]

Needs atheris, which is no dependency of the tests. CORPUS is a folder for what it learns; valid files are put there
first.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tarfile
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["thresher.data", "PIL"]):
    import PIL.Image  # noqa: F401

    from thresher.io.pictures import open_rgb

from tests.data.common import arrow_of, outcome, parquet_of, picture, sample_tar, table
from thresher.errors import PoolError

ENDINGS = {"tar": "x.tar", "parquet": "x.parquet", "arrow": "x.arrow", "csv": "x.csv", "captions": "metadata.jsonl"}
KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
LIMIT = 1 << 20  # pixels: what is refused for its size is refused sooner


def seeds(kind: str) -> list[bytes]:
    """Return valid files to begin with."""
    keys = ["a", "b", "folder/c"]
    if kind == "tar":
        formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
        return [
            sample_tar([*keys, "long" * 60, "\u00fc"][: 3 if fmt == tarfile.USTAR_FORMAT else 5], fmt)
            for fmt in formats
        ]
    if kind == "parquet":
        plain = {"use_dictionary": False, "compression": "none", "write_statistics": False}
        return [
            parquet_of(table(keys)),
            parquet_of(table(keys), **plain),
            parquet_of(table(keys, n=[1, 2, 3]), row_group_size=1),
        ]
    if kind == "arrow":
        return [arrow_of(table(keys), stream=stream) for stream in (True, False)]
    if kind == "picture":
        more = [picture(0, "JPEG", progressive=True), picture(0, "GIF", save_all=True), picture(0, "PNG", size=(1, 1))]
        return [picture(0, one) for one in KINDS] + more
    if kind == "csv":
        return [b'filepath\ttitle\nx.png\tone\n"y""\n.png"\ttwo\n', b"\xef\xbb\xbftitle,filepath\r\n\r\na,x.png\r\n"]
    told = [{"file_name": "x.png", "text": "one"}, {"image": "y.png", "caption": ["one", "two"]}]
    return [b"\n".join(json.dumps(one).encode() for one in told)]


def summed(data: bytes) -> bytes:
    """Return a tar with the sums of its headers made right, so that what lies behind them is reached too."""
    blocks = [data[at : at + 512] for at in range(0, len(data), 512)]
    for i, block in enumerate(blocks):
        if block[257:262] == b"ustar" and len(block) == 512:
            total = sum(block) - sum(block[148:156]) + 8 * 32
            blocks[i] = block[:148] + b"%06o\0 " % total + block[156:]
    return b"".join(blocks)


def main() -> None:
    """Fuzz one kind of file until it is stopped or fails."""
    kind, corpus = sys.argv[1], Path(sys.argv[2])
    corpus.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(seeds(kind)):
        (corpus / f"seed-{kind}-{i}").write_bytes(seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "x.png").write_bytes(picture())

        def one(data: bytes) -> None:
            if kind == "picture":
                for draft in (None, 2):
                    with contextlib.suppress(PoolError):
                        open_rgb(data, limit=LIMIT, draft=draft)
                return
            path = folder / ENDINGS[kind]
            path.write_bytes(summed(data) if kind == "tar" and len(data) % 2 else data)
            outcome(folder if kind == "captions" else path)

        atheris.Setup([sys.argv[0], str(corpus), *sys.argv[3:]], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
