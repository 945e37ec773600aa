"""The Python API: settings in, a result out.

Each call imports what it needs, so a mistake in the settings is reported at once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopeft.costs.constraints import parse_bytes
from autopeft.costs.objectives import COSTS, Cost, find_beside, with_costs
from autopeft.costs.price import PricedRow, PriceList
from autopeft.engine.backend import BACKENDS, check_backend
from autopeft.engine.budget import Budget
from autopeft.engine.callback import as_callbacks
from autopeft.errors import SearchInterrupted, SettingsError, StorageError
from autopeft.integrations.trackers.registry import TRACKERS
from autopeft.saved_inputs import saved_inputs
from autopeft.searcher.pruners.registry import PRUNERS
from autopeft.searcher.samplers.registry import SAMPLERS
from autopeft.serving.servers import chosen_format
from autopeft.settings import RESUMABLE, SearchSettings
from autopeft.tasks.registry import TASKS, check_task
from autopeft.utils.arguments import (
    checked_count,
    checked_folder,
    checked_path,
    checked_target,
    checked_text,
)
from autopeft.utils.files import write_text
from autopeft.utils.folder_lock import FolderLock
from autopeft.utils.gc import frozen_gc, paused_gc
from autopeft.utils.registry import Registry
from autopeft.utils.serialize import read_json
from autopeft.utils.signals import terminable
from autopeft.workspace import SETTINGS, Workspace, read_settings

if TYPE_CHECKING:
    from autopeft.advice.advise import Advice
    from autopeft.comparing.compare import AdapterComparison
    from autopeft.comparing.recorded import TableJudgement
    from autopeft.models.export import Exported
    from autopeft.reporting.converted import Converted
    from autopeft.result import SearchResult
    from autopeft.tasks.preview import Preview


EXPERIMENT = "hf-comparison"
"""The format of `export` that is an experiment of peft's `method_comparison`."""

_LAST_PORT = 65535

_PICK = "use best, knee, baseline, a digest or a limit"

_SEARCHERS: Mapping[str, Registry[Any]] = {"pruner": PRUNERS, "sampler": SAMPLERS}
"""Setting that may be an object of the driver alone -> its registry."""


def search(
    settings: SearchSettings | str | Path | Mapping[str, Any] | None = None,
    *,
    callbacks: Any = (),
    progress: bool = True,
    **overrides: Any,
) -> SearchResult:
    """Search for the adapters that are worth their cost.

    Args:
        settings: Settings, a settings file, or a mapping; None: only `overrides`.
        callbacks: One, or several; they hear of trials and progress; see `Callback`.
        progress: Whether the state is shown: live in a notebook or on a terminal, else as lines
            on standard error.
        **overrides: Any field of `SearchSettings`; they win over `settings`. data, validation and
            test may also be a `datasets.Dataset`, a `DatasetDict`, a pandas DataFrame or a list of
            dicts, and model a model of transformers, with its tokenizer or processor as
            `tokenizer`; they are saved in the output folder. task, metric, costs, evaluate, pruner,
            sampler and backend may be objects too.

    Returns:
        The result; the output folder holds it too, with the adapters.

    Raises:
        UserError: for a mistake in the settings, before any training, with nothing written.
        KeyboardInterrupt: after Ctrl-C; everything is saved and `resume` continues.

    Example:
        >>> result = autopeft.search(
        ...     model="~/.cache/autopeft/all-MiniLM-L6-v2",
        ...     data="~/.cache/autopeft/movie_snippets.csv",
        ...     budget="10m",
        ...     output="runs/first",
        ... )
        >>> result.verdict.text
        '...'
    """
    given = _given(settings, overrides)
    output = given.get("output")
    if not output:
        raise SettingsError("output", "", "is missing", "give --output FOLDER")
    workspace = Workspace(checked_folder("output", output))
    given = {**given, "output": str(workspace.given)}
    with _interruptible(workspace), workspace.held(is_new=True) as lock:
        with saved_inputs(given, workspace.given) as plain:
            asked = workspace.as_begun(merge_settings(plain, {}))
            asked.check_sources()  # Before the imports below, which take seconds.
            return _search(workspace, asked, callbacks, lock=lock, is_shown=progress)


def resume(
    folder: str | Path, *, callbacks: Any = (), progress: bool = True, **overrides: Any
) -> SearchResult:
    """Continue an interrupted search, or give an ended one a larger budget.

    Args:
        folder: The search's output folder.
        callbacks: One, or several; they hear of trials and progress; see `Callback`.
        progress: Whether the state is shown: live in a notebook or on a terminal, else as lines
            on standard error.
        **overrides: budget, confirm_share, confirm_seeds, max_finalists, workers,
            gpus_per_worker, backend, trials_per_worker, ray_address, report_to or pick; what was
            searched cannot change. Also `evaluate`, `pruner` and `sampler`, the same objects again,
            if no module holds them.

    Raises:
        UserError: if the folder holds no search, or a setting may not change, here or in its
            settings file.

    Example:
        >>> result = autopeft.resume("runs/first", budget="20m")
        >>> len(result.front) > 0
        True
    """
    workspace = Workspace(checked_folder("folder", folder))
    with _interruptible(workspace), workspace.held(is_new=False) as lock:
        workspace.check_unedited()
        asked = workspace.as_begun(_resumed(workspace.settings(), overrides))
        return _search(workspace, asked, callbacks, lock=lock, is_resumed=True, is_shown=progress)


def _resumed(settings: SearchSettings, overrides: Mapping[str, Any]) -> SearchSettings:
    """Return a search's settings with those that may change on resume."""
    for key, value in overrides.items():
        # An object of a notebook or script must be given again.
        if key == "evaluate" and settings.evaluate is not None:
            continue
        if key in _SEARCHERS and _SEARCHERS[key].text(key, value) == getattr(settings, key):
            continue
        if key not in RESUMABLE:
            problem = "cannot change on resume: it defines the search"
            remedy = f"change only {', '.join(sorted(RESUMABLE))}, or start a new search"
            raise SettingsError(key, value, problem, remedy)
    for key, parts in _SEARCHERS.items():
        parts.check_known(key, getattr(settings, key))
    return merge_settings(settings.to_mapping(), overrides)


@contextmanager
def _interruptible(workspace: Workspace) -> Iterator[None]:
    """Say what is saved when a search is interrupted."""
    try:
        with terminable():
            yield
    except KeyboardInterrupt:
        if (workspace.folder / SETTINGS).exists():
            text = f"everything is saved: `autopeft resume {workspace.shown}` continues"
        else:
            text = f"no trial was begun, and nothing is left in {workspace.shown}"
        raise SearchInterrupted(text) from None


def _search(
    workspace: Workspace,
    settings: SearchSettings,
    callbacks: Any,
    *,
    lock: FolderLock,
    is_resumed: bool = False,
    is_shown: bool,
) -> SearchResult:
    began = time.monotonic()
    given = as_callbacks(callbacks)
    with ExitStack() as stack:
        if is_shown:
            from autopeft.callbacks import shown_progress

            given = (stack.enter_context(shown_progress(sys.stderr)), *given)
        with paused_gc():
            from autopeft.session import Session
        session = Session(workspace, given, lock=lock, began=began, is_resumed=is_resumed)
        with frozen_gc():
            return session.run(settings)


def merge_settings(
    settings: SearchSettings | str | Path | Mapping[str, Any] | None, overrides: Mapping[str, Any]
) -> SearchSettings:
    """Return settings from any source, with `overrides` on top."""
    merged = SearchSettings.from_mapping(_as_text(_given(settings, overrides)))
    Budget.parse(merged.budget)
    check_task(merged.task)
    check_backend(merged.backend)
    for cost in merged.objectives:
        find_beside(cost)
    for name, parts in _SEARCHERS.items():
        parts.check(name, getattr(merged, name))
    for tracker in merged.report_to:
        TRACKERS.resolve("report_to", tracker)
    return merged


def _given(
    settings: SearchSettings | str | Path | Mapping[str, Any] | None, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what was given; data and model may be objects."""
    if isinstance(settings, str | os.PathLike):
        settings = read_settings(checked_path("settings", settings, error=SettingsError))
    elif isinstance(settings, SearchSettings):
        settings = {each.name: getattr(settings, each.name) for each in fields(settings)}
    elif not isinstance(settings, Mapping | None):
        problem = "must be settings, a file of them, or a mapping"
        shown = type(settings).__name__
        raise SettingsError("settings", shown, problem, "use e.g. a file of `autopeft init`")
    given = {key: value for key, value in overrides.items() if value is not None}
    merged = {**(settings or {}), **given}
    return {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in merged.items()}


def _as_text(given: dict[str, Any]) -> dict[str, Any]:
    """Replace parts that are given as objects, such as tasks, by the text that names them."""
    if not isinstance(given.get("task"), str | None):
        given["task"] = TASKS.text("task", given["task"])
    if not isinstance(given.get("metric"), str | None):
        from autopeft.tasks.metrics import METRICS

        given["metric"] = METRICS.text("metric", given["metric"])
    if not isinstance(given.get("evaluate"), str | None):
        from autopeft.engine.evaluate import EVALUATORS

        given["evaluate"] = EVALUATORS.text("evaluate", given["evaluate"])
    if not isinstance(given.get("backend"), str | None):
        given["backend"] = BACKENDS.text("backend", given["backend"])
    for name, parts in _SEARCHERS.items():
        if name in given:
            given[name] = parts.text(name, given[name])
    if trackers := given.get("report_to"):
        listed = trackers if isinstance(trackers, list | tuple) else [trackers]
        given["report_to"] = [TRACKERS.text("report_to", each) for each in listed]
    if isinstance(costs := given.get("objectives"), list | tuple):
        is_part = [callable(cost) or isinstance(cost, Cost) for cost in costs]
        pairs = zip(costs, is_part, strict=True)
        given["objectives"] = [COSTS.text("objectives", c) if is_ else c for c, is_ in pairs]
    return given


def price(
    settings: SearchSettings | str | Path | Mapping[str, Any] | None = None,
    *,
    fits: str | None = None,
    **overrides: Any,
) -> PriceList:
    """Show what a space holds and what its candidates cost, without training.

    Args:
        settings: As for `search`; no output folder is needed.
        fits: A device's memory, such as "24GB": show instead the largest rank, batch and length of
            a LoRA at every linear module that fit there. Then the model's configuration is enough,
            and without data rows have `max_length` tokens.
        **overrides: As for `search`.

    Raises:
        UserError: for a mistake in the settings.

    Example:
        >>> prices = autopeft.price(
        ...     model="~/.cache/autopeft/all-MiniLM-L6-v2",
        ...     data="~/.cache/autopeft/movie_snippets.csv",
        ... )
        >>> [row.kind for row in prices.rows][0]
        'no adapter'
    """
    if fits is not None:
        parse_bytes("fits", checked_text("fits", fits, 'use e.g. "24GB"'))
    with saved_inputs(_given(settings, overrides), None) as plain:
        asked = merge_settings(plain, {})
        return _price(asked) if fits is None else _fits(asked, fits)


def _fits(asked: SearchSettings, text: str) -> PriceList:
    memory = parse_bytes("fits", text)
    with paused_gc():
        from autopeft.fitting import fitting
    lines: list[str] = []
    found = fitting(asked, note=lines.append)
    return PriceList(tuple(lines), fits=found.fits(memory))


def _price(asked: SearchSettings) -> PriceList:
    with paused_gc():
        import numpy as np

        from autopeft.preparing.prepare import prepare
    lines: list[str] = []
    # Nothing is trained, so the machine is not measured.
    ready = prepare(replace(asked, workers=asked.workers or 1), note=lines.append, must_fit=False)
    names = [cost.name for cost in ready.objectives[1:]]
    prices = with_costs(ready.prices, [*names, *(limit.name for limit in ready.constraints)])
    rng = np.random.default_rng(ready.settings.seed)
    named = [("no adapter", ready.space.reference())]
    named += [("baseline", candidate) for candidate in ready.space.baselines()]
    named += [("draw", ready.space.sample(rng)) for _ in range(12)]
    rows = {}
    for kind, candidate in named:
        cost = prices.price(candidate)
        is_allowed = all(limit.allows(cost) for limit in ready.constraints)
        key = (candidate.plan.digest, kind)
        rows[key] = PricedRow(kind if is_allowed else f"{kind}, excluded", candidate, cost)
    ordered = sorted(rows.values(), key=lambda row: row.price.trainable_params)
    return PriceList(tuple(lines), tuple(ordered))


def advise(model: Any, data: Any, *, rows: int = 64, **overrides: Any) -> Advice:
    """Tell where adapters may pay, without training: score every site on a few training rows.

    Each score comes with its rank correlation with gains that were measured elsewhere.

    Args:
        model: Folder or hub id of the model, or a model object.
        data: The data, as for `search`.
        rows: Training rows to read.
        **overrides: Settings of model, data, task and space, as for `search`.

    Returns:
        The ranked sites, a plan to start with, its price, and the command that searches there.

    Raises:
        UserError: for a mistake in the settings or the data, or if no site can be judged.

    Example:
        >>> advice = autopeft.advise(
        ...     "~/.cache/autopeft/all-MiniLM-L6-v2", "~/.cache/autopeft/movie_snippets.csv"
        ... )
        >>> advice.sites[0].role
        '...'
    """
    given = _given({"model": model, "data": data}, overrides)
    with saved_inputs(given, None) as plain:
        asked = merge_settings(plain, {})
        with paused_gc():
            from autopeft.advice.advise import advise as advice_on
        # What was saved in a temporary folder has no name that lasts.
        return advice_on(asked, n_rows=rows, has_command=plain == given)


def compare(
    adapters: Sequence[str | Path] | str | Path,
    *,
    model: Any,
    data: Any,
    pick: str = "best",
    held_out: bool = False,
    any_base: bool = False,
    output: str | Path | None = None,
    **overrides: Any,
) -> AdapterComparison:
    """Score adapters that were trained elsewhere on the same rows, and judge which differ.

    Args:
        adapters: Folders: peft adapters, models such as merged ones, or runs of autopeft.
        model: Folder or hub id of their base model, or a model object; it is scored too.
        data: The data, as for `search`; the test split is scored.
        pick: Member of a run: as `SearchResult.pick` takes it, or "all".
        held_out: No adapter has seen any row of the data: score all of them.
        any_base: Score an adapter that names another base model too.
        output: Folder to write `compare.json` and `compare.png` to; None: nothing is written.
        **overrides: Settings of model, data and task, as for `search`; with `retain` and `also`,
            further qualities are scored too.

    Returns:
        Scores, costs, and which of the differences are shown.

    Raises:
        UserError: for a mistake in the settings or the data, or if a folder holds no adapter, a
            damaged one, or one of another base model.

    Example:
        >>> found = autopeft.compare(
        ...     "runs/first",
        ...     model="~/.cache/autopeft/all-MiniLM-L6-v2",
        ...     data="~/.cache/autopeft/movie_snippets.csv",
        ...     pick="all",
        ... )
        >>> found.judgement.headline
        '...'
    """
    if isinstance(adapters, str | os.PathLike):
        adapters = [adapters]
    elif not isinstance(adapters, Iterable):
        problem = "must be a folder or a list of them"
        raise SettingsError("adapters", type(adapters).__name__, problem, "give paths of folders")
    paths = [checked_path("adapters", each, error=SettingsError) for each in adapters]
    checked_text("pick", pick, _PICK)
    # Whoever waits for scores must not lose them to a folder that cannot be written.
    target = None if output is None else checked_target("output", output)
    given = _given(None, {"model": model, "data": data, **overrides})
    with saved_inputs(given, None) as plain:
        asked = merge_settings(plain, {})
        with paused_gc():
            from autopeft.comparing.compare import compare_adapters
            from autopeft.comparing.show import write_comparison
        found = compare_adapters(
            paths, asked, pick=pick, is_held_out=held_out, takes_any_base=any_base
        )
    if target is not None:
        write_comparison(found, target)
    return found


def compare_table(
    table: Any,
    *,
    rows: int | None = None,
    seed_sd: float | None = None,
    columns: Mapping[str, str] | None = None,
    output: str | Path | None = None,
) -> TableJudgement:
    """Tell which differences a recorded table of scores shows.

    The error of a score is the binomial one of its test rows, and that of its seeds: as given, or
    as the lines of one name tell it. Where neither does, no difference is shown.

    Args:
        table: A file, or rows as `search` takes them, with the columns name and score, and perhaps
            rows and seeds. Lines of one name are trainings that differ in their seed.
        rows: Test rows of the lines that do not tell.
        seed_sd: Standard deviation between trainings that differ in their seed alone.
        columns: Column by role (name, score, rows, seeds), where they have other names.
        output: Folder to write `compare.json` to; None: nothing is written.

    Raises:
        UserError: if the table cannot be read, or does not tell its test rows.

    Example:
        >>> table = [{"name": "lora", "score": 0.699}, {"name": "dora", "score": 0.740}]
        >>> print(autopeft.compare_table(table, rows=1319).judgement.headline)
        Too close to call: dora has the best score, but lora may be as good.
    """
    from autopeft.comparing.recorded import judge_table
    from autopeft.comparing.show import write_table
    from autopeft.comparing.table_file import is_number, read_lines

    if seed_sd is not None and not (is_number(seed_sd) and 0 <= seed_sd < 1):
        problem = "a number with `0 <= seed_sd < 1` is needed"
        raise SettingsError("seed_sd", seed_sd, problem, "use e.g. 0.006")
    found = judge_table(read_lines(table, rows=rows, columns=columns), seed_sd=seed_sd)
    if output is not None:
        write_table(found, Path(output).expanduser())
    return found


def init(model: Any, data: Any, *, to: str | Path = "search.yaml", **overrides: Any) -> Path:
    """Look at a model and data, and write a commented settings file for a search.

    Args:
        model: Folder or hub id of the model, or a model object.
        data: The data, as for `search`. Objects are saved beside the file.
        to: File to write; must not exist.
        **overrides: As for `search`.

    Returns:
        The file.

    Raises:
        UserError: for a mistake in the settings or the data, or if the file exists.

    Example:
        >>> written = autopeft.init(
        ...     "~/.cache/autopeft/all-MiniLM-L6-v2", "~/.cache/autopeft/movie_snippets.csv"
        ... )
        >>> "text-classification" in written.read_text()
        True
    """
    target = checked_target("to", to)
    if target.exists():
        raise StorageError("to", str(to), "exists", "name another file with --to")
    given = _given({"model": model, "data": data}, overrides)
    with saved_inputs(given, target.with_name(f"{target.stem}_inputs")) as plain:
        asked = merge_settings(plain, {})
        with paused_gc():
            from autopeft.preparing.paths import expand
            from autopeft.preparing.task_data import load_task
            from autopeft.settings_file import settings_text
        encoded, task = load_task(expand(asked))
        write_text(target, settings_text(asked, task, encoded))
    return target


def preview(
    settings: SearchSettings | str | Path | Mapping[str, Any] | None = None,
    *,
    n_rows: int = 3,
    **overrides: Any,
) -> Preview:
    """Show training rows as the model sees them, and what is dropped and cut.

    Args:
        settings: As for `search`; no output folder is needed.
        n_rows: Rows to show.
        **overrides: As for `search`.

    Raises:
        UserError: for a mistake in the settings or the data.

    Example:
        >>> seen = autopeft.preview(
        ...     model="~/.cache/autopeft/all-MiniLM-L6-v2",
        ...     data="~/.cache/autopeft/movie_snippets.csv",
        ... )
        >>> len(seen.rows)
        3
    """
    n_rows = checked_count("n_rows", n_rows, least=0, remedy="use e.g. 3")
    with saved_inputs(_given(settings, overrides), None) as plain:
        asked = merge_settings(plain, {})
        with paused_gc():
            from autopeft.preparing.paths import expand
            from autopeft.preparing.task_data import load_task
            from autopeft.tasks.preview import preview_of
        data, task = load_task(expand(asked))
    return preview_of(data, task, n_rows)


def report(folder: str | Path) -> SearchResult:
    """Write a search's report again from its output folder.

    Raises:
        UserError: if the folder holds no search, or no result yet.

    Example:
        >>> autopeft.report("runs/first").folder / "report.html"
        PosixPath('.../report.html')
    """
    from autopeft.reporting.trials_csv import read_trials
    from autopeft.reporting.write import write_pages
    from autopeft.result import SearchResult

    result = SearchResult.read(folder)
    write_pages(result.view, read_trials(result.folder / "trials.csv"), result.folder)
    return result


def export(
    folder: str | Path,
    *,
    pick: str = "best",
    format: str | None = None,
    server: str | None = None,
    to: str | Path,
    max_rank: int | None = None,
    allow_lossy: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    requantize: bool = False,
    score: bool = False,
    push_to: str | None = None,
) -> Exported:
    """Write one member as an adapter, as one LoRA or as a model, with tokenizer and model card.

    Args:
        folder: The search's output folder.
        pick: "best", "knee", "baseline", the start of a digest, or a limit on a cost.
        format: "peft", "lora", "merged" or "gguf"; None: the server's format, or "peft". Or
            "hf-comparison": an experiment of peft's method_comparison, without the weights.
        server: What will load it: "peft", "vllm", "sglang", "llamacpp", "ollama", "mlx" or
            "transformers"; `--for` on the command line. The result keeps the server's rules.
        to: Folder to write; it must be new or empty.
        max_rank: For "lora" and "gguf": the highest rank of a module; None: the highest that
            the server takes, or 128.
        allow_lossy: For "lora" and "gguf": take the nearest LoRA where no exact one exists.
        device: Where to compute, as torch names it; default: the CPU.
        dtype: Type of a merged model's weights; default: the base model's own.
        max_shard_size: For "merged": the largest file of weights, such as "5GB" or "5GiB", or
            bytes; None: "5GB".
        requantize: For "merged", where the search had a quantized base model: merge into its
            dequantized weights and quantize the result in the same way.
        score: Score what was written on the test split, beside the member itself; the search's
            report shows both from then on. Not for "peft", which is a copy, and not while another
            process uses the search's folder.
        push_to: Repository on the hub to push the folder to, such as "user/name".

    Returns:
        The folder, the command that serves it, and the largest logit difference from the adapter
        on validation rows.

    Raises:
        UserError: if there is no such member, the folder is taken, or the format or the server
            cannot hold the plan, or the hub refuses; the folder then stays.

    Example:
        >>> exported = autopeft.export("runs/first", pick="best", to="exported")
        >>> (exported.folder / "README.md").exists()
        True
    """
    from autopeft.result import SearchResult

    folder = checked_folder("folder", folder)
    checked_text("pick", pick, _PICK)
    target = checked_target("to", to)
    for argument, text in (("format", format), ("server", server), ("device", device)):
        if text is not None:
            checked_text(argument, text, "leave it out, or name one")
    if max_rank is not None:
        max_rank = checked_count("max_rank", max_rank, least=1, remedy="use e.g. 64")
    given = {"max_rank": max_rank, "allow_lossy": allow_lossy, "device": device, "dtype": dtype}
    given |= {"max_shard_size": max_shard_size, "score": score, "requantize": requantize}
    if format == EXPERIMENT and (server is not None or push_to is not None):
        problem = "holds no adapter that a server loads or the hub shows"
        raise SettingsError("format", format, problem, "leave --for and --push-to out")
    chosen = chosen_format(format, server, others=(EXPERIMENT,))
    is_copied, place = chosen == "peft", "cpu" if device is None else device
    for name, value in given.items():
        if format == EXPERIMENT and value is not None and value is not False:
            problem = f"format={format} holds the scores that the search measured, and no weights"
            raise SettingsError(name, value, problem, "leave it out")
    if push_to is not None:
        from autopeft.utils.hub import check_repo, push_folder

        check_repo(push_to)
    workspace = Workspace(folder)
    # Nothing else changes the run's files from before they are read until the score is in them.
    with workspace.changed() if score else nullcontext():
        result = SearchResult.read(folder)
        member = result.pick(pick)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise StorageError("to", str(to), "is taken", "name a folder that does not exist")
        if member.folder is None:
            raise SettingsError(
                "pick",
                pick,
                "was not confirmed, so no adapter was saved",
                "pick a member of the front",
            )
        with paused_gc():
            from autopeft.comparing.converted import ExportScorer
            from autopeft.comparing.experiment import export_experiment
            from autopeft.models.export import Exported, check_options, export_adapter
            from autopeft.preparing.task_data import validation_rows
            from autopeft.reporting.converted import read_converted
            from autopeft.reporting.model_card import model_card
        if format == EXPERIMENT:
            written = export_experiment(result, member, target)
            return Exported(written.folder, format=EXPERIMENT, missing=written.lines)
        # Before the data are read, which takes its time.
        check_options(
            chosen,
            max_rank=max_rank,
            allow_lossy=allow_lossy,
            device=place,
            dtype=dtype,
            max_shard_size=max_shard_size,
            requantize=requantize,
        )
        settings = workspace.settings()
        scorer = None
        if score:
            if is_copied:
                problem = "peft is a copy of the member, which was scored"
                raise SettingsError(
                    "score", True, problem, "leave it out, or convert: --format lora"
                )
            read_converted(result.folder)  # What is damaged ends the export before it is written.
            scorer = ExportScorer(settings, result.view.data.fingerprint, place)
        plan = read_json(member.folder / "plan.json", dict[str, Any], remedy="resume the search")

        def finish(draft: Path, written: Exported) -> Exported:
            """Add the card before the folder is at its place: a kill leaves none without."""
            shown = result
            if scorer is not None:
                converted = scorer.converted(member, replace(written, folder=draft))
                written = replace(written, converted=converted.line(result.view.quality))
                shown = _shown_with(result, converted)
            card = model_card(
                shown.view,
                member.digest,
                format=written.format,
                notes=written.notes(),
                plan=plan,
                serve=written.serve,
                head_file=written.head_file,
                servable=settings.servable or "",
            )
            write_text(draft / "README.md", card)
            return written

        exported = export_adapter(
            result.base_model,
            member.folder,
            target,
            format=format,
            server=server,
            rows=None if is_copied else validation_rows(settings),
            max_rank=max_rank,
            allow_lossy=allow_lossy,
            device=place,
            dtype=dtype,
            max_shard_size=max_shard_size,
            requantize=requantize,
            scorer=scorer,
            finish=finish,
        )
    if push_to is not None:
        return replace(exported, pushed_to=push_folder(target, push_to))
    return exported


def _shown_with(result: SearchResult, converted: Converted) -> SearchResult:
    """Add what an export scored to a search's folder, and write its report again."""
    from autopeft.reporting.converted import add_converted
    from autopeft.reporting.front_json import write_front
    from autopeft.reporting.trials_csv import read_trials
    from autopeft.reporting.write import with_converted, write_pages
    from autopeft.workspace import FRONT

    add_converted(result.folder, converted)
    shown = with_converted(result.view, result.folder)
    write_front(shown, result.folder / FRONT)
    write_pages(shown, read_trials(result.folder / "trials.csv"), result.folder)
    return replace(result, view=shown)


def dashboard(
    folder: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    on_ready: Callable[[str], object] = lambda address: None,
) -> None:
    """Serve optuna-dashboard for a search until interrupted; it shows, and changes nothing.

    Args:
        folder: The search's output folder.
        host: Address to listen on.
        port: Port to listen on.
        on_ready: Called with the address once the study is open.

    Raises:
        UserError: if the folder holds no search, or the port is taken.
    """
    from optuna_dashboard import run_server

    from autopeft.searcher.artifacts import StoredArtifacts
    from autopeft.searcher.storage import open_to_read
    from autopeft.utils.files import contained

    checked_text("host", host, "use e.g. 127.0.0.1")
    if checked_count("port", port, least=1, remedy="use e.g. 8080") > _LAST_PORT:
        raise SettingsError("port", port, f"`port <= {_LAST_PORT}` must hold", "use e.g. 8080")
    workspace = Workspace(checked_folder("folder", folder))
    storage = open_to_read(workspace.storage(workspace.settings()))
    artifacts = StoredArtifacts(contained(workspace.folder, workspace.artifacts.name))
    on_ready(f"http://{host}:{port}/")
    try:
        run_server(storage, host, port, artifacts)
    except OSError as error:
        raise SettingsError(
            "port", port, f"cannot listen ({error.strerror})", "use another --port"
        ) from None
