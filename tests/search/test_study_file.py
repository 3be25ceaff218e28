from collections.abc import Callable
from pathlib import Path

import pytest
from hintsearch.models.errors import InputError
from hintsearch.search.study import load_study
from hintsearch.search.study_file import read_study, study_names

TINY = "name: tiny\nteacher: {model: resnet20}\nstudent: {model: resnet8}\n"

Write = Callable[[str | bytes], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a study file; returns its path."""

    def make(content: str | bytes) -> str:
        path = tmp_path / "study.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return make


def refusal(study: str, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_study(study, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(study, "FILE")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: a\nname: b\n", "FILE is not valid YAML (line 2: the key 'name' stands twice); mend that line"),
        ("name: a\nteacher: {model: a, model: b}\n", "FILE is not valid YAML (line 2: the key 'model' stands twice)"),
        ("name: [\n", "FILE is not valid YAML (line 2: expected the node content"),
        ("name: a\n\tb: 3\n", "FILE is not valid YAML (line 2: found character '\\t'"),
        ("name: !!python/object:os.system {}\n", "FILE is not valid YAML (line 1: could not determine a constructor"),
        ("? [a, b]\n: 1\n", "FILE is not valid YAML (line 1: found unhashable key)"),
        ("name: 2026-13-45\n", "FILE is not valid YAML (month must be in 1..12)"),
        ("seed: " + "9" * 5000, "FILE is not valid YAML (Exceeds the limit"),
        ("seed: " + "[" * 500, "FILE is not valid YAML (maximum recursion depth exceeded"),
        ("\x00\x01", "FILE is not valid YAML (unacceptable character #x0000"),
        (b"\xff\xfe\x80\x81", "FILE is not a text file (invalid start byte); give a study in YAML"),
        ("", "FILE holds a NoneType, but a study is a mapping of keys; see digits.yaml"),
        ("- a\n- b\n", "FILE holds a list, but a study is a mapping of keys; see digits.yaml"),
        ("just words\n", "FILE holds a str, but a study is a mapping of keys; see digits.yaml"),
        (TINY + "1: 2\n", "FILE: 1 is 1, but keys should be strings; change 1"),
        (TINY + "seed: {2026-01-01: 1}\n", "FILE: seed is {datetime.date(2026, 1, 1): 1}, but input should be"),
        (TINY + "recipe: {lr: .inf}\n", "FILE: recipe.lr is Infinity, but input should be a finite number"),
        (TINY + "recipe: {lr: .nan}\n", "FILE: recipe.lr is NaN, but input should be a finite number"),
    ],
)
def test_bad_file_is_one_line_that_names_it(write: Write, content: str | bytes, message: str) -> None:
    assert refusal(write(content)).startswith(message)


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ("nowhere.yaml", "there is no study file FILE; give a file, or one of SHIPPED"),
        ("folder/study", "there is no study file FILE; give a file, or one of SHIPPED"),
        ("digit", "unknown study 'FILE'; did you mean 'digits'? (SHIPPED), or give a YAML file"),
        ("zzz", "unknown study 'FILE'; choose one of SHIPPED, or give a YAML file"),
    ],
)
def test_unknown_study_says_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, study: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        load_study(study)
    shipped = ", ".join(sorted(study_names()))
    assert str(caught.value) == message.replace("FILE", study).replace("SHIPPED", shipped)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budget.trials", "--set 'budget.trials' has no '='; write --set KEY=VALUE, as in --set budget.trials=40"),
        ("=3", "--set '=3' has no '='; write --set KEY=VALUE, as in --set budget.trials=40"),
        ("budget.trials=[", "--set budget.trials: '[' is not valid YAML (line 1: expected the node content"),
        ("space.lr={low: 1, low: 2}", "--set space.lr: '{low: 1, low: 2}' is not valid YAML (line 1: the key 'low'"),
        ("name=2026-13-45", "--set name: '2026-13-45' is not valid YAML (month must be in 1..12); quote it"),
        ("budget.trails=3", "FILE: unknown key 'budget.trails'; did you mean 'trials'?"),
        ("budget.trials=", "FILE: budget.trials is null, but input should be a valid integer; change budget.trials"),
        ("budget=3", "FILE: budget is 3, but input should be a valid dictionary"),
        ("name.first=a", 'FILE: name is {"first": "a"}, but input should be a valid string; change name'),
        ("space.weight.classification.low=1", "FILE: the key 'space.weight.classification.high' is missing; add it"),
    ],
)
def test_bad_override_is_one_line_that_names_it(write: Write, override: str, message: str) -> None:
    assert refusal(write(TINY + "space: {weight: {classification: 1}}\n"), override).startswith(message)


def test_override_reaches_a_nested_key(write: Write) -> None:
    assert load_study(write(TINY + "budget: {trials: 3}\n"), ["budget.trials=40"]).budget.trials == 40


def test_override_reaches_a_section_that_the_file_leaves_out(write: Write) -> None:
    assert load_study(write(TINY), ["budget.rungs=[2, 4]"]).budget.rungs == (2, 4)


def test_override_leaves_the_section_s_other_keys(write: Write) -> None:
    study = load_study(write(TINY + "budget: {trials: 3, reduction: 4}\n"), ["budget.trials=40"])
    assert study.budget.reduction == 4


def test_last_override_of_a_key_counts(write: Write) -> None:
    assert load_study(write(TINY), ["seed=1", "seed=2"]).seed == 2


def test_overrides_make_a_range_of_a_fixed_number(write: Write) -> None:
    path = write(TINY + "space: {temperature: 4}\n")
    span = load_study(path, ["space.temperature.low=1", "space.temperature.high=16"]).space.temperature
    assert (span.low, span.high, span.default) == (1, 16, 4)


def test_override_makes_a_fixed_number_of_a_range(write: Write) -> None:
    path = write(TINY + "space: {temperature: {low: 1, high: 8}}\n")
    assert not load_study(path, ["space.temperature=2"]).space.temperature.searched


def test_value_with_an_equals_sign_is_kept(write: Write) -> None:
    study = load_study(write(TINY), ["tracking.uri=http://host:5000/?a=b"])
    assert study.tracking.uri == "http://host:5000/?a=b"


def test_digits_ships_with_hintsearch() -> None:
    assert "digits" in study_names()
    assert read_study("digits")["name"] == "digits"


def test_file_comes_before_a_study_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits").write_text(TINY)
    assert load_study("digits").name == "tiny"
