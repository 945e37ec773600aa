"""Push a folder to Hugging Face's hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from autopeft.errors import SettingsError


def check_repo(repo: str) -> None:
    """Check the name of a model repository before anything is computed for it.

    Raises:
        SettingsError: if it is no name.
    """
    try:
        validate_repo_id(repo)
        is_named = repo.count("/") == 1
    except HFValidationError:
        is_named = False
    if not is_named:
        raise SettingsError("push_to", repo, "is no name of a repository", "use user/name")


def push_folder(folder: Path, repo: str) -> str:
    """Push a folder to a model repository, which is made if there is none; return its address.

    Raises:
        SettingsError: if the hub refuses, or cannot be reached.
    """
    api = HfApi()
    try:
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload by autopeft")
    except Exception as error:  # The hub's client raises errors of many types.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SettingsError(
            "push_to",
            repo,
            f"the hub refuses or cannot be reached ({reason})",
            f"log in with `hf auth login`, then push {folder} with `hf upload`",
        ) from error
    return str(address)
