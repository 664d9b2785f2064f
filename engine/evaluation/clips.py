"""From a source of videos to the clips that a protocol asks for; and clips that are spoilt.

Which videos, which frames of them, and which order frames are shuffled in depend on the protocol's
seed and on the videos' contents alone: another folder or batch size changes nothing.

Shapes: T frames, H x W pixels, C = 3 (RGB), uint8.
"""

import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from engine.errors import UserError
from engine.evaluation.protocol import EvaluationProtocol, Role
from engine.evaluation.video_sources import VideoShape, VideoSource, resized

View = Literal["plain", "shuffled", "frozen"]
"""How a clip is shown: as it is, its frames in a random order, or its first frame throughout."""
_Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class ChosenClip:
    """A clip of a source's video."""

    number: int
    """The video's, in its source."""
    digest: str
    """sha256 of the video's content."""
    shape: VideoShape
    places: tuple[int, ...]
    """The clip's frames; where the video is too short and starts again, they do too."""


@dataclass(frozen=True)
class Selection:
    """The clips that are measured of a source, and what became of the other videos."""

    source: VideoSource
    role: Role
    clips: tuple[ChosenClip, ...]
    num_dropped: int
    num_looped: int

    def lines(self) -> list[str]:
        """What a reader must know of it."""
        counted = [
            f"{self.role}: {len(self.clips)} of {len(self.source)} videos, {self.source.path}"
        ]
        if self.num_dropped:
            counted.append(f"  {self.num_dropped} were too short and left out")
        if self.num_looped:
            counted.append(f"  {self.num_looped} were too short and start again")
        return counted


def choose_clips(
    source: VideoSource, role: Role, protocol: EvaluationProtocol, most: int | None
) -> Selection:
    """At most `most` clips (None: all), one of each video, in an order drawn by the seed.

    Decodes every chosen video once, so that damaged and short ones are told before anything
    expensive starts. Raises UserError for those, and where fewer than two clips are left.
    """
    order = list(range(len(source)))
    random.Random(f"order {protocol.seed}").shuffle(order)
    clips: list[ChosenClip] = []
    num_dropped = num_looped = 0
    source_frames = protocol.source_frames(role)
    total = len(order) if most is None else min(most, len(order))
    with tqdm(total=total, desc=f"reading {role}", unit="video") as bar:
        for number, shape in source.inspect_all(order, num_ahead=total):
            if most is not None and len(clips) == most:
                break
            if shape.num_frames < source_frames:
                if protocol.short == "drop":
                    num_dropped += 1
                    continue
                if protocol.short == "error":
                    raise UserError(
                        f"{source.path}: {source.names[number]} has {shape.num_frames} frames, a "
                        f"clip of the protocol spans {source_frames}; --set short=drop "
                        "leaves such videos out, short=loop lets them start again, and num_frames "
                        "shortens the clips"
                    )
                num_looped += 1
            digest = source.digest(number)
            clips.append(ChosenClip(number, digest, shape, _places(shape, digest, role, protocol)))
            bar.update()
    if len(clips) < 2:
        raise UserError(
            f"{source.path}: {len(clips)} of {len(source)} videos can be used "
            f"({num_dropped} are shorter than {source_frames} frames), and two are the "
            "least that have a covariance"
        )
    return Selection(source, role, tuple(clips), num_dropped, num_looped)


def check_sizes(selections: list[Selection], protocol: EvaluationProtocol) -> None:
    """UserError where frames of several sizes would be compared: their detail differs already."""
    if protocol.resolution is not None:
        return
    first: tuple[str, int, int] | None = None
    for selection in selections:
        for clip in selection.clips:
            name = f"{selection.source.path}: {selection.source.names[clip.number]}"
            width, height = clip.shape.width, clip.shape.height
            if first is None:
                first = name, width, height
            if (width, height) != first[1:]:
                raise UserError(
                    f"{name} has {width}x{height} pixels, {first[0]} {first[1]}x{first[2]}; bring "
                    "both sources to one size with --set resolution=PIXELS"
                )


def read_clip(source: VideoSource, clip: ChosenClip, protocol: EvaluationProtocol) -> _Frames:
    """The clip's frames at the protocol's size: [T, H, W, C]. Raises UserError."""
    looped = len(set(clip.places)) < len(clip.places)
    wanted = list(range(clip.shape.num_frames)) if looped else list(clip.places)
    frames_THWC = source.read(clip.number, clip.shape, wanted)
    frames_THWC = fitted(frames_THWC, protocol)
    return frames_THWC[list(clip.places)] if looped else frames_THWC


def fitted(frames_THWC: _Frames, protocol: EvaluationProtocol) -> _Frames:
    """Frames at the protocol's resolution, by its `fit`."""
    side = protocol.resolution
    if side is None:
        return frames_THWC
    if protocol.fit == "stretch":
        return resized(frames_THWC, side, side)
    height, width = frames_THWC.shape[1:3]
    shorter = min(height, width)
    # Rounded as the training loader does it: engine/video/geometry.py.
    size = [(2 * each * side + shorter) // (2 * shorter) for each in (height, width)]
    frames_THWC = resized(frames_THWC, *size)
    top, left = ((each - side + 1) // 2 for each in size)
    return np.ascontiguousarray(frames_THWC[:, top : top + side, left : left + side])


def viewed(clip_THWC: _Frames, view: View, digest: str, seed: int) -> _Frames:
    """The clip as the view shows it; `digest` and `seed` draw the order of shuffled frames.

    An order that leaves every frame in its place is drawn again.
    """
    if view == "frozen":
        return np.repeat(clip_THWC[:1], len(clip_THWC), axis=0)
    if view == "shuffled" and len(clip_THWC) > 1:
        order = list(range(len(clip_THWC)))
        draws = random.Random(f"shuffle {seed} {digest}")
        while order == sorted(order):
            draws.shuffle(order)
        return clip_THWC[order]
    return clip_THWC


def clips_of(
    selection: Selection,
    numbers: range,
    view: View,
    protocol: EvaluationProtocol,
    *,
    num_ahead: int,
    num_threads: int,
) -> Iterator[_Frames]:
    """Clips of a selection in their order, the next `num_ahead` read while one is in use."""

    def read(clip: ChosenClip) -> _Frames:
        frames_THWC = read_clip(selection.source, clip, protocol)
        return viewed(frames_THWC, view, clip.digest, protocol.seed)

    wanted = iter(selection.clips[numbers.start : numbers.stop])
    threads = ThreadPoolExecutor(num_threads)
    try:
        reading = deque(threads.submit(read, clip) for clip in islice(wanted, num_ahead))
        while reading:
            frames_THWC = reading.popleft().result()
            reading.extend(threads.submit(read, clip) for clip in islice(wanted, 1))
            yield frames_THWC
    finally:
        threads.shutdown(cancel_futures=True)


def _places(
    shape: VideoShape, digest: str, role: Role, protocol: EvaluationProtocol
) -> tuple[int, ...]:
    offset = protocol.real_offset if role == "real" else protocol.generated_offset
    slack = shape.num_frames - protocol.source_frames(role)
    span = range(0, protocol.source_frames(role), protocol.stride(role))
    if slack < 0:
        return tuple(place % shape.num_frames for place in span)
    start = {"first": 0, "centre": slack // 2}.get(offset)
    if start is None:
        start = random.Random(f"offset {protocol.seed} {digest}").randint(0, slack)
    return tuple(start + place for place in span)
