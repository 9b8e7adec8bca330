"""Files of captions as people have them, and what is said where no column is known to hold captions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.common import picture
from thresher.data import DataOptions, open_data
from thresher.errors import PoolError, UsageError

NAMES = ["000.jpg", "001.jpg"]
SAID = {"000": "a red dog, running", "001": "a cat"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    root.mkdir()
    for i, name in enumerate(NAMES):
        (root / name).write_bytes(picture(i))
    return root


def read(folder: Path, **options: Any) -> dict[str, str]:
    return {sample.key: sample.text for sample in open_data(str(folder), DataOptions(**options)).samples()}


def chat(text: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": text}, {"from": "gpt"}]


def rows(**texts: Any) -> list[dict[str, Any]]:
    """Rows with an image, and in further columns what a function makes of its caption."""
    return [{"image": f"{key}.jpg", **{name: make(text) for name, make in texts.items()}} for key, text in SAID.items()]


def flickr30k() -> str:
    lines = [f"{key}.jpg| {i}| {text if not i else 'another'}" for key, text in SAID.items() for i in range(3)]
    # A line of the published file lacks a delimiter, and captions have quotes.
    return "\n".join(["image_name| comment_number| comment", *lines, "001.jpg| 4   no delimiter", '001.jpg| 5| "Hi'])


FILES: dict[str, tuple[str, str]] = {
    "Flickr30k's results.csv (kaggle: hsankesara/flickr-image-dataset)": ("results.csv", flickr30k()),
    "Flickr8k.token.txt": (
        "Flickr8k.token.txt",
        "".join(f"{k}.jpg#{i}\t{t if not i else 'another'}\n" for k, t in SAID.items() for i in range(5))
        + '001.jpg#5\t"A quote that is never closed\n',
    ),
    "Karpathy": (
        "dataset_flickr30k.json",
        json.dumps(
            {
                "images": [
                    {"filename": f"{key}.jpg", "sentences": [{"tokens": ["a"], "raw": text}, {"raw": "b"}]}
                    for key, text in SAID.items()
                ],
                "dataset": "flickr30k",
            }
        ),
    ),
    "Karpathy, COCO": (
        "dataset_coco.json",
        json.dumps(
            {
                "images": [
                    {"filepath": "val2014", "filename": f"{key}.jpg", "cocoid": 1, "sentences": [{"raw": text}]}
                    for key, text in SAID.items()
                ]
            }
        ),
    ),
    "LLaVA, CLIP-KD#18": ("chat.json", json.dumps([*rows(conversations=chat), {"conversations": []}])),
    "LLaVA, datasets#7337": ("chat.jsonl", "\n".join(map(json.dumps, rows(conversations=chat)))),
    "data": ("x.json", json.dumps({"version": 1, "data": rows(caption=str)})),
    "data-juicer#600": ("x.jsonl", "\n".join(json.dumps({"text": t, "images": [f"{k}.jpg"]}) for k, t in SAID.items())),
    "another list": ("x.json", json.dumps({"info": {"a": 1}, "samples": rows(caption=str)})),
    "CLIP-fine-tune#1": ("x.json", json.dumps({f"{key}.jpg": [text, "b"] for key, text in SAID.items()})),
    "objects by name": ("x.json", json.dumps({f"{key}.jpg": {"caption": text, "n": 1} for key, text in SAID.items()})),
    "lists of objects by name": ("x.json", json.dumps({f"{k}.jpg": [{"caption": t}, {}] for k, t in SAID.items()})),
    "semicolons": ("x.csv", 'file_name;caption\n' + "".join(f"{k}.jpg;{t}\n" for k, t in SAID.items())),
    "no header, tab": ("x.txt", "".join(f"{k}.jpg\t{t}\n" for k, t in SAID.items())),
    "no header, comma": ("x.txt", "001.jpg,a cat\n000.jpg,a red dog, running\n"),
    "blank lines first": ("x.csv", "\n \nfile_name,caption\n" + "".join(f'{k}.jpg,"{t}"\n' for k, t in SAID.items())),
    "old line ends": ("x.csv", "file_name\tcaption\r" + "".join(f"{k}.jpg\t{t}\r" for k, t in SAID.items())),
    "capitals": ("x.csv", "Image\tCaption\n" + "".join(f"{k}.jpg\t{t}\n" for k, t in SAID.items())),
    "known before others": ("x.csv", "n\timage\ttext\n" + "".join(f"7\t{k}.jpg\t{t}\n" for k, t in SAID.items())),
}  # fmt: skip


@pytest.mark.parametrize("way", FILES)
def test_captions_files_of_known_datasets(folder: Path, tmp_path: Path, way: str) -> None:
    name, content = FILES[way]
    (tmp_path / name).write_text(content, newline="")
    assert read(folder, captions_file=str(tmp_path / name)) == SAID


PROMPTS = [("000.jpg", 512, 512, SAID["000"]), ("001.jpg", 512, 512, SAID["001"])]
HEAD = ["file_name", "width", "height", "prompt"]
OBJECTS = [dict(zip(HEAD, row, strict=True)) for row in PROMPTS]


def parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(OBJECTS), path)


GUESSES: dict[str, str | Callable[[Path], None]] = {
    "metadata.csv": "\n".join([",".join(HEAD), *(f'{a},{b},{c},"{d}"' for a, b, c, d in PROMPTS)]),
    "metadata.tsv": "\n".join("\t".join(map(str, row)) for row in [HEAD, *PROMPTS]),
    "captions.txt": "\n".join("\t".join(map(str, row)) for row in [HEAD, *PROMPTS]),
    "metadata.jsonl": "\n".join(map(json.dumps, OBJECTS)),
    "captions.json": json.dumps(OBJECTS),
    "metadata.parquet": parquet,
}


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("name", GUESSES)
def test_a_caption_is_never_guessed(folder: Path, tmp_path: Path, name: str, told: bool) -> None:
    """SimpleTuner#283: metadata with width, height and prompt gave "512" as the caption."""
    path, content = (tmp_path if told else folder) / name, GUESSES[name]
    content(path) if callable(content) else path.write_text(content)
    options = {"captions_file": str(path)} if told else {}
    with pytest.raises(
        PoolError, match=r"no column of captions \(text, .*\); it has file_name, width, height, prompt; .*--caption"
    ):
        read(folder, **options)
    assert read(folder, caption="prompt", **options) == SAID
    with pytest.raises(UsageError, match=r"no column 'promt' for --caption; it has file_name, .*Did you mean 'prompt'"):
        read(folder, caption="promt", **options)
    if not told:
        assert read(folder, captions=False) == {"000": "", "001": ""}


def test_columns_of_labels_are_no_captions(folder: Path) -> None:
    (folder / "captions.csv").write_text("image,label,description\n000.jpg,0,a dog\n001.jpg,1,a cat\n")
    with pytest.raises(PoolError, match="it has image, label, description; name one with --caption COLUMN"):
        read(folder)
    assert read(folder, caption="description") == {"000": "a dog", "001": "a cat"}
    (folder / "captions.csv").write_text("image,label\n000.jpg,0\n001.jpg,1\n")  # nothing could be a caption
    assert read(folder) == {"000": "", "001": ""}
    with pytest.raises(PoolError, match="it has image, label; name one with --caption COLUMN"):
        read(folder, captions_file=str(folder / "captions.csv"))


def test_the_column_of_images_may_be_named(folder: Path) -> None:
    (folder / "captions.csv").write_text("photo,caption\n000.jpg,a dog\n")
    with pytest.raises(
        PoolError, match=r"no column of image paths \(.*\); it has photo, caption; name one with --image"
    ):
        read(folder)
    assert read(folder, image="photo") == {"000": "a dog", "001": ""}
    (folder / "photo.jpg").write_bytes(picture())  # the name of a column is not that of an image
    (folder / "image.jpg").write_bytes(picture())
    with pytest.raises(PoolError, match="it has photo, caption; name one with --image"):
        read(folder)
    (folder / "captions.csv").write_text("image,what\n000.jpg,a dog\n")
    with pytest.raises(PoolError, match="it has image, what; name one with --caption"):
        read(folder)


@pytest.mark.parametrize("first", ["a.jpg,512,a dog", "000,a dog", "caption,000.jpg", "000.jpg,0", "000.jpg\t1"])
def test_a_first_line_without_names_must_be_an_image_and_a_caption(folder: Path, first: str) -> None:
    (folder / "captions.csv").write_text(f"{first}\n{first}\n")
    with pytest.raises(PoolError, match=r"no column of image paths \(.*\); it has "):
        read(folder)


def test_lines_without_names_for_other_images(folder: Path, tmp_path: Path) -> None:
    for line in ("z.jpg,a dog", "z.jpg\ta dog", "z.jpg#0\ta dog"):
        (tmp_path / "x.txt").write_text(f"{line}\n")
        with pytest.raises(PoolError, match=r"names none of the 2 images in .*: it names z.jpg, an image .* 000.jpg"):
            read(folder, captions_file=str(tmp_path / "x.txt"))
        (tmp_path / "x.txt").write_text(f"{line}\n{line.replace('z', '001')}\n")  # the first image was removed
        assert read(folder, captions_file=str(tmp_path / "x.txt")) == {"000": "", "001": "a dog"}


@pytest.mark.parametrize("content", ['{"z/one.jpg": "x"}', '[{"image": "z/one.jpg", "caption": "x"}]'])
def test_a_captions_file_for_other_images_is_an_error_with_both_sides(
    folder: Path, tmp_path: Path, content: str
) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(
        PoolError, match=r"x.json: names none of the 2 images in .*: it names z/one.jpg, an image .* 000.jpg"
    ):
        read(folder, captions_file=str(tmp_path / "x.json"))
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(PoolError, match=r"x.json: names none of the 2 images in .*: it names no image, an image"):
        read(folder, captions_file=str(tmp_path / "x.json"))


def test_an_attribute_of_the_json_next_to_an_image(folder: Path) -> None:
    (folder / "000.json").write_text('{"caption": "short", "prompt": "a dog", "n": 3}')
    (folder / "001.txt").write_text("a text")
    assert read(folder) == {"000": "short", "001": "a text"}
    assert read(folder, caption="prompt") == {"000": "a dog", "001": ""}
    (folder / "000.json").unlink()
    with pytest.raises(
        UsageError, match="--caption prompt: .* is a folder of images, which does not use it; it has no file of"
    ):
        read(folder, caption="prompt")


@pytest.mark.parametrize("wrong", [{"key": "id"}, {"root": "."}, {"image": "path"}])
def test_options_that_a_folder_does_not_use(folder: Path, wrong: dict[str, str]) -> None:
    (name,) = wrong
    with pytest.raises(UsageError, match=rf"--{name} .*: .* is a folder of images, which does not use it; "):
        read(folder, **wrong)
