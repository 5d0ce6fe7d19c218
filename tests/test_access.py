"""Where a checkpoint comes from, and why not: every situation against a server that answers as the Hub does, in a process of its own.

The library reads HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE when it is imported, so each situation is a fresh interpreter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import SECRET, UNLISTED, Hub, Machine, Repository, Token, serving

from gemma_grpo.access import KNOWN_NAMES, AccessError, checkpoint_folder, config_file, in_home
from gemma_grpo.shapes import MINIATURE_DIR

GEMMA = "google/gemma-3-1b-it"
TOKENS = {
    f"{SECRET}ana": Token("ana", accepted=frozenset([GEMMA])),
    f"{SECRET}bob": Token("bob"),
    f"{SECRET}cyd": Token("cyd", name="ci-fine", role="fineGrained", reads_gated=False),
    f"{SECRET}dee": Token("dee", pending=frozenset([GEMMA])),
    f"{SECRET}eve": Token("eve", name="ok-fine", role="fineGrained", reads_gated=True),
}
STRANGE_FILES = {"pytorch_model.bin": b"pickle", "state.pt": b"pickle", "modeling_gemma.py": b"print()", "old/model.safetensors": b"old"}
ROWS = b'{"prompt": "Why is the sky blue?"}\n'
HOW_TO_LOG_IN = '3. hf auth login    (Colab: add it as the secret HF_TOKEN and tick "Notebook access")'
NO_ACCOUNT = "No account? `gemma-grpo demo` needs none."
TOKENS_PAGE = "https://huggingface.co/settings/tokens"


@pytest.fixture
def hub() -> Iterator[Hub]:
    checkpoint = {path.name: path.read_bytes() for path in MINIATURE_DIR.iterdir()} | STRANGE_FILES
    repositories = {
        GEMMA: Repository(checkpoint, gated=True),
        "ana/open": Repository(checkpoint),
        "ana/pickled": Repository({"config.json": b"{}", "pytorch_model.bin": b"pickle"}),
        "ana/rows-only": Repository({"train.jsonl": ROWS}),
        "ana/rows": Repository({"train.jsonl": ROWS}, kind="dataset"),
        "ana/gated-rows": Repository({"train.jsonl": ROWS}, kind="dataset", gated=True),
    }
    with serving(Hub(repositories, TOKENS)) as hub:
        yield hub


class Access(Machine):
    """A machine on which checkpoint_folder is called."""

    def folder(self, name: str, who: str = "", **environment: str) -> Path:
        """What checkpoint_folder gives."""
        done = self.run("-c", f"from gemma_grpo.access import checkpoint_folder as f; print(f({name!r}))", who=who, **environment)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip())

    def refusal(self, name: str, who: str = "", **environment: str) -> list[str]:
        """The lines of the AccessError that checkpoint_folder raises."""
        script = (
            "from gemma_grpo.access import AccessError, checkpoint_folder\n"
            f"try: print('folder', checkpoint_folder({name!r}))\n"
            "except AccessError as error: print('refused'); print(error)\n"
        )
        done = self.run("-c", script, who=who, **environment)
        first, *lines = done.stdout.splitlines() or [done.stderr]
        assert first == "refused", first
        return lines


@pytest.fixture
def machine(hub: Hub, tmp_path: Path) -> Access:
    return Access(hub, tmp_path)


# ---- names that need no Hub


def test_a_folder_is_itself_and_the_miniature_ships_with_the_package(tmp_path: Path) -> None:
    assert checkpoint_folder(str(tmp_path)) == tmp_path
    assert checkpoint_folder("miniature") == MINIATURE_DIR
    assert (MINIATURE_DIR / "model.safetensors").is_file()


def test_a_folder_named_like_a_hub_id_is_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / GEMMA).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert checkpoint_folder(GEMMA) == Path(GEMMA)


@pytest.mark.parametrize("name", ["./foo", "/x/y", "../up/model", "~/models/gemma", "runs/there/model", "runs/model", "a\\b", "up/"])
def test_a_path_that_leads_nowhere_says_that_the_folder_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no such folder") as caught:
        checkpoint_folder(name)
    assert str(caught.value) == f"{name}: no such folder. Check the path."


@pytest.mark.parametrize("name", ["", "a b", "gemma--3", "x" * 97, "google/gemma-3-1b-it?", "gemma\n3"])
def test_a_name_that_can_be_no_hub_id_says_so(name: str) -> None:
    with pytest.raises(ValueError, match=r"is neither a folder here nor a possible Hub id.*Give a folder, or a Hub id such as"):
        checkpoint_folder(name)


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"model.safetensors is a file. Give the folder that holds config.json"):
        checkpoint_folder(str(tmp_path / "model.safetensors"))


def test_the_names_offered_are_possible_ones() -> None:
    from huggingface_hub.utils import validate_repo_id

    for names in KNOWN_NAMES.values():
        for name in names:
            validate_repo_id(name)


def test_only_whole_folder_names_are_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ana")
    assert in_home("/home/ana/.cache") == "~/.cache"
    assert in_home("/home/ana") == "~"
    assert in_home("/home/anabel/.cache") == "/home/anabel/.cache"


# ---- the five situations, and what else a Hub can say


def test_gated_and_not_logged_in(machine: Access) -> None:
    assert machine.refusal(GEMMA) == [
        f"{GEMMA} is gated and you are not logged in.",
        f'1. Open https://huggingface.co/{GEMMA}, sign in, press "Acknowledge license" (instant for Gemma).',
        f"2. Create a read token: {TOKENS_PAGE}",
        HOW_TO_LOG_IN,
        NO_ACCOUNT,
    ]
    assert machine.hub.fetched() == set()


def test_logged_in_but_the_licence_is_not_accepted(machine: Access) -> None:
    assert machine.refusal(GEMMA, who="bob") == [
        f"you are logged in as bob, but bob has not accepted the Gemma license of {GEMMA} yet.",
        f'Open https://huggingface.co/{GEMMA}, signed in as bob, press "Acknowledge license" (instant for Gemma).',
    ]
    # a token that may read gated repositories is not to blame, fine-grained or not
    assert machine.refusal(GEMMA, who="eve")[0] == f"you are logged in as eve, but eve has not accepted the Gemma license of {GEMMA} yet."


def test_a_token_that_was_saved_by_logging_in_counts_as_one_of_the_environment(machine: Access) -> None:
    (machine.home / "hf").mkdir()
    (machine.home / "hf" / "token").write_text(f"{SECRET}bob\n", encoding="utf-8")
    assert machine.refusal(GEMMA)[0].startswith("you are logged in as bob")


def test_a_fine_grained_token_without_the_scope(machine: Access) -> None:
    assert machine.refusal(GEMMA, who="cyd") == [
        'your token "ci-fine" is fine-grained and lacks "Read access to contents of all public gated repos you can access", '
        f"which {GEMMA} needs.",
        f"1. Open {TOKENS_PAGE}, edit the token, tick that permission under Repositories, save.",
        "2. Run the command again; no new login is needed. Or create a token of type Read and run: hf auth login",
    ]


def test_offline_and_not_in_the_cache(machine: Access) -> None:
    assert machine.refusal(GEMMA, HF_HUB_OFFLINE="1") == [
        f"HF_HUB_OFFLINE=1 and {GEMMA} is not in ~/hf/hub, or not all of it.",
        f"Unset HF_HUB_OFFLINE and run once online: hf download {GEMMA}",
        "Or give a folder of this machine.",
        NO_ACCOUNT,
    ]
    assert machine.hub.requests == []
    first, fetch, *_ = machine.refusal(GEMMA, TRANSFORMERS_OFFLINE="true")
    assert first == f"TRANSFORMERS_OFFLINE=true and {GEMMA} is not in ~/hf/hub, or not all of it."
    assert fetch == f"Unset TRANSFORMERS_OFFLINE and run once online: hf download {GEMMA}"


def test_offline_with_a_wrong_name_the_one_that_was_meant_is_to_be_downloaded(machine: Access) -> None:
    first, fetch, *_ = machine.refusal("google/gemma-3-1b", HF_HUB_OFFLINE="1")
    assert first == (
        "Did you mean google/gemma-3-1b-it or google/gemma-3-1b-pt? "
        "HF_HUB_OFFLINE=1 and google/gemma-3-1b is not in ~/hf/hub, or not all of it."
    )
    assert fetch == (
        "Unset HF_HUB_OFFLINE and run once online: hf download google/gemma-3-1b-it    (or google/gemma-3-1b, if that is right)"
    )
    first, fetch = machine.refusal("miniture", HF_HUB_OFFLINE="1")
    assert first.startswith("Did you mean miniature? ")
    assert fetch == "miniature ships with the package: nothing is downloaded for it."


def test_unreachable_and_not_in_the_cache(machine: Access) -> None:
    first, *steps = machine.refusal(GEMMA, HF_ENDPOINT="http://user:password@127.0.0.1:9")
    assert first.startswith(f"{GEMMA} is not in ~/hf/hub, or not all of it, and http://127.0.0.1:9 cannot be reached (ConnectError: ")
    assert steps == [
        "Check the network (and HF_ENDPOINT, HTTPS_PROXY where you set them).",
        f"Run once online: hf download {GEMMA}",
        "Or give a folder of this machine.",
        NO_ACCOUNT,
    ]


def test_a_hub_that_is_down_is_told_from_one_that_cannot_be_reached(machine: Access) -> None:
    machine.hub.down = True
    assert machine.refusal(GEMMA)[0] == f"{GEMMA} is not in ~/hf/hub, or not all of it, and {machine.hub.url} answers HTTP 503."


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("google/gemma-3-1b", "google/gemma-3-1b-it or google/gemma-3-1b-pt"),
        ("gemma-3-4b-it", "google/gemma-3-4b-it"),
        ("Google/Gemma3-27b-it", "google/gemma-3-27b-it"),
        ("miniture", "miniature"),
        ("somebody/else", ""),
        ("google/gemma-3-27b-it", ""),  # spelled right: a mirror may lack it
    ],
)
def test_a_name_that_does_not_exist_offers_the_nearest(machine: Access, name: str, near: str) -> None:
    first, step = machine.refusal(name)
    beginning = f"{name} is no folder here and does not exist on the Hub, or is private and you are not logged in."
    assert first.startswith(beginning + (f" Did you mean {near}" if near else ""))
    assert first.count("Did you mean") == bool(near)
    assert step == f"Check the spelling at https://huggingface.co/{name}; for a private repository run: hf auth login"


def test_a_name_that_does_not_exist_for_somebody_logged_in(machine: Access) -> None:
    first = machine.refusal("google/gemma-3-1b", who="ana")[0]
    assert " does not exist on the Hub, or is private and ana may not read it. Did you mean " in first


def test_a_token_that_the_hub_does_not_accept(machine: Access) -> None:
    assert machine.refusal(GEMMA, who="nobody") == [
        "the Hub does not accept the token of the variable HF_TOKEN: it is invalid or has expired.",
        f"1. {TOKENS_PAGE}",
        "2. Set it to the new one, or unset it and run: hf auth login",
    ]
    (machine.home / "hf").mkdir(exist_ok=True)
    (machine.home / "hf" / "token").write_text(f"{SECRET}nobody", encoding="utf-8")
    saved = machine.refusal("ana/open")
    assert saved[0] == "the Hub does not accept the token saved by `hf auth login`: it is invalid or has expired."
    assert saved[2] == "2. hf auth login --force    (Colab: renew the secret HF_TOKEN)"


@pytest.mark.parametrize("ending", ["\x01", "\u00e4"])
def test_a_token_that_can_be_none_is_not_shown(machine: Access, ending: str) -> None:
    assert machine.refusal(GEMMA, who=f"ana{ending}")[0].startswith("the Hub does not accept the token of the variable HF_TOKEN")


def test_a_request_that_nobody_has_answered_yet(machine: Access) -> None:
    assert machine.refusal(GEMMA, who="dee") == [
        f"{GEMMA} is gated, and its authors have not yet answered the request of dee.",
        f"https://huggingface.co/{GEMMA} shows when they have. Until then give another model or dataset.",
    ]


def test_a_licence_is_said_before_the_scope_when_both_are_missing(machine: Access) -> None:
    machine.hub.tokens[f"{SECRET}fay"] = Token("fay", name="ci", role="fineGrained", reads_gated=False)
    machine.hub.forbidden = UNLISTED.format(kind="model", repo=GEMMA)
    machine.hub.forbidden_code = "GatedRepo"
    first, licence, scope = machine.refusal(GEMMA, who="fay")
    assert first == f"you are logged in as fay, but fay has not accepted the Gemma license of {GEMMA} yet."
    assert licence.startswith("Open ")
    assert scope.startswith('Also give the token "ci" the permission "Read access to contents of all public gated repos')


def test_another_refusal_is_passed_on_with_control_characters_spelled_out(machine: Access) -> None:
    machine.hub.forbidden = "Your organization forbids this\x1b[2J"
    assert machine.refusal(GEMMA, who="ana") == [
        f"the Hub refuses {GEMMA} to ana (HTTP 403). Your organization forbids this\\x1b[2J",
    ]
    assert machine.refusal("ana/open")[0].startswith("the Hub refuses ana/open to a visitor (HTTP 403). Your organization")


# ---- downloads


def test_a_download_takes_what_is_read_and_works_offline_afterwards(machine: Access) -> None:
    folder = machine.folder(GEMMA, who="ana")
    assert machine.cache in folder.parents
    read = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == read
    assert machine.hub.fetched() == read  # no .bin, .pt, .py, and nothing of the folder old/
    assert (folder / "model.safetensors").read_bytes() == (MINIATURE_DIR / "model.safetensors").read_bytes()

    machine.hub.requests.clear()
    assert machine.folder(GEMMA, HF_HUB_OFFLINE="1") == folder
    assert machine.hub.requests == []
    assert machine.folder(GEMMA, HF_ENDPOINT="http://127.0.0.1:9") == folder
    assert machine.folder(GEMMA) == folder, "logged out: what is here is used"


def test_configuration_alone_can_be_fetched_and_does_not_pass_for_a_checkpoint(machine: Access) -> None:
    machine.run("-c", "from gemma_grpo.access import checkpoint_folder as f; f('ana/open', weights=False)")
    assert "tokenizer.json" in machine.hub.fetched()
    assert "model.safetensors" not in machine.hub.fetched()
    assert "is not in ~/hf/hub, or not all of it" in machine.refusal("ana/open", HF_HUB_OFFLINE="1")[0]


def test_a_plan_takes_config_json_alone(machine: Access) -> None:
    def config(name: str, **environment: str) -> tuple[str, str]:
        script = f"from gemma_grpo.access import config_file as f; print(f({name!r}))"
        done = machine.run("-c", script, TQDM_POSITION="-1", **environment)  # -1: bars are drawn without a terminal too
        return done.stdout.strip(), done.stderr

    path, shown = config("ana/open")
    assert Path(path).read_bytes() == (MINIATURE_DIR / "config.json").read_bytes()
    assert machine.hub.fetched() == {"config.json"}
    assert shown == "", "no progress bar for a kilobyte"
    assert config("ana/open", HF_HUB_OFFLINE="1") == (path, "")
    words = "from gemma_grpo.access import checkpoint_folder as f; f('ana/open', weights=False)"
    assert "or not all of it" in machine.run("-c", words, HF_HUB_OFFLINE="1").stderr, "the tokenizer is missing"
    assert f"AccessError: {GEMMA} is gated and you are not logged in." in config(GEMMA)[1]
    assert f"AccessError: HF_HUB_OFFLINE=1 and {GEMMA} is not in" in config(GEMMA, HF_HUB_OFFLINE="1")[1]
    assert "ValueError: ana/rows-only holds no config.json" in config("ana/rows-only")[1]
    assert config_file("miniature") == MINIATURE_DIR / "config.json"


def test_a_shard_that_is_missing_in_the_cache_is_seen(machine: Access) -> None:
    folder = machine.folder("ana/open")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert "or not all of it" in machine.refusal("ana/open", HF_HUB_OFFLINE="1")[0]


def test_a_mirror_that_knows_no_access_check_is_downloaded_from(machine: Access) -> None:
    machine.hub.mirror = True
    assert (machine.folder("ana/open") / "config.json").is_file()
    assert machine.refusal(GEMMA)[0] == f"{GEMMA} is gated and you are not logged in."


def test_a_repository_of_pickled_weights_is_refused_by_name(machine: Access) -> None:
    done = machine.run("-c", "from gemma_grpo.access import checkpoint_folder as f; f('ana/pickled')")
    assert "ValueError: ana/pickled holds no config.json with .safetensors weights, and nothing else is read" in done.stderr
    assert "pytorch_model.bin" not in machine.hub.fetched()


def test_a_download_that_breaks_off_says_how_to_go_on(machine: Access) -> None:
    machine.hub.cut = "model.safetensors"
    first, step = machine.refusal("ana/open")
    assert first.startswith("the download of ana/open broke off (")
    assert step == "Run the same command again: it goes on where it stopped."
    assert "or not all of it" in machine.refusal("ana/open", HF_HUB_OFFLINE="1")[0]
    machine.hub.cut = ""
    assert (machine.folder("ana/open") / "model.safetensors").read_bytes() == (MINIATURE_DIR / "model.safetensors").read_bytes()


def test_a_disk_that_takes_no_more_says_what_to_do(machine: Access) -> None:
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"
        "from gemma_grpo.access import checkpoint_folder\n"
        "checkpoint_folder('ana/open')\n"
    )
    lines = machine.run("-c", script).stderr.splitlines()
    assert lines[-2:] == [
        "gemma_grpo.access.AccessError: ~/hf/hub takes no more (File too large): ana/open was not downloaded to its end.",
        "Make room, or set HF_HOME to a folder on a larger disk. What is there already is kept.",
    ]


# ---- datasets, and the command line


def test_datasets_of_the_hub_have_texts_of_the_same_kind(machine: Access) -> None:
    def stats(name: str, who: str = "", **environment: str) -> list[str]:
        done = machine.run("-m", "gemma_grpo.cli", "data", "stats", name, who=who, **environment)
        assert done.returncode == 4, done.stderr
        return done.stderr.splitlines()

    gated = stats("ana/gated-rows")
    assert gated[0] == "error: ana/gated-rows is gated and you are not logged in."
    assert gated[1] == "  1. Open https://huggingface.co/datasets/ana/gated-rows, sign in, accept the terms (instant for Gemma)."
    assert stats("ana/gated-rows", who="bob")[0].endswith("but bob has not accepted its terms of ana/gated-rows yet.")
    assert stats("anthropic/hh-rlfh")[0] == (
        "error: anthropic/hh-rlfh is no file here and does not exist on the Hub, or is private and you are not logged in. "
        "Did you mean Anthropic/hh-rlhf?"
    )
    assert stats("ana/rows", HF_HUB_OFFLINE="1") == [
        "error: HF_HUB_OFFLINE=1 and ana/rows is not in ~/hf/hub, or not all of it.",
        "  Unset HF_HUB_OFFLINE and run once online: gemma-grpo data stats ana/rows",
        "  Or give a file of this machine.",
    ]


def test_the_command_line_ends_with_4_and_prints_the_steps(machine: Access) -> None:
    done = machine.run("-m", "gemma_grpo.cli", "train", "miniature", f"model_name={GEMMA}", who="bob")
    assert done.returncode == 4
    assert done.stderr.splitlines()[-2:] == [  # other libraries may warn before
        f"error: you are logged in as bob, but bob has not accepted the Gemma license of {GEMMA} yet.",
        f'  Open https://huggingface.co/{GEMMA}, signed in as bob, press "Acknowledge license" (instant for Gemma).',
    ]


def test_an_access_error_is_a_value_error_with_its_steps() -> None:
    error = AccessError("what", "1. this", "2. that")
    assert isinstance(error, ValueError)
    assert (error.what, error.steps, str(error)) == ("what", ("1. this", "2. that"), "what\n1. this\n2. that")
