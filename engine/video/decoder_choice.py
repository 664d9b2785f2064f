"""The decoder that a data set gets: the fastest that decodes all of it, frame for frame.

PyAV decodes whatever the index lists. DALI is asked twice: every video is compared with what its
sources say that it cannot decode, and a few are decoded to see what this machine's decoder does.
"""

import functools
import importlib.util
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import cast, get_args

import torch

from engine.errors import UserError
from engine.video.colour import BT601
from engine.video.index import VideoEntry, VideoIndex
from engine.video.pyav_stream import PyAVStream
from engine.video.sampler import ClipRequest
from engine.video.streams import ClipStream, Decoder, IndexedFiles, StreamSettings

NAMES = {"dali-cpu": "DALI (CPU)", "dali-gpu": "DALI (GPU)", "pyav": "PyAV (CPU)"}
_DALI_CPU_CODECS = {"vp8", "vp9", "mjpeg"}
_DALI_GPU_CODECS = {*_DALI_CPU_CODECS, "h264", "hevc", "av1", "mpeg4"}
# NVDEC's common ground over codecs and GPU generations.
_DALI_GPU_PIXEL_FORMATS = {"yuv420p", "yuvj420p"}


@functools.cache
def try_dali(samples: VideoIndex, decoder: Decoder, device: torch.device) -> str | None:
    """Decode videos for real, once per process; see `engine.video.dali_stream.trial`."""
    try:
        from engine.video.dali_stream import trial
    except (ImportError, OSError) as error:  # one that does not fit this machine
        return f"cannot be loaded: {str(error).partition(chr(10))[0]}"
    return trial(samples, decoder, device)


def choose_decoder(
    asked: str, index: VideoIndex, used: Sequence[int], device: torch.device
) -> tuple[Decoder, str]:
    """The decoder, and why it is not a faster one: a clause, empty where there is none.

    `used`: the videos that are loaded. Raises UserError where the decoder that was asked for by
    name cannot decode them, or is not there.
    """
    if asked == "auto":
        # On the CPU PyAV is at least as fast as DALI, which reads and indexes whole files.
        if device.type != "cuda":
            return "pyav", ""
        problem = _problem("dali-gpu", index, used, device)
        return ("pyav", f"because {NAMES['dali-gpu']} {problem}") if problem else ("dali-gpu", "")
    if asked not in get_args(Decoder):
        raise UserError(f"decoder {asked!r}: use auto, {', '.join(get_args(Decoder))}")
    chosen = cast(Decoder, asked)
    if chosen == "dali-gpu" and device.type != "cuda":
        raise UserError(f"decoder dali-gpu needs a GPU, but this run is on {device}")
    if chosen != "pyav" and (problem := _problem(chosen, index, used, device)):
        raise UserError(f"decoder {asked} {problem}; use decoder auto or pyav")
    return chosen, ""


def open_stream(
    files: IndexedFiles,
    batches: Iterator[list[ClipRequest]],
    decoder: Decoder,
    settings: StreamSettings,
) -> ClipStream:
    """The stream of clips that a decoder makes; `choose_decoder` has allowed it."""
    if decoder == "pyav":
        return PyAVStream(files, batches, settings)
    from engine.video.dali_stream import DaliStream  # late: DALI may not be installed

    return DaliStream(files, batches, decoder, settings)


def obstacle(entry: VideoEntry, decoder: Decoder) -> str:
    """Why a video is not for this decoder, by what is known of it; empty if it is."""
    if decoder == "pyav":
        return ""
    if entry.codec not in (_DALI_GPU_CODECS if decoder == "dali-gpu" else _DALI_CPU_CODECS):
        return entry.codec
    if decoder == "dali-gpu" and entry.pixel_format not in _DALI_GPU_PIXEL_FORMATS:
        return f"{entry.codec} in {entry.pixel_format}"
    # DALI knows no other matrix (dali/operators/video/color_space.cu, and swscale's default), and
    # counts packets by their times (frames_decoder_base.cc).
    if entry.matrix not in BT601:
        return f"{entry.codec} in {entry.matrix} colours"
    if not entry.times_number_frames:
        return f"{entry.codec} whose times do not number its frames"
    return ""


def _problem(
    decoder: Decoder, index: VideoIndex, used: Sequence[int], device: torch.device
) -> str | None:
    """What keeps DALI from these videos: how many and which, or what a trial found."""
    if importlib.util.find_spec("nvidia") is None or not importlib.util.find_spec("nvidia.dali"):
        return "is not installed (pip install nvidia-dali-cuda130)"
    reasons: Counter[str] = Counter()
    first = ""
    for video in used:
        entry = index.entries[video]
        if reason := obstacle(entry, decoder):
            reasons[reason] += 1
            first = first or entry.path
    if reasons:
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        return f"cannot decode {sum(reasons.values())} of {len(used)} ({counts}; e.g. {first})"
    return try_dali(_samples(index, used), decoder, device)


def _samples(index: VideoIndex, used: Sequence[int]) -> VideoIndex:
    """The smallest and the largest video of each kind: NVDEC has limits of both."""
    kinds: dict[tuple[str, str, str], list[VideoEntry]] = {}
    for video in used:
        entry = index.entries[video]
        kinds.setdefault((entry.codec, entry.pixel_format, entry.range), []).append(entry)

    def size(entry: VideoEntry) -> tuple[int, int]:
        return min(entry.width, entry.height), max(entry.width, entry.height)

    chosen = {end(kind, key=size) for kind in kinds.values() for end in (min, max)}
    entries = tuple(sorted(chosen, key=lambda entry: entry.path))
    return VideoIndex(index.root, index.classes, entries)
