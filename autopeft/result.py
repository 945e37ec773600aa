"""The result of a search: members of the front, the pick, the verdict."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopeft.confirm.verdict import Verdict
from autopeft.errors import AdapterError, SettingsError
from autopeft.plan import Candidate
from autopeft.reporting.columns import badges, rows_of
from autopeft.reporting.converted import Converted
from autopeft.reporting.front_json import read_front
from autopeft.reporting.front_view import FrontEntry, FrontView
from autopeft.reporting.markup import front_html
from autopeft.utils.arguments import checked_folder, checked_text
from autopeft.utils.files import contained
from autopeft.utils.formatting import counted
from autopeft.workspace import FRONT, Workspace

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel


@dataclass(frozen=True, repr=False)
class Member:
    """One adapter of the front.

    Attributes:
        entry: Its numbers, as in `front.json`.
        folder: Folder of its adapter; None if none was saved.
        base_model: Folder or hub id of the base model.

    Example:
        >>> result = autopeft.SearchResult.read("runs/first")
        >>> member = result.front[0]
        >>> sorted(member.objectives)
        ['accuracy', 'trainable_params']
        >>> model = member.load()
    """

    entry: FrontEntry
    folder: Path | None
    base_model: str

    def __repr__(self) -> str:
        values = ", ".join(f"{name} {value:.6g}" for name, value in self.objectives.items())
        return f"<Member {self.digest[:8]}: {values}; {self.entry.summary}>"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self)[1:-1])}</p>"

    @property
    def digest(self) -> str:
        """The candidate's digest."""
        return self.entry.digest

    @property
    def candidate(self) -> Candidate:
        """Plan and train settings."""
        return self.entry.candidate

    @property
    def objectives(self) -> Mapping[str, float]:
        """Value by objective name; quality is on the test split if the member was confirmed."""
        return self.entry.objectives

    def load(self, *, device: str | None = None, dtype: str | None = None) -> PreTrainedModel:
        """Return the base model with this adapter attached.

        Args:
            device: Where to load it; default: the CPU.
            dtype: Type of all weights, e.g. "bfloat16"; default: "float32".

        Raises:
            AdapterError: if no adapter was saved.
        """
        from autopeft.models.saving import load_adapter

        if self.folder is None:
            raise AdapterError(
                "adapter", self.digest, "was not confirmed, so none was saved", "resume the search"
            )
        return load_adapter(self.base_model, self.folder, device=device, dtype=dtype)


@dataclass(frozen=True, repr=False)
class SearchResult:
    """The result of one search; the output folder holds all of it too.

    Attributes:
        folder: The output folder, or its copy on this machine, absolute.
        view: All numbers, as in `front.json`.
        base_model: Folder or hub id of the base model.
        url: Where the folder is copied to, if the search's output is a URL.
        given: The output folder as it was given.

    Example:
        >>> result = autopeft.SearchResult.read("runs/first")
        >>> result.pick("knee").digest in {member.digest for member in result.front}
        True
    """

    folder: Path
    view: FrontView
    base_model: str
    url: str | None = None
    given: str = ""

    @property
    def place(self) -> str:
        """The output as `resume`, `report` and `export` take it: the URL, or the folder.

        Example:
            >>> autopeft.SearchResult.read("runs/first").place
            'runs/first'
        """
        return self.url or self.given or str(self.folder)

    def __repr__(self) -> str:
        n_members = len(self.view.front)
        members = f"{counted(n_members, 'member')} on the front"
        return f"<SearchResult of {self.place}: {members}. {self.verdict.text}>"

    def _repr_html_(self) -> str:
        return front_html(self.view)

    def to_pandas(self) -> pandas.DataFrame:
        """Return the front with the tuned LoRA and the reference, cheapest first.

        Returns:
            One row for each candidate, with its digest as index: every objective, the ends of its
            95 % interval, the mean validation quality, the learning rate, methods, the plan in one
            line, and what it is ("the pick", "tuned LoRA").

        Example:
            >>> frame = autopeft.SearchResult.read("runs/first").to_pandas()
            >>> {"accuracy", "accuracy_low", "trainable_params"} <= set(frame.columns)
            True
        """
        import pandas

        rows = []
        for entry in rows_of(self.view):
            row: dict[str, Any] = {"digest": entry.digest}
            for objective in self.view.objectives:
                row[objective.name] = entry.objectives[objective.name]
                if not objective.is_known:
                    low, high = entry.objectives_ci.get(objective.name) or (None, None)
                    row |= {f"{objective.name}_low": low, f"{objective.name}_high": high}
            quality = self.view.quality.name
            row[f"validation_{quality}"] = entry.validation.get(quality)
            row["learning_rate"] = entry.candidate.train.learning_rate
            row["methods"] = "+".join(entry.candidate.plan.methods)
            row["adapter"] = entry.summary
            row["is_confirmed"] = entry.is_confirmed
            row["is"] = ", ".join(badges(self.view, entry))
            rows.append(row)
        return pandas.DataFrame(rows).set_index("digest")

    def plot(self, name: str = "front") -> Figure:
        """Return a plot of the report as a figure of matplotlib; a notebook shows it.

        Args:
            name: As the files in `plots/`: "front" over the first cost, "front_<cost>" over each
                other one, "curves" at the rungs, "where" the adapters are, or "budget".

        Raises:
            SettingsError: if there is no such plot.
            StorageError: if the search's study is gone.

        Example:
            >>> figure = autopeft.SearchResult.read("runs/first").plot("front")
            >>> figure.savefig("front.pdf")
        """
        from autopeft.reporting.plots import draw_figure
        from autopeft.searcher.study import read_study

        workspace = Workspace(self.folder)
        settings = workspace.settings()
        trials, _ = read_study(workspace.storage(settings), workspace.study_name(settings))
        ended = [trial for trial in trials if trial.state != "running"]
        return draw_figure(self.view, ended, name)

    @classmethod
    def read(cls, folder: str | Path) -> SearchResult:
        """Read the result of a finished or interrupted search.

        Raises:
            StorageError: if the folder holds no search.
            SettingsError: if the search has no result yet.
        """
        workspace = Workspace(checked_folder("folder", folder))
        settings = workspace.settings()
        path = workspace.folder / FRONT
        if not path.exists():
            raise SettingsError(
                "folder", str(folder), "the search has no result yet", f"autopeft resume {folder}"
            )
        given, model = str(workspace.given), settings.model
        if Path(model).is_dir():  # As after the search, so that it may be loaded from elsewhere.
            model = str(Path(model).absolute())
        return cls(workspace.folder, read_front(path), model, workspace.url, given)

    def _member(self, entry: FrontEntry) -> Member:
        folder = None if entry.adapter is None else contained(self.folder, entry.adapter)
        return Member(entry, folder, self.base_model)

    @property
    def front(self) -> tuple[Member, ...]:
        """The front, cheapest first."""
        return tuple(self._member(entry) for entry in self.view.front)

    @property
    def converted(self) -> tuple[Converted, ...]:
        """Members as `autopeft export --score` wrote them, with their own test quality.

        Without those whose weights have changed since, as when a search is resumed.
        """
        return self.view.converted

    @property
    def best(self) -> Member | None:
        """The pick; None if no finalist was confirmed or none keeps the rule."""
        entry = self.view.find(self.view.best) if self.view.best else None
        return self._member(entry) if entry else None

    @property
    def best_config(self) -> dict[str, Any] | None:
        """The pick's plan and train settings as plain data, ready for JSON."""
        best = self.best
        return {"digest": best.digest, **best.candidate.to_json()} if best else None

    @property
    def baseline(self) -> Member | None:
        """The tuned LoRA."""
        return self._member(self.view.baseline) if self.view.baseline else None

    @property
    def verdict(self) -> Verdict:
        """Whether the front beats the tuned LoRA."""
        return self.view.verdict

    def pick(self, which: str) -> Member:
        """Return one member.

        Args:
            which: "best", "knee", "baseline", the start of a digest, or a limit such as
                "trainable_params<=50k" or "serving_latency_ms<=50", which picks the member within
                it that is best on validation.

        Raises:
            SettingsError: if no member, or more than one, matches.
        """
        from autopeft.confirm.pick import check_pick
        from autopeft.costs.constraints import is_limit
        from autopeft.trial import oriented
        from autopeft.utils.pareto import knee

        checked_text("pick", which, "use best, knee, baseline, a digest or a limit")
        if is_limit(which) and (limit := check_pick(which)) is not None:
            quality = self.view.quality
            told = [(entry, {**entry.further, **entry.objectives}) for entry in self.view.front]
            if limit.is_measured and not any(limit.name in values for _, values in told):
                problem = f"this search did not measure {limit.name}"
                remedy = "name it in the objectives or constraints of a search"
                raise SettingsError("pick", which, problem, remedy)
            kept = [entry for entry, values in told if limit.is_kept(entry.price, values)]
            if not kept:
                raise SettingsError(
                    "pick", which, "no member of the front is within it", "give a wider limit"
                )
            top = max(kept, key=lambda e: quality.sign() * e.validation.get(quality.name, 0.0))
            return self._member(top)
        if which == "best" and self.best is not None:
            return self.best
        if which == "baseline" and self.baseline is not None:
            return self.baseline
        if which == "knee" and self.view.front:
            values = [entry.objectives for entry in self.view.front]
            return self.front[knee(oriented(values, self.view.objectives))]
        entries = self.view.entries()
        found = [e for e in entries if len(which) >= 3 and e.digest.startswith(which)]
        if len(found) != 1:
            problem = "names several members" if found else f"no such member in {self.folder}"
            there = ("best", self.best), ("knee", self.view.front), ("baseline", self.baseline)
            known = [name for name, member in there if member]
            known += [e.digest[:8] for e in entries]
            remedy = f"use a limit or one of {', '.join(known)}" if known else "resume the search"
            raise SettingsError("pick", which, problem, remedy)
        return self._member(found[0])
