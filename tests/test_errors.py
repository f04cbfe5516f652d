"""Errors a user can mend: one base, one line, and the nearest names."""

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_lens import errors
from persona_lens.errors import PersonaLensError, UnknownNameError


def test_every_error_of_the_package_has_the_one_base_that_the_command_line_catches() -> None:
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]
    assert len(classes) >= 8
    assert all(issubclass(c, PersonaLensError) for c in classes)
    assert not issubclass(PersonaLensError, ValueError | OSError | LookupError), "programming mistakes are not the user's"


def test_a_near_name_is_offered_and_the_others_are_not() -> None:
    message = str(UnknownNameError("pooling", "response", ["response_mean", "prompt_last", "apple"]))
    assert message == "unknown pooling 'response': did you mean response_mean?"


def test_several_near_names_are_offered_nearest_first() -> None:
    message = str(UnknownNameError("layer", "abcd", ["abce", "abcdd", "xyz"]))
    assert message == "unknown layer 'abcd': did you mean abcdd or abce?"


def test_without_a_near_name_all_are_listed_in_order() -> None:
    assert str(UnknownNameError("trait", "qqq", iter(["b", "a", "c"]))) == "unknown trait 'qqq': known: a, b, c"


@given(name=st.text(max_size=20), known=st.lists(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), min_size=1, max_size=4))
def test_the_message_is_one_line_with_the_kind_and_some_known_name(name: str, known: list[str]) -> None:
    message = str(UnknownNameError("trait", name, known))
    assert len(message.splitlines()) == 1
    assert message.startswith(f"unknown trait {name!r}: ")
    assert any(k in message.removeprefix(f"unknown trait {name!r}") for k in known)


def test_an_error_is_caught_by_its_base() -> None:
    with pytest.raises(PersonaLensError):
        raise UnknownNameError("trait", "x", ["y"])
