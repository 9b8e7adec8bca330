"""Every parameter of every method and policy, and every numeric option, with numbers and texts that nobody should give.

Each is refused with a readable message, or accepted.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import click
import numpy as np
import pytest
from typing_extensions import TypeAliasType

import thresher as th
from thresher.cli.main import SECTIONS, thresher
from thresher.dynamic.registry import POLICIES
from thresher.errors import ThresherError, UsageError
from thresher.pruning.registry import METHODS
from thresher.runtime import parameters
from thresher.runtime.parameters import MOST, Share, build, coerce, read
from thresher.selection import Keep

NUMBERS: list[Any] = [0, -1, 1, 10**18, MOST, MOST + 1, 10**30, -(10**30), 10**400, 10**5000]
NUMBERS += [math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324]
TEXTS = ["1e12", "", " ", "nan", "inf", "-inf", "1e400", "1_000", "5" * 5000, "-" + "5" * 5000, "\0", "0x10", "²", "%"]
TEXTS += ["9" * 19 + "%", "0." + "0" * 5000 + "1", "x" * 100_000]
OTHERS: list[Any] = [None, True, [], {}, b"1"]
SOME = {"keep": "30%", "draws": "30%", "where": "a > 1", "columns": "clip-score", "reference": "clip-score"}


def every_parameter() -> list[Any]:
    return [
        pytest.param(cls, name, item.name, id=f"{name}-{item.name}")
        for point in (METHODS, POLICIES)
        for name, cls in point.all().items()
        for item in parameters.parameters_of(cls)
    ]


@pytest.mark.parametrize(("cls", "name", "parameter"), every_parameter())
def test_hostile_values_are_refused_or_accepted(cls: Any, name: str, parameter: str) -> None:
    needed = {i.name: SOME.get(i.name, "x") for i in parameters.parameters_of(cls) if parameters.is_required(i)}
    needed |= getattr(cls, "example", {})
    kind = parameters.type_of(cls, parameter)
    refused = 0
    for value in (*NUMBERS, *TEXTS, *OTHERS):
        try:
            build(cls, name, {**needed, parameter: value})
        except ThresherError as error:
            refused += 1
            text = str(error)
            assert "\n" not in text
            assert len(text) < 2_000 or kind is str, "the value is cut; a free text is cut where it is shown"
        if isinstance(value, str):
            with contextlib.suppress(ThresherError):
                read(kind, value)
    assert refused, "at least a list of bytes is no value of any parameter"


def options_of(command: click.Command, words: tuple[str, ...], ctx: click.Context) -> list[Any]:
    """The options for whole numbers and fractions of a command and its subcommands."""
    found = []
    if isinstance(command, click.Group):
        for name in command.list_commands(ctx):
            inner = command.get_command(ctx, name)
            assert inner is not None
            found += options_of(inner, (*words, name), click.Context(inner, parent=ctx))
        return found
    for item in command.params:
        if isinstance(item, click.Option) and isinstance(
            item.type, (click.types.IntParamType, click.types.FloatParamType)
        ):
            found.append(((*words, item.opts[0]), item))
    return found


def test_every_numeric_option_parses_or_refuses_hostile_text() -> None:
    ctx = click.Context(thresher)
    options = options_of(thresher, (), ctx)
    commands = {words[0] for words, _ in options}
    assert {"select", "score", "cluster", "train", "doctor", "embed", "report"} <= commands
    assert commands <= {name for section in SECTIONS for name in section.commands}
    for words, option in options:
        for text in (*TEXTS, *map(str, [0, -1, 10**30, math.nan, math.inf, 1e308])):
            with contextlib.suppress(click.UsageError):
                assert math.isfinite(option.type.convert(text, option, ctx)), words
        for text in ("10%", "0,7", "70 %", "1k", "many"):
            with pytest.raises(
                click.BadParameter, match=r"'; give a (whole|finite) number.*([;] type|, such as) [\d.]+$"
            ) as caught:
                option.type.convert(text, option, ctx)
            assert text in caught.value.message, words


@pytest.mark.parametrize(
    ("text", "whole", "number"),
    [
        ("10%", "", "0.1"), ("70 %", "", "0.7"), ("0,7", "", "0.7"), (",5", "", "0.5"), ("-0,25", "", "-0.25"),
        ("1,000", "1000", "1000"), ("1,000,000.5", "", "1000000.5"), ("1e6", "1000000", "1000000"), ("5.0", "5", "5"),
        ("10k", "10000", "10000"), ("1.5M", "1500000", "1500000"), ("2B", "2000000000", "2000000000"),
        ("1 000", "1000", "1000"), ("1_0'0", "100", "100"), ("1e-3", "", "0.001"), ("0,5%", "", "0.005"),
        ("many", "", ""), ("%", "", ""), (".", "", ""), ("1.000,5", "", ""), ("", "", ""), ("1e99", "", f"1{'0' * 99}"),
    ],
)  # fmt: skip
def test_what_a_text_means_as_a_number(text: str, whole: str, number: str) -> None:
    assert parameters.meant(int, text) == whole
    assert parameters.meant(float, text) == number


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Keep.parse("0,7"), "; type 0.7$"),
        (lambda: Keep.parse("3e6"), "; type 3000000$"),
        (lambda: Keep.parse("1,000,000"), "; type 1000000$"),
        (lambda: Keep.parse("1,0"), "3_000_000$"),
        (lambda: Keep.parse("1.0"), "for one row write 1; give .*3_000_000$"),
        (lambda: parameters.share_of("0,7"), "like 30% or 0.3; type 0.7$"),
        (lambda: parameters.share_of("1.7"), "like 30% or 0.3$"),
        (lambda: parameters.share_of("1.0"), "like 30% or 0.3$"),
        (lambda: parameters.share_of("100%"), "like 30% or 0.3$"),
        (lambda: coerce("eps", float, "10%"), "^eps = '10%'; expected a finite number; write 0.1$"),
        (lambda: coerce("clusters", int, "1e3"), "; expected a whole number; write 1000$"),
        (lambda: coerce("clusters", int, "10%"), "; expected a whole number$"),
        (lambda: read(float, "10%"), "'10%'; give a finite number; type 0.1$"),
    ],
)
def test_messages_say_what_to_type(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize("value", [10**400, -(10**400), 10**5000, MOST + 1], ids=["large", "negative", "huge", "next"])
def test_whole_numbers_have_a_limit(value: int) -> None:
    for kind in (int, float, int | None):
        with pytest.raises(UsageError, match=r"a = .*the largest number allowed is 9,223,372,036,854,775,807"):
            coerce("a", kind, value)
    with pytest.raises(UsageError, match="cannot keep"):
        Keep.parse(value)


@pytest.mark.parametrize("value", [10**400, MOST + 1])
def test_functions_of_the_package_have_the_same_limit(value: int, tmp_path: Path) -> None:
    calls: list[tuple[Any, dict[str, Any]]] = [
        (th.cluster, {"iterations": value}), (th.cluster, {"clusters": value}), (th.embed, {"batch_size": value}),
    ]  # fmt: skip
    for function, options in calls:
        more = {"out": tmp_path / "out", "encoder": "conse"} if function is th.embed else {}
        with pytest.raises(UsageError, match=f"{next(iter(options))} = .*the largest number allowed is"):
            function(tmp_path, **more, **options)


def test_limits() -> None:
    assert coerce("a", int, MOST) == MOST
    assert coerce("a", float, 7) == 7.0
    with pytest.raises(UsageError, match="expected ndarray"):
        coerce("a", np.ndarray, 3)
    message = r"cannot read 'x{100}'\.\.\. \(5,000 characters\) as an amount to keep; give a share"
    with pytest.raises(UsageError, match=message):
        Keep.parse("x" * 5000)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("normsim", {"keep": "5", "rounds": 10**9}, "rounds = 1,000,000,000: must be from 1 to 10,000"),
        ("negclip", {"keep": "5", "repeats": 10**9}, "repeats = 1,000,000,000: must be from 1 to 10,000"),
        ("scs", {"draws": "5", "penalty": 1e308}, r"penalty = 1e\+308: must be from 0 to 1,000,000"),
        ("density", {"keep": "5", "temperature": 5e-324}, "temperature = 5e-324: must be from 0.000001"),
        ("combine", {"keep": "5", "columns": "a=1e308"}, "the weight 1e308 of a must be from 1e-30 to 1e.30"),
        ("combine", {"keep": "5", "columns": "a=1e-308"}, "only the ratios of weights matter"),
        ("ssp", {"keep": "5", "sample": "5" * 5000}, r"sample = '5+\.\.\. \(5,000 characters\)': must be all, auto"),
    ],
)
def test_numbers_that_would_run_for_ever_or_overflow(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(METHODS.find(method), method, options)


Item = TypeVar("Item", bound=np.generic)
Rows = TypeAliasType("Rows", np.ndarray[Any, np.dtype[Item]], type_params=(Item,))  # NDArray, since NumPy 2.5
MaybeShare = TypeAliasType("MaybeShare", Share | None)
Words = TypeAliasType("Words", Literal["one", "two"])


@dataclass(frozen=True, kw_only=True)
class WithNames:
    rows: Rows[Any] | None = None
    share: MaybeShare = None
    word: Words = "one"


def test_a_named_type_is_what_it_stands_for() -> None:
    """``type Share = float`` of Python 3.12."""
    given = {"rows": np.arange(3), "share": 0.5, "word": "two"}
    assert vars(build(WithNames, "x", given)) == given
    assert parameters.choices(parameters.type_of(WithNames, "word")) == ("one", "two")
    assert build(WithNames, "x", {"rows": None, "share": None}) == WithNames()
    assert read(parameters.type_of(WithNames, "share"), "20%") == 0.2
    for bad, says in (
        ({"rows": [1]}, "expected ndarray"),
        ({"share": "x"}, "share"),
        ({"word": None}, "allowed: one, two"),
    ):
        with pytest.raises(UsageError, match=says):
            build(WithNames, "x", bad)
