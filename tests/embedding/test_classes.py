"""Class embeddings: the mean of sentences, whatever the batches; files of names and templates are read strictly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from thresher.cli.embed import embed_classes as embed_classes_command
from thresher.embedding.classes import TEMPLATES, embed_classes, read_names, read_templates
from thresher.errors import OutputError, PoolError, UsageError
from thresher.pruning.clusters import read_names as names_beside


class Hashed:
    """Texts as vectors that only equal texts share; remembers how many it was given at a time."""

    def __init__(self, **options: str) -> None:
        self.name, self.image_dim, self.text_dim = "hashed", 0, 6
        self.preprocess, self.tokenize = None, self._tokens
        self.batches: list[int] = []

    def _tokens(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        self.batches.append(len(texts))
        return {"id": np.array([[sum(ord(c) * 31**i for i, c in enumerate(text)) % 2**31] for text in texts])}

    def encode_texts(self, tokens: dict[str, np.ndarray]) -> np.ndarray:
        return np.array([vector(int(seed)) for seed in tokens["id"][:, 0]])

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        raise AssertionError

    def weights(self) -> str:
        return ""


class Pictures(Hashed):
    def __init__(self, **options: str) -> None:
        super().__init__()
        self.image_dim, self.text_dim, self.preprocess, self.tokenize = 6, 0, np.asarray, None


def vector(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=6).astype(np.float32) * (1 + seed % 7)


@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 20))
def test_the_mean_of_sentences(classes: int, sentences: int, batch: int) -> None:
    names = [f"class {i}" for i in range(classes)]
    templates = [f"{i} of a {{}} here." for i in range(sentences)]
    encoder = Hashed()
    found = embed_classes(names, encoder, templates, batch=batch)
    assert (found.shape, found.dtype) == ((classes, 6), np.float32)
    assert max(encoder.batches) <= batch
    assert sum(encoder.batches) == classes * sentences
    for row, name in zip(found, names, strict=True):
        vectors = [Hashed().encode_texts(Hashed()._tokens([t.replace("{}", name)]))[0] for t in templates]
        mean = sum(v / np.linalg.norm(v) for v in vectors)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-5)


def test_a_brace_in_a_name_is_a_brace() -> None:
    np.testing.assert_array_equal(
        embed_classes(["{0} {x} {}"], Hashed(), ["a {}."])[0], embed_classes(["a {0} {x} {}."], Hashed(), ["{}"])[0]
    )


def test_what_cannot_be_embedded() -> None:
    with pytest.raises(UsageError, match="does not encode texts"):
        embed_classes(["a"], Pictures())
    for names, templates in (([], ["{}"]), (["a"], [])):
        with pytest.raises(UsageError, match="at least one of each"):
            embed_classes(names, Hashed(), templates)
    with pytest.raises(UsageError, match="the name, 2 times; write it once"):
        embed_classes(["a"], Hashed(), ["{} or {}"])


# --- files ----------------------------------------------------------------------------------------


def test_names(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffdog\r\n t-shirt\t(blue) \n# 7\nétoile\n\n".encode())
    assert read_names(path) == ["dog", "t-shirt (blue)", "# 7", "étoile"]
    for text, message in (
        ("", "has no class names"),
        (" \n\n", "has no class names"),
        ("a\n\nb", "line 2 is empty"),
        ("a\nb\n a \n", "lines 1 and 3 are both 'a'"),
    ):
        path.write_text(text)
        with pytest.raises(PoolError, match=f"names.txt: .*{message}"):
            read_names(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(PoolError, match="not UTF-8 text"):
        read_names(path)
    with pytest.raises(PoolError, match="No such file"):
        read_names(tmp_path / "none")


def test_templates(tmp_path: Path) -> None:
    assert read_templates(None) == TEMPLATES == ("a photo of a {}.",)
    assert len(read_templates("openai")) == 80
    assert len(read_templates("simple")) == 7
    for name, known in (
        ("openai", open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("simple", open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ):
        assert [template.replace("{}", "x y") for template in read_templates(name)] == [make("x y") for make in known]
    path = tmp_path / "templates.txt"
    path.write_text("a photo of {c}, a flower.\n\nthe {}\n")
    assert read_templates(str(path)) == ("a photo of {}, a flower.", "the {}")
    for text, message in (
        ("\n", "has no templates"),
        ("{}\na photo", "line 2 has {}, the place of the class name, 0 times"),
        ("{} {c}", "line 1 has {}, the place of the class name, 2 times"),
    ):
        path.write_text(text)
        with pytest.raises(PoolError, match=message):
            read_templates(str(path))
    with pytest.raises(PoolError, match=r"there are also openai and simple\) cannot be read: No such file"):
        read_templates("imagenet")


# --- the command ----------------------------------------------------------------------------------


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(embed_classes_command, [*map(str, arguments), "--encoder", f"{__name__}:Hashed"])


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("dog\nblue  shirt\n")
    out = tmp_path / "classes.npy"
    done = run(tmp_path / "names.txt", "-o", out, "--templates", "simple", "--batch-size", "3")
    assert done.exception is None
    assert (
        done.output == f"2 classes, 7 sentences each, 6 dimensions\nwritten to {out} and {tmp_path / 'classes.txt'}\n"
    )
    found = np.load(out, allow_pickle=False)
    np.testing.assert_array_equal(found, embed_classes(["dog", "blue shirt"], Hashed(), read_templates("simple")))
    assert names_beside(str(out), 2) == ["dog", "blue shirt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes.npy", "classes.txt", "names.txt"]

    again = run(tmp_path / "names.txt", "-o", out)
    assert isinstance(again.exception, OutputError)
    assert "pass --overwrite" in str(again.exception)
    np.testing.assert_array_equal(np.load(out), found)
    assert run(tmp_path / "names.txt", "-o", out, "--overwrite").exception is None
    np.testing.assert_array_equal(np.load(out), embed_classes(["dog", "blue shirt"], Hashed()))


def test_the_names_may_lie_where_theirs_would(tmp_path: Path) -> None:
    names = tmp_path / "classes.txt"
    names.write_bytes(b"dog\r\n\tcat\n\n")
    assert run(names, "-o", tmp_path / "classes.npy").exception is None
    assert names.read_bytes() == b"dog\r\n\tcat\n\n"


def test_the_command_refuses_before_it_loads_anything(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("dog\n")
    (tmp_path / "taken.txt").write_text("mine")
    for arguments, kind, message in (
        ((names, "-o", tmp_path / "classes"), UsageError, r"type .*classes.npy"),
        ((tmp_path / "none", "-o", tmp_path / "a.npy"), PoolError, "No such file"),
        ((names, "-o", tmp_path / "taken.npy"), OutputError, r"taken.txt: exists already"),
        ((names, "-o", names / "a.npy"), OutputError, "cannot be written"),
    ):
        done = CliRunner().invoke(embed_classes_command, [*map(str, arguments), "--encoder", "no such"])
        assert isinstance(done.exception, kind)
        with pytest.raises(kind, match=message):
            raise done.exception
    assert sorted(path.name for path in tmp_path.iterdir()) == ["names.txt", "taken.txt"]
