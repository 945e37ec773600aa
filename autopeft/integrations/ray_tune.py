"""GapScheduler: stops trials of any Ray Tune run that are far from the front of quality and cost.

```python
from ray import tune

from autopeft.integrations.ray_tune import GapScheduler

scheduler = GapScheduler(costs=lambda config: config["width"] ** 2, max_t=30)
tuner = tune.Tuner(
    train,
    param_space={"width": tune.randint(8, 256), "lr": tune.loguniform(1e-4, 1e-1)},
    tune_config=tune.TuneConfig(
        metric="accuracy", mode="max", num_samples=100, scheduler=scheduler
    ),
)
```
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from autopeft.errors import SettingsError, UserError
from autopeft.searcher.pruners.rung_table import RungTable, last_stopping_step
from autopeft.searcher.pruners.trial_costs import CostFunction, TrialCosts, computed_price
from autopeft.utils.serialize import to_float

_REMEDY = "put it into the config or what the trial reports, or give costs=function of the config"


class GapScheduler(FIFOScheduler):  # type: ignore[misc]
    """Ray Tune's scheduler with the decision of `autopeft.GapPruner`.

    A trial is stopped early if a trial that costs no more beats it by far; see `GapPruner`. Unlike
    ASHA, it keeps the best trial at each cost, so the run ends with a front.

    A resumed run compares with the trials that report from then on.

    Args:
        costs: A function of a trial's config that returns its cost, or costs by name; or the name
            or names of numbers in the config or in what the trial reports.
        time_attr: Key of the step in what trials report, a whole number. Trials are compared at
            equal steps.
        metric: Key of the quality in what trials report; None: as in `TuneConfig`.
        mode: "max" or "min"; None: as in `TuneConfig`.
        max_t: Steps of a whole training. Trials end there, and none is stopped early after a third
            of it. None: trials end by themselves, and every report may stop one.
        grace_period: Reports before this step are not compared.
        reduction_factor: Of n trials about n / reduction_factor pass the first report.
        min_peers: Minimum number of trials at a step, itself included, before any is stopped.

    Raises:
        UserError: for an argument out of range; and when a trial reports that has no costs, or
            whose costs, step or quality are no numbers.
    """

    def __init__(
        self,
        costs: str | Sequence[str] | CostFunction,
        time_attr: str = "training_iteration",
        metric: str | None = None,
        mode: str | None = None,
        max_t: int | None = None,
        grace_period: int = 1,
        reduction_factor: float = 3.0,
        min_peers: int = 2,
    ) -> None:
        super().__init__()
        if not reduction_factor > 1:
            problem = "`reduction_factor > 1` must hold"
            raise SettingsError("reduction_factor", reduction_factor, problem, "use 3")
        if max_t is not None and not max_t >= 1:
            raise SettingsError("max_t", max_t, "`max_t >= 1` must hold", "use 1 or more")
        names = (costs,) if isinstance(costs, str) else costs
        self._function = costs if callable(costs) else None
        self._names = () if callable(names) else tuple(names)
        if not (self._function or self._names):
            problem = "must name at least one, or be a function of the config"
            raise SettingsError("costs", costs, problem, "name a number of the config")
        self._costs = TrialCosts(self._names or None, "costs", _REMEDY)
        self._time_attr = time_attr
        self._metric = metric
        self._mode = mode
        self._max_t = max_t
        self._grace_period = grace_period
        self._eta = float(reduction_factor)
        self._min_peers = min_peers
        self._table: RungTable | None = None
        self._numbers: dict[str, int] = {}  # by Tune's id of a trial
        self._n_stopped = 0

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Take metric and mode of `TuneConfig`; False if they are given twice."""
        if (self._metric and metric) or (self._mode and mode):
            return False
        self._metric, self._mode = self._metric or metric, self._mode or mode
        return True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Check that metric and mode are known."""
        if not self._metric:
            raise SettingsError("metric", self._metric, "is missing", "name it in TuneConfig")
        if self._mode not in ("max", "min"):
            raise SettingsError("mode", self._mode, "must be max or min", "set it in TuneConfig")

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return whether a trial continues after a report."""
        metric, name = str(self._metric), trial.trial_id
        step, score = to_float(result.get(self._time_attr)), to_float(result.get(metric))
        if score is None:
            problem = f"trial {name} reports no number"
            raise UserError(metric, result.get(metric), problem, "report one")
        if step is None or step != step // 1:
            problem = f"must be a whole number in what trial {name} reports"
            remedy = "count steps, not seconds"
            raise UserError(self._time_attr, result.get(self._time_attr), problem, remedy)
        costs = self._costs.of(name, self._price(trial, result))
        if self._table is None:
            self._table = RungTable(len(costs))
        number = self._numbers.setdefault(name, len(self._numbers))
        self._table.add(number, costs)
        if step >= self._grace_period:
            self._table.report(number, int(step), score if self._mode == "max" else -score)
        if self._max_t is not None and step >= self._max_t:
            return str(TrialScheduler.STOP)
        last_step = last_stopping_step(self._max_t or math.inf)
        if self._table.gap_to_stop(number, last_step, self._eta, self._min_peers) <= 0:
            return str(TrialScheduler.CONTINUE)
        self._n_stopped += 1
        return str(TrialScheduler.STOP)

    def _price(self, trial: Any, result: Mapping[str, Any]) -> Any:
        if self._function is not None:
            return computed_price(self._function, trial.trial_id, trial.config)
        known = {**trial.config, **result}
        return {name: known[name] for name in self._names if name in known}

    def debug_string(self) -> str:
        """Return what Tune shows while it runs."""
        return f"GapScheduler: {self._n_stopped} of {len(self._numbers)} trials stopped early"
