"""Metrics of predictions: built in, scikit-learn's by name, and a user's own functions."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal, TypeVar, get_args, overload

import numpy as np
from numpy.typing import NDArray

from autopeft.costs.objectives import PERPLEXITY, UNBOUNDED, Direction, Objective, default_direction
from autopeft.errors import SettingsError
from autopeft.tasks.tag_metrics import TAG_METRICS
from autopeft.tasks.text_metrics import ERROR_RATES, TEXT_METRICS, by_row, regex_match
from autopeft.utils.formatting import one_line
from autopeft.utils.registry import Registry, blamed
from autopeft.utils.serialize import nearest, to_float

F = TypeVar("F")
FloatArray = NDArray[np.float64]
Needs = Literal["", "loss", "labels", "scores", "values", "text", "tags"]

N_REDRAWS = 100
"""How often a resample is drawn again if the metric is undefined on it."""


@dataclass(frozen=True)
class Metric:
    """What a search may optimize: a number that says how good predictions are.

    Attributes:
        name: Its name in settings and results.
        direction: "maximize" or "minimize".
        function: Returns the metric of (targets, predictions), or an array of one value per row
            whose mean is the metric. For texts, it returns the value of one row's (prompt,
            reference, generated text) or (reference, generated text); with a true attribute
            `batched` it takes lists of all rows. None: the task computes it itself.
        needs: What the predictions are: "labels", class indices of shape (n_rows,), or
            (n_rows, n_labels) of 0 and 1 where a row has several; "scores", class probabilities of
            shape (n_rows, n_labels); "values", numbers of shape (n_rows,); "text", generated texts;
            "tags", a list of tag names per row; "loss", nothing: the task's loss; "": what the task
            usually predicts.
        takes_classes: Whether `function` takes the keyword `n_labels`.
        bounds: Its least and its largest possible value, which confidence intervals stay within.

    Example:
        >>> metric = autopeft.Metric("closeness", "maximize", lambda t, p: -abs(t - p).max())
        >>> metric.objective.direction
        'maximize'
    """

    name: str
    direction: Direction
    function: Callable[..., Any] | None = None
    needs: Needs = ""
    takes_classes: bool = False
    bounds: tuple[float, float] = UNBOUNDED

    @property
    def objective(self) -> Objective:
        """The metric as an objective of a search."""
        return Objective(self.name, self.direction, bounds=self.bounds)

    def for_classes(self, n_labels: int) -> Metric:
        """Return the metric over the classes 0 to n_labels - 1, of which rows may lack some."""
        if not self.takes_classes or self.function is None:
            return self
        return replace(self, function=partial(self.function, n_labels=n_labels))


# Built-in metrics


def _accuracy(targets: Any, predictions: Any) -> NDArray[Any]:
    right = np.equal(np.asarray(targets), np.asarray(predictions))
    rows: NDArray[np.bool_] = right.all(axis=1) if right.ndim == 2 else right
    return rows


def _f1(targets: Any, predictions: Any, n_labels: int | None = None) -> float:
    """Return the mean F1 of the classes, of those that occur if `n_labels` is not given."""
    right, wanted, found = _counts(np.asarray(targets), np.asarray(predictions), n_labels)
    total = wanted + found
    scores = np.where(total > 0, 2.0 * right / np.maximum(total, 1), 0.0)
    return float((scores if n_labels is not None else scores[total > 0]).mean())


def _f1_micro(targets: Any, predictions: Any, n_labels: int | None = None) -> float:
    """Return F1 over all pairs of row and label; 0 without any."""
    right, wanted, found = _counts(np.asarray(targets), np.asarray(predictions), n_labels)
    return float(2.0 * right.sum() / max(1, wanted.sum() + found.sum()))


def _counts(
    targets: NDArray[Any], predictions: NDArray[Any], n_labels: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the right, the wanted and the found rows of each class, each of shape (n_labels,)."""
    if targets.ndim == 2:
        both = (targets != 0) & (predictions != 0)
        return both.sum(axis=0), (targets != 0).sum(axis=0), (predictions != 0).sum(axis=0)
    size = n_labels or 1 + int(max(targets.max(), predictions.max()))
    right = np.bincount(targets[targets == predictions], minlength=size)
    return right, np.bincount(targets, minlength=size), np.bincount(predictions, minlength=size)


def _matthews(targets: Any, predictions: Any) -> float:
    """Return the correlation of Matthews; 0 if all targets or all predictions are of one class."""
    counts = _counts(np.asarray(targets), np.asarray(predictions))
    right, wanted, found = (each.astype(float) for each in counts)
    n = wanted.sum()
    spread = (n**2 - wanted @ wanted) * (n**2 - found @ found)
    return float((right.sum() * n - wanted @ found) / np.sqrt(spread)) if spread > 0 else 0.0


def _pearson(targets: Any, predictions: Any) -> float:
    x, y = np.asarray(targets, dtype=float), np.asarray(predictions, dtype=float)
    if np.ptp(x) == 0.0:
        return float("nan")
    # A constant prediction goes with nothing.
    return 0.0 if np.ptp(y) == 0.0 else float(np.corrcoef(x, y)[0, 1])


def _spearman(targets: Any, predictions: Any) -> float:
    return _pearson(_ranks(targets), _ranks(predictions))


def _ranks(values: Any) -> FloatArray:
    """Return ranks from 0; equal values share their mean rank."""
    _, group, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ranks: FloatArray = (np.cumsum(counts) - (counts + 1) / 2.0)[group]
    return ranks


def _squared_errors(targets: Any, predictions: Any) -> FloatArray:
    errors: FloatArray = (np.asarray(targets, dtype=float) - np.asarray(predictions)) ** 2
    return errors


def _absolute_errors(targets: Any, predictions: Any) -> FloatArray:
    errors: FloatArray = np.abs(np.asarray(targets, dtype=float) - np.asarray(predictions))
    return errors


def _rmse(targets: Any, predictions: Any) -> float:
    return float(np.sqrt(_squared_errors(targets, predictions).mean()))


def _r2(targets: Any, predictions: Any) -> float:
    spread = float(np.var(np.asarray(targets, dtype=float)))
    if spread == 0.0:
        return float("nan")
    return 1.0 - float(_squared_errors(targets, predictions).mean()) / spread


# The registry


def _as_metric(
    name: str, part: Any, direction: Direction | None = None, needs: Needs | None = None
) -> Metric:
    if isinstance(part, Metric):
        if name and part.name != name:
            raise TypeError(f"is the metric {part.name!r}")
        if part.function is None and part.needs != "loss":
            raise TypeError("lacks a function of (targets, predictions)")
        direction, needs = direction or part.direction, part.needs if needs is None else needs
        return _checked(replace(part, direction=direction, needs=needs))
    if not callable(part) or isinstance(part, type):
        raise TypeError("must be a function of (targets, predictions), or an autopeft.Metric")
    own = getattr(part, "__name__", "metric")
    name = name or ("metric" if own.startswith("<") else own)
    way: Any = direction or getattr(part, "direction", default_direction(name))
    kind: Any = getattr(part, "needs", "") if needs is None else needs
    return _checked(Metric(name, way, part, kind))


def _checked(metric: Metric) -> Metric:
    for field, known in (("direction", get_args(Direction)), ("needs", get_args(Needs))):
        value = getattr(metric, field)
        if value not in known:
            names = " or ".join(filter(None, known))
            raise TypeError(f"its {field} must be {names}, but is {value!r}")
    if metric.needs == "text" and metric.function is not None:
        return replace(metric, function=by_row(metric.name, metric.function))
    return metric


METRICS: Registry[Metric] = Registry("metric", "autopeft.metrics", __name__, _as_metric)
"""Every metric but scikit-learn's."""


@overload
def register_metric(
    name: str | None = None,
    function: None = None,
    *,
    direction: Direction | None = None,
    needs: Needs | None = None,
) -> Callable[[F], F]: ...
@overload
def register_metric(
    name: str, function: F, *, direction: Direction | None = None, needs: Needs | None = None
) -> F: ...
@overload
def register_metric(
    name: F, *, direction: Direction | None = None, needs: Needs | None = None
) -> F: ...
def register_metric(
    name: Any = None,
    function: Any = None,
    *,
    direction: Direction | None = None,
    needs: Needs | None = None,
) -> Any:
    """Register a metric, so that settings can name it.

    A call, or a decorator of a function. A package offers one with an entry point of the group
    `autopeft.metrics`.

    Args:
        name: Its name in settings; as a bare decorator, that of the function.
        function: Takes targets and predictions and returns a number, or one value per row whose
            mean is the metric; for generated texts, takes the prompt, the reference and the
            generated text of one row, see `Metric`. Or where it is found, as `module:function`.
        direction: "maximize" or "minimize"; by default the function's attribute `direction`, else
            "minimize" if a word of the name is loss, error or the like, else "maximize".
        needs: What the predictions are, see `Metric`; by default the function's attribute `needs`,
            else what the task usually predicts.

    Returns:
        The function, or a decorator.

    Raises:
        SettingsError: if the name stands for another metric.

    Example:
        >>> @autopeft.register_metric(needs="scores")
        ... def confidence(targets, predictions):
        ...     return predictions[range(len(targets)), targets]
        >>> settings = autopeft.SearchSettings(model="gpt2", data="a.csv", metric="confidence")
    """
    if isinstance(function, str) and (direction or needs):
        problem = "direction and needs go with the function, not with its path"
        raise SettingsError("metric", function, problem, "set them as attributes of the function")
    own = name if isinstance(name, str) else ""
    return METRICS.door(name, function, lambda part: _as_metric(own, part, direction, needs))


_SHARE, _CORRELATION, _ERROR = (0.0, 1.0), (-1.0, 1.0), (0.0, np.inf)

for _metric in (
    Metric("loss", "minimize", needs="loss"),
    Metric(PERPLEXITY, "minimize", needs="loss", bounds=(1.0, np.inf)),
    Metric("token_accuracy", "maximize", needs="loss", bounds=_SHARE),
    Metric("preference_accuracy", "maximize", needs="loss", bounds=_SHARE),
    Metric("margin", "maximize", needs="loss"),
    Metric("ndcg_at_10", "maximize", needs="loss", bounds=_SHARE),
    Metric("recall_at_1", "maximize", needs="loss", bounds=_SHARE),
    Metric("recall_at_10", "maximize", needs="loss", bounds=_SHARE),
    Metric("accuracy", "maximize", _accuracy, "labels", bounds=_SHARE),
    Metric("f1", "maximize", _f1, "labels", takes_classes=True, bounds=_SHARE),
    Metric("f1_macro", "maximize", _f1, "labels", takes_classes=True, bounds=_SHARE),
    Metric("f1_micro", "maximize", _f1_micro, "labels", takes_classes=True, bounds=_SHARE),
    Metric("matthews", "maximize", _matthews, "labels", bounds=_CORRELATION),
    Metric("pearson", "maximize", _pearson, "values", bounds=_CORRELATION),
    Metric("spearman", "maximize", _spearman, "values", bounds=_CORRELATION),
    Metric("mse", "minimize", _squared_errors, "values", bounds=_ERROR),
    Metric("mae", "minimize", _absolute_errors, "values", bounds=_ERROR),
    Metric("rmse", "minimize", _rmse, "values", bounds=_ERROR),
    Metric("r2", "maximize", _r2, "values", bounds=(-np.inf, 1.0)),
):
    register_metric(_metric)
for _name, _function in TEXT_METRICS.items():
    register_metric(Metric(_name, "maximize", _function, "text", bounds=_SHARE))
for _name, _rate in ERROR_RATES.items():
    register_metric(Metric(_name, "minimize", _rate, "text", bounds=_ERROR))
for _name, _tag_function in TAG_METRICS.items():
    register_metric(Metric(_name, "maximize", _tag_function, "tags", bounds=_SHARE))


def is_metric(value: str) -> bool:
    """Return whether a text names a metric: registered, scikit-learn's, a path or a pattern."""
    if value in METRICS or ":" in value or value.startswith("regex="):
        return True
    from sklearn.metrics import get_scorer_names

    return value in get_scorer_names()


def find_metric(value: Any, usual: Needs = "labels", *, field: str = "metric") -> Metric:
    """Return the metric that a setting's value stands for.

    Args:
        value: A registered name, the name of a scorer of scikit-learn, `package.module:name`, a
            `regex=PATTERN` that texts are compared by, a function or a Metric.
        usual: What the task usually predicts, for a function that does not say what it needs.
        field: The setting.

    Raises:
        SettingsError: if there is no such metric.
    """
    metric = _found(field, value)
    if metric.name in _COMPARED_AS_LOSS and (metric.needs or usual) != "loss":
        problem = "is the name of a metric that the loss tells, which is compared as one"
        raise SettingsError(field, metric.name, problem, "give yours another name")
    if metric.needs:
        return metric
    if usual == "text":
        assert metric.function is not None, "only the built-in metrics of the loss have none"
        return replace(metric, needs=usual, function=by_row(metric.name, metric.function))
    return replace(metric, needs=usual)


_COMPARED_AS_LOSS = frozenset({"loss", PERPLEXITY})
"""Metrics whose errors are taken from the losses of rows, or tokens, by their name."""


def _found(field: str, value: Any) -> Metric:
    if isinstance(value, str) and value.startswith("regex="):
        function = regex_match(value.removeprefix("regex="))
        return Metric("regex_match", "maximize", function, "text", bounds=_SHARE)
    if not isinstance(value, str) or ":" in value or value in METRICS:
        return METRICS.resolve(field, value)
    from sklearn.metrics import get_scorer_names

    names = get_scorer_names()
    if value in names:
        return Metric(
            value, "maximize", partial(_sklearn_score, value), _sklearn_needs(value), True
        )
    raise SettingsError(field, value, "no such metric", nearest(value, [*METRICS, *names]))


# scikit-learn's scorers, called as they are: with an estimator that knows its predictions


def _estimator(targets: Any, predictions: Any, n_labels: int | None = None) -> Any:
    """Return a fitted estimator of scikit-learn whose predictions are these."""
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin

    targets, predictions = np.asarray(targets), np.asarray(predictions)
    if np.issubdtype(targets.dtype, np.floating):

        class Regressor(RegressorMixin, BaseEstimator):  # type: ignore[misc]
            def predict(self, rows: Any) -> Any:
                return predictions

        return Regressor()
    is_multi_label = targets.ndim == 2
    has_scores = np.issubdtype(predictions.dtype, np.floating)

    class Labels(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
        def predict(self, rows: Any) -> Any:
            if not has_scores:
                return predictions
            return (predictions > 0.5).astype(int) if is_multi_label else predictions.argmax(axis=1)

    class Scores(Labels):
        def predict_proba(self, rows: Any) -> Any:
            return predictions

    made = Scores() if has_scores else Labels()
    if is_multi_label:
        made.classes_ = [np.arange(2)] * targets.shape[1]
    elif n_labels is not None or has_scores:
        made.classes_ = np.arange(n_labels or predictions.shape[1])
    else:
        made.classes_ = np.unique(np.concatenate([targets, predictions]))
    return made


def _sklearn_score(name: str, targets: Any, predictions: Any, n_labels: int | None = None) -> float:
    from sklearn.metrics import get_scorer

    rows = np.zeros((len(targets), 1))
    estimator = _estimator(targets, predictions, n_labels)
    return float(get_scorer(name)(estimator, rows, np.asarray(targets)))


@cache
def _sklearn_needs(name: str) -> Needs:
    """Return what a scorer needs, found by trying: its own attributes are private."""
    tries: tuple[tuple[Needs, list[float], Any], ...] = (
        ("values", [0.5, 1.5, 3.0], [0.6, 1.4, 2.5]),
        ("labels", [0, 1, 1], [0, 1, 0]),
    )
    for needs, targets, predictions in tries:
        try:
            with warnings.catch_warnings():
                # Of values where classes are meant, a scorer of clusters only warns.
                warnings.simplefilter("error" if needs == "values" else "ignore")
                _sklearn_score(name, targets, predictions)
        except Exception:
            continue
        return needs
    return "scores"


# Evaluation


def evaluate_metric(
    metric: Metric, targets: Any, predictions: Any, prompts: Sequence[str] | None = None
) -> tuple[float, FloatArray | None]:
    """Return a metric, and the rows' values if it is their mean.

    Args:
        metric: A metric with a function.
        targets: What is right, one item per row; for texts, the references.
        predictions: What `metric.needs` says, one item per row.
        prompts: The prompts, for a metric of texts.

    Returns:
        The metric; and shape (n_rows,), or None if it is no mean over rows.

    Raises:
        SettingsError: if the function fails, or returns neither a finite number nor one for each
            row.
    """
    n_rows = len(targets)
    assert len(predictions) == n_rows, "one prediction for each target"
    # A function may write into what it gets, and others get it too.
    targets, predictions, prompts = map(copy.deepcopy, (targets, predictions, prompts))
    with blamed("metric", metric.name, f"fails on {n_rows} rows", _remedy(metric)):
        returned = _called(metric, targets, predictions, prompts)
    values = _numbers(returned)
    if values is None:
        raise _wrong(metric, f"returns a {type(returned).__name__}", n_rows)
    if isinstance(values, str):
        raise _wrong(metric, f"returns a {type(returned).__name__} of {values}", n_rows)
    if values.shape not in ((), (n_rows,)):
        raise _wrong(metric, f"returns an array of shape {values.shape}", n_rows)
    if not np.isfinite(values).all():
        where = "" if values.ndim == 0 else f" for row {int(np.argmin(np.isfinite(values))) + 1}"
        raise _wrong(metric, f"is {values[~np.isfinite(values)][0]}{where}", n_rows)
    if values.shape == (n_rows,):
        return float(values.mean()), values
    return float(values), None


def _numbers(returned: Any) -> FloatArray | str | None:
    """Return a number, or numbers and truth values of rows, as an array of any shape.

    Returns:
        None for what holds no numbers; the type of the first item that is none.
    """
    try:
        if np.ndim(returned) == 0:
            number = to_float(returned)
            return None if number is None else np.array(number)
        if np.ma.is_masked(returned):
            return "masked"  # An array tells what lies below the mask.
        items = np.asarray(returned)
    except (TypeError, ValueError, RuntimeError):
        return None
    if items.dtype.kind in "biuf":
        return items.astype(float)
    numbers = [to_float(item, truth=True) for item in items.flat]
    if None in numbers:
        return type(items.flat[numbers.index(None)]).__name__.rstrip("_")
    return np.array(numbers, dtype=float).reshape(items.shape)


def _called(metric: Metric, targets: Any, predictions: Any, prompts: Any) -> Any:
    assert metric.function is not None, "the task computes it"
    with warnings.catch_warnings():
        # What is undefined is NaN, which is checked.
        warnings.simplefilter("ignore")
        if metric.needs == "text":
            return metric.function(prompts, targets, predictions)
        return metric.function(targets, predictions)


def _wrong(metric: Metric, what: str, n_rows: int) -> SettingsError:
    return SettingsError(
        "metric",
        metric.name,
        f"{what}, but must be a finite number or an array of {n_rows} of them, one per row",
        _remedy(metric),
    )


def _remedy(metric: Metric) -> str:
    function = metric.function.func if isinstance(metric.function, partial) else metric.function
    if function is not _sklearn_score:
        return "correct the function, or use another metric"
    from sklearn.metrics import get_scorer_names

    variants = [name for name in get_scorer_names() if name.startswith(f"{metric.name}_")]
    return f"use {' or '.join(variants)}" if variants else "use another metric"


def resample(n_rows: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return the rows of one resample, shape (n_rows,)."""
    return generator.integers(n_rows, size=n_rows)


def bootstrap_draws(
    metric: Metric,
    targets: Any,
    predictions: Any,
    n: int,
    seed: int,
    prompts: Sequence[str] | None = None,
) -> FloatArray:
    """Return the metric on resamples of the rows.

    The i-th resample depends on the number of rows, the seed and i alone, so that the draws of two
    models on the same rows are paired. Where the metric is undefined on a resample (NaN, infinite
    or an error, as the ROC AUC of one class), the next resample of the same random stream replaces
    it, at most `N_REDRAWS` times. What is undefined because of the targets is so for every model,
    and the draws stay paired.

    Args:
        metric: A metric with a function.
        targets: As for `evaluate_metric`.
        predictions: As for `evaluate_metric`.
        n: Number of resamples.
        seed: Seeds them.
        prompts: As for `evaluate_metric`.

    Returns:
        Shape (n,), in the metric's own direction.

    Raises:
        SettingsError: as `evaluate_metric` does, or if the metric stays undefined.
    """
    _, rows = evaluate_metric(metric, targets, predictions, prompts)
    n_rows = len(targets)
    draws = np.empty(n)
    for i in range(n):
        generator, reason = np.random.default_rng([seed, i]), ""
        for _ in range(N_REDRAWS):
            index = resample(n_rows, generator)
            if rows is not None:
                draws[i] = rows[index].mean()
                break
            try:
                taken = None if prompts is None else _take(prompts, index)
                value = _called(metric, _take(targets, index), _take(predictions, index), taken)
                draws[i] = float(value)
            except Exception as error:
                reason = f" ({one_line(error)[:200]})"
                continue
            reason = f" ({draws[i]})"
            if np.isfinite(draws[i]):
                break
        else:
            raise SettingsError(
                "metric",
                metric.name,
                f"is undefined on {N_REDRAWS} resamples of {n_rows} rows in a row{reason}",
                "give more rows to test on, or use another metric",
            )
    return draws


def _take(values: Any, index: NDArray[np.int64]) -> Any:
    """Return rows as the caller's own, which it may write into."""
    if isinstance(values, np.ndarray):
        return values[index]
    return copy.deepcopy([values[i] for i in index])
