import dataclasses
import re

import pytest

from fvq_jax.runtime.errors import InputError
from fvq_jax.runtime.fields import Field, prefixed, setting, settings_of


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (Field(1, "."), 0),
        (Field(1.5, "."), 2),  # an int where a float is expected
        (Field((1, 2), "."), [1, 2, 3]),
        (Field((1, 2), "."), ()),
        (Field("a", "."), ""),
        (Field(True, "."), False),
        (Field(0.5, ".", below=1), 0.0),
        (Field(-1, ".", least=None), -7),
        (Field(0, ".", most=3), 3),
        (Field(1, ".", least=1), 1),
        (Field("a", ".", choices=("", "a")), ""),
    ],
)
def test_values_that_fit(field, value):
    field.check("optim.x", value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (Field(1, "."), 1.0, "must be a whole number, not 1.0"),
        (Field(1, "."), True, "must be a whole number, not True"),
        (Field(1.0, "."), "1", "must be a number, not '1'"),
        (Field(1.0, "."), False, "must be a number, not False"),
        (Field(True, "."), 1, "must be True or False, not 1"),
        (Field("a", "."), None, "must be text, not None"),
        (Field((1, 2), "."), 3, "must be numbers such as (1, 2), not 3"),
        (Field(1, "."), -1, "must be 0 or more and finite, not -1"),
        (Field(1, ".", least=2), 1, "must be 2 or more and finite, not 1"),
        (Field(1.0, ".", above=0), 0.0, "must be above 0 and finite, not 0.0"),
        (Field(1.0, "."), float("nan"), "must be 0 or more and finite, not nan"),
        (Field(1.0, "."), float("inf"), "must be 0 or more and finite, not inf"),
        (Field(0.5, ".", below=1), 1.0, "must be below 1, not 1.0"),
        (Field(0, ".", most=3), 4, "must be at most 3, not 4"),
        (Field("a", ".", choices=("", "a")), "b", "must be one of nothing, a, not 'b'"),
    ],
)
def test_values_that_do_not_fit_are_refused_with_the_name_of_the_setting(field, value, message):
    with pytest.raises(InputError, match=re.escape(f"config field optim.x {message}") + "$"):
        field.check("optim.x", value)


@dataclasses.dataclass
class Quantizer:
    size: int = setting(64, "How many codes.", above=0, stays=True)
    mesh: str = "no setting"
    kind: str = setting("plain", "Which kind.", choices=("plain", "bridged"))


def test_settings_of_a_dataclass_are_its_fields_that_were_made_as_such():
    assert settings_of(Quantizer) == {
        "size": Field(64, "How many codes.", above=0, stays=True),
        "kind": Field("plain", "Which kind.", choices=("plain", "bridged")),
    }
    assert (Quantizer().size, Quantizer(kind="bridged").kind) == (64, "bridged")


def test_settings_of_a_section_have_its_name_in_front():
    fields = settings_of(Quantizer)
    assert prefixed("tokenizer.quantizer", fields) == {
        "tokenizer.quantizer.size": fields["size"],
        "tokenizer.quantizer.kind": fields["kind"],
    }


def test_a_number_of_any_size_must_still_be_finite():
    with pytest.raises(InputError, match="f must be finite, not nan"):
        Field(1.0, "Any number.", least=None).check("f", float("nan"))
    Field(1.0, "Any number.", least=None).check("f", -3.5)
