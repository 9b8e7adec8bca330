"""What the command line prints: JSON for scripts, also of errors; text that data cannot forge."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thresher.cli import output, write
from thresher.cli.main import main
from thresher.io.paths import visible
from thresher.runtime.memory import OUT_OF_MEMORY
from thresher.runtime.progress import Bars, Lines

POOL = str(Path(__file__).parents[2] / "examples" / "twemoji")
EVIL = "a\x1b[2Jb\rc\nError: forged\x85d\u2028e\u202ef\u200bg\th\x00\x9b\ufeff"
ESCAPED = "a\\x1b[2Jb\\rc\\nError: forged\\x85d\\u2028e\\u202ef\\u200bg\\th\\x00\\x9b\\ufeff"
HOSTILE = EVIL.replace("\x00", "").replace("\n", "").replace("\r", "")  # what a name of a file can hold
UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    def call(*words: object, cached: bool = False) -> tuple[int, str, str]:
        code = main([*map(str, words), *(["--cache", str(tmp_path / "cache")] if cached else [])])
        out, err = capsys.readouterr()
        return code, out, err

    return call


# --- what a terminal obeys ------------------------------------------------------------------------


def test_visible() -> None:
    assert visible("plain \u00e9 \u4f60\u597d \U0001f44b \\n") == "plain \u00e9 \u4f60\u597d \U0001f44b \\n"
    assert visible("\u3000 \u00a0") == "\u3000 \u00a0", "spaces of other scripts are spaces"
    assert visible(EVIL) == ESCAPED
    assert visible("\ud800 \udcff") == "\\ud800 \\udcff"
    assert visible("\U000e0041") == "\\U000e0041"
    assert visible("a" * 999) == "a" * 400 + "... (999 characters)"
    assert visible("a" * 999, limit=None) == "a" * 999
    for code in (*range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200D, 0x2029, 0x2066, 0xFFF9):
        assert visible(chr(code)).isascii()
        assert visible(chr(code)).isprintable()


@pytest.fixture
def evil_pool(tmp_path: Path) -> Path:
    """A pool whose keys, captions, column names and file name hold what terminals obey."""
    rows = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    table = {
        "key": [f"{EVIL}{row}" for row in range(40)],
        "text": [f"{EVIL} caption {row}" for row in range(40)],
        f"column {EVIL}": list(range(40)),
        "image_embedding": list(rows),
        "text_embedding": list(rows + 0.1),
    }
    pool = tmp_path / "pool \x1b]0;x\x07\u202e"
    pool.mkdir()
    pq.write_table(pa.table(table), pool / "part \x1b[31m\n\u200b.parquet")
    return pool


def assert_tame(*texts: str) -> None:
    for text in texts:
        assert not UNSAFE.search(text), repr(text)
        assert not re.search(r"^Error: forged", text, re.MULTILINE)


def test_a_pool_cannot_control_the_terminal(run: Run, evil_pool: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a \x1b[1m", tmp_path / "b"
    code, out, err = run("inspect", evil_pool, cached=True)
    assert code == 0
    assert f"column {ESCAPED}" in out
    assert_tame(out, err)
    code, out, err = run("select", "semdedup", evil_pool, "-o", a, "--eps", "0.5", "--clusters", "2", cached=True)
    assert (code, f"written to {visible(str(a))}" in out) == (0, True)
    assert_tame(out, err)
    assert run("select", "random", evil_pool, "-o", b, "--keep", "50%", cached=True)[0] == 0

    code, out, err = run("explain", a, f"{EVIL}3")
    assert code == 0
    assert out.startswith(f"row 3, key {ESCAPED}3 \u201c{ESCAPED} caption 3\u201d: ")
    assert_tame(out, err)
    code, out, err = run("explain", a, f"{EVIL}3", "--json")
    assert json.loads(out)["caption"] == f"{EVIL} caption 3"
    assert_tame(out, err)

    for words in (
        ["compare", a, b],
        ["compare", a, b, "--covariance"],
        ["export", a, "--as", "csv", "-o", tmp_path / "rows \x1b.csv"],
        ["report", a, "-o", tmp_path / "page \x1b.html"],
    ):
        code, out, err = run(*words)
        assert code == 0, err
        assert_tame(out, err)
    for words in (
        ["explain", a, f"{EVIL}99"],
        ["explain", a, "\x1b[2J\udcff"],
        ["select", "filter", evil_pool, "-o", tmp_path / "c", "--where", "width = '\udcff\x1b'"],
        ["select", "random", evil_pool, "-o", tmp_path / "c", "--keep", "1%", "--image", "\udcff\x1b"],
        ["select", "random", evil_pool, "-o", b, "--keep", "1%", "--key", f"{EVIL}"],
        ["select", "filter", evil_pool, "-o", b, "--overwrite", "--where", "nothing > 3"],
        ["export", a, "--as", "keys", "-o", tmp_path / "keys \x1b.txt"],  # keys with line breaks: none is left
        ["inspect", f"{evil_pool} is not there"],
        ["compare", a, b, "--worst", "\x1b[2J"],
        ["inspect", POOL, "\x1b[2J\u202e"],
        ["inspect", POOL, "--\x1b[2J"],
        ["\x1b[2J\u202e"],
        ["select", "\x1b[2J"],
    ):
        code, out, err = run(*words)
        assert (code, out) == (2, "")
        assert len(re.findall("^Error: ", err, re.MULTILINE)) == 1
        assert_tame(err)


def test_raw_data_cannot_control_the_terminal(run: Run, tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "data \x1b[1m"
    folder.mkdir()
    files = []
    for row in range(12):
        Image.new("RGB", (16, 16), (row, 9, 3)).save(tmp_path / "one.png")
        files.append((tmp_path / "one.png").read_bytes())
    captions = [f"caption {EVIL} {row}" for row in range(12)]
    table = pa.table({"image": files, "caption": captions, f"x{EVIL}": captions})
    with open(folder / f"a{HOSTILE}.parquet", "wb") as file:
        pq.write_table(table, file)
    damaged = folder / f"b{HOSTILE}.parquet"
    damaged.write_bytes(b"PAR1 damaged")
    code, out, err = run("doctor", folder)
    assert (code, out) == (2, "")
    assert visible(damaged.name) in err
    assert_tame(err)
    damaged.unlink()
    code, out, err = run("doctor", folder)
    assert code == 0, err
    assert f"other columns: x{ESCAPED}" in out
    assert_tame(out, err)
    assert json.loads(run("doctor", folder, "--json")[1])["columns"]["others"] == [f"x{EVIL}"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_old_terminal_cannot_show_is_escaped(tmp_path: Path, encoding: str) -> None:
    code = "from thresher.cli.output import say; say('\u00e9 \u4f60 \u202e')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, env={**os.environ, "PYTHONIOENCODING": encoding}
    )
    first = b"\xe9" if encoding == "latin-1" else b"\\xe9"
    assert done.stdout == first + b" \\u4f60 \\u202e\n"


def test_progress_shows_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    shown = output._VisibleProgress(Lines())
    shown.say(EVIL + "a" * 999)
    assert capsys.readouterr().err == ESCAPED + "a" * 999 + "\n"
    labels: list[str] = []

    class Labels(Lines):
        def task(self, label: str, total: int, unit: str = "rows") -> Any:
            labels.append(label)
            return super().task(label, total, unit)

    with output._VisibleProgress(Labels()).task(EVIL, 3) as advance:
        advance(3)
    assert labels == [ESCAPED]


def test_names_are_no_markup(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("COLUMNS", "200")
    bars = Bars()
    with bars.task("[/nope] [red]x :smile:", 3) as advance:
        advance(3)
    bars.say("[/nope] [red]x :smile:")
    err = capsys.readouterr().err
    assert err.endswith("[/nope] [red]x :smile:\n")
    assert err.count("[/nope] [red]x :smile:") >= 2


# --- JSON -----------------------------------------------------------------------------------------


def test_json_of_long_commands_ends_with_their_cost(run: Run, tmp_path: Path) -> None:
    sel, other, clusters = tmp_path / "sel", tmp_path / "other", tmp_path / "clusters"
    (tmp_path / "recipe.toml").write_text('[[step]]\nmethod = "random"\nkeep = "30%"\n')
    for words, cached in (
        (["inspect", POOL, "--quick"], True),
        (["select", "random", POOL, "-o", sel, "--keep", "10%"], True),
        (["run", tmp_path / "recipe.toml", POOL, "-o", tmp_path / "of-recipe"], True),
        (["score", "clip-score", POOL, "-o", tmp_path / "s.parquet"], True),
        (["cluster", POOL, "-o", clusters, "--clusters", "3", "--iterations", "1"], True),
        (["select", "random", POOL, "-o", other, "--keep", "20%"], True),
        (["compare", sel, other], True),
        (["export", sel, "--as", "keys", "-o", tmp_path / "keys.txt"], False),
        (["report", sel, "-o", tmp_path / "page.html", "--without-pool"], True),
        (["doctor", POOL, "--sample", "5"], False),
        (["reshard", POOL, sel, "-o", tmp_path / "shards", "--workers", "1"], False),
    ):
        begin = time.monotonic()
        code, out, err = run(*words, "--json", cached=cached)
        assert (code, err) == (0, ""), out
        found = json.loads(out)
        assert list(found)[-2:] == ["seconds", "peak_memory_bytes"], words
        assert 0 <= found["seconds"] <= time.monotonic() - begin + 0.001
        assert 10_000_000 < found["peak_memory_bytes"] < 100_000_000_000
    found = json.loads(run("explain", sel, "row:3", "--json")[1])
    assert "seconds" not in found


def test_json_of_embedding_ends_with_its_cost(run: Run, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "data").mkdir()
    for row in range(3):
        Image.new("RGB", (16, 16), (row, 9, 3)).save(tmp_path / "data" / f"{row}.png")
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    encoder = ["--encoder", "tests.toy:Toy", "--json"]
    words = ["embed", tmp_path / "data", "-o", tmp_path / "pool", "--workers", "0", "--only", "image", *encoder]
    code, out, _ = run(*words)
    assert code == 0, out
    assert list(json.loads(out))[-2:] == ["seconds", "peak_memory_bytes"]
    code, out, _ = run("embed-classes", tmp_path / "names.txt", "-o", tmp_path / "c.npy", *encoder)
    assert code == 0, out
    found = json.loads(out)
    assert (found["classes"], found["dims"]) == np.load(tmp_path / "c.npy").shape
    assert list(found)[-2:] == ["seconds", "peak_memory_bytes"]


def test_json_of_short_commands(run: Run, tmp_path: Path) -> None:
    assert "random" in json.loads(run("methods", "--json")[1])
    assert json.loads(run("methods", "random", "--json")[1])["parameters"][0]["name"] == "keep"
    assert "dbp-laion" in json.loads(run("recipes", "--json")[1])
    assert 'method = "density"' in json.loads(run("recipes", "dbp-laion", "--json")[1])["toml"]
    there = str(tmp_path / "cache")
    assert json.loads(run("cache", "--json", "--cache", there)[1])["folder"] == there
    for words in (["clear", "--cache", there, "--json"], ["--json", "--cache", there, "clear"]):
        words = ["cache", *words] if words[0] == "clear" else ["cache", *words]
        assert json.loads(run(*words)[1]) == {"folder": there, "removed_bytes": 0}


def test_numbers_that_json_lacks_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"a": [float("nan"), float("inf"), 1.5], "b": EVIL, "c": Path("x"), "d": "\ud800"})
    text = capsys.readouterr().out
    assert text.isascii()
    assert json.loads(text) == {"a": [None, None, 1.5], "b": EVIL, "c": "x", "d": "\ud800"}


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["inspect", "/nowhere"], "PoolError"),
        (["select", "random", POOL, "-o", "x", "--keep", "0"], "UsageError"),
        (["select", "random", POOL, "-o", "x", "--keep", "5000"], "BudgetError"),
        (["select", "random", POOL, "-o", "/proc/x/y", "--keep", "3"], "OutputError"),
        (["select", "densty", POOL], "UsageError"),
        (["select", "density", POOL, "-o", "x", "--kep", "3"], "UsageError"),
        (["inspect"], "UsageError"),
        (["inspect", POOL, "more"], "UsageError"),
        (["export", "sel", "-o", "x"], "UsageError"),
        (["export", "sel", "--as", "parqet", "-o", "x"], "UsageError"),
        (["cluster", POOL, "-o", "x", "--iterations", "many"], "UsageError"),
        (["explain", "/nowhere", "a"], "PoolError"),
        (["compare", "a"], "UsageError"),
        (["coreset", "/nowhere", "-o", "x", "--keep", "3"], "PoolError"),
        (["reshard", "/nowhere", "a", "-o", "x"], "PoolError"),
        (["embed", "/nowhere", "-o", "x", "--encoder", "tests.toy:Toy"], "PoolError"),
        (["embed-classes", "/nowhere", "-o", "x.npy", "--encoder", "tests.toy:Toy"], "PoolError"),
        (["doctor", "/nowhere"], "PoolError"),
        (["recipes", "nothing"], "UsageError"),
        (["methods", "nothing"], "UsageError"),
        (["train", "clip"], "UsageError"),
        (["train", "wash"], "UsageError"),
        (["wash"], "UsageError"),
        ([], "UsageError"),
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_errors_are_json_with_the_same_exit_code(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], kind: str, first: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    at = (2 if words[:1] in (["select"], ["train"]) else 1) if first else len(words)
    code, out, err = run(*words[:at], "--json", *words[at:])
    found = json.loads(out)
    assert (code, err) == (2, "")
    assert set(found) == {"error"}
    assert set(found["error"]) == {"type", "message"}
    assert found["error"]["message"]
    if not first or words:
        assert found["error"]["type"] == kind, found
    assert not list(tmp_path.iterdir())


def test_after_two_dashes_json_is_a_name(run: Run) -> None:
    code, out, err = run("inspect", "--", "--json")
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")


@pytest.mark.parametrize(
    ("error", "code", "kind", "message"),
    [
        (
            KeyboardInterrupt(),
            130,
            "Interrupted",
            "interrupted; run the same command again; it reuses what is in the cache",
        ),
        (output.Interrupted("use --resume"), 130, "Interrupted", "interrupted; use --resume"),
        (PermissionError(13, "Permission denied", "a\x1b"), 2, "PermissionError", "a\x1b: Permission denied"),
        (OSError("torn"), 2, "OSError", "torn"),
        (MemoryError(), 2, "MemoryError", OUT_OF_MEMORY),
    ],
)
def test_trouble_of_the_machine_is_json_too(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, kind: str, message: str
) -> None:
    def fail(**given: Any) -> None:
        raise error

    monkeypatch.setattr(write.export, "callback", fail)
    words = ["export", "sel", "--as", "keys", "-o", "x"]
    assert run(*words, "--json")[0] == code
    _, out, _ = run(*words, "--json")
    assert json.loads(out) == {"error": {"type": kind, "message": message}}
    again, out, err = run(*words)
    assert (again, out) == (code, "")
    assert visible(message) in err
    assert_tame(err)


@pytest.mark.slow
def test_a_killed_command_says_so_in_json(tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", np.random.default_rng(0).standard_normal((200_000, 64)).astype(np.float16))
    words = ["cluster", tmp_path / "image.npy", "-o", tmp_path / "out", "--clusters", "400", "--sample", "all"]
    command = [sys.executable, "-m", "thresher", *words, "--iterations", "500", "--cache", tmp_path / "cache", "--json"]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "cache").exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate()
    assert process.returncode == 130
    assert json.loads(out)["error"]["type"] == "Interrupted"
    assert "Traceback" not in err


def test_memory_counts_children_but_not_whoever_started_the_program() -> None:
    child = "x = bytearray(300_000_000)"
    code = "import subprocess, sys; from thresher.cli.output import peak_memory; before = peak_memory();"
    code += f"subprocess.run([sys.executable, '-c', {child!r}]); print(before, peak_memory())"
    held = bytearray(os.urandom(1) * 400_000_000)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert len(held) == 400_000_000
    assert after >= 300_000_000
    if sys.platform == "linux":
        assert before < 200_000_000


# --- warnings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [False, True])
def test_a_warning_is_one_line_once(run: Run, monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    def warn(output: output.Output, **given: Any) -> None:
        for _ in range(3):
            warnings.warn(f"toy offers 'x\x1b', which cannot be used:\n{EVIL}", stacklevel=1)
            warnings.warn("second", stacklevel=1)
        output.result({"fine": True}, ["fine"], cost=False)

    monkeypatch.setattr(write.export, "callback", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before = warnings.showwarning
        words = ["export", "sel", "--as", "keys", "-o", "x", *(["--json"] if as_json else [])]
        code, out, err = run(*words)
        assert warnings.showwarning is before
    assert code == 0
    assert json.loads(out) == {"fine": True} if as_json else out == "fine\n"
    first, second = err.splitlines()
    assert first.startswith("Warning: toy offers 'x\\x1b', which cannot be used: a\\x1b[2Jb")
    assert second == "Warning: second"
    assert_tame(err)


def test_a_broken_plug_in_is_one_line(tmp_path: Path) -> None:
    package = tmp_path / "broken-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[thresher.methods]\nmine = broken_method:Mine\n")
    (tmp_path / "broken_method.py").write_text("raise RuntimeError('first\\nsecond')\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    for words in (["methods", "--json"], ["select", "--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "thresher", *words],
            capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("Warning: broken offers 'mine', which cannot be used: RuntimeError: first")


# --- texts of any length --------------------------------------------------------------------------


@pytest.mark.slow
def test_long_texts_are_cut_where_they_are_shown(run: Run, tmp_path: Path) -> None:
    """A caption of 3 MB and keys of 100 kB: each output is short and says how long the text is."""
    rows = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    keys = pa.array([f"{'K' * 100_000}{row}" for row in range(40)])
    captions = pa.DictionaryArray.from_arrays(pa.array([0] * 40, pa.int32()), ["é" * 3_000_000])
    pool, sel = tmp_path / "pool", tmp_path / "sel"
    pool.mkdir()
    table = {"uid": keys, "text": captions, "embedding": list(rows), "short": [f"s{row // 2}" for row in range(40)]}
    pq.write_table(pa.table(table), pool / "a.parquet", store_schema=False)
    assert run("select", "semdedup", pool, "-o", sel, "--eps", "0.9", "--clusters", "2", cached=True)[0] == 0

    code, out, _ = run("explain", sel, "row:3")
    assert code == 0
    assert "(3,000,000 characters)" in out
    assert "(100,001 characters)" in out
    assert len(out) < 20_000
    code, out, _ = run("explain", sel, "row:3", "--json")
    found = json.loads(out)
    assert found["caption"] == "é" * 2_000 + "... (3,000,000 characters)"
    assert found["key"] == "K" * 2_000 + "... (100,001 characters)"
    code, out, err = run("explain", sel, "Z" * 100_000)
    assert (code, out) == (2, "")
    assert err.startswith("Error: no row 'ZZZ")
    assert err.endswith("row:39\n")
    assert len(err) < 1_000
    assert json.loads(run("explain", sel, "Z" * 100_000, "--json")[1])["error"]["message"] in err
    code, _, err = run("report", sel, "-o", tmp_path / "page.html")
    assert (code, (tmp_path / "page.html").stat().st_size < 500_000) == (0, True), err
    assert run("export", sel, "--as", "keys", "-o", tmp_path / "keys.txt")[0] == 0
    assert all(len(line) > 100_000 for line in (tmp_path / "keys.txt").read_text().splitlines()), "nothing is lost"
    wrong = run("select", "random", pool, "-o", tmp_path / "b", "--keep", "5", "--key", "short", cached=True)
    assert wrong[0] == 2

    twice = tmp_path / "twice"
    twice.mkdir()
    pq.write_table(pa.table({**table, "uid": ["K" * 100_000] * 40}), twice / "a.parquet")
    code, _, err = run("select", "random", twice, "-o", tmp_path / "c", "--keep", "5", cached=True)
    assert code == 2
    assert "... (100,000 characters)" in err
    assert "--skip-bad" in err
    assert len(err) < 1_500


def test_a_line_of_any_length_is_cut(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    output.say("a" * 500_000 + " end")
    text = capsys.readouterr().out
    assert len(text) < 11_000
    assert text.endswith("a end\n")
    output.print_json({"text": "a" * 500_000})
    assert json.loads(capsys.readouterr().out)["text"] == "a" * 100_000 + "... (500,000 characters)"
    output.show_error("UsageError", "b" * 300_000 + "; do this", as_json=False)
    text = capsys.readouterr().err
    assert len(text) < 2_200
    assert text.endswith("; do this\n")
    with output.warnings_as_lines():
        warnings.simplefilter("always")
        warnings.warn("c" * 300_000, UserWarning, stacklevel=1)
    assert len(capsys.readouterr().err) < 2_200
