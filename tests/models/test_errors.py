from hintsearch.models.errors import InputError, nearest, reason
from hypothesis import given, settings
from hypothesis import strategies as st


def test_nearest_suggests_a_close_name_before_listing_all_sorted() -> None:
    assert nearest("fitnt", ["sp", "fitnet", "at"]) == "did you mean 'fitnet'? (at, fitnet, sp)"


def test_nearest_overlooks_the_case_of_what_was_given() -> None:
    assert nearest("FitNet", ["at", "fitnet"]) == "did you mean 'fitnet'? (at, fitnet)"


def test_nearest_lists_all_names_when_none_is_close() -> None:
    assert nearest("quux", ["sp", "at"]) == "choose one of at, sp"


def test_nearest_says_so_when_there_is_no_option() -> None:
    assert nearest("quux", []) == "there is nothing to choose from"


def test_input_error_is_a_value_error() -> None:
    assert issubclass(InputError, ValueError)


@given(st.text(alphabet="ab \n\r\t\v\x85\u2028"))
@settings(deadline=None)
def test_reason_is_one_line_that_is_never_empty(text: str) -> None:
    assert len(reason(ValueError(text)).splitlines()) == 1


def test_reason_joins_the_lines_of_a_message() -> None:
    assert reason(OSError("Error downloading:\nTried a, got:\nrefused")) == "Error downloading: Tried a, got: refused"


def test_reason_of_a_silent_error_is_its_type() -> None:
    assert reason(AssertionError()) == "AssertionError"


def test_of_many_names_the_nearest_five_are_told() -> None:
    names = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(18)]
    assert nearest("layer2.18", names) == (
        "did you mean 'layer2.8'? (layer2.1, layer2.15, layer2.16, layer2.17, layer2.8 and 49 more)"
    )
