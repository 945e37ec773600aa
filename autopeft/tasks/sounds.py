"""Recordings: decoded to one channel at the model's rate, and encoded by its feature extractor."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopeft.errors import DataError, ModelError
from autopeft.models.backbone import load_processor
from autopeft.models.loading import first_line
from autopeft.tasks.columns import FILE_NAMES, Column
from autopeft.tasks.encoding import check_memory
from autopeft.tasks.examples import Examples
from autopeft.utils.quiet import quiet_transformers

AUDIO = Column(
    "audio",
    "audio",
    "the recording",
    names=("sound", "speech", "recording", "wav", "waveform", *FILE_NAMES),
)
INPUTS = ("input_values", "input_features", "attention_mask")
"""Names of what feature extractors return."""

TOKENS_PER_SECOND = 50
"""A token of sound is 20 ms long, as the positions of wav2vec 2.0's and Whisper's encoders are."""

_SOUNDS_AT_ONCE = 32

_FASTEST = 1_000_000
"""Hz: a filter that resamples is as long as the rate says, whoever wrote the file."""

_FILTER_REACH = 10
"""As `scipy.signal.resample_poly` makes its filter, in samples of the higher rate."""

_LOUDEST = 16.0
"""Samples are within -1 and 1, but for a little more after a resampling."""


@dataclass(frozen=True)
class Sound:
    """A decoded recording.

    Attributes:
        samples: The mean of its channels, shape (n,), float32.
        rate: Samples in a second.
        n_channels: Channels that it had.
    """

    samples: NDArray[np.float32]
    rate: int
    n_channels: int

    @property
    def seconds(self) -> float:
        """Its length."""
        return len(self.samples) / self.rate


def decoded(cell: Any) -> Sound:
    """Return the sound of a cell: bytes, a mapping of "bytes" and "path", or of an array.

    Args:
        cell: A file's bytes, {"bytes", "path"} as `datasets` keeps them, or {"array",
            "sampling_rate"}, where an array of two dimensions has its channels along the shorter.

    Raises:
        OSError, TypeError or ValueError: if it is no readable sound.
        DataError: if the package that reads files is missing.
    """
    if isinstance(cell, Mapping) and cell.get("array") is not None:
        return _of_array(cell["array"], cell.get("sampling_rate"))
    if isinstance(cell, Mapping) and (cell.get("bytes") or cell.get("path")):
        cell = cell.get("bytes") or Path(cell["path"]).read_bytes()
    if not isinstance(cell, bytes):
        raise TypeError(f"a {type(cell).__name__}")
    try:
        import soundfile
    except ImportError:
        raise DataError(
            "audio", "", "files of sound need the package soundfile", "pip install autopeft[audio]"
        ) from None
    try:
        samples, rate = soundfile.read(BytesIO(cell), dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise ValueError(first_line(error)) from None
    return _mono(samples, rate)


def _of_array(array: Any, rate: Any) -> Sound:
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not rate > 0:
        raise ValueError(f"its sampling_rate is {rate!r}")
    samples = np.asarray(array)
    if samples.dtype == np.int16:
        samples = samples / np.float32(1 << 15)
    if not np.issubdtype(samples.dtype, np.floating) or samples.ndim not in (1, 2):
        raise ValueError(f"an array of {samples.dtype} and {samples.ndim} dimensions")
    if samples.ndim == 1:
        samples = samples[:, None]
    return _mono(samples if samples.shape[0] >= samples.shape[1] else samples.T, int(rate))


def _mono(samples: NDArray[Any], rate: int) -> Sound:
    """Return the sound of samples of shape (n, channels)."""
    if not samples.size:
        raise ValueError("it has no samples")
    if rate > _FASTEST:
        raise ValueError(f"its rate is {rate} Hz, but must be at most {_FASTEST}")
    mean = samples.mean(axis=1).astype(np.float32)
    if not np.isfinite(mean).all():
        raise ValueError("its samples are not finite")
    if (loudest := float(np.abs(mean).max())) > _LOUDEST:
        raise ValueError(f"its samples reach {loudest:g}, but must be between -1 and 1")
    return Sound(np.ascontiguousarray(mean), rate, samples.shape[1])


def samples_at(cell: Any, rate: int, n_most: int) -> NDArray[np.float32]:
    """Return the first samples of a cell at a rate, shape (n,), `n_most` of them at most.

    Of a long sound no more is resampled: a file whose header says 1 Hz would take all memory.
    """
    from scipy.signal import resample_poly

    sound = decoded(cell)
    if sound.rate == rate:
        return sound.samples[:n_most]
    shared = math.gcd(rate, sound.rate)
    up, down = rate // shared, sound.rate // shared
    # scipy's filter reaches so far beyond the last sample that is wanted.
    reach = _FILTER_REACH * max(up, down)
    heard = sound.samples[: (n_most * down + reach) // up + 2]
    resampled: NDArray[np.float32] = resample_poly(heard, up, down).astype(np.float32)
    return resampled[:n_most]


def with_sounds(rows: Examples, name: str, extractor: Any) -> Examples:
    """Return rows with what their recordings are.

    Added are "key", which is equal for equal sounds, "seconds", and "about" for a preview. Notes
    say what is resampled or has several channels.

    Args:
        rows: Rows with the column "audio".
        name: Its name in the source.
        extractor: The model's feature extractor.

    Raises:
        DataError: if a recording cannot be decoded.
    """
    added: dict[str, list[Any]] = {"key": [], "seconds": [], "about": []}
    rates: Counter[int] = Counter()
    n_mixed = 0
    for cell, number in zip(rows["audio"], (rows.source_rows + 1).tolist(), strict=True):
        try:
            sound = decoded(cell)
        except (OSError, TypeError, ValueError) as error:
            raise DataError(
                "audio",
                name,
                f"row {number} of {rows.source} is not a readable sound ({first_line(error)})",
                "remove or replace it: sounds are files (WAV, FLAC, OGG, MP3) or an array with its "
                "sampling_rate; file names are read if all those files are there, relative to "
                "the table's folder",
            ) from None
        rates[sound.rate] += 1
        n_mixed += sound.n_channels > 1
        digest = hashlib.sha256(sound.samples.tobytes()).hexdigest()
        added["key"].append(f"{sound.rate} {digest}")
        added["seconds"].append(sound.seconds)
        channels = f", {sound.n_channels} channels" if sound.n_channels > 1 else ""
        added["about"].append(f"{sound.seconds:.2f} s at {sound.rate} Hz{channels}")
    notes = []
    others = sorted(set(rates) - {extractor.sampling_rate})
    if others:
        notes.append(
            f"{sum(rates[rate] for rate in others)} of {len(rows)} sounds of {rows.source} are "
            f"resampled to the model's {extractor.sampling_rate} Hz "
            f"(from {', '.join(map(str, others))} Hz)"
        )
    if n_mixed:
        notes.append(
            f"{n_mixed} of {len(rows)} sounds of {rows.source} have several channels: their mean "
            "is used"
        )
    columns = {**rows.columns, **{role: tuple(values) for role, values in added.items()}}
    return replace(rows, columns=columns, notes=(*rows.notes, *notes))


def load_extractor(model: str, loader: str, revision: str | None = None) -> Any:
    """Return a model's processor of sounds.

    Args:
        model: Folder or hub id.
        loader: "AutoFeatureExtractor", or "AutoProcessor" for that and a tokenizer.
        revision: Revision of a hub model.

    Raises:
        ModelError: if it has none, or it does not say at which rate it reads.
    """
    processor = load_processor(model, loader, revision=revision)
    if not isinstance(getattr(extractor_of(processor), "sampling_rate", None), int):
        raise ModelError(
            "model",
            model,
            f"its {type(processor).__name__} names no sampling_rate",
            "use a model of sounds, such as Whisper or wav2vec 2.0",
        )
    return processor


def extractor_of(processor: Any) -> Any:
    """Return the feature extractor of a processor, which may be one itself."""
    return getattr(processor, "feature_extractor", processor)


READ_FILE = """\
# A recording at the rate of the model.
sound, rate = soundfile.read("path/to/recording.wav", always_2d=True)
"""
"""Lines of a model card."""


def is_raw(extractor: Any) -> bool:
    """Return whether a feature extractor returns the samples, as wav2vec 2.0's and its kin's do."""
    import transformers

    return isinstance(extractor, transformers.Wav2Vec2FeatureExtractor)


def longest_sound(extractor: Any) -> int | None:
    """Return how long a recording a model takes, in tokens of 20 ms; None: any length.

    Whisper's and the Audio Spectrogram Transformer's feature extractors pad all to that length.
    """
    if (n_samples := getattr(extractor, "n_samples", None)) is not None:
        return int(n_samples) * TOKENS_PER_SECOND // int(extractor.sampling_rate)
    frames = getattr(extractor, "max_length", None)  # 10 ms each
    return None if frames is None else int(frames) // 2


def tokens_of(seconds: Sequence[float]) -> NDArray[np.int64]:
    """Return the lengths of recordings in tokens of 20 ms, rounded up, shape (n,)."""
    return np.ceil(np.asarray(seconds) * TOKENS_PER_SECOND - 1e-9).astype(np.int64)


def features(extractor: Any, rows: Examples, n_tokens: int, model: str) -> dict[str, NDArray[Any]]:
    """Return what a model's feature extractor makes of recordings, as arrays (n_rows, ...).

    Args:
        extractor: The model's feature extractor.
        rows: Rows with the column "audio".
        n_tokens: Length that recordings are cut to and, if it does not pad them itself, padded to.
        model: Name of the model, for errors.

    Raises:
        ModelError: if it returns arrays of several shapes, or nothing that is known.
        DataError: if there is not enough memory for them.
    """
    rate = extractor.sampling_rate
    longest = n_tokens * rate // TOKENS_PER_SECOND
    options: dict[str, Any] = {"sampling_rate": rate, "return_tensors": "np"}
    if is_raw(extractor):
        options |= {"padding": "max_length", "max_length": longest}
    parts: dict[str, list[NDArray[Any]]] = {}
    problem = ""
    for start in range(0, len(rows), _SOUNDS_AT_ONCE):
        cells = rows["audio"][start : start + _SOUNDS_AT_ONCE]
        sounds = [samples_at(cell, rate, longest) for cell in cells]
        try:
            with quiet_transformers():
                found = extractor(sounds, **options)
            unknown = [name for name in found if name not in INPUTS]
            problem = f"also returns {', '.join(unknown)}" if unknown else ""
            for name in INPUTS:
                if name in found:
                    array = np.asarray(found[name])
                    kind = np.int8 if name == "attention_mask" else np.float32
                    parts.setdefault(name, []).append(array.astype(kind, copy=False))
        except ValueError as error:
            problem = f"fails ({first_line(error)})"
        shapes = {part.shape[1:] for part in parts.get("input_values", parts.get(INPUTS[1], []))}
        if not problem and len(shapes) != 1:
            problem = "returns arrays of several shapes"
        if problem:
            raise ModelError(
                "model",
                model,
                f"its {type(extractor).__name__} {problem}",
                "use a model such as wav2vec 2.0, HuBERT, Whisper or the Audio Spectrogram "
                "Transformer",
            )
        if not start:
            n_bytes = sum(array[0].nbytes for (array,) in parts.values()) * len(rows)
            check_memory(n_bytes, rows.source, "sounds")
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}
