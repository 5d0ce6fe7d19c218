"""Recipes written to harm whoever reads them: each is refused with its line, or stays the text it is; none of them runs anything."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from gemma_grpo.config import ConfigError, build_config, load_recipe, parse_overrides
from gemma_grpo.grpo.setup import reward_weights

TAGS = "tags (!) are not read in recipes"
ANCHORS = "anchors and aliases (& and *) are not read in recipes"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

REFUSED = {
    "object/apply": ("dataset: !!python/object/apply:os.system ['touch CANARY']", TAGS),
    "object/new": ("dataset: !!python/object/new:subprocess.Popen [['touch', 'CANARY']]", TAGS),
    "object": ("!!python/object:pathlib.Path {}", TAGS),
    "name": ("reward: {!!python/name:os.system : 1.0}", TAGS),
    "module": ("dataset: !!python/module:os", TAGS),
    "tuple": ("seed: !!python/tuple [1, 2]", TAGS),
    "tag in a list": ("lora: {target_modules: [q_proj, !!python/name:os.system ]}", TAGS),
    "own tag directive": ("%TAG ! tag:yaml.org,2002:python/\n---\ndataset: !object/apply:os.system ['touch CANARY']", TAGS),
    "verbatim tag": ("dataset: !<tag:yaml.org,2002:python/name:os.system> x", TAGS),
    "binary": ("dataset: !!binary aGVsbG8=", TAGS),
    "set": ("reward: !!set {length, empty}", TAGS),
    "harmless tag": ("seed: !!int 3", TAGS),
    "billion laughs": (BOMB, ANCHORS),
    "an anchor alone": ("seed: &s 1", ANCHORS),
    "an alias to itself": ("lora: &l {r: *l}", ANCHORS),
    "a merge of an alias": ("base: &b {r: 8}\nlora: {<<: *b}", ANCHORS),
    "a merge key": ("lora:\n  <<: {r: 64}", "no such setting"),
    "deep flow": ("lora: " + "[" * 5000, "nested deeper than 20 levels"),
    "deep blocks": ("\n".join(" " * depth + "a:" for depth in range(200)), "nested deeper than 20 levels"),
    "deep explicit keys": ("? " * 10_000, "nested deeper than 20 levels"),
    "two megabytes": ("# x\n" * 500_000, "is larger than 32768 bytes"),
    "a key twice": ("seed: 1\nseed: 2", "given twice, first on line 1"),
    "a key twice in a stage": ("lora:\n  r: 8\n  r: 64", "given twice, first on line 2"),
    "a key twice in a flow": ("reward: {length: 1.0, length: -1.0}", "given twice"),
    "a key twice in a list": ("lora: {target_modules: [{a: 1, a: 2}]}", "target_modules.0.a: given twice"),
    "a key twice under two names": ("model: miniature\nmodel_name: other", "sets the same as model"),
    "two documents": ("seed: 1\n---\nseed: 2", "not YAML"),
    "a reward that is a path to code": ("reward: os:system", "names with numbers below it are needed"),
    "a reward that is a list of code": ("reward: [os.system, subprocess.run]", "names with numbers below it are needed"),
    "a weight that is code": ("reward: {length: '__import__(\"os\").system(\"touch CANARY\")'}", "a number is needed"),
    "code by another name": ("reward_funcs: os:system", "is `reward` here"),
    "remote code": ("trust_remote_code: true", "no such setting"),
    "allowed code": ("allow_code: evil.py", "no such setting"),
    "control characters": ("dataset: \x1b]52;c;Y2F0\x07", "holds a control character"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_document_is_refused_at_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, what = REFUSED[name]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text.replace("CANARY", str(tmp_path / "canary")), encoding="utf-8")
    start = time.process_time()
    with pytest.raises(ConfigError) as refused:
        load_recipe(recipe)
    assert what in str(refused.value)
    assert time.process_time() - start < 2
    assert list(tmp_path.iterdir()) == [recipe]


@pytest.mark.parametrize("payload", ["{{7*7}}", "{% import os %}", "${HOME}", "$(touch canary)", "`id`", "%(x)s", "{0.__class__}"])
def test_a_template_or_a_shell_word_stays_text(payload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"dataset: '{payload}'\n", encoding="utf-8")
    assert load_recipe(recipe).dataset == payload
    assert parse_overrides([f"dataset='{payload}'"])["dataset"] == payload
    assert build_config({"dataset": payload}).dataset == payload
    assert list(tmp_path.iterdir()) == [recipe]


@pytest.mark.parametrize("name", ["os.system", "os:system", "builtins.eval", "../evil.py:f", "__import__", "length.__class__", "evil"])
def test_a_reward_is_a_name_from_a_list_and_never_a_place(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('a file beside the recipe ran')\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"unknown reward .*needs --allow-code FILE"):
        reward_weights(None, build_config({"reward": {name: 1.0}}))


@pytest.mark.parametrize(
    ("word", "what"),
    [
        ("reward={length: 1, length: 2}", "gives length twice"),
        ("lora={target_modules: [{a: 1, a: 2}]}", "gives target_modules.0.a twice"),
        ("dataset=[!!python/name:os.system ]", "opens a bracket or a quote but is not YAML"),
        ("reward={a: &x 1, b: *x}", "opens a bracket or a quote but is not YAML"),
        ("lora=" + "[" * 5000, "opens a bracket or a quote but is not YAML"),
    ],
)
def test_a_word_of_the_command_line_is_read_as_strictly(word: str, what: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_overrides([word])
    assert what in str(refused.value)


@pytest.mark.parametrize("word", ["dataset=!!python/object/apply:os.system", "dataset=*x", "dataset=&x"])
def test_a_word_without_a_bracket_is_text_whatever_it_looks_like(word: str) -> None:
    assert parse_overrides([word]) == {"dataset": word.removeprefix("dataset=")}


def test_the_largest_recipe_that_is_read_is_read_soon(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lora: {target_modules: [" + "x," * 16_000 + "]}", encoding="utf-8")
    start = time.process_time()
    with pytest.raises(ConfigError):
        load_recipe(recipe)
    assert time.process_time() - start < 15
