"""Confirmations on disk."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autopeft.confirm.finalists import Compressed, Finalist, SeedScore
from autopeft.costs import Price
from autopeft.errors import StorageError
from autopeft.plan import Candidate
from autopeft.utils.files import replaced_folder, write_bytes, write_text
from autopeft.utils.serialize import read_json, to_plain

_ORIGIN = "compressed.json"
"""File beside the score of a compressed candidate: what it was cut from."""

_LOOKS = "looks.json"
"""What has been looked at in between, to decide what is trained next."""

_ROUND = "round.json"
"""What the last round of trainings is: how many seeds each candidate has after it."""

_NAME = re.compile(r"(.+)-seed([0-9]{1,18})")
"""Digest and seed, as a confirmation's folder is named."""

_REMEDY = "delete its folder; `autopeft resume` trains it again"


@dataclass(frozen=True)
class _Origin:
    """The content of `_ORIGIN`; `candidate` is as `Candidate.to_json` returns it."""

    candidate: Mapping[str, Any]
    price: Price
    compressed_from: str


class ConfirmationStore:
    """Keeps each confirmation in a folder of its own, so that an interrupted run loses none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "confirm"
        self._cuts = folder / "confirm" / "cut"
        self._adapters = folder / "adapters"

    def _place(self, digest: str, seed: int, *, is_cut: bool = False) -> Path:
        # A candidate may first be cut from another, and be trained itself in a later session.
        return (self._cuts if is_cut else self._folder) / f"{digest}-seed{seed}"

    def save(self, candidate: Candidate, score: SeedScore, files: Mapping[str, bytes]) -> None:
        """Write one confirmation atomically."""
        self._write(self._place(candidate.digest, score.seed), score, files)

    def save_compressed(self, made: Compressed, source: Candidate) -> None:
        """Write a candidate that was cut from a confirmation of `source`."""
        origin = _Origin(made.candidate.to_json(), made.costs, source.digest)
        place = self._place(made.candidate.digest, made.score.seed, is_cut=True)
        self._write(place, made.score, made.files, origin)

    @staticmethod
    def _write(
        place: Path, score: SeedScore, files: Mapping[str, bytes], origin: _Origin | None = None
    ) -> None:
        with replaced_folder(place) as draft:
            for name, content in files.items():
                write_bytes(draft / "adapter" / name, content)
            write_text(draft / "score.json", json.dumps(to_plain(score)))
            if origin is not None:
                write_text(draft / _ORIGIN, json.dumps(to_plain(origin)))

    def check(self, names: Sequence[str]) -> None:
        """Check that each confirmation has the objectives of the search.

        Raises:
            StorageError: if a file is damaged or lacks one; it names the file.
        """
        quality = names[0]
        for folder in (self._cuts, self._folder):
            for path in sorted(folder.glob("[!.]*-seed*/score.json")):
                score = read_json(path, SeedScore, remedy=_REMEDY)
                lacking = [name for name in names if name not in score.objectives]
                lacking += [
                    quality for split in (score.validation, score.test) if quality not in split
                ]
                if lacking:
                    problem = f"lacks the value of {lacking[0]!r}"
                    raise StorageError("score.json", str(path), problem, _REMEDY)

    def scores(self) -> dict[str, tuple[SeedScore, ...]]:
        """Return all confirmations by candidate digest, ordered by seed.

        Where a candidate was both cut from another and trained, the trainings count.
        """
        done, trained = self.done(), self._scores_in(self._folder)
        cut, known = self._scores_in(self._cuts), self.compressed()
        kept = {
            digest: tuple(each for each in cut[digest] if (source, each.seed) in done)
            for digest, (*_, source) in known.items()
        }
        return kept | trained

    @staticmethod
    def _scores_in(folder: Path) -> dict[str, tuple[SeedScore, ...]]:
        found: dict[str, list[SeedScore]] = {}
        for path in sorted(folder.glob("[!.]*-seed*/score.json")):
            digest = path.parent.name.rsplit("-seed", 1)[0]
            found.setdefault(digest, []).append(read_json(path, SeedScore, remedy=_REMEDY))
        return {digest: tuple(sorted(s, key=lambda s: s.seed)) for digest, s in found.items()}

    def compressed(self) -> dict[str, tuple[Candidate, Price, str]]:
        """Return the compressed candidates that were never trained themselves, by digest.

        Each with its costs and the digest of the candidate it was cut from. What was cut with a
        seed counts once that one is saved with it: a kill in between leaves a part of the cuts, and
        the seed is trained again.
        """
        done = self.done()
        trained = {digest for digest, _ in done}
        found = {}
        for path in sorted(self._cuts.glob(f"[!.]*-seed*/{_ORIGIN}")):
            origin = read_json(path, _Origin, remedy=_REMEDY)
            candidate = Candidate.from_json(origin.candidate)
            name = _NAME.fullmatch(path.parent.name)
            is_whole = name is not None and (origin.compressed_from, int(name[2])) in done
            if is_whole and candidate.digest not in trained:
                found[candidate.digest] = candidate, origin.price, origin.compressed_from
        return found

    def cuts(self) -> dict[str, list[Candidate]]:
        """Return what each candidate was cut to, by the digest of that candidate."""
        found: dict[str, list[Candidate]] = {}
        for candidate, _, source in self.compressed().values():
            found.setdefault(source, []).append(candidate)
        return found

    def done(self) -> frozenset[tuple[str, int]]:
        """Return (digest, seed) of every retraining."""
        names = (path.name for path in self._folder.glob("[!.]*-seed*"))
        # Another's folder may hold names that are none of ours.
        found = (_NAME.fullmatch(name) for name in names)
        return frozenset((match[1], int(match[2])) for match in found if match)

    def looks(self) -> tuple[dict[str, int], ...]:
        """Return the looks at the scores so far: seeds of each finalist, by digest."""
        path = self._folder / _LOOKS
        return (
            read_json(path, tuple[dict[str, int], ...], remedy="restore the file")
            if path.is_file()
            else ()
        )

    def note_look(self, look: Mapping[str, int]) -> None:
        """Add a look, unless it could tell nothing, or nothing has come since the last one."""
        known = self.looks()
        if max(look.values(), default=0) > 1 and dict(look) not in known[-1:]:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_text(self._folder / _LOOKS, json.dumps([*known, dict(look)]))

    def round(self) -> dict[str, int]:
        """Return how many seeds each candidate of the last round has after it, by digest."""
        path = self._folder / _ROUND
        return read_json(path, dict[str, int], remedy="delete it") if path.is_file() else {}

    def note_round(self, n_seeds: Mapping[str, int]) -> None:
        """Keep what a round trains: a search that is killed in it goes on as it was decided."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text(self._folder / _ROUND, json.dumps(dict(n_seeds)))

    def publish(self, finalist: Finalist, seed: int) -> Path | None:
        """Copy the adapter of one seed to `adapters/<digest>` and return that folder.

        None if there is none: a training function of the user's need not keep its adapters.
        """
        digest = finalist.candidate.digest
        target = self._adapters / digest
        place = self._place(digest, seed, is_cut=bool(finalist.compressed_from))
        if not (place / "adapter").is_dir():
            return None
        with replaced_folder(target) as draft:
            shutil.copytree(place / "adapter", draft, dirs_exist_ok=True)
        return target
