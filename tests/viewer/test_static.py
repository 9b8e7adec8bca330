"""The files of the page are built from the source that is in the repository, and are complete in themselves."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from thresher.runtime.format import percent

ROOT = Path(__file__).parents[2]
SOURCE, BUILT = ROOT / "view", ROOT / "src" / "thresher" / "viewer" / "static"
NAMES = {"app.js", "app-style.css", "index.html", "icon.svg", "source.txt"}


def source_files() -> list[str]:
    names = ["build.mjs", "package-lock.json", "package.json", "tsconfig.json"]
    return sorted([*names, *(f"src/{path.name}" for path in (SOURCE / "src").iterdir())])


def test_the_files_were_built_from_this_source() -> None:
    made = hashlib.sha256()
    for name in source_files():
        made.update(f"{name}\0".encode() + (SOURCE / name).read_bytes() + b"\0")
    assert (BUILT / "source.txt").read_text().strip() == made.hexdigest(), "run npm ci && npm run build in view/"
    assert {path.name for path in BUILT.iterdir()} == NAMES


def test_the_lock_file_names_no_registry_and_few_packages() -> None:
    lock = json.loads((SOURCE / "package-lock.json").read_text())
    assert "resolved" not in json.dumps(lock)
    assert "http" not in json.dumps([package.get("resolved") for package in lock["packages"].values()])
    wanted = json.loads((SOURCE / "package.json").read_text())
    assert set(wanted["devDependencies"]) == {"esbuild", "typescript"}
    assert "dependencies" not in wanted
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in wanted["devDependencies"].values())


def test_the_page_uses_nothing_from_outside_and_makes_no_html_of_texts() -> None:
    page = (BUILT / "index.html").read_text()
    assert re.findall(r'(?:src|href)="([^"]+)"', page) == ["static/icon.svg", "static/app-style.css", "static/app.js"]
    assert "<style" not in page
    assert "onclick" not in page
    for path in (SOURCE / "src").iterdir():
        text = path.read_text(encoding="utf-8")
        urls = set(re.findall(r"https?://[^\s\"'`)]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not urls, f"{path.name}: {urls}"
        for banned in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            assert banned not in text, f"{path.name}: {banned}"
    assert "url(" not in (BUILT / "app-style.css").read_text()


def test_the_files_are_small() -> None:
    assert sum(path.stat().st_size for path in BUILT.iterdir()) < 300_000


def test_the_wheel_and_the_source_archive_have_the_page() -> None:
    """hatchling takes every file of the package that git does not ignore."""
    ignored = subprocess.run(
        ["git", "check-ignore", *(str(BUILT / name) for name in NAMES)], cwd=ROOT, capture_output=True, text=True
    )
    assert ignored.stdout == ""
    settings = (ROOT / "pyproject.toml").read_text()
    assert 'packages = ["src/thresher"]' in settings
    assert "exclude" not in settings


@pytest.mark.slow
def test_a_build_gives_the_same_bytes(tmp_path: Path) -> None:
    """Needs npm; without it, the hash above says whether the files are up to date."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    copy = shutil.copytree(SOURCE, tmp_path / "view", ignore=shutil.ignore_patterns("node_modules"))
    subprocess.run(
        [npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts"], cwd=copy, check=True, capture_output=True
    )
    subprocess.run([npm, "run", "types"], cwd=copy, check=True, capture_output=True)
    subprocess.run(["node", "build.mjs", "--out", str(tmp_path / "out")], cwd=copy, check=True, capture_output=True)
    for name in NAMES:
        assert (tmp_path / "out" / name).read_bytes() == (BUILT / name).read_bytes(), name


def test_the_page_rounds_as_reports_do() -> None:
    """19.25% is 19.2% in both: toFixed of JavaScript would make it 19.3%. Needs node."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    shares = [(385, 2000), (1, 1_000_000), (999_999, 1_000_000), (1, 1), (0, 3), (3, 0), (1, 8), (1, 16), (3, 16)]
    shares += [(part, 2000) for part in range(0, 2001, 7)]
    numbers = [(0.0625, 3), (2.5, 0), (3.5, 0), (-0.125, 2), (1.005, 2), (1 / 3, 4), (0.5, 0)]
    source = (SOURCE / "src" / "dom.ts").read_text(encoding="utf-8")
    code = "".join(re.findall(r"^export function (?:fixed|percent)\(.*?^}$", source, re.MULTILINE | re.DOTALL))
    code = re.sub(r": (number|string)\b", "", code).replace("export ", "\n")
    code += f"\nconst shares = {json.dumps(shares)}, numbers = {json.dumps(numbers)};"
    code += (
        "\nconsole.log(JSON.stringify([shares.map((one) => percent(...one)), numbers.map((one) => fixed(...one))]));"
    )
    done = subprocess.run([node, "-e", code], check=True, capture_output=True, text=True)
    expected = [[percent(*one) for one in shares], [f"{value:.{digits}f}" for value, digits in numbers]]
    assert json.loads(done.stdout) == expected
    assert expected[0][:3] == ["19.2%", "<0.1%", ">99.9%"]
