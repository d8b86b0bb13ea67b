"""Public job ids: round trip, order, refusals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lessor.ids import decode_job_id, encode_job_id

LARGEST = (1 << 63) - 1
numbers = st.integers(min_value=1, max_value=LARGEST)


@given(numbers)
def test_an_id_decodes_to_its_number(number: int) -> None:
    text = encode_job_id(number)
    assert len(text) == 14
    assert text[0] == "j"
    assert decode_job_id(text) == number


@given(numbers, numbers)
def test_ids_sort_as_their_numbers_do(left: int, right: int) -> None:
    assert (encode_job_id(left) < encode_job_id(right)) == (left < right)


def test_known_ids_never_change() -> None:
    assert encode_job_id(1) == "j0000000000001"
    assert encode_job_id(31) == "j000000000000z"
    assert encode_job_id(32) == "j0000000000010"
    assert encode_job_id(LARGEST) == "j7zzzzzzzzzzzz"


@pytest.mark.parametrize("number", [0, -1, LARGEST + 1])
def test_a_number_out_of_range_has_no_id(number: int) -> None:
    with pytest.raises(ValueError, match=str(number)):
        encode_job_id(number)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "expected 'j'"),
        ("j1", "expected 'j'"),
        ("x0000000000001", "expected 'j'"),
        ("J0000000000001", "expected 'j'"),
        ("j00000000000011", "expected 'j'"),
        ("j000000000000i", "'i' is no base-32 digit"),
        ("j000000000000A", "'A' is no base-32 digit"),
        ("j00000000000٣1", "is no base-32 digit"),
        ("j 000000000001", "is no base-32 digit"),
        ("j0000000000000", "out of range"),
        ("j8000000000000", "out of range"),
        ("jzzzzzzzzzzzzz", "out of range"),
    ],
)
def test_what_is_no_id_is_refused_with_its_text(text: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong) as caught:
        decode_job_id(text)
    assert repr(text) in str(caught.value)


@given(st.text(max_size=16))
def test_any_text_decodes_or_is_refused(text: str) -> None:
    try:
        number = decode_job_id(text)
    except ValueError:
        return
    assert encode_job_id(number) == text
