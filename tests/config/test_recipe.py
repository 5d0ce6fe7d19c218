"""Recipes: every mistake at once, with its line; what is written is what is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gemma_grpo.config import ConfigError, GRPOConfig, build_config, dump_recipe, find_recipe, load_recipe, parse_overrides, shipped_recipes


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def complaints(path: Path, **overrides: object) -> list[str]:
    """The lines of the ConfigError, without the folder."""
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


def test_all_mistakes_are_reported_at_once_in_the_order_of_their_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "model_name: miniature\nlerning_rate: 1e-5\nbatch_size: two\nnum_generations: 1\nlora:\n  rank: 8\n  dropout: 1\ntemperature: 0\n",
    )
    assert complaints(path, seed=-1) == [
        "recipe.yaml:2: lerning_rate: no such setting. Did you mean 'learning_rate'?",
        "recipe.yaml:3: batch_size: is 'two'; a whole number is needed. Default 2.",
        "recipe.yaml:4: num_generations: is 1; must be at least 2. Default 8.",
        "recipe.yaml:6: lora.rank: no such setting. Did you mean 'r'?",
        "recipe.yaml:7: lora.dropout: is 1; must be below 1.0. Default 0.0.",
        "recipe.yaml:8: temperature: is 0; must be above 0.0. Default 1.0.",
        "command line: seed: is -1; must be at least 0. Default 0.",
    ]


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("beta", "kl.beta"),
        ("lora_alpha", "lora.alpha"),
        ("clip_high", "loss.clip_high"),
        ("epsilon", "loss.clip_low"),
        ("Batch-Size", "batch_size"),
        ("modle", "model"),
        ("kl.bet", "beta"),
        ("lr", "learning_rate"),
    ],
)
def test_an_unknown_name_gets_the_nearest_one(tmp_path: Path, key: str, near: str) -> None:
    assert complaints(write(tmp_path, f"{key}: 1\n"))[0].endswith(f"no such setting. Did you mean {near!r}?")


def test_a_choice_names_the_choices(tmp_path: Path) -> None:
    path = write(tmp_path, "loss:\n  type: ppoo\n")
    assert complaints(path) == ["recipe.yaml:2: loss.type: is 'ppoo'; choose one of ppo, gspo, cispo, sapo. Default 'ppo'."]


@pytest.mark.parametrize("value", ["fp16", "float16", "half"])
def test_fp16_is_refused_with_the_reason(tmp_path: Path, value: str) -> None:
    (line,) = complaints(write(tmp_path, f"precision: {value}\n"))
    assert "residual stream exceeds what fp16 can hold" in line
    assert line.endswith("Use auto, or fp16_rescaled, which is exact.")


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_tied_layers_get_no_adapter(tmp_path: Path, layer: str) -> None:
    (line,) = complaints(write(tmp_path, f"lora:\n  target_modules: [q_proj, {layer}]\n"))
    assert line.startswith(f"recipe.yaml:2: lora.target_modules: names '{layer}'; Gemma ties")


def test_settings_that_disagree_are_placed_at_the_one_to_change(tmp_path: Path) -> None:
    path = write(tmp_path, "kl:\n  beta_max: 0.5\n  beta_min: 0.9\n")
    assert complaints(path) == ["recipe.yaml:3: kl.beta_min: is 0.9, above kl.beta_max 0.5. Lower kl.beta_min."]


def test_a_key_given_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\nlora:\n  r: 2\n  r: 3\nseed: 2\n")
    assert complaints(path) == [
        "recipe.yaml:4: lora.r: given twice, first on line 3. Keep one.",
        "recipe.yaml:5: seed: given twice, first on line 1. Keep one.",
    ]


def test_names_of_trl_with_our_meaning_are_read(tmp_path: Path) -> None:
    config = load_recipe(write(tmp_path, "model: miniature\ntrain_dataset: rows.jsonl\nnum_train_epochs: 3\nnum_iterations: 4\n"))
    assert (config.model_name, config.dataset, config.epochs, config.planning_steps) == ("miniature", "rows.jsonl", 3.0, 4)


def test_both_names_of_one_setting_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "model: a\nmodel_name: b\n")
    assert complaints(path) == ["recipe.yaml:2: model_name: sets the same as model on line 1. Keep one."]


def test_a_batch_size_that_counts_completions_is_refused_with_an_explanation(tmp_path: Path) -> None:
    (line,) = complaints(write(tmp_path, "per_device_train_batch_size: 8\n"))
    assert line.startswith("recipe.yaml:1: per_device_train_batch_size: counts completions in TRL; batch_size here counts prompts")


def test_an_alias_error_is_reported_under_the_name_that_was_written() -> None:
    with pytest.raises(ConfigError, match=r"^keyword: num_iterations: is 0; must be at least 1\. Default 2\.$"):
        build_config({"num_iterations": 0})


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("1.5E-3", 1.5e-3), (".5", 0.5), ("3", 3.0), ("'1e-5'", 1e-5)],
)
def test_every_way_to_write_a_number_is_read(tmp_path: Path, text: str, value: float) -> None:
    assert load_recipe(write(tmp_path, f"learning_rate: {text}\n")).learning_rate == value


@pytest.mark.parametrize("text", ["no", "2026-11-22", "1:30", "0x10", "y"])
def test_what_older_yaml_turns_into_something_else_stays_text(tmp_path: Path, text: str) -> None:
    assert load_recipe(write(tmp_path, f"dataset: {text}\n")).dataset == text


def test_a_leading_zero_is_not_octal(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "seed: 010\n")).seed == 10


@pytest.mark.parametrize("text", ["seed: true", "learning_rate: false", "reward:\n  length: true"])
def test_a_truth_value_is_no_number(tmp_path: Path, text: str) -> None:
    (line,) = complaints(write(tmp_path, text))
    assert "which this setting does not take" in line


@pytest.mark.parametrize("text", [".inf", "1e999", ".nan"])
def test_infinity_is_no_setting(tmp_path: Path, text: str) -> None:
    assert complaints(write(tmp_path, f"learning_rate: {text}\n"))


# ---- files that are no recipe


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("", "1", "the recipe is empty"),
        ("# only a comment\n", "1", "the recipe is empty"),
        ("- a\n- b\n", "1", "a recipe is a list of `name: value` lines"),
        ("seed: 1\nlora: [\n", "2", "not YAML"),
        ("seed: 1\n  lora: 3\n", "2", "not YAML"),
        ("seed: 1\nbad: \x07\n", "2", "holds a control character"),
        ("a: &x 1\nb: *x\n", "1", "anchors and aliases"),
        ("a: !!python/object/apply:os.system ['true']\n", "1", "tags (!) are not read"),
        ("a: !!int abc\n", "1", "tags (!) are not read"),
        ("seed: " + "[" * 30 + "]" * 30, "1", "nested deeper than 20 levels"),
        ("seed: 1\n---\nseed: 2\n", "2", "not YAML"),
    ],
)
def test_what_is_no_recipe_is_refused_at_its_line(tmp_path: Path, text: str, line: str, what: str) -> None:
    assert complaints(write(tmp_path, text))[0].startswith(f"recipe.yaml:{line}: {what}")


def test_a_bomb_of_aliases_is_refused_before_it_grows(tmp_path: Path) -> None:
    levels = "\n".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 10))
    assert "anchors and aliases" in complaints(write(tmp_path, f"l0: &l0 [x]\n{levels}\n"))[0]


def test_a_file_that_is_no_text_or_too_large_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"seed: 1\ndataset: \xff\n")
    assert complaints(path) == ["recipe.yaml:2: is not UTF-8 text. Save the recipe as UTF-8."]
    path.write_bytes(b"#" * 1_000_001)
    assert "larger than 32768 bytes" in complaints(path)[0]
    path.write_bytes(b"\xef\xbb\xbfseed: 3\r\n")  # what Windows editors write
    assert load_recipe(path).seed == 3


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    assert "no such recipe" in complaints(tmp_path / "recipe.yaml")[0]
    (tmp_path / "recipe.yaml").mkdir()
    assert "is a folder" in complaints(tmp_path / "recipe.yaml")[0]


def test_control_characters_of_a_key_do_not_reach_the_terminal(tmp_path: Path) -> None:
    (line,) = complaints(write(tmp_path, '"a\\e[2Jb": 1\n'))
    assert "a\\x1b[2Jb" in line


def test_wrong_overrides_are_reported_beside_a_recipe_that_cannot_be_read(tmp_path: Path) -> None:
    lines = complaints(write(tmp_path, "seed: [\n"), num_generations=1)
    assert [line.split(":")[0] for line in lines] == ["recipe.yaml", "command line"]


# ---- overrides


def test_overrides_stand_above_the_recipe_whatever_their_spelling(tmp_path: Path) -> None:
    path = write(tmp_path, "planning_steps: 1\nlora:\n  r: 2\n  alpha: 3\nkl:\n  beta: 0.1\n")
    config = load_recipe(path, {"num_iterations": 3, "lora": {"r": 4}, "kl.beta": 0.2})
    assert (config.planning_steps, config.lora.r, config.lora.alpha, config.kl.beta) == (3, 4, 3.0, 0.2)


def test_a_mapping_for_reward_replaces_it_and_a_dotted_name_adds_to_it(tmp_path: Path) -> None:
    path = write(tmp_path, "reward:\n  length: 0.5\n")
    assert load_recipe(path, {"reward": {"refusal": 1}}).reward == {"refusal": 1.0}
    assert load_recipe(path, {"reward.refusal": 1}).reward == {"length": 0.5, "refusal": 1.0}
    assert load_recipe(path, {"reward": None}).reward is None
    assert load_recipe(write(tmp_path, "reward: null\n"), {"reward.refusal": 1}).reward == {"refusal": 1.0}


def test_a_value_above_a_stage_in_the_recipe_does_not_hide_the_mistake(tmp_path: Path) -> None:
    assert complaints(write(tmp_path, "lora: 5\n"), **{"lora.r": 4}) == ["recipe.yaml:1: lora: is 5; settings below it are needed."]


def test_words_of_the_command_line_are_yaml_scalars() -> None:
    words = ["a=1e-3", "b=null", "c=", "d=*.jsonl", "e=[q_proj, v_proj]", "f={length: 1}", "g='1'", "h=a=b", "i=#1", "j=C:\\x", "k=true"]
    assert parse_overrides(words) == {
        "a": 1e-3,
        "b": None,
        "c": None,
        "d": "*.jsonl",
        "e": ["q_proj", "v_proj"],
        "f": {"length": 1},
        "g": "1",
        "h": "a=b",
        "i": "#1",
        "j": "C:\\x",
        "k": True,
    }


def test_words_that_are_no_settings_are_all_reported_with_what_else_is_wrong() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides(["foo", "seed=1", "seed=2", "lora.target_modules=[", "sed=1"], "miniature")
    assert [problem.key for problem in caught.value.problems] == ["foo", "seed", "lora.target_modules", "sed"]


def test_keywords_may_be_nested_or_dotted() -> None:
    assert build_config({"kl": {"beta": 0.3}, "lora.r": 2}) == build_config({"kl.beta": 0.3, "lora": {"r": 2}})
    assert build_config() == GRPOConfig()


# ---- round trips


def test_a_dumped_recipe_loads_to_the_same_settings(tmp_path: Path) -> None:
    config = build_config({"learning_rate": 1e-5, "lora.target_modules": ["o_proj"], "reward": {"length": -0.5}, "kl.ref_target": None})
    assert load_recipe(write(tmp_path, dump_recipe(config))) == config


@example(text="a\x85\u2028b", number=1.0, seed=0)  # line breaks to YAML alone
@given(text=st.text(max_size=40), number=st.floats(min_value=1e-300, max_value=1e300), seed=st.integers(0, 2**31 - 1))
def test_whatever_a_setting_holds_survives_dumping(tmp_path_factory: pytest.TempPathFactory, text: str, number: float, seed: int) -> None:
    config = build_config({"dataset": text, "data.source": text, "learning_rate": number, "temperature": number, "seed": seed})
    assert load_recipe(write(tmp_path_factory.mktemp("recipes"), dump_recipe(config))) == config


# ---- shipped recipes


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_and_says_what_it_needs(name: str) -> None:
    load_recipe(name)
    head = [line for line in find_recipe(name).read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any("Hardware:" in line for line in head)


def test_the_reference_configuration_is_the_one_promised() -> None:
    config = load_recipe("gemma3-4b-t4")
    assert (config.model_name, config.learning_rate) == ("google/gemma-3-4b-it", 1e-5)
    assert (config.batch_size, config.gradient_accumulation_steps) == (2, 8)
    assert (config.planning_steps, config.lora.r, config.lora.target_modules, config.epochs) == (2, 8, ("q_proj", "v_proj"), 2.0)


def test_a_folder_named_like_a_shipped_recipe_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gemma3-1b").mkdir()
    assert load_recipe("gemma3-1b").model_name == "google/gemma-3-1b-it"
    with pytest.raises(ConfigError, match="is a folder; a recipe is a YAML file"):
        load_recipe("./gemma3-1b")
    (tmp_path / "miniature").write_text("seed: 77\n", encoding="utf-8")
    assert load_recipe("miniature").seed == 77, "a file is somebody's own recipe"


def test_an_unknown_recipe_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"^miniatur: no such recipe\. Did you mean 'miniature'\?"):
        find_recipe("miniatur")
