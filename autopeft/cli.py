"""The command line: flags become settings, settings go to the API, results are printed."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NoReturn

import click

from autopeft import api
from autopeft.errors import AutoPeftError, SearchInterrupted, TrainingFailure, printable
from autopeft.serving.servers import FORMATS, SERVERS
from autopeft.settings import RESUMABLE, SearchSettings
from autopeft.tasks.registry import TASKS
from autopeft.utils.formatting import one_line, without_numbers
from autopeft.utils.signals import terminable
from autopeft.utils.terminal import console, echo, open_streams, written

if TYPE_CHECKING:
    from autopeft.result import SearchResult

DEBUG = "AUTOPEFT_DEBUG"
"""Environment variable; if it is set, errors show their traceback."""

_REPEATED = ("objectives", "constraints", "also")
_INIT = frozenset(
    "task columns task_options metric max_length on_long validation test data_name data_revision "
    "model_revision".split()
)
"""Settings that are flags of `autopeft init`."""
_ADVISE = _INIT - {"metric"} | frozenset(
    "text text_pair label prompt completion role_map space max_train_rows batch_size seed "
    "quantization gpus_per_worker".split()
)
"""Settings that are flags of `autopeft advise`."""
_COMPARE = _ADVISE - {"space"} | frozenset(
    "metric max_test_rows precision attn_implementation generation_rows retain retain_rows "
    "also".split()
)
"""Settings that are flags of `autopeft compare`."""
_TYPES: dict[str, Any] = {"int": int, "float": float}


def _settings_options(*, only: frozenset[str] | None = None) -> Callable[[Any], Any]:
    """Add an option for each field of SearchSettings, with the field's help text."""

    def decorate(command: Any) -> Any:
        for field in reversed(fields(SearchSettings)):
            if only is not None and field.name not in only:
                continue
            names = ["--" + field.name.replace("_", "-")]
            if field.type == "bool":
                names = [f"{names[0]}/--no-{names[0][2:]}"]
            if field.name in _REPEATED and field.name.endswith("s"):
                names.append(names[0].removesuffix("s"))
            kind = str(field.type).split("|")[0].strip()
            is_switch = kind == "bool" and field.type != "bool"
            # Without a value it is switched on.
            more: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if is_switch else {}
            help_text, default = field.metadata["help"], field.default
            if field.name == "task":
                help_text += f" One of {', '.join(TASKS.registered)}."
            shown = ", ".join(default) if isinstance(default, tuple) else default
            command = click.option(
                *names,
                field.name,
                type=None if field.type == "bool" else _TYPES.get(kind, str),
                multiple=field.name in _REPEATED,
                default=None,
                help=help_text + (f" [default: {shown}]" if shown else ""),
                **more,
            )(command)
        return command

    return decorate


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the flags that were given."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in flags.items()
        if value is not None and value != ()
    }


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="autopeft")
def app() -> None:
    """Automated adapter search: which adapter, where, at what rank and rate.

    An error is one line; with AUTOPEFT_DEBUG=1 in the environment it shows its traceback too.
    """


@app.command()
@click.argument("settings", required=False, type=click.Path())
@_settings_options()
def search(settings: str | None, **flags: Any) -> None:
    """Search for adapters worth their cost; flags override the YAML file SETTINGS."""
    with _progress() as progress:
        result = api.search(settings, callbacks=[progress], progress=False, **_given(flags))
    _conclude(result)
    _check_completed(result)


@app.command()
@click.argument("folder", type=click.Path())
@_settings_options(only=RESUMABLE)
def resume(folder: str, **flags: Any) -> None:
    """Continue the search in FOLDER: after an interruption, or with a larger --budget."""
    with _progress() as progress:
        result = api.resume(folder, callbacks=[progress], progress=False, **_given(flags))
    _conclude(result)
    _check_completed(result)


@app.command()
@click.argument("settings", required=False, type=click.Path())
@click.option(
    "--fits",
    metavar="MEMORY",
    help="A device's memory, such as 24GB: show the largest rank, batch and length that fit. "
    "SETTINGS may then be a model, of which config.json is enough.",
)
@_settings_options()
def price(settings: str | None, fits: str | None, **flags: Any) -> None:
    """Show what the space holds and what its candidates cost, with no training."""
    from autopeft.reporting.tables import fits_table, price_table

    if fits is not None and settings is not None and not settings.endswith((".yaml", ".yml")):
        flags, settings = {**flags, "model": settings}, None
    found = api.price(settings, fits=fits, **_given(flags))
    _print(price_table(found) if fits is None else fits_table(found))


@app.command()
@click.argument("model")
@click.argument("data")
@click.option("--rows", default=64, show_default=True, help="Training rows to read.")
@_settings_options(only=_ADVISE)
def advise(model: str, data: str, rows: int, **flags: Any) -> None:
    """Tell where adapters may pay for MODEL and DATA, in seconds and without training."""
    from autopeft.advice.show import advice_text

    advice = api.advise(model, data, rows=rows, **_given(flags))
    _print(advice_text(advice))
    echo(f"next: {advice.command}")


@app.command()
@click.argument("adapters", nargs=-1, type=click.Path())
@click.option("--model", help="Folder or hub id of their base model; it is scored too.")
@click.option("--data", help="The data, as for `search`; the test split is scored.")
@click.option(
    "--pick",
    default="best",
    show_default=True,
    help="Member of a run: best, knee, baseline, a digest, a limit, or all.",
)
@click.option("--held-out", is_flag=True, help="No adapter has seen the data: score all its rows.")
@click.option("--any-base", is_flag=True, help="Score adapters that name another base model too.")
@click.option("--output", type=click.Path(), help="Folder for compare.json and compare.png.")
@click.option(
    "--table",
    type=click.Path(),
    help="Judge a recorded table of scores instead: its columns are name, score, rows, seeds.",
)
@click.option("--rows", type=int, help="With --table: test rows, where it has no column rows.")
@click.option("--seed-sd", type=float, help="With --table: standard deviation between seeds.")
@_settings_options(only=_COMPARE)
def compare(
    adapters: tuple[str, ...],
    model: str | None,
    data: str | None,
    pick: str,
    held_out: bool,
    any_base: bool,
    output: str | None,
    table: str | None,
    rows: int | None,
    seed_sd: float | None,
    **flags: Any,
) -> None:
    """Score ADAPTERS on the same rows, and tell which of them differ.

    An adapter is a folder: of peft, of a whole model such as a merged one, or a run of autopeft.
    With --table, tell instead which differences a recorded table of scores shows.
    """
    from autopeft.comparing.show import comparison_text, table_text

    if table is not None:
        named = SearchSettings.from_mapping(_given(flags)).columns
        judged = api.compare_table(table, rows=rows, seed_sd=seed_sd, columns=named, output=output)
        _print(table_text(judged))
        return
    found = api.compare(
        adapters,
        model=model,
        data=data,
        pick=pick,
        held_out=held_out,
        any_base=any_base,
        output=output,
        **_given(flags),
    )
    _print(comparison_text(found))
    if output is not None:
        echo(f"written: {output}")


@app.command()
@click.argument("model")
@click.argument("data")
@click.option("--to", default="search.yaml", show_default=True, help="File to write.")
@_settings_options(only=_INIT)
def init(model: str, data: str, to: str, **flags: Any) -> None:
    """Look at MODEL and DATA and write a commented settings file."""
    written = api.init(model, data, to=to, **_given(flags))
    echo(f"written: {written}\nnext: autopeft preview {written}")


@app.command()
@click.argument("settings", required=False, type=click.Path())
@click.option("--rows", default=3, show_default=True, help="Training rows to show.")
@_settings_options()
def preview(settings: str | None, rows: int, **flags: Any) -> None:
    """Show training rows as the model sees them: what is learned, lengths, and what is cut."""
    from autopeft.reporting.data_tables import preview_text

    _print(preview_text(api.preview(settings, n_rows=rows, **_given(flags))))


@app.command()
@click.argument("folder", type=click.Path())
def report(folder: str) -> None:
    """Write the report of the search in FOLDER again and show its summary."""
    _conclude(api.report(folder))


@app.command()
@click.argument("folder", type=click.Path())
@click.option(
    "--pick",
    default="best",
    show_default=True,
    help="best, knee, baseline, a digest, or a limit: trainable_params<=50k.",
)
@click.option(
    "--format",
    "format_",
    type=click.Choice([*FORMATS, api.EXPERIMENT]),
    help="peft: the adapter alone; lora: a mixed plan as one LoRA; merged: a full model folder "
    "that transformers loads; gguf: one LoRA for llama.cpp and Ollama; hf-comparison: an "
    "experiment of peft's method_comparison. "
    "[default: that of --for, or peft]",
)
@click.option(
    "--for",
    "server",
    help=f"What will load it: {', '.join(SERVERS)}. It chooses the format and keeps the rules.",
)
@click.option("--to", required=True, type=click.Path(), help="Folder to write; must not exist.")
@click.option(
    "--max-rank",
    type=int,
    help="lora: the highest rank of a module [default: that of --for, or 128]",
)
@click.option(
    "--allow-lossy",
    is_flag=True,
    help="lora: take the nearest LoRA where a layer has no equal one.",
)
@click.option("--device", help="Where to compute, e.g. cuda. [default: cpu]")
@click.option(
    "--dtype", help="merged: type of the weights, e.g. bfloat16. [default: the base model's]"
)
@click.option(
    "--max-shard-size", help="merged: the largest file of weights, e.g. 500MiB. [default: 5GB]"
)
@click.option(
    "--requantize",
    is_flag=True,
    help="merged: store the weights as the search had them, e.g. in 4 bits.",
)
@click.option(
    "--score", is_flag=True, help="Score what was written on the test split, for the report too."
)
@click.option("--push-to", metavar="USER/NAME", help="Also push it to this repository of the hub.")
def export(folder: str, format_: str | None, **flags: Any) -> None:
    """Write one member of the front in FOLDER as an adapter, as one LoRA or as a merged model."""
    written = api.export(folder, format=format_, **flags)
    for line in written.notes():
        echo(line)
    if written.format not in ("peft", api.EXPERIMENT) and written.largest_difference is None:
        echo("logits not compared: the search's data can no longer be read")
    echo(f"written: {written.folder}")
    if written.serve:
        echo(f"serve: {written.serve}")
    if written.pushed_to:
        echo(f"pushed: {written.pushed_to}")


@app.command("check-export")
@click.argument("folder", type=click.Path())
@click.option("--for", "server", required=True, help=f"The server: {', '.join(SERVERS)}.")
def check_export(folder: str, server: str) -> int:
    """Check whether a server would load the adapter in FOLDER rightly; exit with 1 if not.

    Each broken rule is one line, with the file of the server's source that it was read in. Where
    the base model is on this machine, its modules are compared with the adapter's tensors.
    """
    from autopeft.models.check_export import examine

    found = examine(folder, server)
    for line in found.broken:
        echo(line)
    if not found.broken:
        n_rules = len(SERVERS[server].rules)
        echo(f"{folder} keeps the {n_rules} rules of {server}")
    for line in found.notes:
        echo(f"not checked: {line}")
    return 1 if found.broken else 0


@app.command()
@click.argument("folder", type=click.Path())
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8080, show_default=True, help="Port to listen on.")
def dashboard(folder: str, host: str, port: int) -> None:
    """Open optuna-dashboard on the search in FOLDER, running or ended."""

    def tell(address: str) -> None:
        echo(f"optuna-dashboard: {address}  (Ctrl-C ends it)")

    api.dashboard(folder, host=host, port=port, on_ready=tell)


@app.group()
def prior() -> None:
    """Make a file for the setting `prior` of a search."""


@prior.command()
@click.argument("results", nargs=-1, required=True, type=click.Path())
@click.option("--to", default="prior.json", show_default=True, help="File to add the rows to.")
def add(results: tuple[str, ...], to: str) -> None:
    """Add RESULTS, files of peft's method_comparison or folders of them, to a prior."""
    from autopeft.comparing.prior_file import add_to_prior

    for line in add_to_prior(results, to).lines():
        echo(line)


@app.command()
@click.option("--markdown", is_flag=True, help="Print Markdown.")
def methods(markdown: bool) -> None:
    """List the adapter methods."""
    if markdown:
        from autopeft.methods import table

        echo(table.markdown())
        return
    from autopeft.reporting.tables import methods_table

    _print(methods_table())


@app.command()
def tasks() -> None:
    """List the tasks: the columns they read, and the metrics they measure."""
    from autopeft.reporting.data_tables import tasks_table

    _print(tasks_table())


@app.command()
def spaces() -> None:
    """List the search spaces that come with autopeft."""
    from autopeft.reporting.tables import spaces_table

    _print(spaces_table())


@contextmanager
def _progress() -> Iterator[Any]:
    """Show the progress of a search; SIGTERM and SIGHUP end it in one line from here on."""
    with terminable():
        from autopeft.callbacks import shown_progress

        with shown_progress() as progress:
            yield progress


def _print(renderable: Any) -> None:
    with written():
        console().print(renderable)


def _conclude(result: SearchResult) -> None:
    """Print the result and what to do next."""
    from autopeft.reporting.tables import summary

    _print(summary(result.view))
    echo(f"report: {result.place}/report.html")
    if result.best is not None:
        folder = shlex.quote(result.place)
        echo(f"best adapter: autopeft export {folder} --pick best --format peft --to FOLDER")


def _commonest(reasons: Sequence[str]) -> str:
    kind, count = Counter(map(without_numbers, reasons)).most_common(1)[0]
    shown = next(reason for reason in reasons if without_numbers(reason) == kind)
    return f"{count} of {len(reasons)} failed with: {shown}"


def _check_completed(result: SearchResult) -> None:
    """Raise a TrainingFailure with the commonest reason if all trials or confirmations failed."""
    counts = result.view.trials
    # The empty plan is scored even where no adapter can be trained.
    if counts.get("complete", 0) > 1:
        if not result.view.is_complete and not result.view.is_confirmed:
            told = [line.partition(" failed: ") for line in result.view.warnings]
            reasons = [why for what, _, why in told if what.startswith("confirming ")]
            text = f"no finalist was confirmed; {_commonest(reasons)}"
            raise TrainingFailure(f"{text}; mend it, then `autopeft resume {result.place}`")
        return
    if not any(counts.values()):
        raise TrainingFailure(
            "no trial was completed: the budget ended before the first; "
            f"`autopeft resume {result.place} --budget` with a larger one continues"
        )
    from autopeft.reporting.trials_csv import read_trials

    trials = read_trials(result.folder / "trials.csv")
    if counts.get("complete"):
        others = [trial for trial in trials if trial.plan.specs]
        if not others or any(trial.state != "failed" for trial in others):
            return
    reasons = [trial.reason for trial in trials if trial.state == "failed" and trial.reason]
    ended = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
    what = "no trial of an adapter" if counts.get("complete") else "no trial"
    text = f"{what} was completed ({ended})"
    if reasons:
        text += f"; {_commonest(reasons)}"
    raise TrainingFailure(
        f"{text}; all is kept in {result.place}, where trials.csv has each reason"
    )


def main() -> None:
    """Run the command line; exit with 0, 1 (failure), 2 (user error) or 130 (interrupted)."""
    # A file and a line of code mean nothing to whoever types a command.
    warnings.formatwarning = lambda message, *_, **__: (
        f"autopeft: warning: {printable(' '.join(str(message).split()))}\n"
    )
    open_streams()
    try:
        status = app(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except AutoPeftError as error:
        _show_traceback()
        echo(f"autopeft: {error}", err=True)
        sys.exit(error.exit_status)
    except click.exceptions.NoArgsIsHelpError as error:
        echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        echo(f"autopeft: {error.format_message()}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort) as stopped:
        # Click puts its own in the place of the first.
        cause = stopped.__cause__ or stopped
        if isinstance(cause, EOFError):
            # click takes the end of a file, wherever it was read, for that of the input.
            _report_unexpected(cause)
        what = f"; {cause}" if isinstance(cause, SearchInterrupted) else ""
        echo(f"interrupted{what}", err=True)
        sys.exit(130)
    except SystemExit:
        raise
    except BaseException as error:  # Nobody foresaw it, so it is a mistake of autopeft.
        _report_unexpected(error)


def _report_unexpected(error: BaseException) -> NoReturn:
    """Print an error that nobody foresaw, and exit with 1."""
    _show_traceback()
    echo(
        f"autopeft: unexpected {one_line(error)[:400]}; this is a mistake of autopeft, "
        f"please report it with what {DEBUG}=1 shows",
        err=True,
    )
    sys.exit(1)


def _show_traceback() -> None:
    """Print the traceback of the present exception if the user has asked for it."""
    if os.environ.get(DEBUG):
        echo(traceback.format_exc(), err=True)
