from __future__ import annotations

import pytest
import torch
from tiny_models import KINDS, build

from autopeft.models.layout import is_chain
from autopeft.profiling.output_positions import n_logit_weights, narrow_modules, read_positions

_TOKENS = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 2, 2], [5, 6, 2, 2, 2]])
_MASK = (_TOKENS != 2).long()
_LAST = [4, 2, 1]


def _read(name: str) -> list[list[int]] | None:
    """Columns that are read, row by row."""
    backbone = build(name, device="meta")
    found = read_positions(
        backbone,
        lambda model: model(input_ids=_TOKENS, attention_mask=_MASK).logits.float().square().sum(),
        *_TOKENS.shape,
    )
    return None if found is None else [row.nonzero().flatten().tolist() for row in found]


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "deberta-v2", "modernbert"])
def test_encoders_read_their_first_token(name: str) -> None:
    assert _read(name) == [[0], [0], [0]]


def test_decoders_classify_by_their_last_token() -> None:
    assert _read("llama-cls") == [[last] for last in _LAST]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3", "falcon"])
def test_language_models_read_all(name: str) -> None:
    assert _read(name) == [[0, 1, 2, 3, 4]] * 3


@pytest.mark.parametrize("name", ["albert", "t5"])
def test_blocks_that_are_no_chain_are_left_alone(name: str) -> None:
    assert _read(name) is None


def test_blocks_of_two_halves_are_no_chain() -> None:
    assert not is_chain(build("t5").layout.blocks)
    assert is_chain(build("bert").layout.blocks)


@pytest.mark.parametrize("name", [n for n in KINDS if n not in ("albert", "t5", "bart", "whisper")])
def test_narrowed_modules_hold_no_keys_and_no_values(name: str) -> None:
    backbone = build(name)
    paths = narrow_modules(backbone.model, backbone.layout)
    assert paths
    last = backbone.topology.n_layers - 1
    for role in ("attn.k", "attn.v", "attn.qkv"):
        for path in backbone.layout.modules.get((last, role), ()):
            assert not any(path == narrow or path.startswith(f"{narrow}.") for narrow in paths)


def test_logits_have_the_weights_of_the_output_embedding() -> None:
    assert n_logit_weights(build("llama", device="meta")) == 60 * 32
    assert n_logit_weights(build("bert", device="meta")) == 0
