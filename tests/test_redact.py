"""Secrets go out of a text by their form or by the variable that holds them; nothing else does."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_grpo.config import ConfigError, GRPOConfig, build_config, dump_recipe, load_recipe, shipped_recipes
from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.redact import holds_secret, redact, redact_all

HF = "hf_" + "aBcD3" * 7
SK = "sk-proj-" + "x1Y2z3" * 6
WANDB = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"401 for token {HF}.", "401 for token ***"),
        (f"'{HF}'", "'***'"),
        (f"hf_oauth_{'a1B2' * 8}", "***"),
        (f"api_org_{'a1B2' * 8}", "***"),
        (f"key {SK}, and more", "key ***, and more"),
        ("https://user:pass@host.org/rows.jsonl", "https://***@host.org/rows.jsonl"),
        ("https://user:p@ss@host.org/x", "https://***@host.org/x"),
        ("s3://AKIAIOSFODNN7:abc@bucket", "s3://***@bucket"),
        ("{'Authorization': 'Bearer abcdefgh1234'}", "{'Authorization': 'Bearer ***'}"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic ***"),
        ("authorization=abc", "authorization=***"),
        ("sent Bearer abcdefgh1234 there", "sent Bearer *** there"),
        ("https://host/x?token=abcdef123&page=2", "https://host/x?token=***&page=2"),
        ("OPENAI_API_KEY=plainwords", "OPENAI_API_KEY=***"),
        (f"WANDB_API_KEY={WANDB}", "WANDB_API_KEY=***"),
        (f"wandb key: {WANDB}", "wandb key: ***"),
        (f"your token is '{WANDB}'", "your token is '***'"),
        (f"login={WANDB}", "login=***"),
    ],
)
def test_a_secret_is_taken_out_and_the_rest_stays(text: str, left: str) -> None:
    assert redact(text) == left
    assert redact(left) == left


@pytest.mark.parametrize(
    "text",
    [
        f"commit {WANDB} of the dataset",  # a hash, where nothing says that it is a key
        f"sha256 {WANDB}{WANDB[:24]}",
        f"key {WANDB}0",
        "HF_HUB_ENABLE_HF_TRANSFER=1, hf_transfer, hf_hub_download",
        "memory.token_budget=4096 kv_token_budget=40",
        "the token <end_of_turn> at id 106; your token lacks a permission",
        "https://huggingface.co/google/gemma-3-4b-it and a@b.org",
        "task-specific sk-learn, risk-averse",
        "Did you mean 'learning_rate'?",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_what_the_environment_calls_a_secret_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "of no known form 123")
    monkeypatch.setenv("MY_SERVICE_PASSWORD", "correct horse battery")
    monkeypatch.setenv("SOME_KEY", "short")
    monkeypatch.setenv("SSL_KEY", "/etc/ssl/a-path.pem")
    monkeypatch.setenv("MONKEY", "not a secret at all")
    text = "of no known form 123, correct horse battery, short, /etc/ssl/a-path.pem, not a secret at all"
    assert redact(text) == "***, ***, short, /etc/ssl/a-path.pem, not a secret at all"


def test_every_text_of_a_value_is_redacted_and_numbers_stay() -> None:
    assert redact_all({"a": [f"x {HF}", 1, None, 0.5], HF: {"b": (SK,)}}) == {"a": ["x ***", 1, None, 0.5], "***": {"b": ["***"]}}


@given(st.text(st.characters(categories=["L", "N", "P", "Zs"])))
def test_redacting_twice_is_redacting_once(text: str) -> None:
    assert redact(redact(text)) == redact(text)


# ---- settings


def test_no_setting_is_for_a_secret() -> None:
    def names(fields: dict[str, object], prefix: str = "") -> list[str]:
        inner = [name for key, value in fields.items() if isinstance(value, dict) for name in names(value, f"{prefix}{key}.")]
        return [*(prefix + key for key in fields), *inner]

    words = ("secret", "password", "passwd", "credential", "api_key", "apikey", "auth", "login")
    found = names(GRPOConfig().model_dump())
    assert len(found) > 60
    assert not [name for name in found for word in words if word in name.lower()]
    # tokens are what a model reads; none of these is a text
    assert [name for name in found if "token" in name] == ["memory.token_budget", "memory.kv_token_budget"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("dataset", "https://me:mine@host/rows.jsonl"),
        ("model_name", f"org/{HF}"),
        ("output_dir", f"runs/{SK}"),
        ("data.source", f"token={WANDB}"),
        ("reward_model.path", f"/x/{HF}/reward"),
        ("reward", {HF: 1.0}),
    ],
)
def test_a_setting_that_holds_a_secret_is_refused_without_repeating_it(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{setting}.* holds what looks like a token, a key or a password") as refused:
        build_config({setting: value})
    assert not any(secret in str(refused.value) for secret in ("mine", HF, SK, WANDB))


def test_an_error_of_the_schema_itself_does_not_quote_the_input() -> None:
    with pytest.raises(ValueError, match="valid integer") as refused:
        GRPOConfig(seed=f"password={HF}")  # type: ignore[arg-type]
    assert HF not in str(refused.value)


@pytest.mark.parametrize("name", shipped_recipes())
def test_no_shipped_recipe_is_taken_for_a_secret(name: str) -> None:
    assert not holds_secret(dump_recipe(load_recipe(name)))


# ---- the run directory


def test_what_a_run_writes_of_texts_holds_no_secret(tmp_path) -> None:
    with RunDirectory.create(tmp_path / "run", "seed: 0\n", {"status": "running", "command": f"x --token {HF}"}) as run:
        run.event("warn", text=f"the server said {SK}", nested={"urls": ["https://u:hunter2@host"]})
        run.update_run(error=f"401: Authorization: Bearer {WANDB}")
        written = "".join(path.read_text(encoding="utf-8") for path in run.path.iterdir() if path.is_file())
        assert not [secret for secret in (HF, SK, WANDB, "hunter2") if secret in written]
        assert json.loads((run.path / "run.json").read_text(encoding="utf-8"))["error"] == "401: Authorization: Bearer ***"
