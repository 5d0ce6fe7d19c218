"""A folder to the Hub: whether the token may write there, asked before anything expensive, and the upload itself.

A token is sent, never shown. Where files come from is access.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_grpo.access import AccessError, ask, hub_errors, logged_in, offline, offline_variable
from gemma_grpo.escapes import printable

_TOKENS_PAGE = "https://huggingface.co/settings/tokens"
_WRITES = ("repo.write", "repo.content.write")
_ROLES_THAT_WRITE = ("write", "admin", "contributor")


def check_write_access(repository: str, *, timeout: float = 10.0) -> None:
    """Raise AccessError, with what mends it, unless the present token may write to USER/NAME; ValueError for a name that is none."""
    owner = _owner(repository)
    if offline():
        raise AccessError(f"{repository} cannot be written to: {offline_variable()} is set.", f"Unset {offline_variable()}.")
    if not logged_in():
        raise AccessError(
            f"uploading to {repository} needs a login, and you have none.",
            f"1. Create a token of type Write: {_TOKENS_PAGE}",
            "2. hf auth login    (Colab: add it as the secret HF_TOKEN)",
        )
    account = _whoami(repository, timeout)
    user, token = printable(str(account.get("name", "this account"))), _mapping(_mapping(account.get("auth")).get("accessToken"))
    named = f'token "{printable(str(token.get("displayName", "")))}"'
    if not _token_writes(token, owner, repository):
        raise AccessError(
            f"your {named} may not write to {repository}.",
            f"Give it that permission, or create a token of type Write: {_TOKENS_PAGE}",
        )
    if owner != account.get("name") and not _member_writes(account, owner):
        raise AccessError(
            f"you are logged in as {user}, who may not write to repositories of {owner}.",
            f"Upload to {user}/{repository.partition('/')[2]}, or ask {owner} for the role of a contributor.",
        )


def upload(repository: str, folder: Path, *, public: bool = False) -> str:
    """Upload a folder's files, in a repository of their own, private unless it is there already or `public`. Returns its address.

    Raises AccessError where the Hub refuses or breaks off; what is there then is as it was, since the files are one commit.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Trained with gemma-grpo")
    except hub_errors(RuntimeError) as error:
        first = printable((str(error).strip().splitlines() or [""])[0][:300])
        raise AccessError(
            f"the upload to {repository} failed ({type(error).__name__}: {first}).", f"{folder} is whole. Try again."
        ) from error
    return str(commit).partition("/commit/")[0]


def _owner(repository: str) -> str:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    owner, slash, name = repository.partition("/")
    try:
        validate_repo_id(repository)
    except HFValidationError:
        slash = ""
    if not (owner and slash and name):
        raise ValueError(f"{printable(repository[:200])!r} names no repository. Give USER/NAME, such as hub:me/gemma-3-4b-aligned.")
    return owner


def _whoami(repository: str, timeout: float) -> Mapping[str, Any]:
    try:
        answer = ask("/api/whoami-v2", timeout)
        found = answer.json() if answer.is_success else {}
    except hub_errors(ValueError) as error:
        raise AccessError(
            f"the Hub cannot be reached ({type(error).__name__}), so {repository} cannot be written to.", "Try again."
        ) from error
    if answer.status_code == 401:
        raise AccessError("the Hub does not accept your token: it is invalid or has expired.", "hf auth login --force")
    if not isinstance(found, dict) or not found:
        raise AccessError(f"the Hub answers HTTP {answer.status_code} when asked who you are.", "Try again.")
    return found


def _token_writes(token: Mapping[str, Any], owner: str, repository: str) -> bool:
    role = token.get("role")
    if role != "fineGrained":
        return role == "write"
    fine = _mapping(token.get("fineGrained"))
    scopes = [one for one in fine.get("scoped") or [] if _mapping(_mapping(one).get("entity")).get("name") in (owner, repository)]
    return any(permission in _WRITES for scope in scopes for permission in scope.get("permissions") or [])


def _member_writes(account: Mapping[str, Any], owner: str) -> bool:
    orgs = [_mapping(org) for org in account.get("orgs") or []]
    return any(org.get("name") == owner and org.get("roleInOrg") in _ROLES_THAT_WRITE for org in orgs)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
