"""A source of videos to evaluate: a folder of files, of frame folders, or an npz archive.

- A folder (and the folders in it) with mp4, webm, avi, mov, mkv files.
- A folder of folders that hold a video's frames as PNG, JPEG, WebP or BMP, in the order of the
  numbers in their names. `engine/sample.py --format png` writes such (`frames/`).
- An npz with `videos`, uint8 [N, T, H, W, 3], as `engine/sample.py --format npz` writes it.

Videos are ordered by their path. What a video is, is judged by the same full decode that training's
index is made by; a damaged one is an error, never left out silently.

Shapes: T frames, H x W pixels, C = 3 (RGB), uint8.
"""

import hashlib
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch.nn.functional import interpolate

from engine.durable_files import reading
from engine.errors import UserError
from engine.evaluation.judging import judged
from engine.processors import cores_per_process
from engine.video.containers import RejectedError
from engine.video.decoding import decode_window
from engine.video.file_pool import run_all
from engine.video.folders import LINK_OUT, files_of
from engine.video.index import VideoIndex
from engine.video.inspection import VideoFacts
from engine.video.keyframes import unpack
from engine.video.reasons import VIDEO_SUFFIXES
from engine.video.streams import IndexedFiles

FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_READ_SUFFIXES = {*VIDEO_SUFFIXES, *FRAME_SUFFIXES}
_ARCHIVE_OF_SAMPLE = "samples.npz"
_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "F")
"""Pillow clips their values at 255 when it makes RGB of them."""
_LEAST_FOR_PROCESSES = 256  # starting them takes as long as inspecting some hundred small files
_Frames = NDArray[np.uint8]
_NOT_VIDEOS_OF_SAMPLE = ("grid.mp4",)
"""engine/sample.py writes it beside the clips: it shows them all at once."""


@dataclass(frozen=True)
class VideoShape:
    """What must be known of a video before a clip is cut from it."""

    num_frames: int
    height: int
    width: int
    """As displayed."""
    facts: VideoFacts | None = None
    """Of video files."""


class VideoSource(ABC):
    """Videos by number; whoever has other ones than files derives from it."""

    def __init__(self, path: str, names: list[str]) -> None:
        self.path, self.names = path, names
        """Where the videos are, and what each is called there."""

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def digest(self, number: int) -> str:
        """sha256 of a video's content, without its name."""

    @abstractmethod
    def inspect(self, number: int) -> VideoShape:
        """A video's shape. Raises UserError that names the video, if it is damaged."""

    def inspect_all(self, order: list[int], num_ahead: int) -> Iterator[tuple[int, VideoShape]]:
        """Numbers of `order` and their shapes, as they are asked for; the first `num_ahead` may be
        inspected at once. Raises UserError as `inspect` does.
        """
        for number in order:
            yield number, self.inspect(number)

    @abstractmethod
    def read(self, number: int, shape: VideoShape, places: list[int]) -> _Frames:
        """The frames at `places`, increasing, as displayed: [T, H, W, C]. Raises UserError."""

    def label(self, number: int) -> str | None:
        """The class folder that a video lies in; None at the top."""
        parent = Path(self.names[number]).parent.as_posix()
        return None if parent == "." else parent


class VideoFiles(VideoSource):
    """Video files below a folder."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        super().__init__(str(folder), names)
        self._folder = folder

    def digest(self, number: int) -> str:
        """See `VideoSource`."""
        return _file_digest(self._folder / self.names[number])

    def inspect(self, number: int) -> VideoShape:
        """See `VideoSource`."""
        return self._shape(number, judged(self._folder / self.names[number]))

    def inspect_all(self, order: list[int], num_ahead: int) -> Iterator[tuple[int, VideoShape]]:
        """See `VideoSource`: many files by several processes, one of which a file may crash."""
        num_workers = cores_per_process()
        if num_workers == 1 or num_ahead < _LEAST_FOR_PROCESSES:
            yield from super().inspect_all(order, num_ahead)
            return
        for first in range(0, len(order), num_ahead):
            part = order[first : first + num_ahead]
            paths = {str(number): self._folder / self.names[number] for number in part}
            found: dict[int, VideoFacts | str | None] = {}
            for name, verdict in run_all(judged, paths, num_workers):
                found[int(name)] = verdict
            for number in part:
                yield number, self._shape(number, found[number])

    def _shape(self, number: int, found: VideoFacts | str | None) -> VideoShape:
        if not isinstance(found, VideoFacts):
            path, reason = self._folder / self.names[number], found or "crashes the decoder"
            raise UserError(f"cannot use {path}: {reason}; mend or remove it")
        return VideoShape(found.num_frames, found.height, found.width, found)

    def read(self, number: int, shape: VideoShape, places: list[int]) -> _Frames:
        """See `VideoSource`."""
        path, facts = self._folder / self.names[number], shape.facts
        assert facts is not None, "inspect gave the shape"
        stride = places[1] - places[0] if len(places) > 1 else 1
        assert places == list(range(places[0], places[-1] + 1, stride)), "evenly spaced"
        try:
            frames_THWC = decode_window(
                path,
                start_frame=places[0],
                num_frames=len(places),
                frame_stride=stride,
                video_frames=facts.num_frames,
                keyframes=unpack(facts.keyframes),
            )
        except RejectedError as rejected:
            raise UserError(f"cannot use {path}: {rejected}; mend or remove it") from None
        return _upright(frames_THWC, facts)


class IndexedVideos(VideoFiles):
    """The videos of a training index, which knows their shapes already."""

    def __init__(self, index: VideoIndex) -> None:
        super().__init__(index.root, [entry.path for entry in index.entries])
        self._index, self._files = index, IndexedFiles(index)

    def digest(self, number: int) -> str:
        """See `VideoSource`: as the index has it."""
        return self._index.entries[number].sha256

    def inspect_all(self, order: list[int], num_ahead: int) -> Iterator[tuple[int, VideoShape]]:
        """See `VideoSource`: nothing is decoded."""
        for number in order:
            yield number, self._shape(number, self._index.entries[number])

    def read(self, number: int, shape: VideoShape, places: list[int]) -> _Frames:
        """See `VideoSource`; of the file that was indexed."""
        self._files.check(number)
        return super().read(number, shape, places)

    def label(self, number: int) -> str | None:
        """The class's name."""
        label = self._index.entries[number].label
        return None if label is None else self._index.classes[label]


class FrameFolders(VideoSource):
    """Folders of pictures, a folder per video."""

    def __init__(self, folder: Path, frames: dict[str, list[Path]]) -> None:
        super().__init__(str(folder), list(frames))
        self._frames = list(frames.values())

    def digest(self, number: int) -> str:
        """See `VideoSource`."""
        digest = hashlib.sha256()
        for path in self._frames[number]:
            digest.update(_file_digest(path).encode())
        return digest.hexdigest()

    def inspect(self, number: int) -> VideoShape:
        """See `VideoSource`: by the first frame."""
        height, width, _ = _picture(self._frames[number][0]).shape
        return VideoShape(len(self._frames[number]), height, width)

    def read(self, number: int, shape: VideoShape, places: list[int]) -> _Frames:
        """See `VideoSource`."""
        frames = []
        for place in places:
            path = self._frames[number][place]
            frame_HWC = _picture(path)
            if frame_HWC.shape[:2] != (shape.height, shape.width):
                raise UserError(
                    f"{path} has {frame_HWC.shape[1]}x{frame_HWC.shape[0]} pixels, the first frame "
                    f"of its folder {shape.width}x{shape.height}"
                )
            frames.append(frame_HWC)
        return np.stack(frames)


class ArchivedVideos(VideoSource):
    """`videos` of an npz; or any such array in memory."""

    def __init__(self, path: str, videos_NTHWC: _Frames, labels: list[str] | None = None) -> None:
        digits = len(str(max(len(videos_NTHWC) - 1, 0)))
        super().__init__(path, [f"videos[{n:0{digits}d}]" for n in range(len(videos_NTHWC))])
        self._videos_NTHWC, self._labels = videos_NTHWC, labels

    def digest(self, number: int) -> str:
        """See `VideoSource`."""
        video_THWC = np.ascontiguousarray(self._videos_NTHWC[number])
        digest = hashlib.sha256(repr(video_THWC.shape).encode())
        digest.update(video_THWC.data)
        return digest.hexdigest()

    def inspect(self, number: int) -> VideoShape:
        """See `VideoSource`."""
        return VideoShape(*self._videos_NTHWC.shape[1:4])

    def read(self, number: int, shape: VideoShape, places: list[int]) -> _Frames:
        """See `VideoSource`."""
        return np.array(self._videos_NTHWC[number][places])

    def label(self, number: int) -> str | None:
        """The number in `labels`, if the archive has them."""
        return None if self._labels is None else self._labels[number]


def open_source(path: Path, *, follow_symlinks: bool = False) -> VideoSource:
    """The videos at `path`. Raises UserError, which says what is expected, where there are none.

    Also for symbolic links that lead out of the folder `path`, unless `follow_symlinks`.
    """
    if path.suffix == ".npz" and path.is_file():
        return _open_archive(path)
    if not path.is_dir():
        what = "it is a file" if path.exists() else "no such folder"
        raise UserError(f"no videos at {path}: {what}; name a folder of videos or an .npz file")
    with reading(path):
        found = list(files_of(path, follow_symlinks=follow_symlinks))
    for each in found:
        suffix = Path(each.path).suffix.lower()
        if each.leads_out and (each.path.endswith("/") or suffix in _READ_SUFFIXES):
            raise UserError(f"{path / each.path} is {LINK_OUT}; --follow-symlinks takes it")
    inside = (path / each.path for each in found if not each.leads_out)
    files = sorted(file for file in inside if file.is_file())
    videos = [
        file.relative_to(path).as_posix()
        for file in files
        if file.suffix.lower() in VIDEO_SUFFIXES and file.name not in _NOT_VIDEOS_OF_SAMPLE
    ]
    frames: dict[str, list[Path]] = {}
    for file in files:
        if file.suffix.lower() in FRAME_SUFFIXES and file.parent != path:
            frames.setdefault(file.parent.relative_to(path).as_posix(), []).append(file)
    if videos and frames:
        raise UserError(
            f"{path} holds both video files ({videos[0]}) and folders of frames "
            f"({next(iter(frames))}); name a folder with one kind, such as {path}/frames"
        )
    if videos and (path / _ARCHIVE_OF_SAMPLE).is_file():
        raise UserError(
            f"{path} holds {_ARCHIVE_OF_SAMPLE} beside video files, and it is exact; name it, or a "
            "folder without it"
        )
    if videos:
        return VideoFiles(path, videos)
    if frames:
        return FrameFolders(path, {name: sorted(frames[name], key=_number) for name in frames})
    loose = any(file.suffix.lower() in FRAME_SUFFIXES for file in files)
    hint = "; frames lie in a folder of their own for each video" if loose else ""
    raise UserError(f"no videos in {path}: no mp4, webm, avi, mov or mkv, nor frames{hint}")


def _open_archive(path: Path) -> ArchivedVideos:
    """An npz, without reading the videos where they are stored uncompressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            labels = None
            if "labels.npy" in members:
                with archive.open("labels.npy") as file:
                    found = np.lib.format.read_array(file, allow_pickle=False)
                labels = [str(label) for label in found.ravel().tolist()]
            if "videos.npy" not in members:
                names = ", ".join(members) or "nothing"
                raise UserError(f"{path} has no array 'videos', only {names}")
            if members["videos.npy"].compress_type == zipfile.ZIP_STORED:
                videos = _mapped(path, archive, members["videos.npy"])
            else:
                with archive.open("videos.npy") as file:
                    videos = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if videos.dtype != np.uint8 or videos.ndim != 5 or videos.shape[-1] != 3 or not len(videos):
        raise UserError(
            f"{path}: 'videos' is {videos.dtype} {list(videos.shape)}, not uint8 [N, T, H, W, 3]"
        )
    if labels is not None and len(labels) != len(videos):
        raise UserError(f"{path}: {len(labels)} labels of {len(videos)} videos")
    return ArchivedVideos(str(path), videos, labels)


def _mapped(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> _Frames:
    """An array that lies in the file as it is."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read(file)
        header_bytes = file.tell()
    if dtype.hasobject:
        raise ValueError("it holds objects, which are not read")
    with path.open("rb") as raw:
        raw.seek(member.header_offset + 26)  # the local header's two variable lengths
        name, extra = np.frombuffer(raw.read(4), "<u2").tolist()
    offset = member.header_offset + 30 + name + extra + header_bytes
    if offset + int(np.prod(shape)) * dtype.itemsize > path.stat().st_size:
        raise ValueError("it ends within its videos")
    order: str = "F" if fortran else "C"
    return np.memmap(path, dtype, "r", offset, shape, order)  # type: ignore[call-overload]


def _number(path: Path) -> tuple[list[int], str]:
    """Frames by the numbers in their names: 2.png is before 10.png."""
    return [int(digits) for digits in re.findall(r"\d+", path.stem)], path.name


def _picture(path: Path) -> _Frames:
    try:
        with Image.open(path) as image:
            if image.mode in _DEEP_MODES:
                raise UserError(f"{path} has more than 8 bits per value ({image.mode}): make it 8")
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise UserError(f"cannot read the frame {path}: {error}") from None


def _file_digest(path: Path) -> str:
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _upright(frames_THWC: _Frames, facts: VideoFacts) -> _Frames:
    """Frames as coded as they are displayed: square pixels, turned."""
    turned = np.rot90(frames_THWC, facts.rotation // 90, axes=(1, 2))
    if turned.shape[1:3] == (facts.height, facts.width):
        return np.ascontiguousarray(turned)
    return resized(np.ascontiguousarray(turned), facts.height, facts.width)


def resized(frames_THWC: _Frames, height: int, width: int) -> _Frames:
    """Antialiased bilinear, as Pillow and the training loader do it, rounded to uint8."""
    frames_TCHW = torch.from_numpy(frames_THWC).permute(0, 3, 1, 2)
    size = (height, width)
    if frames_TCHW.shape[2:] != size:
        frames_TCHW = interpolate(frames_TCHW, size=size, mode="bilinear", antialias=True)
    return frames_TCHW.permute(0, 2, 3, 1).contiguous().numpy()
