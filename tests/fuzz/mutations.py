"""Mutations of valid inputs: values of other types, text of other encodings, damaged bytes."""

from __future__ import annotations

import copy
import random
from typing import Any

TEXTS = (
    "",
    " ",
    "\x00",
    "\x1b[2J",
    "\ud800",
    "\u202e",
    "²",
    "٣",
    "a" * 300,
    "../outside",
    "/etc/passwd",
    "=1+1",
    "1e999",
    "nan",
    "-1",
    "0",
    "1e10",
    "group:²",
    "last:99999999999999999999",
    "1e999trials",
    "[" * 2000,
    "{a: b}",
    "lora",
    "attn.q",
    "none",
    "all",
    "trainable_params<=1e999",
    "maximize",
    "<script>",
    "\n\n",
    "% s %d {0}",
)
NUMBERS: tuple[Any, ...] = (
    0,
    1,
    -1,
    2,
    7,
    2**31,
    2**63,
    10**18,
    10**299,
    0.5,
    -0.0,
    1e308,
    -1e308,
    5e-324,
    float("nan"),
    float("inf"),
    float("-inf"),
)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [{}], {"a": 1}, {"": ""}, [None])

ATOMS: tuple[Any, ...] = (*TEXTS, *NUMBERS, *OTHERS)


def atom(rng: random.Random) -> Any:
    """Return a value that is seldom meant."""
    return copy.deepcopy(rng.choice(ATOMS))


def mutated(value: Any, rng: random.Random, times: int = 1) -> Any:
    """Return plain values with some of them replaced, removed, added, doubled or nested."""
    whole = [copy.deepcopy(value)]
    for _ in range(times):
        places = list(_places(whole))
        holder, key = rng.choice(places)
        change = rng.randrange(8)
        if change <= 3:
            holder[key] = atom(rng)
        elif change == 4 and holder is not whole:
            del holder[key]
        elif change == 5 and isinstance(holder, dict):
            holder[rng.choice([*map(str, TEXTS), *holder])] = rng.choice([atom(rng), holder[key]])
        elif change == 5:
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
        elif change == 6:
            holder[key] = rng.choice([[holder[key]], {"a": holder[key]}])
        else:
            other, name = rng.choice(places)
            holder[key] = copy.deepcopy(other[name]) if _has(other, name) else atom(rng)
        if not whole:
            return atom(rng)
    return whole[0]


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def _places(value: Any) -> Any:
    """Yield (holder, key) of every value inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """Return bytes that were cut off, overwritten, repeated, encoded otherwise or interrupted."""
    change = rng.randrange(10)
    at = rng.randrange(len(raw) + 1)
    if change == 0:
        return raw[:at]
    if change == 1:
        return raw[at:]
    if change == 2:
        return raw[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9))) + raw[at:]
    if change == 3:
        return raw[:at] + rng.choice((b"\x00", b"\xff", b"\r", b'"', b"\n", b"\x1b")) + raw[at:]
    if change == 4:
        return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")) + raw
    if change == 5:
        text = raw.decode("utf-8", "replace")
        return text.encode(rng.choice(("utf-16", "utf-32", "utf-16-le", "cp1252")), "replace")
    if change == 6:
        inserted = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
        return raw[:at] + inserted + raw[at + rng.randrange(9) :]
    if change == 7:
        end = min(len(raw), at + rng.randrange(1, 40))
        return raw[:end] + raw[at:end] * rng.randrange(1, 20) + raw[end:]
    if change == 8:
        return raw[:at] + rng.choice((b"[", b"{", b"'", b'"', b",")) * 3000 + raw[at:]
    position = rng.randrange(max(1, len(raw)))
    return raw[:position] + bytes([rng.randrange(256)]) + raw[position + 1 :]
