"""Settings: every mistake is named, and the command line knows every field."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from autopeft.errors import SettingsError
from autopeft.settings import RENAMED, RESUMABLE, SearchSettings


def test_mapping_and_back() -> None:
    settings = SearchSettings(model="m", data="d", constraints=("trainable_params<=1k",))
    assert SearchSettings.from_mapping(settings.to_mapping()) == settings


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("modle", "x", "did you mean 'model'"),
        ("steps", 0, "steps >= 1"),
        ("steps", "many", "whole number"),
        ("steps", True, "whole number"),
        ("objectives", [], "at least one cost"),
        ("objectives", ["latency_ms", "latency_ms"], "each once"),
        ("confirm_share", 1.0, "0 to 0.9"),
        ("eta", 1, "eta >= 2"),
        ("audit_share", -0.1, "0 to 1"),
        ("audit_share", float("nan"), "0 to 1"),
        ("activation_cache_gb", float("nan"), "activation_cache_gb >= 0"),
        ("budget", 30, "text"),
        ("compress", 1, "true or false"),
        ("compress", "yes", "true or false"),
        ("space", 3, "text or a mapping"),
        ("objectives", 3, "a list"),
        ("role_map", ["attn.q"], "a mapping"),
        ("zzz", None, "use one of model, data"),
    ],
)
def test_a_mistake_names_field_and_remedy(key: str, value: object, hint: str) -> None:
    with pytest.raises(SettingsError, match=hint) as caught:
        SearchSettings.from_mapping({key: value})
    assert caught.value.field == key
    assert "\n" not in str(caught.value)


def test_lists_may_be_written_with_commas() -> None:
    settings = SearchSettings.from_mapping(
        {"objectives": "trainable_params, latency_ms", "budget": ["3m", "5trials"]}
    )
    assert settings.objectives == ("trainable_params", "latency_ms")
    assert settings.budget == "3m,5trials"


def test_roles_may_be_mapped_in_yaml_or_by_a_flag() -> None:
    wanted = {"blocks": "encoder.stages", "attn.q": "mix.query"}
    for given in (wanted, "blocks=encoder.stages, attn.q=mix.query"):
        assert SearchSettings.from_mapping({"role_map": given}).role_map == wanted
    for wrong in ("attn.q", "attn.q=", {"attn.q": 3}):
        with pytest.raises(SettingsError, match="role_map"):
            SearchSettings.from_mapping({"role_map": wrong})


def test_a_flag_that_names_a_pair_twice_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"columns=.*: names 'text' twice; name it once"):
        SearchSettings.from_mapping({"columns": "text=a, text=b"})


def test_none_stands_for_the_default() -> None:
    settings = SearchSettings.from_mapping({"steps": None, "max_validation_rows": None})
    assert settings == SearchSettings()


def test_whole_numbers_serve_as_numbers() -> None:
    assert SearchSettings.from_mapping({"gpus_per_worker": 1}).gpus_per_worker == 1.0
    shares = {None: 1, 0: 1, 0.25: 1, 1: 1, 2: 2}
    for share, devices in shares.items():
        assert SearchSettings(gpus_per_worker=share).devices_per_worker == devices
    with pytest.raises(SettingsError, match=r"gpus_per_worker=1.5: .* whole ones; use 1"):
        SearchSettings(gpus_per_worker=1.5)


def test_every_field_has_help() -> None:
    for field in fields(SearchSettings):
        assert field.metadata["help"].endswith("."), field.name


def test_only_known_settings_may_change_on_resume() -> None:
    assert {field.name for field in fields(SearchSettings)} >= RESUMABLE
    assert "model" not in RESUMABLE
    assert "seed" not in RESUMABLE


@pytest.mark.parametrize("key", ["prefix_cache", "prefix_cache_gb"])
def test_a_former_name_is_answered_by_the_new_one(key: str) -> None:
    with pytest.raises(SettingsError, match=f"{key}=1: was renamed; use {RENAMED[key]}$"):
        SearchSettings.from_mapping({key: 1})
    assert RENAMED[key] in {each.name for each in fields(SearchSettings)}


def test_a_space_may_be_written_in_braces() -> None:
    text = "{methods: {lora: {learning_rate: [1e-4, 1e-2]}}, layers: last:2}"
    read = SearchSettings.from_mapping({"space": text}).space
    assert read == {"methods": {"lora": {"learning_rate": [1e-4, 1e-2]}}, "layers": "last:2"}
    for mistaken in ("{methods: [lora}", "{1: 2}"):
        with pytest.raises(SettingsError, match="space=") as caught:
            SearchSettings.from_mapping({"space": mistaken})
        assert "\n" not in str(caught.value)


def test_a_switch_may_be_left_to_autopeft() -> None:
    for text, value in {"true": True, "false": False, "auto": "auto"}.items():
        for given in (text, value):
            for name in ("gradient_checkpointing", "torch_compile"):
                read = SearchSettings.from_mapping({name: given})
                assert getattr(read, name) == value
    assert not SearchSettings().trains_alone
    with pytest.raises(SettingsError, match="use one of true, false, auto"):
        SearchSettings.from_mapping({"gradient_checkpointing": "maybe"})


@pytest.mark.parametrize(
    "way", [{"gradient_checkpointing": True}, {"torch_compile": True}, {"micro_batch_tokens": 64}]
)
def test_adapters_that_are_trained_alone_are_not_trained_together(way: dict[str, object]) -> None:
    assert SearchSettings.from_mapping(way).trains_alone == next(iter(way))
    with pytest.raises(SettingsError, match=r"one at a time.*leave it out"):
        SearchSettings.from_mapping({**way, "trials_per_worker": 2})


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("rungs", 10_000_000_000, "rungs <= 100"),
        ("steps", 10**12, "steps <= 2147483647"),
        ("seed", 10**200, "seed <= 2147483647"),
        ("activation_cache_gb", float("inf"), "activation_cache_gb <= "),
        ("model", "a\x00b", "NUL"),
        ("model", "m" * 300, "longer than any name"),
        ("data", ["ok.csv", "d/" * 3000], "longer than any name"),
        ("output", "\ud800", "half a character"),
    ],
)
def test_what_no_search_can_use_is_refused_at_once(key: str, value: object, hint: str) -> None:
    with pytest.raises(SettingsError, match=hint) as caught:
        SearchSettings.from_mapping({key: value})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ("trainable_params<=1,000", "write 1000"),
        ("trainable_params <= 1,000,000", "write 1000000"),
        ("adapter_bytes<=1,500kB,trainable_params<=5", "write 1500"),
        (["trainable_params<=5", "trainable_params<=12,345"], "write 12345"),
        ("forgetting<=0,05", "write 0.05"),
        ("forgetting<=0,125", "write 0.125"),
    ],
)
def test_a_comma_inside_a_number_is_named(given: Any, remedy: str) -> None:
    """Regression: `constraint='000': cannot be read` (issue 18)."""
    with pytest.raises(SettingsError, match="a comma separates limits") as refused:
        SearchSettings.from_mapping({"constraints": given})
    assert str(refused.value).endswith(remedy)
    two = SearchSettings.from_mapping({"constraints": "trainable_params<=1k,adapter_bytes<=2kB"})
    assert two.constraints == ("trainable_params<=1k", "adapter_bytes<=2kB")


def test_a_column_that_is_named_twice_is_refused() -> None:
    """Regression: `columns` won, with no word (issue 18)."""
    with pytest.raises(SettingsError, match="text='label': columns names 'text' for the same role"):
        SearchSettings.from_mapping({"text": "label", "columns": {"text": "text"}})
    with pytest.raises(SettingsError, match=r"label='a': .*leave out label, or columns.label"):
        SearchSettings(label="a", columns={"label": "b"})
    same = SearchSettings(text="a", columns={"text": "a", "label": "b"})
    assert same.column_names() == {"text": "a", "label": "b"}
