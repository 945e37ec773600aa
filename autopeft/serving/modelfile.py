"""Read Ollama's `Modelfile`: the base model and the adapters that it names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autopeft.errors import AdapterError
from autopeft.utils.text_files import Unreadable, read_text

_MAX_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Modelfile:
    """What a `Modelfile` names.

    Attributes:
        base: The value of the last FROM; "" if there is none.
        adapters: The value of each ADAPTER.
    """

    base: str = ""
    adapters: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Modelfile:
        r'''Return what a text names; names of commands are in any case.

        Example:
            >>> Modelfile.parse('from llama3\nSYSTEM """\nADAPTER none\n"""\nADAPTER ./a.gguf')
            Modelfile(base='llama3', adapters=('./a.gguf',))
        '''
        base, adapters = "", []
        lines = iter(text.splitlines())
        for line in lines:
            command, _, value = line.strip().partition(" ")
            value = value.strip()
            if command.lower() == "message":  # A role comes before its text.
                value = value.partition(" ")[2].strip()
            for quote in ('"""', '"'):
                if value.startswith(quote):
                    # A quoted value may have several lines; what is in them is no command.
                    while not (value.endswith(quote) and len(value) >= 2 * len(quote)):
                        following = next(lines, None)
                        if following is None:
                            break
                        value = f"{value}\n{following}".rstrip()
                    value = value.removeprefix(quote).removesuffix(quote)
                    break
            if command.lower() == "from":
                base = value
            elif command.lower() == "adapter":
                adapters.append(value)
        return cls(base, tuple(adapters))

    @classmethod
    def read(cls, path: Path) -> Modelfile | None:
        """Read a file; None if there is none.

        Raises:
            AdapterError: if it is no text.
        """
        if not path.is_file():
            return None
        try:
            return cls.parse(read_text(path, max_bytes=_MAX_BYTES))
        except Unreadable as error:
            raise AdapterError("adapter", str(path), str(error), "write it again") from None
