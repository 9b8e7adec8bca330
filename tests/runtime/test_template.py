"""Templates: plain names and a short list of formats, whatever a file says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.crafted import FINE, TEMPLATES
from thresher import Step, UsageError
from thresher.runtime.template import RoundedFloat, filled, formats, parts_of

FORMATS = ["", ",", "d", ",d", "f", ",f", "e", "g", "%", ",%", *(f".{n}{kind}" for n in (0, 4, 19) for kind in "efg%")]


@pytest.mark.parametrize("spec", FORMATS)
def test_allowed_formats_are_those_of_python(spec: str) -> None:
    for value, kind in ((7, "i"), (-12_345_678, "i"), (0.5, "f"), (-1234.5678, "f"), (np.inf, "f"), (True, "b")):
        if formats(spec, kind):
            assert filled(f"a {{x:{spec}}} {{{{b}}}}", lambda name, value=value: value) == f"a {value:{spec}} {{b}}"
        else:
            assert spec.endswith("d")
            assert kind == "f"
    assert filled(f"{{x:{spec}}}", lambda name: "unknown") == "unknown"


@given(st.text(st.sampled_from("{}[]().!:,_<>^=+-#0123456789dfegnbcosxX%rsa xy\u202e\x1b"), max_size=20))
def test_any_text_is_filled_or_refused(template: str) -> None:
    try:
        parts = parts_of(template)
    except UsageError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    if not any("d" in spec for _, _, spec in parts):
        assert len(filled(template, lambda name: 0.25)) < 400
    assert len(filled(template, lambda name: 3)) < 400


@pytest.mark.parametrize(("template", "said"), [(text, said) for text, said in TEMPLATES if isinstance(text, str)])
def test_a_step_checks_its_templates(template: str, said: str) -> None:
    """Also a step of a method of another package."""

    def step() -> Step:
        return Step(
            method="theirs",
            parameters={},
            seed=0,
            rows_in=2,
            rows_out=1,
            reasons=(template,),
            cut=0.5,
            rows={"score": np.array([0.1, 0.9]), "cluster": np.array([0, 0]), "duplicate_of": np.array([1, -1])},
            groups={"size": np.array([2]), "d_intra": np.array([0.25])},
        )

    if said == FINE:
        assert isinstance(step().why(0), str)
        return
    with pytest.raises(UsageError) as error:
        step()
    assert str(error.value).startswith("theirs: ")
    assert len(str(error.value)) < 500


def test_small_values_keep_their_digits() -> None:
    assert filled("{x:.4f}", lambda name: 0.000012) == "1.2e-05"
    assert f"{RoundedFloat(0.5):.4f}" == "0.5000"
