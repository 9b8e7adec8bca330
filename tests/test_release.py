"""What a release consists of: one version, valid files for the repository's host, man pages, stored ratios."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import thresher
from thresher.cli.main import SECTIONS

ROOT = Path(__file__).parents[1]


def script(path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_script", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    monkeypatch.syspath_prepend(str((ROOT / path).parent))
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


# --- the version, and files for the host ----------------------------------------------------------


def test_the_citation_is_valid_and_has_the_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert cited["version"] == thresher.__version__
    assert set(cited) >= {
        "message",
        "title",
        "authors",
        "type",
    }  # message, title and authors are required by the format
    assert all(set(author) <= {"name", "given-names", "family-names"} for author in cited["authors"])
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert cited["license"] == settings["project"]["license"]
    assert "version" in settings["project"]["dynamic"], "the version is written in one place"
    assert f"version = {{{thresher.__version__}}}" in (ROOT / "docs" / "cite.md").read_text(encoding="utf-8")


def test_a_tag_must_be_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = script(".ci/check_tag.py", monkeypatch).problems
    (tmp_path / "src" / "thresher").mkdir(parents=True)
    (tmp_path / "src" / "thresher" / "__init__.py").write_text('x = 1\n__version__ = "1.2.0"\n')
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.2.0\n")
    (tmp_path / "CHANGELOG.md").write_text("## [1.2.0] - 2027-01-01\n")
    assert problems("v1.2.0", tmp_path) == []
    assert problems("1.2.0", tmp_path) == ["the tag 1.2.0 is not v1.2.0, the version in src/thresher/__init__.py"]
    assert len(problems("v1.2.1", tmp_path)) == 3
    assert len(problems(f"v{thresher.__version__}")) <= 1, "only the changelog may not name the version yet"


FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


@pytest.mark.parametrize("form", [path for path in FORMS if path.stem != "config"], ids=lambda path: path.stem)
def test_issue_forms_ask_for_doctor_self(form: Path) -> None:
    content = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert set(content) == {"name", "description", "labels", "body"}
    assert {item["type"] for item in content["body"]} <= {"textarea", "input", "dropdown", "checkboxes", "markdown"}
    ids = [item["id"] for item in content["body"]]
    assert len(set(ids)) == len(ids)
    assert all(item["attributes"]["label"] for item in content["body"])
    assert "thresher doctor --self" in form.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_workflows_are_valid_and_may_do_little(path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content["permissions"] == {"contents": "read"}
    for name, job in content["jobs"].items():
        assert job["timeout-minutes"] <= 90, name
        assert set(job.get("permissions", {})) <= {"id-token"}, "only publishing needs more, and no password"
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            for each in re.findall(r"(?:^|\s)((?:\.ci|benchmarks)/[\w./]+)", step.get("run", "")):
                assert (ROOT / each).exists(), each
            for target in re.findall(r"\bmake ([\w-]+)", step.get("run", "")):
                assert f"\n{target}:" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_second_build_of_a_release_does_not_contain_the_first(tmp_path: Path) -> None:
    """A source distribution has every file that git does not ignore, so the first build is kept elsewhere."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))
    (step,) = [step["run"] for step in workflow["jobs"]["build"]["steps"] if "diff -r" in step.get("run", "")]
    repository, programs, temporary = (tmp_path / name for name in ("repository", "bin", "temporary"))
    for folder in (repository, programs, temporary):
        folder.mkdir()
    make = programs / "make"  # lists what a source distribution would contain
    listing = "git ls-files --cached --others --exclude-standard"
    make.write_text(f'#!/bin/sh\nfiles=$({listing})\nrm -rf dist\nmkdir dist\necho "$files" > dist/files\n')
    make.chmod(0o755)
    shutil.copy(ROOT / ".gitignore", repository)
    subprocess.run(["git", "init", "-q"], cwd=repository, check=True)
    env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "RUNNER_TEMP": str(temporary)}
    done = subprocess.run(["bash", "-e", "-c", step], cwd=repository, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (repository / "dist" / "files").read_text() == ".gitignore\n"


def test_the_wheel_is_checked_where_doctor_finds_something_to_correct(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On macOS a process may open 256 files, of which ``doctor --self`` warns with exit code 1."""
    check = script(".ci/check_dist.py", monkeypatch)
    with pytest.raises(SystemExit, match="exit code 1"):
        check.run("sh", "-c", "exit 1", cwd=tmp_path)
    bin = tmp_path / "venv" / "bin"
    bin.mkdir(parents=True)
    versions = json.dumps({"versions": {"thresher": "1.0", "python": "3.11"}, "extras": {"torch": {}}})
    (bin / "python").write_text(f"#!/bin/sh\necho {bin}/thresher.py\n")
    (bin / "thresher").write_text(
        f"#!/bin/sh\ncase $1 in --version) echo '{{\"version\": \"1.0\"}}';; doctor) echo '{versions}'; exit 1;; "
        "*) echo select is reached >&2; exit 9;; esac\n"
    )
    for path in bin.iterdir():
        path.chmod(0o755)
    with pytest.raises(SystemExit, match="select is reached"):
        check.check_commands(tmp_path / "thresher-1.0-py3-none-any.whl", "true", [], tmp_path)


def test_every_extra_is_in_the_page_on_installing() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    rows = page.partition("| extra |")[2].partition("\n\n")[0].splitlines()[2:]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(settings["optional-dependencies"])


def test_every_python_of_the_classifiers_is_in_the_matrix() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [line.rpartition(" ")[2] for line in settings["classifiers"] if re.search(r":: 3\.\d+$", line)]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    matrix = workflow["jobs"]["installed"]["strategy"]["matrix"]
    assert set(named) <= set(matrix["python"])
    assert settings["requires-python"] == f">={matrix['python'][0]}"


def test_the_image_has_no_rights() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    words = [line.split() for line in lines if line and line.split()[0].isupper()]
    assert next(rest for name, *rest in words if name == "USER") == ["thresher"]
    names = [name for name, *_ in words]
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert "RUN" not in names[names.index("USER") :]
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert ignored == ["*", "!dist/*.whl"], "nothing but the wheel reaches the build"


# --- man pages ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """All man pages."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        written: list[Path] = script("website/man.py", monkeypatch).write_pages(tmp_path_factory.mktemp("man"))
    return written


def test_every_command_has_a_man_page(pages: list[Path]) -> None:
    names = {page.stem for page in pages}
    assert names >= {"thresher"} | {f"thresher-{name}" for section in SECTIONS for name in section.commands}
    assert {"thresher-select-semdedup", "thresher-train-clip", "thresher-config-set"} <= names
    for page in pages:
        text = page.read_text(encoding="ascii")
        assert text.startswith(".TH "), page
        assert '"2023-11-14"' in text.splitlines()[0], "the day of the build"
    text = next(page for page in pages if page.stem == "thresher").read_text()
    assert "THRESHER_WORKERS" in text
    assert r"\-\-version" in text


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(words, id=words[0], marks=pytest.mark.skipif(not shutil.which(words[0]), reason="not installed"))
        for words in (["groff", "-man", "-Tutf8", "-ww", "-z"], ["mandoc", "-Tlint", "-Wwarning"])
    ],
)
def test_formatters_have_nothing_to_say(command: list[str], pages: list[Path]) -> None:
    done = subprocess.run([*command, *map(str, pages)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_text_in_man_pages_is_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    man = script("website/man.py", monkeypatch)
    assert man.escaped(r".x \n 'a' -b “c”") == r"\&.x \en 'a' \-b \[u201C]c\[u201D]"
    assert list(man.paragraphs("One\ntwo.\n\n\b\na: b\nc: d\n")) == ["One two.", "a: b", "c: d"]


# --- stored ratios --------------------------------------------------------------------------------


@pytest.fixture
def nightly(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, in a process whose kernels it may not change."""
    monkeypatch.setenv("OPENBLAS_CORETYPE", "")
    return script("benchmarks/nightly.py", monkeypatch)


def test_a_regression_is_more_than_15_percent_and_the_noise(nightly: Any) -> None:
    ratio = nightly.Ratio
    stored = {"cut": ratio(0.5, 0.02, 9)}
    for now, slower in ((0.5, []), (0.59, []), (0.6, ["cut"]), (0.1, [])):
        assert nightly.verdicts(stored, {"cut": ratio(now, 0.01, 9)})[1] == slower
    assert nightly.verdicts(stored, {"cut": ratio(0.6, 0.05, 9)})[1] == [], "noise may be the reason"
    lines, slower = nightly.verdicts({}, {"cut": ratio(0.6, 0.05, 9)})
    assert slower == ["cut"]
    assert "--store" in lines[0]


def test_the_ratio_is_that_of_rounds_in_turn(nightly: Any) -> None:
    found = nightly.ratio_of([1.0, 2.0, 30.0, 4.0, 5.0], [2.0, 4.0, 60.0, 8.0, 5.0])
    assert (found.ratio, found.rounds) == (0.5, 5)
    assert found.noise == 0.0, "one slow machine for both sides, and one outlier, are no noise"
    assert nightly.ratio_of([3.0], [2.0]) == nightly.Ratio(1.5, 0.0, 1)


def test_thresholds_and_history_fit_the_contests(nightly: Any) -> None:
    assert set(nightly.load(nightly.THRESHOLDS)) == set(nightly.CONTESTS)
    history = nightly.read_history(nightly.HISTORY)
    assert history
    for line in history:
        assert set(line) == {"day", "version", "commit", "machine", "ratios"}
        assert not {"node", "host", "user", "path"} & set(line["machine"])


@pytest.mark.slow
def test_one_contest_from_measuring_to_the_plot(
    nightly: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("THRESHOLDS", "HISTORY", "PLOT"):
        monkeypatch.setattr(nightly, name, tmp_path / name.lower())

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["nightly.py", *words])
        code: int = nightly.main()
        return code

    assert run("cut", "--rounds", "1") == 1, "nothing is stored yet"
    assert run("cut", "--rounds", "1", "--store") == 0
    stored = json.loads((tmp_path / "thresholds").read_text())["ratios"]
    assert stored["cut"]["ratio"] > 0
    stored["cut"]["ratio"] /= 1000
    (tmp_path / "thresholds").write_text(json.dumps({"ratios": stored}))
    assert run("cut", "--rounds", "1") == 1
    assert "SLOWER" in capsys.readouterr().out
    history = nightly.read_history(tmp_path / "history")
    assert [line["version"] for line in history] == [thresher.__version__] * 3
    assert run("--plot") == 0
    first = (tmp_path / "plot").read_bytes()
    assert run("--plot") == 0
    assert (tmp_path / "plot").read_bytes() == first
    assert b"cut" in first
