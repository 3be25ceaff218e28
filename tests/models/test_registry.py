from collections.abc import Callable

import pytest
from hintsearch.models.errors import InputError
from hintsearch.models.registry import Registry


@pytest.fixture
def registry() -> Registry[Callable[[], int]]:
    registry: Registry[Callable[[], int]] = Registry("number")

    @registry.register("two", source="Peano 1889", parity="even")
    def two() -> int:
        return 2

    @registry.register("one", source="Peano 1889", parity="odd")
    def one() -> int:
        return 1

    return registry


def test_get_gives_the_registered_item(registry: Registry[Callable[[], int]]) -> None:
    assert registry.get("two")() == 2


def test_entry_carries_source_and_declared_facts(registry: Registry[Callable[[], int]]) -> None:
    entry = registry.entry("one")
    assert (entry.name, entry.source, entry.facts) == ("one", "Peano 1889", {"parity": "odd"})


def test_names_keep_the_order_of_registration(registry: Registry[Callable[[], int]]) -> None:
    assert registry.names() == ("two", "one")


def test_iteration_yields_the_entries(registry: Registry[Callable[[], int]]) -> None:
    assert [entry.name for entry in registry] == ["two", "one"]


def test_contains_knows_registered_names_only(registry: Registry[Callable[[], int]]) -> None:
    assert "one" in registry
    assert "three" not in registry


def test_decorated_function_is_left_as_it_was(registry: Registry[Callable[[], int]]) -> None:
    def three() -> int:
        return 3

    assert registry.register("three", source="Peano 1889")(three) is three


def test_unknown_name_is_an_error_with_the_nearest_name(registry: Registry[Callable[[], int]]) -> None:
    with pytest.raises(InputError) as caught:
        registry.get("tow")
    assert str(caught.value) == "unknown number 'tow'; did you mean 'two'? (one, two)"


def test_unknown_name_near_to_none_lists_all_names(registry: Registry[Callable[[], int]]) -> None:
    with pytest.raises(InputError) as caught:
        registry.entry("xyz")
    assert str(caught.value) == "unknown number 'xyz'; choose one of one, two"


def test_registering_a_name_twice_raises(registry: Registry[Callable[[], int]]) -> None:
    with pytest.raises(ValueError, match=r"^the number 'two' is registered twice$"):
        registry.register("two", source="again")(lambda: 22)


def test_a_refused_second_registration_keeps_the_first(registry: Registry[Callable[[], int]]) -> None:
    with pytest.raises(ValueError, match="registered twice"):
        registry.register("two", source="again")(lambda: 22)
    assert registry.get("two")() == 2
