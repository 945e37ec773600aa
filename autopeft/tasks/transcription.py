"""Transcription of recordings by an encoder-decoder such as Whisper."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from transformers.generation import GenerationMixin

from autopeft.errors import ModelError, SettingsError
from autopeft.models.checkpoint import is_local_only
from autopeft.models.loading import not_loadable, position_limit
from autopeft.tasks.base import Generated, IntArray
from autopeft.tasks.columns import Column
from autopeft.tasks.data import EncodedSplit, Ragged, SplitName, TaskData
from autopeft.tasks.encoding import TOO_LONG, UNLIMITED, flat, split_of, tokenized, without
from autopeft.tasks.examples import Examples
from autopeft.tasks.generation import GREEDY, SPARE_TOKENS, TIE
from autopeft.tasks.reading import Table
from autopeft.tasks.seq2seq import Seq2Seq
from autopeft.tasks.sounds import (
    AUDIO,
    READ_FILE,
    TOKENS_PER_SECOND,
    extractor_of,
    features,
    load_extractor,
    longest_sound,
    tokens_of,
    with_sounds,
)
from autopeft.utils.quiet import quiet_transformers

_ROWS_AT_ONCE = 8
_CHECKED = 2
"""Rows of the first batch whose generation is compared with a plain forward pass."""


class Transcription(Seq2Seq):
    """Learns the transcript of each recording, after the tokens that tell Whisper what to do.

    Labels are those of the model's own tokenizer: its prompt (language, task, no timestamps), the
    text and its end, without the first token, which the decoder starts from.

    Args:
        labels: Not used.
        pad_id: Not used.
        metric: Quality to optimize: loss (default), perplexity, token_accuracy, wer or cer.
    """

    name = "transcription"
    description = "the transcript of each recording, by Whisper"
    columns = (
        AUDIO,
        Column(
            "text",
            "text",
            "the transcript",
            names=("sentence", "transcription", "transcript", "normalized_text", "target"),
        ),
    )
    target = "text"
    identity = ("key",)
    auto_class = "AutoModelForSpeechSeq2Seq"
    input_names = ("input_features", "decoder_input_ids")
    sequence_names = ("text",)
    options: ClassVar[Mapping[str, Any]] = {"language": ""}

    def load_processor(self, model: str, revision: str | None = None) -> Any:
        """Return the model's feature extractor and tokenizer, set to the language.

        Raises:
            ModelError: if it has none, or is no model like Whisper.
            SettingsError: if it knows several languages and the settings name none of them.
        """
        processor = load_extractor(model, "AutoProcessor", revision)
        tokenizer: Any = getattr(processor, "tokenizer", None)
        if longest_sound(extractor_of(processor)) is None or not hasattr(
            tokenizer, "prefix_tokens"
        ):
            raise ModelError(
                "model",
                model,
                f"its {type(processor).__name__} pads sounds to no fixed length, or its tokenizer "
                "has no tokens that start a transcript",
                "use a Whisper model",
            )
        language, field = str(self.option("language")), "task_options.language"
        is_multilingual = _is_multilingual(model, revision)
        if is_multilingual and not language:
            raise SettingsError(
                field,
                "",
                f"{model} writes several languages and must be told which",
                "name that of the recordings, such as language=en",
            )
        if language and is_multilingual is False:
            raise SettingsError(field, language, f"{model} knows one language", "leave it out")
        if language:
            try:
                tokenizer.set_prefix_tokens(language=language, task="transcribe")
                _ = tokenizer.prefix_tokens
            except ValueError:
                raise SettingsError(
                    field, language, "no such language", "use a name or code such as english or en"
                ) from None
        return processor

    def usage(self, rows: Examples, max_length: int) -> str:
        """Return Python that transcribes a recording."""
        language = str(self.option("language"))
        spoken = f', language="{language}", task="transcribe"' if language else ""
        return (
            "import soundfile\n"
            "from transformers import AutoProcessor\n\n"
            "processor = AutoProcessor.from_pretrained(checkpoint)\n"
            f"{READ_FILE}"
            'inputs = processor(sound.mean(axis=1), sampling_rate=rate, return_tensors="pt")\n'
            f"output = model.generate(**inputs, do_sample=False, num_beams=1{spoken})\n"
            "print(processor.decode(output[0], skip_special_tokens=True))"
        )

    def length_limit(self) -> int | None:
        """Return the longest transcript that the model writes, in tokens."""
        return _longest_transcript(self.model_config)

    def usual_length(self, splits: Mapping[SplitName, Examples]) -> int | None:
        """Return the longest transcript that the model writes: its sounds have no tokens."""
        return self.length_limit()

    def clean(self, table: Table) -> Examples:
        """Return the complete rows of a source; the "key" of a row is what its samples are.

        Raises:
            DataError: if a recording cannot be decoded.
        """
        name = self.find_columns(self.settings.column_names(), table)["audio"]
        return with_sounds(super().clean(table), name, extractor_of(self.processor))

    def encode(
        self, processor: Any, rows: Examples, labels: tuple[str, ...], max_length: int
    ) -> EncodedSplit:
        """Return the features of recordings, and their transcripts as tokens.

        Transcripts of more than `max_length` tokens are cut or dropped. Recordings that are longer
        than the model takes are always dropped: what is said at their end could not be heard.
        """
        extractor = extractor_of(processor)
        limit = longest_sound(extractor)
        assert limit is not None, "load_processor has checked it"
        dropped: dict[str, int] = {}
        unheard = np.flatnonzero(tokens_of(rows["seconds"]) > limit).tolist()
        if unheard:
            dropped[f"longer than {limit / TOKENS_PER_SECOND:g} s of sound"] = len(unheard)
            rows = rows.take(without(unheard, len(rows)))
        found, long = tokenized(
            processor.tokenizer, {"text": list(rows["text"])}, max_length or UNLIMITED
        )
        ids = found["input_ids"]
        if self.settings.on_long == "drop" and long:
            dropped[TOO_LONG] = len(long)
            kept = without(long, len(rows))
            rows, ids, long = rows.take(kept), [ids[row] for row in kept], []
        start = self._start_id()
        read = [row[:-1] if row[0] == start else [start, *row[:-1]] for row in ids]
        learned = [row[1:] if row[0] == start else row for row in ids]
        offsets = np.cumsum([0, *map(len, learned)], dtype=np.int64)
        arrays = features(extractor, rows, limit, self.settings.model) if len(rows) else {}
        return split_of(
            rows,
            [],
            row_arrays={name: arrays[name] for name in arrays if name in self.input_names},
            ragged={
                "labels": Ragged(flat(learned).astype(np.int32), offsets),
                "decoder_input_ids": Ragged(flat(read).astype(np.int32), offsets),
            },
            texts={"audio": rows["about"]},
            tokens_per_row=limit,
            n_truncated=len(long),
            dropped=dropped,
        )

    def generate(
        self, model: Any, data: TaskData, split: SplitName, rows: IntArray, device: Any
    ) -> Generated:
        """Return the references and the transcripts that a model writes by greedy search.

        The cache of keys is compared once, on the first rows, with a plain forward pass.
        """
        source = data.splits[split]
        _, references = self.prompts_and_references(source, rows)
        tokenizer = self.processor.tokenizer
        prompt = list(tokenizer.prefix_tokens)
        longest = int(source.ragged["labels"].lengths[rows].max()) + SPARE_TOKENS
        limit = _longest_transcript(model.config)
        n_new = longest if limit is None else max(1, min(longest, limit - len(prompt)))
        write = _Writer(prompt, n_new, tokenizer.eos_token_id)
        sounds = source.row_arrays["input_features"]
        texts: list[str] = []
        with torch.inference_mode(), quiet_transformers():
            for begin in range(0, len(rows), _ROWS_AT_ONCE):
                part = torch.from_numpy(sounds[rows[begin : begin + _ROWS_AT_ONCE]]).to(device)
                texts += self._texts(write(model, part))
        return [""] * len(rows), references, texts

    def prompts_and_references(
        self, split: EncodedSplit, rows: IntArray
    ) -> tuple[list[str], list[str]]:
        """Return no prompts, and the transcripts."""
        labels = split.ragged["labels"]
        references = [
            labels.values[labels.offsets[row] : labels.offsets[row + 1]].tolist()
            for row in rows.tolist()
        ]
        return [""] * len(rows), self._texts(references)


def _longest_transcript(config: Any) -> int | None:
    stated = getattr(config, "max_target_positions", None)
    return int(stated) if stated else position_limit(config)


def _is_multilingual(model: str, revision: str | None) -> bool | None:
    """Return whether a Whisper model writes several languages, if its checkpoint says so."""
    with quiet_transformers():
        try:
            settings = transformers.GenerationConfig.from_pretrained(
                model, revision=revision or "main", local_files_only=is_local_only(model)
            )
        except OSError:  # It has none.
            return None
        except Exception as error:  # Files of others raise errors of many types.
            raise not_loadable(model, "GenerationConfig", error) from error
    return getattr(settings, "is_multilingual", None)


class _Writer:
    """Generates transcripts by greedy search.

    It is transformers' own `generate`, without what Whisper's adds for long recordings. Tokens
    that the checkpoint never writes (`suppress_tokens`) are not written here either.
    """

    def __init__(self, prompt: list[int], n_new: int, end: int) -> None:
        self.prompt = prompt
        self.n_new = n_new
        self.end = end
        self.use_cache: bool | None = None

    def __call__(self, model: Any, sounds: torch.Tensor) -> list[list[int]]:
        """Return the tokens for features of shape (b, ...), without the prompt and the end."""
        if self.use_cache is None:
            some = sounds[:_CHECKED]
            self.use_cache = self._agrees(model, some, self._written(model, some, True))
            if not self.use_cache:
                warnings.warn(
                    f"generation with a cache is off: {type(model).__name__} with these adapters "
                    "computes other tokens without it; this is slower but correct",
                    stacklevel=3,
                )
        written = self._written(model, sounds, self.use_cache)
        return [row[:-1] if row[-1:] == [self.end] else row for row in written]

    def _written(self, model: Any, sounds: torch.Tensor, use_cache: bool) -> list[list[int]]:
        """Return the generated tokens, each row up to its end."""
        prompt = torch.tensor([self.prompt] * len(sounds), device=sounds.device)
        output = GenerationMixin.generate(
            model,
            input_features=sounds,
            decoder_input_ids=prompt,
            max_new_tokens=self.n_new,
            do_sample=False,
            num_beams=1,
            use_cache=use_cache,
            pad_token_id=self.end,
            eos_token_id=self.end,
            **GREEDY,
        )
        rows: list[list[int]] = output[:, len(self.prompt) :].tolist()
        return [row[: row.index(self.end) + 1] if self.end in row else row for row in rows]

    def _agrees(self, model: Any, sounds: torch.Tensor, written: Sequence[list[int]]) -> bool:
        """Return whether a plain forward pass over each row predicts the same tokens."""
        settings = model.generation_config
        for sound, tokens in zip(sounds, written, strict=True):
            ids = torch.tensor([[*self.prompt, *tokens[:-1]]], device=sounds.device)
            logits = model(input_features=sound[None], decoder_input_ids=ids).logits[0].float()
            logits = logits[len(self.prompt) - 1 :]  # (n tokens, vocabulary)
            spread = logits.max(dim=1).values - logits.min(dim=1).values
            logits[:, list(settings.suppress_tokens or ())] = -torch.inf
            logits[0, list(settings.begin_suppress_tokens or ())] = -torch.inf
            chosen = logits.gather(1, torch.tensor(tokens, device=sounds.device)[:, None])[:, 0]
            if bool((logits.max(dim=1).values - chosen > TIE * spread).any()):
                return False
        return True
