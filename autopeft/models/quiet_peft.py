"""Keeps peft's own code from doing at injection what nobody asked for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import peft.tuners.boft.layer
import peft.tuners.shira.layer
import peft.tuners.supertuning.layer
import torch


@contextmanager
def calmed() -> Iterator[None]:
    """While it is open, peft compiles nothing, warns of nothing harmless and drops old layers."""
    # BOFT would compile a CUDA extension, noisily and for minutes; it only speeds up the assembly
    # of blocks, and without it peft allows one butterfly factor, which is all that is asked for.
    peft.tuners.boft.layer._FBD_CUDA = False
    # SHiRA's forward pass makes a sparse tensor; torch wants it said that checks stay off.
    torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]
    # These remember every layer that ever ran, so as to warn of each only once.
    peft.tuners.shira.layer._warn_once_about_module_hooks.cache_clear()
    peft.tuners.supertuning.layer._warn_once_about_module_hooks.cache_clear()
    with warnings.catch_warnings():
        # Said of every normalization, whose widths LN tuning does not need.
        warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
        # BEFT says it of a module without a bias; autopeft never merges BEFT.
        warnings.filterwarnings("ignore", "Detected that the base layer has no bias", UserWarning)
        # Random matrices that a seed gives back need not be in a file.
        warnings.filterwarnings("ignore", "Specified to not (save|load) ", UserWarning)
        yield
