"""Small copies of videos: the same frames under the same numbers, whole or not there."""

import fcntl
import json
import os
import re
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from clip_loading import index_of, loader
from numbered_videos import decode_all, read_number, real_clip, write_numbered
from numpy.typing import NDArray
from small_runs import full_disk
from test_colours import COLOURS, write_colours

from engine.errors import UserError
from engine.video import copying, transcoding
from engine.video.containers import RejectedError
from engine.video.copying import copy_video
from engine.video.decoder_choice import obstacle
from engine.video.encoding import Codec
from engine.video.index import VideoIndex, load_rejects
from engine.video.inspection import VideoFacts
from engine.video.loader import LoadedClips
from engine.video.transcoding import Copies, build_copies


def copies_of(root: Path, **options: Any) -> Copies:
    """Of the videos in `root`, in the folder "small" beside it."""
    settings: dict[str, Any] = {"size": 32, "num_workers": 0, "progress": False}
    folder = root.with_name("small")
    return build_copies(root, folder / "index.jsonl", folder, **{**settings, **options})


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources' names, as they are copied."""
    names: list[str] = []

    def counted(source: Path, *more: Any) -> VideoFacts:
        names.append(source.parent.name)
        return copy_video(source, *more)

    monkeypatch.setattr(transcoding, "copy_video", counted)
    return names


def videos(root: Path, names: str = "abc", num_frames: int = 10) -> Path:
    """A class folder per letter with a video each."""
    for name in names:
        write_numbered(root / name, "mjpeg", num_frames=num_frames)
    return root


@pytest.mark.parametrize("codec", ["mjpeg", "vp9"])
def test_frames_keep_their_numbers(codec: Codec, tmp_path: Path) -> None:
    for source in ("h264", "h264-open-gop", "vp9", "mpeg4"):
        write_numbered(tmp_path / "v" / source, source, num_frames=40)
    copies = copies_of(tmp_path / "v", codec=codec)
    assert (len(copies.index.entries), copies.rejects, copies.num_made) == (4, [], 4)
    assert VideoIndex.load(tmp_path / "small" / "index.jsonl") == copies.index
    for number, entry in enumerate(copies.index.entries):
        assert (entry.codec, entry.num_frames, entry.fps) == (codec, 40, 25)
        assert (entry.width, entry.height) == (48, 32)
        assert obstacle(entry, "dali-gpu") == obstacle(entry, "dali-cpu") == ""
        numbers = [read_number(frame) for frame in decode_all(copies.index.path(number))]
        assert numbers == list(range(40))


def test_classes_and_labels_are_the_sources(tmp_path: Path) -> None:
    videos(tmp_path / "v", "abc")
    (tmp_path / "v" / "a" / "bad.mp4").write_text("x")
    # In the same folder, with the same name but for the suffix.
    write_numbered(tmp_path / "v" / "b", "mjpeg444").rename(tmp_path / "v" / "b" / "mjpeg.avi")
    (tmp_path / "classes.txt").write_text("c\nnone\na\nb\n")
    copies = copies_of(tmp_path / "v", classes=tmp_path / "classes.txt")
    assert copies.index.classes == ("c", "none", "a", "b")
    assert [(entry.path, entry.label) for entry in copies.index.entries] == [
        ("a/mjpeg.mkv.mkv", 2),
        ("b/mjpeg.avi.mkv", 3),
        ("b/mjpeg.mkv.mkv", 3),
        ("c/mjpeg.mkv.mkv", 0),
    ]
    rejects = load_rejects(tmp_path / "small" / "index.jsonl")
    assert rejects == copies.rejects
    assert [(r.path, r.reason[:11]) for r in rejects] == [("a/bad.mp4", "not a video")]


def clips_of(index: VideoIndex) -> LoadedClips:
    clips = loader(index, resolution=32, view_resolution=32, batch_size=8, num_frames=5)
    batch = next(clips)
    clips.close()
    return batch


@pytest.mark.parametrize("codec", ["mjpeg", "vp9"])
def test_training_sees_the_same_windows(codec: Codec, tmp_path: Path) -> None:
    """Cropped at random. The bound is what coding may cost, and another window is farther off."""
    for name in ("bikes", "carphone_pristine"):
        (tmp_path / "v" / name).mkdir(parents=True)
        shutil.copy(real_clip(name), tmp_path / "v" / name / "x.mp4")
    sources, copies = index_of(tmp_path / "v"), copies_of(tmp_path / "v", codec=codec).index
    (wanted, labels), (found, found_labels) = clips_of(sources), clips_of(copies)
    assert torch.equal(labels, found_labels)
    assert set(labels.tolist()) == {0, 1}
    levels = 127.5 * (found - wanted).abs().mean((1, 2, 3, 4))
    others = 127.5 * (found - wanted.roll(1, 0)).abs().mean((1, 2, 3, 4))
    assert (levels < 5).all()
    assert (others > 10).all()


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_turned_videos_become_upright(rotation: int, tmp_path: Path) -> None:
    write_numbered(tmp_path / "v", "h264", num_frames=9, rotation=rotation)
    index = copies_of(tmp_path / "v").index
    (entry,) = index.entries
    size = (48, 32) if rotation == 180 else (32, 48)
    assert (entry.rotation, (entry.width, entry.height)) == (0, size)
    frames = decode_all(index.path(0))
    as_coded = [np.rot90(frame, -rotation // 90) for frame in frames]
    assert [read_number(frame) for frame in as_coded] == list(range(9))


def test_pixels_become_square(tmp_path: Path) -> None:
    """A disc that only the header's 64:45 makes round: as wide as high in the copy."""
    (tmp_path / "v").mkdir()
    width, height, aspect = 180, 144, Fraction(64, 45)
    y, x = np.mgrid[:height, :width]
    inside = ((x + 0.5 - width / 2) * float(aspect)) ** 2 + (y + 0.5 - height / 2) ** 2 < 50**2
    picture = np.repeat(np.where(inside, 235, 16).astype(np.uint8)[..., None], 3, 2)
    with av.open(str(tmp_path / "v" / "x.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        for _ in range(3):
            container.mux(stream.encode(VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    index = copies_of(tmp_path / "v", size=72).index
    (entry,) = index.entries
    assert (entry.sample_aspect_ratio, entry.width, entry.height) == ("1:1", 128, 72)
    disc = decode_all(index.path(0))[1].mean(-1) > 128
    across, down = disc.any(0).sum(), disc.any(1).sum()
    assert abs(across - 50) <= 2  # its diameter of 100, halved
    assert abs(down - 50) <= 2


def test_nothing_is_enlarged(tmp_path: Path) -> None:
    videos(tmp_path / "v", "a")
    (entry,) = copies_of(tmp_path / "v", size=100).index.entries
    assert (entry.width, entry.height) == (96, 64)


@pytest.mark.parametrize("codec", ["mjpeg", "vp9"])
def test_colours_are_the_sources_by_the_copies_own_tags(codec: Codec, tmp_path: Path) -> None:
    """Of a source in BT.709, from which BT.601 is up to 39 levels off, and one in full range."""
    write_colours(tmp_path / "v" / "709.mp4", "bt709", "limited", transfer=1)
    write_colours(tmp_path / "v" / "full.mp4", "bt470bg", "full")
    index = copies_of(tmp_path / "v", codec=codec, size=64).index
    for number, entry in enumerate(index.entries):
        assert (entry.matrix, entry.range) == (
            "bt470bg",
            "full" if codec == "mjpeg" else "limited",
        )
        middles = decode_all(index.path(number))[1, 32, 8::16]
        # Two conversions to whole levels of limited range, and two quantisations.
        assert np.abs(middles.astype(int) - COLOURS).max() <= 6
    assert [entry.transfer for entry in index.entries] == ["bt709", "unspecified"]


def test_frame_rates_are_kept(tmp_path: Path) -> None:
    """Of the header of 30000/1001, and of pictures that come unevenly."""
    (tmp_path / "v").mkdir()
    shutil.copy(real_clip("carphone_pristine"), tmp_path / "v" / "x.mp4")
    with av.open(str(tmp_path / "v" / "y.mkv"), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for time in (0, 100, 130, 500, 700):
            frame = VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    fast, slow = copies_of(tmp_path / "v").index.entries
    assert fast.fps == 29.97003
    assert slow.fps == pytest.approx(4 / 0.7, abs=0.01)
    assert slow.num_frames == 5


def test_only_what_is_new_or_changed_is_copied(tmp_path: Path, made: list[str]) -> None:
    root = videos(tmp_path / "v")
    before = copies_of(root)
    assert made == ["a", "b", "c"]
    made.clear()
    again = copies_of(root)
    assert (again.index, again.num_made, made) == (before.index, 0, [])

    write_numbered(root / "a", "mjpeg", num_frames=11)
    os.utime(root / "b" / "mjpeg.mkv")  # the same content
    gone = (root / "c" / "mjpeg.mkv").read_bytes()
    (root / "c" / "mjpeg.mkv").unlink()
    write_numbered(root / "d", "mjpeg", num_frames=12)
    index = copies_of(root).index
    assert made == ["a", "d"]
    assert [(entry.path[0], entry.num_frames) for entry in index.entries] == [
        ("a", 11),
        ("b", 10),
        ("d", 12),
    ]
    made.clear()
    (root / "c" / "mjpeg.mkv").write_bytes(gone)  # it comes back, and its copy is there yet
    assert len(copies_of(root).index.entries) == 4
    assert made == []


def test_a_copy_that_is_not_as_it_was_written_is_made_anew(tmp_path: Path, made: list[str]) -> None:
    root, small = videos(tmp_path / "v"), tmp_path / "small"
    before = copies_of(root).index
    cut = small / before.entries[0].path
    cut.write_bytes(cut.read_bytes()[:-100])
    (small / before.entries[1].path).unlink()
    made.clear()
    after = copies_of(root).index
    assert made == ["a", "b"]
    assert after.fingerprint() == before.fingerprint()


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = videos(tmp_path / "v", "abcd")
    names: list[str] = []

    def interrupted(source: Path, entry: Any, copy: Path, *more: Any) -> VideoFacts:
        names.append(source.parent.name)
        if names == ["a", "b", "c"]:
            copy.write_bytes(b"half a copy")
            raise KeyboardInterrupt
        return copy_video(source, entry, copy, *more)

    monkeypatch.setattr(transcoding, "copy_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        copies_of(root)
    small = tmp_path / "small"
    assert not (small / "index.jsonl").exists()
    assert not (small / ".unfinished").exists()
    (small / ".unfinished").mkdir()
    (small / ".unfinished" / "1-2").write_text("what a killed run leaves")
    with (small / ".copies.jsonl").open("a") as file:
        file.write('{"path": "c/mjpeg.mkv", "source_sha')  # the line that was being written
    assert copies_of(root).num_made == 2
    assert names == ["a", "b", "c", "c", "d"]
    assert not (small / ".unfinished").exists()
    shown = sorted(path.name for path in small.rglob("*") if not path.name.startswith("."))
    assert shown == sorted([*"abcd", *["mjpeg.mkv.mkv"] * 4, "index.jsonl", "index.rejects.jsonl"])


def replaced(frames: dict[int, int]) -> Callable[..., VideoFrame]:
    """An encoder that shows other frames than it is given."""
    seen: list[NDArray[np.uint8]] = []

    def to_yuv(frame_HWC: NDArray[np.uint8], codec: Codec) -> VideoFrame:
        seen.append(frame_HWC)
        return original(seen[frames.get(len(seen) - 1, len(seen) - 1)], codec)

    original = copying.to_yuv
    return to_yuv


def brightened(frame_HWC: NDArray[np.uint8], codec: Codec) -> VideoFrame:
    return TO_YUV(np.minimum(frame_HWC, 245) + np.uint8(10), codec)


TO_YUV = copying.to_yuv


@pytest.mark.parametrize(
    ("broken", "levels", "frame"),
    [
        (replaced({7: 6}), 219 / 8, 7),  # one of eight bars is black instead of white
        (brightened, 10, 0),
    ],
)
def test_a_copy_that_shows_something_else_is_rejected_and_the_run_goes_on(
    broken: Callable[..., VideoFrame],
    levels: float,
    frame: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = videos(tmp_path / "v", "ab")
    encode = copying._encode

    def only_of_a(source: Path, *more: Any) -> None:
        with monkeypatch.context() as patch:
            if source.parent.name == "a":
                patch.setattr(copying, "to_yuv", broken)
            encode(source, *more)

    monkeypatch.setattr(copying, "_encode", only_of_a)
    copies = copies_of(root)
    assert [entry.path for entry in copies.index.entries] == ["b/mjpeg.mkv.mkv"]
    (reject,) = copies.rejects
    assert reject.path == "a/mjpeg.mkv"
    said = re.fullmatch(r"its copy is (\d+) levels off at frame (\d+)", reject.reason)
    assert said is not None
    assert int(said[2]) == frame
    assert abs(int(said[1]) - levels) <= 1.5  # rounded; and JPEG's error at the bars' edges
    assert not list((tmp_path / "small").rglob("a/*"))
    monkeypatch.setattr(copying, "_encode", encode)
    assert copies_of(root).num_made == 1  # tried again


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[: len(content) // 2], "its copy is unusable: truncated"),
        (lambda content: b"", "its copy is unusable: not a video"),
    ],
)
def test_a_file_that_is_not_what_was_encoded_is_rejected(
    damage: Callable[[bytes], bytes],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode = copying._encode

    def damaged(source: Path, entry: Any, copy: Path, *more: Any) -> None:
        encode(source, entry, copy, *more)
        copy.write_bytes(damage(copy.read_bytes()))

    monkeypatch.setattr(copying, "_encode", damaged)
    with pytest.raises(UserError, match=rf"no usable copy of .* 1 rejected, .*: {reason}"):
        copies_of(videos(tmp_path / "v", "a"))


def test_a_frame_too_few_is_noticed(tmp_path: Path) -> None:
    root = videos(tmp_path / "v", "a")
    (entry,) = index_of(root).entries
    longer = replace(entry, num_frames=11)
    with pytest.raises(RejectedError, match="its copy has 10 frames, not 11"):
        copy_video(root / "a" / "mjpeg.mkv", longer, tmp_path / "x", "mjpeg", 32)


def test_a_source_that_changes_meanwhile_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = videos(tmp_path / "v", "ab")

    def changed(source: Path, *more: Any) -> VideoFacts:
        facts = copy_video(source, *more)
        if source.parent.name == "a":
            os.utime(source)
        return facts

    monkeypatch.setattr(transcoding, "copy_video", changed)
    copies = copies_of(root)
    assert [(r.path, r.reason) for r in copies.rejects] == [
        ("a/mjpeg.mkv", "has changed while it was copied")
    ]


def test_memory_holds_few_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[NDArray[np.uint8]]] = []
    most = 0

    def counted(frame: VideoFrame) -> NDArray[np.uint8]:
        nonlocal most
        array = original(frame)
        made.append(weakref.ref(array))
        most = max(most, sum(each() is not None for each in made))
        return array

    original = copying.rgb
    monkeypatch.setattr(copying, "rgb", counted)
    copies_of(videos(tmp_path / "v", "a", num_frames=60))
    assert len(made) == 3 * 60  # to encode; to compare, with the copy's
    assert 1 <= most <= 4


def test_a_full_disk_is_one_line_and_leaves_no_half_copies(tmp_path: Path) -> None:
    root = tmp_path / "v"
    root.mkdir()
    random = np.random.default_rng(0)
    with av.open(str(root / "noise.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(20):
            noise = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode())
    for free_bytes in (8192, 50_000):
        with (
            full_disk(free_bytes),
            pytest.raises(UserError, match=r"cannot write .*small") as error,
        ):
            copies_of(root, size=64)
        assert "\n" not in str(error.value)
        assert not list((tmp_path / "small").rglob(".unfinished"))
    assert copies_of(root, size=64).num_made == 1


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("v", "v", "i"), "v and .*v lie one in the other"),
        (("v", "v/small", "i"), "lie one in the other"),
        (("v", ".", "i"), "lie one in the other"),
        (("none", "small", "i"), "none is not a folder of videos"),
        (("v", "other", "i"), "other holds other files; give an empty or a new folder"),
        (("v", "other/x", "i"), "x is a file"),
        (("v", "other/x/y", "i"), "cannot write .*: Not a directory"),
        (("v", "small", "v/i"), "i lies among the videos"),
        (("v", "small", "other"), "other is a folder; --out names the index file"),
        (("v", "small", "other/x"), "x is there already and is not a video index"),
        (("v", "small", "source"), "source is the index of .*v, not of .*small"),
        (("v", "small", "small/.copies.jsonl"), "jsonl is a file of the copies' own; choose"),
        (("empty", "small", "i"), "empty is empty"),
    ],
)
def test_what_is_refused(folders: tuple[str, str, str], message: str, tmp_path: Path) -> None:
    videos(tmp_path / "v", "a")
    index_of(tmp_path / "v").save(tmp_path / "source")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").write_text("x")
    root, folder, out = (tmp_path / name for name in folders)
    with pytest.raises(UserError, match=message) as error:
        build_copies(root, out, folder, size=32, num_workers=0, progress=False)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["x"]


def test_copies_that_were_made_otherwise_are_not_mixed(tmp_path: Path, made: list[str]) -> None:
    root = videos(tmp_path / "v", "a")
    copies_of(root)
    with pytest.raises(UserError, match="made with size 32, not 16; give another folder, or rem"):
        copies_of(root, size=16)
    with pytest.raises(UserError, match="made with codec mjpeg, not vp9"):
        copies_of(root, codec="vp9")
    other = videos(tmp_path / "w", "a")
    with pytest.raises(UserError, match=r"made with source .*v, not .*w"):
        copies_of(other)
    assert made == ["a"]
    # A data set that was moved is not another one.
    root.rename(tmp_path / "moved")
    assert copies_of(tmp_path / "moved").num_made == 0


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path, made: list[str]) -> None:
    root = videos(tmp_path / "v", "a")
    copies_of(root)
    with (tmp_path / "small" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another engine/prepare\.py is writing to .*small"):
            copies_of(root)
    assert copies_of(root).num_made == 0


def test_a_damaged_list_of_copies_is_named(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / ".copies.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*copies\.jsonl: damaged"):
        copies_of(videos(tmp_path / "v", "a"))


def test_a_damaged_line_of_the_list_is_a_copy_to_be_made(tmp_path: Path) -> None:
    root = videos(tmp_path / "v", "a")
    assert copies_of(root).num_made == 1
    journal = tmp_path / "small" / ".copies.jsonl"
    settings, line = journal.read_text().splitlines()
    record = json.loads(line)
    for damage in ({"path": 5}, {"num_frames": "many"}, {"keyframes": 1}):
        damaged = json.dumps({**record, "facts": {**record["facts"], **damage}})
        journal.write_text(f"{settings}\n{damaged}\n")
        assert copies_of(root).num_made == 1
    assert copies_of(root).num_made == 0


def test_a_name_that_leaves_no_room_for_the_copys_is_rejected(tmp_path: Path) -> None:
    root = videos(tmp_path / "v", "ab")
    (root / "a" / "mjpeg.mkv").rename(root / "a" / ("x" * 248 + ".mkv"))
    copies = copies_of(root)
    assert len(copies.index.entries) == 1
    assert [r.reason[:20] for r in copies.rejects] == ["its name is too long"]
