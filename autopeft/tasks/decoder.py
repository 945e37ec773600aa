"""What tasks of a decoder share: losses of learned tokens, without logits of the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from autopeft.errors import TrainingFailure
from autopeft.tasks.batch import Batch, Window
from autopeft.tasks.conversations import Conversation
from autopeft.tasks.data import IGNORED
from autopeft.tasks.examples import Examples
from autopeft.tasks.language import LanguageTask
from autopeft.utils.device import sent

_PROMPTS = {
    True: (
        'messages = [{"role": "user", "content": "a question"}]',
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ")",
    ),
    False: ('inputs = tokenizer("a prompt", return_tensors="pt")',),
}
"""What a model generates from, for a model card: a chat, or text."""

_GENERATION = (
    "from transformers import AutoTokenizer\n\n"
    "tokenizer = AutoTokenizer.from_pretrained(checkpoint)",
    "output = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0]",
    'print(tokenizer.decode(output[inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
)


class DecoderTask(LanguageTask):
    """Next-token prediction: computes logits only where a token is learned.

    Encoded rows have the token array "labels": the token itself where it is learned, else -100.
    """

    auto_class = "AutoModelForCausalLM"
    is_autoregressive = True

    def usage(self, rows: Examples, max_length: int) -> str:
        """Return Python that answers a message, or continues a text."""
        row = rows["row"][0]
        is_chat = isinstance(getattr(row, "chosen", row), Conversation)
        return "\n".join((_GENERATION[0], *_PROMPTS[is_chat], *_GENERATION[1:]))

    def windows(self, batch: Batch) -> dict[str, Window]:
        """Return the positions that predict learned tokens; size: the longest span of them."""
        is_learned = _is_target(batch)
        length = is_learned.shape[1]
        columns = np.arange(length)
        last = (columns * is_learned).max(axis=1)  # (b,)
        first = np.minimum(np.where(is_learned, columns, length).min(axis=1), last)
        begin = np.maximum(first - 1, 0)
        size = max(1, int((last - begin).max()))
        starts = torch.from_numpy(np.minimum(begin, length - size))
        return {"completion": Window(sent(starts, batch.labels.device), size)}

    def row_losses(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed cross-entropy and the number of learned tokens of each row."""
        logits, targets, owner = learned_logits(model, batch)
        losses = functional.cross_entropy(logits, targets, reduction="none")
        empty = torch.zeros(len(batch.sequences), device=losses.device)
        sums = empty.index_add(0, owner, losses)
        return sums, empty.index_add(0, owner, torch.ones_like(losses))

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean cross-entropy over the learned tokens of the batch."""
        logits, targets, _ = learned_logits(model, batch)
        # Rows without learned tokens are dropped before; a mean over none would be NaN.
        return functional.cross_entropy(logits, targets, reduction="sum") / max(1, len(targets))

    def score(self, model: torch.nn.Module, batch: Batch) -> Mapping[str, torch.Tensor]:
        """Return the summed loss, the number of learned tokens and of correct ones of each row."""
        logits, targets, owner = learned_logits(model, batch)
        losses = functional.cross_entropy(logits, targets, reduction="none")
        right = logits.argmax(dim=-1) == targets
        empty = torch.zeros(len(batch.sequences), device=losses.device)
        return {
            "loss": empty.index_add(0, owner, losses),
            "weight": empty.index_add(0, owner, torch.ones_like(losses)),
            "correct": empty.index_add(0, owner, right.float()),
        }


def learned_logits(
    model: torch.nn.Module, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute logits only at positions that predict a learned token.

    Returns:
        Logits, shape (n, vocabulary), float32; the tokens to predict, shape (n,); and the sequence
        in the batch of each, shape (n,).
    """
    is_target = _is_target(batch)
    rows, columns = is_target.nonzero()  # (n,), (n,)
    owners = rows if batch.owners is None else batch.owners[is_target]
    # Counted from the end: tokens of a prompt may stand before a row's own.
    places = columns - 1 - is_target.shape[1]
    found = np.stack([rows, places, batch.on_host("labels")[is_target], owners])
    row, column, targets, owner = sent(torch.from_numpy(found), batch.labels.device)
    with _only_at(model, row, column):
        logits: torch.Tensor = model(**batch.model_inputs(), use_cache=False).logits
    if logits.shape[0] != 1 or logits.shape[1] != len(owner):
        raise TrainingFailure(
            f"{type(model).__name__} does not compute its logits with its output embedding; "
            "autopeft cannot skip the logits of the prompt"
        )
    return logits[0].float(), targets, owner


def _is_target(batch: Batch) -> NDArray[np.bool_]:
    """Return which tokens are to be predicted, shape (b, t).

    Column j predicts token j + 1; nothing predicts the first token.
    """
    is_target: NDArray[np.bool_] = batch.on_host("labels") != IGNORED
    is_target[:, 0] = False
    return is_target


@contextmanager
def _only_at(model: torch.nn.Module, rows: torch.Tensor, columns: torch.Tensor) -> Iterator[None]:
    """Pass only these positions to the output embedding, as one row of shape (1, n, width).

    Logits of all prompt positions would cost more than the rest of a small decoder. What a model
    does after the embedding (scaling, soft-capping) is elementwise, so it still works.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]

    def pick(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (inputs[0][rows, columns][None],)

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()
