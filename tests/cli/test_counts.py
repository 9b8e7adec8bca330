"""What commands say about one thing: "1 row", not "1 rows"."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.embedding.raw import tars
from thresher.cli.main import main

WRONG = re.compile(r"(?<![\d.,-])1 (?!of )((?:[a-z-]+ )?(?!this|always|less)[a-z]+(?<!s)s)\b")


@pytest.mark.slow
def test_one_of_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, pool, out = str(tars(tmp_path / "raw", 1)), str(tmp_path / "pool"), str(tmp_path / "out")
    pair = str(tars(tmp_path / "pair", 2))
    keys = tmp_path / "keys.txt"
    keys.write_text("000000\nelsewhere\n", encoding="ascii")
    commands = [
        ["doctor", raw, "--encoder", "tests.toy:Toy"],
        ["embed", raw, "-o", pool, "--encoder", "tests.toy:Toy", "--workers", "0", "--thumbnails"],
        ["inspect", pool, "--workers", "1"],
        ["cluster", pool, "-o", f"{out}-clusters", "--clusters", "1"],
        ["score", "clip-score", pool, "-o", f"{out}.parquet"],
        ["select", "random", pool, "-o", f"{out}-sel", "--keep", "1"],
        ["explain", f"{out}-sel", "row:0"],
        ["export", f"{out}-sel", "--as", "keys", "-o", f"{out}-keys.txt"],
        ["report", f"{out}-sel", "-o", f"{out}.html"],
        ["reshard", raw, f"{out}-sel", "-o", f"{out}-shards"],
        ["train", "clip", pair, "-o", f"{out}-run", "--epochs", "1", "--batch-size", "4", "--eval-every", "0"],
        ["explain", f"{out}-run", "row:0"],
        ["report", f"{out}-run", "-o", f"{out}-run.html"],
    ]
    for words in commands:
        assert main(words) == 0, words
        said = "".join(capsys.readouterr())
        found = [match[0] for match in WRONG.finditer(said)]
        assert not found, f"{words[0]}: {said}"
    assert main(["reshard", raw, str(keys), "-o", f"{out}-two"]) in (0, 2)
    said = "".join(capsys.readouterr())
    assert f"1 of 2 samples in 1 tar, found by key\n1 key not found in {raw}, listed in {out}-two/missing.txt" in said
    for page in (f"{out}.html", f"{out}-run.html"):
        text = re.sub(r"<[^>]+>", "", re.sub(r"<(style|svg).*?</\1>", "", Path(page).read_text(), flags=re.DOTALL))
        assert [match[0] for match in WRONG.finditer(text)] == []
