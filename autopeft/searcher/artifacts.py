"""Files of a search as artifacts of its study, which optuna-dashboard shows and offers."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import optuna
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta, upload_artifact
from optuna.artifacts.exceptions import ArtifactNotFound

from autopeft.errors import StorageError
from autopeft.utils.files import contained
from autopeft.utils.scratch import scratch_folder

MAX_ADAPTER_BYTES = 64 * 2**20
"""A larger adapter is not stored a second time."""


def artifact_store(folder: Path) -> FileSystemArtifactStore:
    """Return the store in a folder, which is created."""
    folder.mkdir(parents=True, exist_ok=True)
    return FileSystemArtifactStore(folder)


class StoredArtifacts:
    """The artifacts in a folder, to be read: nothing is written, and no link leads out of it.

    Args:
        folder: The folder, which need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """Open an artifact."""
        try:
            return contained(self._folder, artifact_id).open("rb")
        except (OSError, StorageError) as error:
            raise ArtifactNotFound(str(error)) from error

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Refuse to write."""
        raise self._refused()

    def remove(self, artifact_id: str) -> None:
        """Refuse to remove."""
        raise self._refused()

    def _refused(self) -> StorageError:
        problem = "its artifacts are only shown"
        return StorageError("artifacts", str(self._folder), problem, "change the files themselves")


def save_artifacts(
    study: optuna.study.Study, folder: Path, files: Sequence[Path], adapters: Mapping[str, Path]
) -> tuple[str, ...]:
    """Attach files, and adapters as archives, to a study; one that it has is replaced.

    Args:
        study: Any study.
        folder: Where the store keeps its copies.
        files: Files to attach.
        adapters: Name of the archive without suffix -> the adapter's folder.

    Returns:
        The names of adapters that were left out, because they are too large to be kept twice.
    """
    store = artifact_store(folder)
    known = {meta.filename: meta.artifact_id for meta in get_all_artifact_meta(study)}

    def save(path: Path) -> None:
        if path.name not in known:
            upload_artifact(artifact_store=store, file_path=str(path), study_or_trial=study)
            return
        with path.open("rb") as content:
            store.write(known[path.name], content)

    left_out = []
    for path in files:
        save(path)
    with scratch_folder() as drafts:
        for name, place in adapters.items():
            parts = sorted(path for path in place.rglob("*") if path.is_file())
            if sum(path.stat().st_size for path in parts) > MAX_ADAPTER_BYTES:
                left_out.append(name)
                continue
            draft = drafts / f"{name}.zip"
            # Weights do not compress.
            with zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as archive:
                for path in parts:
                    archive.write(path, path.relative_to(place))
            save(draft)
            draft.unlink()
    return tuple(left_out)
