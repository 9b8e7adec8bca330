"""The emoji pool as trainers are given data: parquet, tars and csv of the same rows."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

POOL = Path(__file__).parents[2] / "examples" / "twemoji"


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def emoji(rows: int | None = None) -> pa.Table:
    """The first rows of the emoji pool: key, text, image, group."""
    table = pa.concat_tables(
        pq.read_table(path, columns=["key", "text", "image", "group"]) for path in sorted(POOL.glob("*.parquet"))
    )
    return table if rows is None else table.slice(0, rows)


@dataclass(frozen=True)
class Data:
    """The same rows, three times; ``table`` has them."""

    table: pa.Table
    parquet: Path
    tars: str
    csv: Path


ROWS = 150


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("data")
    table = emoji(ROWS)
    pq.write_table(table, folder / "pairs.parquet", row_group_size=64)
    (folder / "pictures").mkdir()
    lines = ["filepath\ttitle"]
    cells = list(zip(table["key"].to_pylist(), table["text"].to_pylist(), table["image"].to_pylist(), strict=True))
    for shard in range(3):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for key, text, image in cells[shard * 50 : shard * 50 + 50]:
                add(archive, f"{key}.webp", image["bytes"])
                add(archive, f"{key}.txt", text.encode())
    for key, text, image in cells:
        path = folder / "pictures" / f"{key}.webp"
        path.write_bytes(image["bytes"])
        lines.append(f"{path}\t{text}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Data(table, folder / "pairs.parquet", str(folder / "{00000..00002}.tar"), folder / "pairs.csv")


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
