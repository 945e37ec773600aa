"""Regular expressions in PEFT's configurations of others: matching them must end.

Python's `re` tries every way to match. That may take longer than a life, and nothing interrupts it.
So whether it ends soon is tried in a small process, which is killed if it does not. It imports
nothing of autopeft.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence

SECONDS = 3.0
"""What matching all expressions of a configuration with all names may take."""

# How PEFT 0.21.2 uses an expression (tuners/tuners_utils.py, utils/other.py).
_TEXT = r"(?:{})\Z"
_KEY = r"(.*\.)?({})$"
_ITEM = r"(^|.*\.){}($|\..*)"
_LAYERS = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."


def endless(config: Mapping[str, object], names: Sequence[str]) -> str:
    r"""Return what is wrong with a configuration's expressions; "" if all are soon matched.

    Args:
        config: Content of an `adapter_config.json`: any text or key in it may be an expression.
        names: The modules' names, with which PEFT matches them.

    Example:
        >>> from autopeft.utils.expressions import endless
        >>> endless({"target_modules": r".*\.(q_proj|v_proj)"}, ["layers.0.q_proj"])
        ''
    """
    # Without these, there is one way to match.
    uses = sorted({use for use in _uses(config) if re.search(r"[*+?{|]", use[1])})
    if not uses or not names:
        return ""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", __file__],
            input=json.dumps([uses, sorted(set(names))]).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=SECONDS,
        ).stdout
    except subprocess.TimeoutExpired as error:
        done = error.stdout or b""
    if len(done) == len(uses):
        return ""
    return f"holds an expression that takes too long to match: {uses[len(done)][1][:100]!r}"


def _uses(config: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield (how it is used, text) of each text in a configuration."""
    for name, value in config.items():
        is_of_layers = name == "layers_pattern"
        if isinstance(value, str):
            yield _LAYERS if is_of_layers else _TEXT, value
        elif isinstance(value, Mapping):
            yield from ((_KEY, str(key)) for key in value)
        elif isinstance(value, list):
            texts = (each for each in value if isinstance(each, str))
            yield from ((_LAYERS if is_of_layers else _ITEM, text) for text in texts)


def _match_all() -> None:
    """Match, in the small process; write a byte for each expression that is done."""
    uses, names = json.loads(sys.stdin.buffer.read())
    for form, text in uses:
        try:
            known = re.compile(form.format(text))
            for name in names:
                known.match(name)
        except (re.error, RecursionError, OverflowError):
            pass  # Whoever uses it tells.
        sys.stdout.buffer.write(b".")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _match_all()
