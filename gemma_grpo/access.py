"""Where a checkpoint's files are: a folder here, the shipped miniature, or the Hub. Owns every text about why the Hub says no.

Loads neither torch nor transformers; huggingface_hub only when the Hub or its cache is asked. A token is sent, never shown.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from gemma_grpo.escapes import printable
from gemma_grpo.shapes import MINIATURE, MINIATURE_DIR, known_shapes

Kind = Literal["model", "dataset"]

CONFIG_FILES = ("*.json", "tokenizer.model", "chat_template.jinja")
WEIGHT_FILES = ("*.safetensors",)
"""What is fetched of a checkpoint. Pickled weights and code (.bin, .pt, .py) are not fetched, so they cannot be read by mistake."""

KNOWN_NAMES = {"model": (MINIATURE, *known_shapes()), "dataset": ("Anthropic/hh-rlhf",)}
"""For "did you mean": a wrong name must be answered without asking anybody."""

_NO_ACCOUNT = "No account? `gemma-grpo demo` needs none."
_NO_CHECKPOINT = (
    "{name} holds no config.json with .safetensors weights, and nothing else is read (no .bin, .pt, .gguf). "
    "Use a repository of the original weights, such as google/gemma-3-1b-it."
)
_SCOPE = "Read access to contents of all public gated repos you can access"
_TOKENS_PAGE = "https://huggingface.co/settings/tokens"


class AccessError(ValueError):
    """The Hub's files cannot be had: `what` in one line, then the steps that mend it."""

    def __init__(self, what: str, *steps: str) -> None:
        super().__init__("\n".join([what, *steps]))
        self.what, self.steps = what, steps


@dataclass(frozen=True, slots=True)
class _Account:
    """Who a token belongs to, by the Hub's own word."""

    user: str = "this account"
    token_name: str = ""
    valid: bool = True
    reads_gated: bool = True
    """False for a fine-grained token without the permission for public gated repositories."""


def checkpoint_folder(name: str, *, weights: bool = True) -> Path:
    """The folder that holds a checkpoint: a local folder as it is, "miniature" for the shipped one, a Hub id downloaded or cached.

    Access is asked for before the first byte of weights; without `weights` only configuration and tokenizer files are fetched.
    A checkpoint in the cache is used when the Hub is off, unreachable, or refuses.
    Raises AccessError when the Hub's files cannot be had, ValueError for a name that is neither a folder nor a possible Hub id.
    """
    if (folder := local_folder(name)) is not None:
        return folder
    problem = access_problem(name)
    if problem is None:
        return _download(name, weights=weights)
    cached = cached_folder(name, weights=weights)
    if cached is None:
        raise problem
    return cached


def config_file(name: str) -> Path:
    """A checkpoint's config.json alone: what a plan needs. Found as checkpoint_folder finds the rest, and refused as it refuses.

    In a local folder the file may be missing: whoever reads it says so.
    """
    if (folder := local_folder(name)) is not None:
        return folder / "config.json"
    problem = access_problem(name)
    if problem is None:
        return _download_config(name)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    if not isinstance(cached, str):
        raise problem
    return Path(cached)


def local_folder(name: str) -> Path | None:
    """The folder of a local checkpoint or of "miniature", None for what can only be a Hub id. Asks nobody.

    Raises ValueError for a name that is neither a folder nor a possible Hub id.
    """
    path, shown = Path(name).expanduser(), printable(name[:200])
    if name == MINIATURE:
        return MINIATURE_DIR
    if name and os.path.isdir(path):  # Path.exists raises for names too long to be one
        return path
    if name and os.path.exists(path):
        raise ValueError(f"{shown} is a file. Give the folder that holds config.json and the .safetensors files.")
    outside = name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1 or name.endswith("/")
    if outside or os.path.isdir(name.partition("/")[0]):
        raise ValueError(f"{shown}: no such folder. {_did_you_mean(name, 'model')}Check the path.")
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(
            f"{shown!r} is neither a folder here nor a possible Hub id. {_did_you_mean(name, 'model')}"
            "Give a folder, or a Hub id such as google/gemma-3-1b-it."
        ) from None
    return None


def cached_folder(name: str, *, weights: bool = True) -> Path | None:
    """The folder of a Hub id in the cache when all its files are there, else None. Asks nobody."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True, **_files(weights)))
    except LocalEntryNotFoundError:
        return None
    words = any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model"))
    return folder if words and _is_complete(folder, weights) else None


def access_problem(name: str, kind: Kind = "model", *, timeout: float = 10.0) -> AccessError | None:
    """Why the Hub will not give this repository, None when it will. `timeout` in seconds, for each of at most two questions."""
    if offline():
        return _offline(name, kind)
    if not _token().isprintable() or not _token().isascii():
        return _invalid_token()  # asking with it would put it into the error's text
    try:
        answer = ask(f"/api/{kind}s/{name}/auth-check", timeout)
    except hub_errors() as error:
        return _unreachable(name, kind, f"cannot be reached ({_reason(error)})")
    return None if answer.is_success else _refusal(name, kind, answer, timeout)


def hub_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """What a request to the Hub may raise, to be caught together with `others`."""
    # the base of httpx's errors, which huggingface_hub takes from httpx or from httpx2, by version
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    return (HTTPError, OSError, *others)


def offline() -> bool:
    """Whether a variable forbids asking: see offline_variable."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def offline_variable() -> str:
    """Which variable forbids asking, for texts that say what to unset."""
    return "TRANSFORMERS_OFFLINE" if os.environ.get("TRANSFORMERS_OFFLINE") and not os.environ.get("HF_HUB_OFFLINE") else "HF_HUB_OFFLINE"


def logged_in() -> bool:
    """Whether a token is set, valid or not: by HF_TOKEN, `hf auth login` or a Colab secret."""
    return bool(_token())


def cache_dir() -> Path:
    """Where huggingface_hub keeps what it downloads: HF_HUB_CACHE, HF_HOME or the default."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def in_home(path: Path | str) -> str:
    """A path as a message may show it, the home folder written as ~."""
    text, home = str(path), str(Path.home())
    return f"~{text[len(home) :]}" if text == home or text.startswith(home + os.sep) else text


def _download(name: str, *, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    with _told_as_access_error(name):
        folder = Path(snapshot_download(name, **_files(weights)))
    if not _is_complete(folder, weights):
        raise ValueError(_NO_CHECKPOINT.format(name=name))
    return folder


def _download_config(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars  # type: ignore[attr-defined]

    hidden = are_progress_bars_disabled()
    disable_progress_bars()  # for a kilobyte
    try:
        with _told_as_access_error(name):
            return Path(hf_hub_download(name, "config.json"))
    finally:
        if not hidden:
            enable_progress_bars()


@contextmanager
def _told_as_access_error(name: str) -> Iterator[None]:
    from huggingface_hub.errors import EntryNotFoundError

    try:
        yield
    except EntryNotFoundError:
        raise ValueError(_NO_CHECKPOINT.format(name=name)) from None
    except hub_errors(RuntimeError) as error:  # RuntimeError: what hf_xet raises when a transfer breaks off
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise AccessError(
                f"{in_home(cache_dir())} takes no more ({os.strerror(error.errno)}): {name} was not downloaded to its end.",
                "Make room, or set HF_HOME to a folder on a larger disk. What is there already is kept.",
            ) from error
        answer = getattr(error, "response", None)
        problem = None if answer is None else _refusal(name, "model", answer, timeout=10.0)
        broken_off = AccessError(
            f"the download of {name} broke off ({_reason(error)}).", "Run the same command again: it goes on where it stopped."
        )
        raise problem or broken_off from error


def _files(weights: bool) -> dict[str, Any]:
    # "*" matches slashes too: without the second, every checkpoint in a repository's subfolders would be fetched
    return {"allow_patterns": [*CONFIG_FILES, *(WEIGHT_FILES if weights else ())], "ignore_patterns": ["*/*"]}


def _is_complete(folder: Path, weights: bool) -> bool:
    """Whether the files are there; the versions of huggingface_hub differ in what they call a snapshot."""
    index, has_config = folder / "model.safetensors.index.json", (folder / "config.json").is_file()
    if not has_config or not weights:
        return has_config
    if not index.is_file():
        return any(folder.glob("*.safetensors"))
    shards = re.findall(r'"([^"/]+\.safetensors)"', index.read_text(encoding="utf-8", errors="replace"))
    return all((folder / shard).is_file() for shard in shards)  # an index that is damaged is loading's to name


def ask(path: str, timeout: float) -> Any:
    """One GET with the user's token. HfApi().auth_check and whoami wait without a limit, which a dropped packet turns into minutes."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]

    return get_session().get(constants.ENDPOINT + path, headers=build_hf_headers(), timeout=timeout)


def _token() -> str:
    from huggingface_hub import get_token

    return get_token() or ""


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0][:200]}".rstrip(": ")
    return printable(text.replace(token, "***") if (token := _token()) else text)


def _refusal(name: str, kind: Kind, answer: Any, timeout: float) -> AccessError | None:
    """What an answer that is no success means; None where the server does not know the question, as some mirrors do not."""
    status, code = answer.status_code, answer.headers.get("X-Error-Code", "")
    message = printable(answer.headers.get("X-Error-Message", "")[:300])
    if status in (404, 405) and not code:
        return None
    if status == 429 or status >= 500:
        return _unreachable(name, kind, f"answers HTTP {status}")
    if not _token():
        if code == "GatedRepo":
            return _not_logged_in(name, kind)
        return _unknown(name, kind, "you are not logged in") if status in (401, 404) else _other(name, "a visitor", status, message)
    account = _account(timeout)
    if not account.valid:
        return _invalid_token()
    unlisted = "not in the authorized list" in message
    if "fine-grained" in message or (code == "GatedRepo" and not account.reads_gated and not unlisted):
        return _lacks_scope(name, account)
    if code == "GatedRepo":
        return _not_accepted(name, kind, account, "" if unlisted else message)
    return _unknown(name, kind, f"{account.user} may not read it") if status in (401, 404) else _other(name, account.user, status, message)


def _account(timeout: float) -> _Account:
    try:
        answer = ask("/api/whoami-v2", timeout)
        if answer.status_code == 401:
            return _Account(valid=False)
        facts = answer.json() if answer.is_success else {}
    except hub_errors(ValueError):
        return _Account()
    token = facts.get("auth", {}).get("accessToken", {})
    reads_gated = token.get("role") != "fineGrained" or bool(token.get("fineGrained", {}).get("canReadGatedRepos"))
    return _Account(printable(facts.get("name", "this account")), printable(token.get("displayName", "")), True, reads_gated)


def _page(name: str, kind: Kind) -> str:
    return f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"


def _accept(name: str, kind: Kind, *, sign_in: str) -> str:
    button = 'press "Acknowledge license"' if name.startswith("google/gemma") else "accept the terms"
    return f"Open {_page(name, kind)}, {sign_in}, {button} (instant for Gemma)."


def _not_logged_in(name: str, kind: Kind) -> AccessError:
    return AccessError(
        f"{name} is gated and you are not logged in.",
        f"1. {_accept(name, kind, sign_in='sign in')}",
        f"2. Create a read token: {_TOKENS_PAGE}",
        '3. hf auth login    (Colab: add it as the secret HF_TOKEN and tick "Notebook access")',
        _NO_ACCOUNT,
    )


def _not_accepted(name: str, kind: Kind, account: _Account, message: str) -> AccessError:
    licence = "the Gemma license" if name.startswith("google/gemma") else "its terms"
    if "awaiting" in message:
        return AccessError(
            f"{name} is gated, and its authors have not yet answered the request of {account.user}.",
            f"{_page(name, kind)} shows when they have. Until then give another model or dataset.",
        )
    what = f"you are logged in as {account.user}, but {account.user} has not accepted {licence} of {name} yet."
    steps = [_accept(name, kind, sign_in=f"signed in as {account.user}")]
    if not account.reads_gated:
        steps.append(f'Also give the token "{account.token_name}" the permission "{_SCOPE}": {_TOKENS_PAGE}')
    return AccessError(what, *steps, *([f"The Hub says: {message}"] if message else []))


def _lacks_scope(name: str, account: _Account) -> AccessError:
    token = f'your token "{account.token_name}"' if account.token_name else "your token"
    return AccessError(
        f'{token} is fine-grained and lacks "{_SCOPE}", which {name} needs.',
        f"1. Open {_TOKENS_PAGE}, edit the token, tick that permission under Repositories, save.",
        "2. Run the command again; no new login is needed. Or create a token of type Read and run: hf auth login",
    )


def _invalid_token() -> AccessError:
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        source, remedy = "of the variable HF_TOKEN", "Set it to the new one, or unset it and run: hf auth login"
    else:
        source, remedy = "saved by `hf auth login`", "hf auth login --force    (Colab: renew the secret HF_TOKEN)"
    return AccessError(f"the Hub does not accept the token {source}: it is invalid or has expired.", f"1. {_TOKENS_PAGE}", f"2. {remedy}")


def _unknown(name: str, kind: Kind, or_private: str) -> AccessError:
    near, here = _did_you_mean(name, kind), "folder" if kind == "model" else "file"
    return AccessError(
        f"{name} is no {here} here and does not exist on the Hub, or is private and {or_private}.{' ' + near.rstrip() if near else ''}",
        f"Check the spelling at {_page(name, kind)}; for a private repository run: hf auth login",
    )


def _other(name: str, user: str, status: int, message: str) -> AccessError:
    return AccessError(f"the Hub refuses {name} to {user} (HTTP {status}). {message}".rstrip())


def _offline(name: str, kind: Kind) -> AccessError:
    variable = offline_variable()
    what = f"{variable}={os.environ.get(variable, 1)} and {name} is not in {in_home(cache_dir())}, or not all of it."
    return AccessError(_did_you_mean(name, kind) + what, *_fetch_steps(name, kind, f"Unset {variable} and run once online:"))


def _unreachable(name: str, kind: Kind, what: str) -> AccessError:
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)  # without a user and password that may stand in it
    host = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}" if parts.hostname else constants.ENDPOINT
    both = f"{name} is not in {in_home(cache_dir())}, or not all of it, and {host} {what}."
    check = "Check the network (and HF_ENDPOINT, HTTPS_PROXY where you set them)."
    return AccessError(_did_you_mean(name, kind) + both, check, *_fetch_steps(name, kind, "Run once online:"))


def _fetch_steps(name: str, kind: Kind, when: str) -> list[str]:
    """How to get the files; of the name that was probably meant, since a wrong one cannot be downloaded."""
    meant = [*_near(name, kind), name][0]
    doubt = "" if meant == name else f"    (or {name}, if that is right)"
    fetch = f"{when} {'hf download' if kind == 'model' else 'gemma-grpo data stats'} {meant}{doubt}"
    here = ["Or give a folder of this machine.", _NO_ACCOUNT] if kind == "model" else ["Or give a file of this machine."]
    return [f"{MINIATURE} ships with the package: nothing is downloaded for it."] if meant == MINIATURE else [fetch, *here]


def _did_you_mean(name: str, kind: Kind) -> str:
    return f"Did you mean {' or '.join(near)}? " if (near := _near(name, kind)) else ""


def _near(name: str, kind: Kind) -> list[str]:
    """Known names that a wrong one resembles, nearest kind first; none for a known name, which is no misspelling."""
    near = [] if name in KNOWN_NAMES[kind] else get_close_matches(name, KNOWN_NAMES[kind], n=2)
    return sorted(near, key=lambda known: not known.endswith("-it"))
