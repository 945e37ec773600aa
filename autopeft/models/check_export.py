"""Check exported folders for servers, with the base model's modules where it is on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autopeft.models.base_fit import fit_of
from autopeft.serving import servers
from autopeft.serving.adapter_folder import PEFT_DEFAULT, AdapterFolder
from autopeft.serving.base_fit import BaseFit


@dataclass(frozen=True)
class ExportCheck:
    """What a check found.

    Attributes:
        broken: The rules that the folder breaks, one line each.
        notes: What could not be checked, one line each.
    """

    broken: tuple[str, ...]
    notes: tuple[str, ...]


def examine(folder: str | Path, server: str) -> ExportCheck:
    """Check a folder like `check_export`, and tell what could not be checked.

    Raises:
        SettingsError: if there is no such server.
        AdapterError: if there is no such folder, or a file in it is damaged.
    """
    if servers.find_server(server).is_for_models:
        return ExportCheck(tuple(servers.check_export(folder, server)), ())
    notes: list[str] = []

    def fit(adapter: AdapterFolder) -> BaseFit:
        found = fit_of(adapter)
        # A file of another format than the server's breaks a rule already.
        if adapter.shapes or adapter.gguf_shapes:
            if found.not_compared:
                notes.append(f"tensors were not compared with the base model: {found.not_compared}")
            if adapter.config.get("peft_type") == "LORA" and "lora_alpha" not in adapter.config:
                notes.append(f"lora_alpha is not named: PEFT takes {PEFT_DEFAULT}")
        return found

    return ExportCheck(tuple(servers.check_export(folder, server, fit=fit)), tuple(notes))


def check_export(folder: str | Path, server: str) -> list[str]:
    """Return the rules of a server that an adapter's folder breaks, one line each.

    Where the base model is on this machine (a folder, or in the hub's cache), the adapter's tensors
    are compared with its modules: they are built without weights, from `config.json` alone.

    Args:
        folder: A folder that autopeft or plain peft wrote, or one with a GGUF file.
        server: Name of a server.

    Raises:
        SettingsError: if there is no such server.
        AdapterError: if there is no such folder, or a file in it is damaged.

    Example:
        >>> autopeft.export("runs/first", pick="baseline", server="peft", to="exported/for_peft")
        Exported(...)
        >>> autopeft.check_export("exported/for_peft", server="peft")
        []
    """
    return list(examine(folder, server).broken)
