"""Whatever settings hold, they are a config, or a ConfigError that names each mistake: 5,000 generated, as keywords, recipes and words."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from gemma_grpo.config import ConfigError, GRPOConfig, build_config, dump_recipe, find_recipe, load_recipe, parse_overrides
from gemma_grpo.escapes import printable


def names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every setting and section by its dotted name."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from names(field.annotation, f"{prefix}{name}.")


NAMES = list(names(GRPOConfig))


def misspelt(name: str, place: int, kind: int) -> str:
    at = place % len(name)
    return [name[:at] + name[at + 1 :], name[:at] + "x" + name[at:], name.upper(), name.replace("_", "-"), f"{name}.{name}"][kind % 5]


KEY = st.one_of(
    st.sampled_from(NAMES),
    st.sampled_from(NAMES),
    st.builds(misspelt, st.sampled_from(NAMES), st.integers(0, 40), st.integers(0, 4)),
    st.sampled_from(["", ".", "lora.", ".r", "lora..r", "reward.length", "model", "beta", "fp16", "__class__", "a\0\x1b[2J\n"]),
    st.text(max_size=8),
)
NUMBER = st.one_of(
    st.integers(-3, 40),
    st.floats(),
    st.integers(),
    st.sampled_from([1e400, float("nan"), -0.0, 10**18, 10**400, 2**31, 2**63, 1e-320]),
)
WORDS = ["", "1", "1e400", "nan", "true", "null", "auto", "none", "ppo", "\ud800", "1_0", " 2"]
TEXT = st.one_of(st.sampled_from(WORDS), st.text(max_size=6))
SCALAR = st.one_of(NUMBER, NUMBER, TEXT, st.none(), st.booleans(), st.binary(max_size=4), st.complex_numbers())
VALUE = st.recursive(
    SCALAR,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(KEY, st.integers(), st.none()), inner, max_size=3),
    ),
    max_leaves=6,
)


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def check(config: GRPOConfig, folder: Path) -> None:
    """What is accepted is within every limit and survives being written and read."""
    path = folder / "written.yaml"
    path.write_text(dump_recipe(config), encoding="utf-8")
    assert load_recipe(path) == config == GRPOConfig.model_validate(config.model_dump())


def check_refused(error: ConfigError, origins: set[str]) -> None:
    """Each mistake is one printable line with where it is and, but for a whole file, which setting."""
    assert error.problems
    for problem, line in zip(error.problems, str(error).splitlines(), strict=True):
        assert problem.origin in origins
        assert line == str(problem)
        assert problem.line is None or problem.line >= 1
        assert printable(line) == line  # nothing in it that a screen would obey
        assert problem.what.rstrip().endswith((".", "?", "]", "'", "`", ")")), problem.what


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


@settings(max_examples=2000, deadline=None)
@given(st.dictionaries(KEY, VALUE, max_size=4))
def test_keywords_are_a_config_or_named_mistakes(folder: Path, overrides: Mapping[str, Any]) -> None:
    try:
        config = build_config(overrides)
    except ConfigError as error:
        check_refused(error, {"keyword", "defaults"})
    else:
        check(config, folder)


LINE = st.one_of(
    st.builds("{}: {}".format, KEY, st.one_of(TEXT, NUMBER, st.sampled_from(["[1, 2]", "{r: 1}", "[", "&a 1", "*a", "!!int 1", "|", "'"]))),
    st.builds("  {}: {}".format, KEY, st.one_of(TEXT, NUMBER)),
    st.sampled_from(["lora:", "kl:", "reward:", "- a", "---", "...", "%YAML 1.1", "\t", "#", "? a", "<<: {seed: 1}", "[" * 60, "{" * 60]),
    st.text(max_size=10),
)
RECIPE = st.one_of(
    st.lists(LINE, max_size=6).map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass")),
    st.dictionaries(st.sampled_from(NAMES), st.one_of(NUMBER, TEXT), max_size=4).map(
        lambda values: "\n".join(f"{name}: {value!r}" for name, value in values.items()).encode()
    ),
    st.binary(max_size=30),
)


@settings(max_examples=1200, deadline=None)
@given(RECIPE)
def test_the_bytes_of_a_recipe_are_a_config_or_named_mistakes(folder: Path, content: bytes) -> None:
    path = folder / "recipe.yaml"
    path.write_bytes(content)
    try:
        config = load_recipe(path)
    except ConfigError as error:
        check_refused(error, {str(path), "defaults"})
    else:
        check(config, folder)


BRACKETS = st.sampled_from(["[", "[a", "{r: 1}", "'x", '"', "[" * 40, "&a", "{a: *a}", "[!!int 1]"])
WORD = st.one_of(
    st.builds("{}={}".format, KEY, st.one_of(TEXT, NUMBER, BRACKETS)),
    st.text(max_size=8),
)


@settings(max_examples=800, deadline=None)
@given(st.lists(WORD, max_size=4))
def test_the_words_of_a_command_line_are_a_config_or_named_mistakes(folder: Path, words: list[str]) -> None:
    try:
        config = load_recipe("miniature", parse_overrides(words, "miniature"))
    except ConfigError as error:
        check_refused(error, {"command line", "defaults", str(find_recipe("miniature"))})
    else:
        check(config, folder)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
@pytest.mark.parametrize("name", [*NAMES, "reward.length"])
def test_no_setting_is_infinite_or_not_a_number(name: str, value: float) -> None:
    with pytest.raises(ConfigError) as refused:
        build_config({name: value})
    check_refused(refused.value, {"keyword", "defaults"})


# ---- settings that go together

SMALL = st.sampled_from([0.0, 0.01, 0.05, 0.2, 1.0])


@settings(max_examples=1000, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "kl.beta": SMALL,
            "kl.beta_min": SMALL,
            "kl.beta_max": SMALL.filter(bool),
            "kl.ref_target": st.sampled_from([None, 0.05]),
            "kl.placement": st.sampled_from(["loss", "reward", "off"]),
            "sampling.top_k": st.sampled_from([0, 5]),
            "sampling.top_p": st.sampled_from([1.0, 0.9]),
            "advantage.aggregation": st.sampled_from(["sum", "gdpo"]),
            "reward": st.sampled_from([None, {}, {"length": 1.0}]),
        }
    )
)
def test_settings_that_disagree_are_refused_at_the_one_to_change(values: Mapping[str, Any]) -> None:
    beta, low, high, placement = (values[f"kl.{name}"] for name in ("beta", "beta_min", "beta_max", "placement"))
    filtered = values["sampling.top_k"] > 0 or values["sampling.top_p"] < 1
    disagree = {  # in the order in which they are looked at; the first is said
        "kl.beta_min": low > high,
        "kl.beta": placement != "off" and values["kl.ref_target"] is not None and not low <= beta <= high,
        "kl.placement": placement == "reward" and filtered,
        "advantage.aggregation": values["advantage.aggregation"] == "gdpo" and placement == "reward",
        "reward": values["reward"] == {},
    }
    expected = next((name for name, wrong in disagree.items() if wrong), None)
    try:
        build_config(values)
    except ConfigError as error:
        (problem,) = error.problems
        assert (problem.origin, problem.key) == ("keyword", expected)
    else:
        assert expected is None


# ---- what a message names


def limits() -> Iterator[tuple[str, Any, str]]:
    """(setting, value just outside, what the message says of it) of every limit in the schema."""
    words = {"ge": "must be at least", "gt": "must be above", "le": "must be at most", "lt": "must be below"}
    for name in NAMES:
        model: Any = GRPOConfig
        *stages, leaf = name.split(".")
        for stage in stages:
            model = model.model_fields[stage].annotation
        schema = model.model_json_schema()["properties"][leaf]
        for choice in (schema, *schema.get("anyOf", ())):
            for json_name, short in (("minimum", "ge"), ("exclusiveMinimum", "gt"), ("maximum", "le"), ("exclusiveMaximum", "lt")):
                if json_name in choice:
                    limit = choice[json_name]
                    step = {"ge": -1, "gt": 0, "le": 1, "lt": 0}[short]
                    yield name, limit + step, f"is {limit + step}; {words[short]} {limit}"


LIMITS = list(limits())


@pytest.mark.parametrize(("name", "value", "said"), LIMITS, ids=lambda value: str(value))
def test_every_limit_is_named_with_its_setting_and_value(name: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build_config({name: value})
    line = str(refused.value)
    assert line.startswith(f"keyword: {name}: {said}")


def test_the_limits_are_those_of_the_schema() -> None:
    assert ("num_generations", 1, "is 1; must be at least 2") in LIMITS
    assert len(LIMITS) > 50


LARGE = "a value of type"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"seed": 10**5000}, "keyword: seed: is a value of type int too large to show; must be below 2147483648. Default 0."),
        ({"reward": {"length": 10**5000}}, "keyword: reward.length: is a value of type int too large to show; a number is needed."),
        ({"seed": deep(5000)}, "keyword: seed: is a value of type list too large to show; a whole number is needed. Default 0."),
        ({"batch_size": 10**5000}, f"keyword: batch_size: is {LARGE} int too large to show; must be below 1000000000000000000. Default 2."),
        ({"temperature": float("nan")}, "keyword: temperature: is nan; must be finite. Default 1.0."),
        ({"temperature": 1e400}, "keyword: temperature: is inf; must be finite. Default 1.0."),
        ({"lora": b"r"}, "keyword: lora: is b'r'; settings below it are needed."),
        ({"lora": [1]}, "keyword: lora: is [1]; settings below it are needed."),
        ({"batch_size": "2.5"}, "keyword: batch_size: is '2.5'; a whole number is needed. Default 2."),
        ({"batch_size": 1e300}, "keyword: batch_size: is 1e+300; a whole number is needed, with fewer digits. Default 2."),
        ({"kl.placement": "reward", "sampling.top_k": 5}, "keyword: kl.placement: is reward, which measures KL where it sampled: top_k, "
         "top_p must be off. Use kl.placement=loss."),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_values_that_are_hard_to_say_are_said(overrides: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build_config(overrides)
    assert str(refused.value) == message


@pytest.mark.parametrize("content", ["lerning_rate: 1", "seed: 1\nseed: 2", "temperature: 1e400", "- a", "", "kl: {beta: 3}"])
def test_a_wrong_recipe_is_refused_before_torch_is_loaded(tmp_path: Path, content: str) -> None:
    (tmp_path / "recipe.yaml").write_text(content, encoding="utf-8")
    script = (
        "import sys\nfrom gemma_grpo.cli import run\n"
        f"code = run(['train', {str(tmp_path / 'recipe.yaml')!r}])\n"
        "print(code, *(name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "2"
    assert f"{tmp_path / 'recipe.yaml'}:1: " in done.stderr or f"{tmp_path / 'recipe.yaml'}:2: " in done.stderr
