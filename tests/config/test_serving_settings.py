"""Settings of replicas: addresses that are none, secrets in them, and the weights that other engines' samples must have."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_grpo.config import ConfigError, GRPOConfig, LossSettings, build_config, dump_recipe, load_recipe, parse_overrides
from gemma_grpo.config.machine import ServingSettings

URL = "http://one:8000"


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("ftp://one", r"'ftp://one', which is no http or https address\. Write it as http://host:8000\."),
        ("one:8000", r"'one:8000', which is no http or https address"),
        ("http://", r"which is no http or https address"),
        ("http://one two", r"which is no http or https address"),
        ("http://on\u202ee", r"which is no http or https address"),
        ("http://one:99999", r"no address that can be read \(Port out of range"),
        ("http://one?x=1", r"with a part behind \? or #"),
        ("http://one:8000/v1/", r"/v1 is added to it\. Leave it out"),
    ],
)
def test_what_is_no_address_is_named_with_its_place(url: str, text: str) -> None:
    with pytest.raises(ConfigError, match=rf"^keyword: serving\.urls: has in entry 2 .*{text}"):
        build_config({"serving.urls": [URL, url]})


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match=r"user or password in entry 1.* VLLM_API_KEY") as raised:
        build_config({"serving.urls": ["http://me:swordfish@one"]})
    assert "swordfish" not in str(raised.value)


def test_a_key_in_an_address_is_found_in_a_list_too() -> None:
    with pytest.raises(ConfigError, match="looks like a token"):
        build_config({"serving.urls": [f"{URL}/hf_{'a' * 30}"]})


def test_a_replica_is_named_once() -> None:
    with pytest.raises(ConfigError, match=r"serving\.urls: names http://one:8000 twice"):
        build_config({"serving.urls": [URL, f"{URL}/"]})


def test_addresses_come_from_the_command_line_without_their_last_slash() -> None:
    config = build_config(parse_overrides(["serving.urls=[http://one:8000/, https://two/behind/a/proxy]"]))
    assert config.serving.urls == (URL, "https://two/behind/a/proxy")


@pytest.mark.parametrize("loss", [{}, {"loss.clip_high": 0.3}, {"loss.tis_cap": None}, {"loss": {"clip_high": 0.3}}])
def test_samples_of_replicas_are_weighted_unless_another_cap_is_given(loss: dict[str, object], tmp_path: Path) -> None:
    config = build_config({"serving.urls": [URL], **loss})
    assert config.loss.tis_cap == 2.0
    assert config.loss.clip_high == (0.3 if "clip_high" in str(loss) else 0.2)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(config), encoding="utf-8")
    assert "tis_cap: 2.0" in recipe.read_text(encoding="utf-8")  # what is in force, for whoever reads it
    assert load_recipe(recipe) == config


def test_a_cap_that_is_given_stays_and_one_engine_has_none() -> None:
    assert build_config({"serving.urls": [URL], "loss.tis_cap": 3.0}).loss.tis_cap == 3.0
    assert GRPOConfig(serving=ServingSettings(urls=(URL,)), loss=LossSettings(clip_high=0.4)).loss == LossSettings(
        clip_high=0.4, tis_cap=2.0
    )
    assert build_config({"serving.max_staleness": 2}).loss.tis_cap is None
