"""converted.json: members of a front as other programs load them, with their own test quality."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autopeft.costs.objectives import Objective
from autopeft.errors import StorageError
from autopeft.inputs import files_digest
from autopeft.utils.files import contained, write_text
from autopeft.utils.serialize import finite, from_plain, read_json, strict_json, to_plain

FILE = "converted.json"

_REMEDY = "remove the file; autopeft export --score writes it again"


@dataclass(frozen=True)
class Converted:
    """A member that was exported in another form, and scored in it.

    Attributes:
        digest: The member's.
        format: "merged", "lora" or "gguf".
        server: The server that it was written for; "" for none.
        quantization: How the weights of a merged model are stored.
        rank: The rank of all modules of a LoRA; 0 for other formats.
        dtype: Type of the weights.
        lossy: Whether it may answer otherwise than the member, beyond rounding.
        metrics: Its scores on the test rows, the loss among them.
        member: The same of the member itself, of the same weights on the same rows.
        n_rows: Test rows.
        file_bytes: Size of its files.
        weights: Digest of the member's weights that were converted; "": not noted, as by an earlier
            version.
    """

    digest: str
    format: str
    server: str = ""
    quantization: str = "none"
    rank: int = 0
    dtype: str = "float32"
    lossy: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)
    member: Mapping[str, float] = field(default_factory=dict)
    n_rows: int = 0
    file_bytes: int = 0
    weights: str = ""

    @property
    def form(self) -> str:
        """What it is, such as "merged, bnb-4bit"."""
        parts = [f"{self.format} for {self.server}" if self.server else self.format]
        parts += [self.quantization] if self.quantization != "none" else []
        parts += [f"rank {self.rank}"] if self.rank else []
        return ", ".join([*parts, self.dtype])

    def value(self, quality: Objective) -> float:
        """Return its test quality; NaN if it was not a number."""
        return self.metrics.get(quality.name, math.nan)

    def line(self, quality: Objective) -> str:
        """Return its test quality beside the member's, in one line."""
        own, member = self.value(quality), self.member.get(quality.name)
        beside = "" if member is None else f"; the member itself {member:.4f}"
        mark = "lossy" if self.lossy else "exact up to rounding"
        return f"{quality.name} {own:.4f} on {self.n_rows} test rows{beside} ({self.form}; {mark})"

    @property
    def outdated(self) -> str:
        """Why its quality is not shown where the weights saved now are not those scored."""
        which = "other weights than those saved now" if self.weights else "weights not noted then"
        return f"{self.form}: scored with {which}; autopeft export --score scores it again"


def weights_of(folder: Path) -> str:
    """Return a digest of the weights of a saved adapter."""
    return files_digest(sorted(folder.rglob("*.safetensors")))


def read_converted(folder: Path) -> tuple[Converted, ...]:
    """Return what was scored of a run; () where nothing was.

    Raises:
        StorageError: if the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return ()
    rows = read_json(path, list[dict[str, Any]], remedy=_REMEDY)
    return tuple(
        from_plain(
            Converted, row, error=StorageError, remedy=_REMEDY, allow_unknown=True, null_is_nan=True
        )
        for row in rows
    )


def add_converted(folder: Path, new: Converted) -> None:
    """Add one to a run's file, in place of an earlier one of the same form."""
    kept = [c for c in read_converted(folder) if (c.digest, c.form) != (new.digest, new.form)]
    write_text(contained(folder, FILE), strict_json(finite(to_plain((*kept, new)))))
