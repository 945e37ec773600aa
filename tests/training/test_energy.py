"""The meter of energy: refused before a search begins, where it cannot tell."""

from __future__ import annotations

from typing import Any, cast

import pytest

from autopeft.errors import SettingsError
from autopeft.settings import SearchSettings
from autopeft.tasks.base import Task
from autopeft.training import energy
from autopeft.training.energy import check_energy
from autopeft.utils.energy import no_energy


def _check(**settings: Any) -> None:
    device = settings.pop("device", "cpu")
    asked = SearchSettings(model="m", data="d", objectives=("energy_joules",), **settings)
    check_energy(asked, cast(Task, None), device)


def _none(*_: Any) -> Any:
    raise no_energy("no counter")


def test_a_machine_without_a_counter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "PackageEnergy", _none)
    with pytest.raises(SettingsError, match="objectives='energy_joules': no counter"):
        _check()
    _check(ray_address="ray://elsewhere:1")  # Its workers find out.


def test_workers_that_share_a_device_are_refused() -> None:
    with pytest.raises(SettingsError, match="counts several workers"):
        _check(device="cuda", gpus_per_worker=0.5)
