"""The sample data set: seeded clips of coloured shapes, one shape and motion per class.

They are written as real video files, so that training reads them through the same index, decoder
and loader as Kinetics. Classes must differ at a glance at 16x16 pixels, every 4th frame: shapes are
large, edges soft, colours strong, and a motion takes about one clip to complete.

Shapes: T frames, H x W pixels; positions are in [-1, 1] on both axes, times in [0, 1] per clip.
"""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from engine.configuration import ProceduralClips
from engine.durable_files import writing
from engine.errors import UserError
from engine.video.encoding import ENCODINGS, REPEATABLE, add_stream
from engine.video.indexing import build_index

Array = NDArray[np.floating]  # float32 throughout; numpy's stubs widen it
FPS = 25
_INDEX, _SETTINGS = "index.jsonl", "procedural.json"
_EDGE = 0.09  # width of a shape's soft edge: 3 of 64 pixels


@dataclass(frozen=True)
class _Pose:
    """Where a shape is at each time: centre [T], angle in radians [T], and size [T]."""

    x: Array
    y: Array
    angle: Array
    size: Array


# Signed distance functions: negative inside. u, v are the shape's own axes, both [T, H, W].
def _circle(u: Array, v: Array) -> Array:
    return np.hypot(u, v) - 1


def _square(u: Array, v: Array) -> Array:
    return np.maximum(np.abs(u), np.abs(v)) - 0.85


def _bar(u: Array, v: Array) -> Array:
    return np.maximum(np.abs(u) - 1.6, np.abs(v) - 0.4)


def _cross(u: Array, v: Array) -> Array:
    return np.minimum(_bar(u / 0.8, v), _bar(v / 0.8, u))


def _ring(u: Array, v: Array) -> Array:
    return np.abs(np.hypot(u, v) - 0.75) - 0.3


def _triangle(u: Array, v: Array) -> Array:
    return np.maximum(np.abs(u) * 0.87 + v * 0.5, -v) - 0.6


def _pair(u: Array, v: Array) -> Array:
    return np.minimum(np.hypot(u - 1, v), np.hypot(u + 1, v)) - 0.65


def _stripes(u: Array, v: Array) -> Array:
    return 0.35 * np.cos(np.pi * u)


# Motions: times [T] and three uniform numbers of the clip's own -> pose.
def _bounce(t: Array, a: float, b: float, c: float) -> _Pose:
    bounce = np.abs(np.sin(np.pi * (1.5 * t + a)))
    x = 0.5 * np.sin(np.pi * (t + b))
    return _Pose(x, 0.55 - 1.1 * bounce, 0 * t, 0 * t + 0.38 + 0.06 * c)


def _rotate(t: Array, a: float, b: float, c: float) -> _Pose:
    turn = np.pi * (t + 2 * a)
    return _Pose(0 * t + 0.3 * b - 0.15, 0 * t + 0.3 * c - 0.15, turn, 0 * t + 0.5)


def _zoom(t: Array, a: float, b: float, c: float) -> _Pose:
    size = 0.55 + 0.3 * np.sin(2 * np.pi * (t + a))
    return _Pose(0 * t + 0.2 * b - 0.1, 0 * t + 0.2 * c - 0.1, 0 * t, size)


def _orbit(t: Array, a: float, b: float, c: float) -> _Pose:
    turn = 2 * np.pi * (t + a)
    radius = 0.45 + 0.1 * b
    return _Pose(radius * np.cos(turn), radius * np.sin(turn), 0 * t, 0 * t + 0.4 + 0.05 * c)


def _sweep(t: Array, a: float, b: float, c: float) -> _Pose:
    x = 0.6 * np.sin(2 * np.pi * (t + a))
    return _Pose(x, 0 * t + 0.1 * b, 0 * t + np.pi / 2, 0 * t + 0.6 + 0.1 * c)


def _drift(t: Array, a: float, b: float, c: float) -> _Pose:
    return _Pose(1.2 * t + 2 * a, 0 * t, 0 * t + 0.5 + 0.2 * b, 0 * t + 0.38 + 0.04 * c)


@dataclass(frozen=True)
class _Kind:
    name: str
    shape: Callable[[Array, Array], Array]
    motion: Callable[[Array, float, float, float], _Pose]
    hue: float  # of the shape, in turns; the background has the opposite one


_KINDS = (
    _Kind("bouncing circle", _circle, _bounce, 0.00),
    _Kind("rotating square", _square, _rotate, 0.60),
    _Kind("zooming ring", _ring, _zoom, 0.14),
    _Kind("orbiting triangle", _triangle, _orbit, 0.36),
    _Kind("sweeping bar", _bar, _sweep, 0.86),
    _Kind("spinning cross", _cross, _rotate, 0.08),
    _Kind("circling pair", _pair, _rotate, 0.50),
    _Kind("drifting stripes", _stripes, _drift, 0.74),
)
MAX_CLASSES = len(_KINDS)


def render_clip(kind: int, seed: int, number: int, num_frames: int, resolution: int) -> NDArray:
    """One clip of class `kind`, uint8 [T, H, W, 3]; the same pixels for the same arguments."""
    random = np.random.default_rng([seed, kind, number])
    look = _KINDS[kind]
    # Motion is per frame, not per clip: longer clips show more of it, not slower.
    t = np.arange(num_frames, dtype=np.float32)[:, None, None] / 64
    pose = look.motion(t, *random.random(3).tolist())
    axis = (np.arange(resolution, dtype=np.float32) + 0.5) * (2 / resolution) - 1
    y, x = axis[None, :, None], axis[None, None, :]
    dx, dy = x - pose.x, y - pose.y
    cos, sin = np.cos(pose.angle), np.sin(pose.angle)
    u, v = (cos * dx + sin * dy) / pose.size, (cos * dy - sin * dx) / pose.size
    distance = look.shape(u, v) * pose.size
    cover = np.clip(0.5 - distance / _EDGE, 0, 1)[..., None]
    hue = look.hue + random.uniform(-0.03, 0.03)
    colour = _rgb(hue, saturation=0.85, value=random.uniform(0.9, 1.0))
    background = _texture(random, t, x, y, hue + 0.5)
    pixels = background + cover * (colour - background)
    assert pixels.dtype == np.float32  # twice as fast to make as float64
    return (pixels * 255 + 0.5).astype(np.uint8)


def _texture(random: np.random.Generator, t: Array, x: Array, y: Array, hue: float) -> Array:
    """Two dark shades of one hue, mixed by slowly moving plane waves, [T, H, W, 3]."""
    waves = np.zeros(np.broadcast_shapes(t.shape, x.shape, y.shape), dtype=np.float32)
    for _ in range(3):
        frequency, phase = random.uniform(-5, 5, size=2), random.uniform(0, 2 * np.pi)
        along_x = float(frequency[0]) * x
        along_yt = float(frequency[1]) * y + random.uniform(-2, 2) * t + phase
        # sin(p + q), expanded: sines of two small arrays instead of one large one
        waves += np.sin(along_x) * np.cos(along_yt) + np.cos(along_x) * np.sin(along_yt)
    mix = (waves / 6 + 0.5)[..., None]
    dark, light = _rgb(hue, 0.6, 0.12), _rgb(hue + 0.08, 0.45, 0.5)
    return dark + mix * (light - dark)


def _rgb(hue: float, saturation: float, value: float) -> Array:
    ramps = np.abs((hue + np.array([0, 2 / 3, 1 / 3], dtype=np.float32)) % 1 * 6 - 3) - 1
    return value * (1 - saturation * (1 - np.clip(ramps, 0, 1)))


def write_procedural_clips(
    folder: str | Path, settings: ProceduralClips, num_classes: int, *, num_workers: int = 1
) -> None:
    """Write the clips into class folders below `folder`, with their index `index.jsonl`.

    Clip i is of class i % num_classes. All of it is made aside and renamed when whole, so that an
    interrupted run leaves nothing that looks like a data set. Raises UserError when there are
    more classes than kinds of motion, or when `folder` cannot be written.
    """
    if not 1 <= num_classes <= MAX_CLASSES:
        raise UserError(f"data.num_classes {num_classes}: procedural clips have 1 to {MAX_CLASSES}")
    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}.making-{os.getpid()}")
    try:
        with writing(folder, av.error.FFmpegError):
            shutil.rmtree(aside, ignore_errors=True)
            for kind in range(min(num_classes, settings.num_clips)):
                (aside / _KINDS[kind].name).mkdir(parents=True)
            with ThreadPoolExecutor(max(1, num_workers)) as pool:
                tasks = [
                    pool.submit(_write_clip, aside, settings, number, num_classes)
                    for number in range(settings.num_clips)
                ]
                for task in tasks:
                    task.result()
            build_index(aside, aside / _INDEX, num_workers=0, progress=False)
            (aside / _SETTINGS).write_text(_described(settings, num_classes))
            aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def ensure_procedural(
    folder: str | Path,
    settings: ProceduralClips,
    num_classes: int,
    say: Callable[[str], None] = lambda line: None,
    *,
    num_workers: int = 1,
) -> Path:
    """The index of the sample data set in `folder`, which is made first when it is not there.

    `say` receives a line when something is made. Raises UserError when the folder cannot be read
    or holds anything else: clips made with other settings, or files that are not ours to replace.
    """
    folder = Path(folder)
    if not _is_made(folder, _described(settings, num_classes)):
        say(f"making {settings.num_clips} sample clips in {folder}")
        write_procedural_clips(folder, settings, num_classes, num_workers=num_workers)
    return folder / _INDEX


def _is_made(folder: Path, description: str) -> bool:
    described = folder / _SETTINGS
    try:
        if described.exists():
            # Other settings may be anything, also no text.
            if described.read_bytes() != description.encode():
                raise UserError(
                    f"{folder} holds sample clips made with other settings (see {described}); "
                    "remove it or choose another data.path"
                )
            return True
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                f"{folder} exists and is not the sample data set; choose another data.path for it"
            )
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename}: {error.strerror}; make it readable or choose another "
            "data.path"
        ) from None
    return False


def _described(settings: ProceduralClips, num_classes: int) -> str:
    return json.dumps({**settings.model_dump(), "num_classes": num_classes}, indent=2) + "\n"


def _write_clip(folder: Path, settings: ProceduralClips, number: int, num_classes: int) -> None:
    kind, place = number % num_classes, number // num_classes
    frames = render_clip(kind, settings.seed, place, settings.num_frames, settings.resolution)
    path = folder / _KINDS[kind].name / f"{place:04d}.{ENCODINGS[settings.codec].suffix}"
    with av.open(str(path), "w", options=REPEATABLE) as container:
        side = settings.resolution
        stream = add_stream(container, settings.codec, side, side, Fraction(FPS))
        for frame_HWC in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode())
