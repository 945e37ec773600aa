"""A base model's files for nodes of a Ray cluster that do not have them."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import ray
from filelock import FileLock
from huggingface_hub.errors import LocalEntryNotFoundError

from autopeft.engine.messages import WorkerContext
from autopeft.models.checkpoint import is_local_only
from autopeft.utils.scratch import ensure_copy

_CHUNK = 64 * 2**20
"""Bytes that travel at once, so that a large model does not fill the object store."""

_WHOLE = 2**20
"""A file up to so many bytes is compared whole, a larger one by its size, beginning and end."""


@dataclass(frozen=True)
class Listing:
    """The files of a folder.

    Attributes:
        sizes: Pairs of a file's path in the folder and its bytes, sorted.
        identity: Digest of the sizes, of small files, and of the ends of large ones.
    """

    sizes: tuple[tuple[str, int], ...]
    identity: str

    @classmethod
    def of(cls, folder: Path) -> Listing:
        """Return the listing of a folder."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        digest = hashlib.sha256()
        sizes = []
        for path in paths:
            name, size = path.relative_to(folder).as_posix(), path.stat().st_size
            sizes.append((name, size))
            digest.update(f"{name}\0{size}\0".encode())
            with path.open("rb") as file:
                digest.update(file.read(_WHOLE))
                file.seek(max(0, size - _WHOLE))
                digest.update(file.read(_WHOLE))
        return cls(tuple(sizes), digest.hexdigest()[:16])


@ray.remote(num_cpus=0)
class _Files:
    """Reads a folder's files on the driver's node."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._listing = Listing.of(self._folder)

    def listing(self) -> Listing:
        return self._listing

    def read(self, name: str, offset: int) -> bytes:
        with (self._folder / name).open("rb") as file:
            file.seek(offset)
            return file.read(_CHUNK)


def offer(context: WorkerContext) -> Any:
    """Return what hands a base model's files to other nodes; None if there are none here.

    A search without data trains no model of ours.
    """
    settings = context.settings
    if context.data is None:
        return None
    folder = _folder_here(settings.model, settings.model_revision)
    if folder is None:
        return None
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    return _Files.options(scheduling_strategy=here).remote(str(folder))  # type: ignore[attr-defined]


def with_model(context: WorkerContext, files: Any) -> WorkerContext:
    """Return the context of a node that has the base model: it is fetched where it is missing.

    One process of a node fetches, and the others wait for it.

    Raises:
        OSError: if the node's disk is full.
    """
    if files is None:
        return context
    settings = context.settings
    wanted: Listing = ray.get(files.listing.remote())
    here = _folder_here(settings.model, settings.model_revision)
    if Path(settings.model).is_absolute():
        if here is not None and Listing.of(here).identity == wanted.identity:
            return context
    elif here is not None or not is_local_only(settings.model):
        return context  # In the hub's cache of this node, or to be had from the hub.
    base = Path(context.cache_folder or tempfile.gettempdir())
    ensure_copy(base)
    folder = base / f"model-{wanted.identity}"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            _fetch(files, wanted, folder)
    return replace(
        context,
        settings=replace(settings, model=str(folder), model_revision=None),
        base_model=(settings.model, settings.model_revision),
    )


def _fetch(files: Any, wanted: Listing, folder: Path) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # A worker died over it.
    for name, size in wanted.sizes:
        target = partial / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            for offset in range(0, size, _CHUNK):
                file.write(ray.get(files.read.remote(name, offset)))
    partial.rename(folder)


def _folder_here(model: str, revision: str | None) -> Path | None:
    """Return the folder of a model on this machine, also in the hub's cache; None: not here."""
    if (folder := Path(model)).is_dir():
        return folder
    if folder.is_absolute():
        return None
    try:
        found = huggingface_hub.snapshot_download(model, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, ValueError):
        return None
    return Path(found)
