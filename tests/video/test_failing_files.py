"""Files that fail while clips of them are loaded: named in one line, and nothing is lost."""

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_loading import index_of, loader, write_all_numbered
from numbered_videos import damage, write_numbered
from small_runs import environment
from torch import Tensor

from engine.errors import UserError
from engine.video.dali_stream import DaliStream
from engine.video.index import VideoIndex
from engine.video.loader import ClipLoader


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> VideoIndex:
    return write_all_numbered(tmp_path_factory.mktemp("numbered"))


def spoil(path: Path, harm: str) -> None:
    """What can become of a file after it was indexed."""
    if harm == "damage":
        times = path.stat()
        damage(path, start=2000, length=40000)
        # Bits that rot leave no trace in size and time.
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif harm == "shorten":
        path.write_bytes(path.read_bytes()[:20000])
    elif harm == "remove":
        path.unlink()
    else:
        # Of the old size; DALI would open what it lists.
        listed = f"ffconcat version 1.0\nfile '{path.with_name('good.mkv')}'\n".encode()
        path.write_bytes(listed + b"#" * (path.stat().st_size - len(listed)))


@pytest.mark.parametrize("decoder", ["dali-cpu", "pyav"])
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        # Two answers where the file may be read before it was harmed, or meanwhile.
        ("damage", "has changed|cannot decode .*: damaged"),
        ("shorten", "has changed|cannot decode"),
        ("remove", "No such file"),
        ("replace", "has changed|cannot decode"),
    ],
)
def test_a_file_that_fails_in_mid_run_is_named(
    decoder: str, harm: str, message: str, tmp_path: Path
) -> None:
    for name in ("good", "bad one"):
        path = write_numbered(tmp_path, "mjpeg")
        path.rename(tmp_path / f"{name}.mkv")
    bad = tmp_path / "bad one.mkv"
    index = index_of(tmp_path)
    clips = loader(index, decoder=decoder, batch_size=2, num_frames=26)  # nearly all frames
    next(clips)
    spoil(bad, harm)
    with pytest.raises(UserError, match=rf"({message}).*run engine/prepare\.py again") as caught:
        list(itertools.islice(clips, 8))  # more than were prefetched
    assert str(bad) in str(caught.value)
    assert "\n" not in str(caught.value)
    clips.close()


SHORTENED_WHILE_IT_IS_READ = """
import os, sys, threading, time
from pathlib import Path
import numpy as np
from nvidia.dali import fn, pipeline_def
from engine.video.dali_stream import decoded

path, num_frames = Path(sys.argv[1]), int(sys.argv[2])
whole = path.read_bytes()

@pipeline_def(batch_size=4, num_threads=2, device_id=None)
def frames():
    files, starts = fn.external_source(
        lambda: ([np.frombuffer(bytes(path), np.uint8)] * 4, [np.int32(0)] * 4),
        num_outputs=2,
        batch=True,
    )
    return decoded([files, starts], "dali-cpu", num_frames, 1)

def harm():
    while True:
        os.truncate(path, 20000)
        time.sleep(0.002)
        path.write_bytes(whole)
        time.sleep(0.01)

threading.Thread(target=harm, daemon=True).start()
end, failed = time.monotonic() + 5, 0
while time.monotonic() < end:
    pipeline = frames()
    try:
        while time.monotonic() < end:
            pipeline.run()
    except RuntimeError:
        failed += 1
print(failed)
sys.stdout.flush()
os._exit(0)
"""


def test_a_file_that_is_shortened_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    """And not the end of the process, SIGBUS, as it is where the file is mapped into memory."""
    path = write_numbered(tmp_path, "mjpeg")
    command = [sys.executable, "-c", SHORTENED_WHILE_IT_IS_READ, str(path), "26"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 0


def dali_error(operator: str, reason: str) -> RuntimeError:
    """In DALI's words, observed."""
    return RuntimeError(
        f"Critical error in pipeline:\nError in mixed operator `nvidia.dali.fn.{operator}`,\nwhich "
        "was used in the pipeline definition with the following traceback:\n\n  File ...\n\n"
        f"encountered:\n\n{reason}\nCurrent pipeline object is no longer valid."
    )


def test_memory_is_no_files_fault(numbered: VideoIndex) -> None:
    size = {"resolution": 10_000_000, "view_resolution": 10_000_000}
    clips = loader(numbered, decoder="dali-cpu", **size)
    with pytest.raises(RuntimeError, match="bad_alloc"):
        next(clips)
    clips.close()


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (dali_error("decoders.video", "CUDA allocation failed: out of memory"), RuntimeError),
        (dali_error("resize", "CUDA error 700: an illegal memory access"), RuntimeError),
        (RuntimeError("CUDA driver error"), RuntimeError),
        (dali_error("decoders.video", "Codec not supported"), UserError),
        (RuntimeError('Assert on "IsDenseTensor()" failed: Codec not supported'), UserError),
    ],
)
def test_only_a_decoders_error_is_blamed_on_files(
    error: RuntimeError, shown: type[Exception], numbered: VideoIndex
) -> None:
    clips = loader(numbered, decoder="dali-cpu")
    next(clips)
    assert isinstance(clips._stream, DaliStream)

    def failing() -> Iterator:
        raise error
        yield

    clips._stream._iterator = failing()  # type: ignore[assignment]
    message = r"cannot decode one of .*: Codec not supported$" if shown is UserError else None
    with pytest.raises(shown, match=message) as caught:
        next(clips)
    assert error in (caught.value, caught.value.__cause__)
    clips.close()


def take(clips: ClipLoader, number: int) -> None:
    for _ in range(number):
        next(clips)


def test_a_file_that_comes_back_is_loaded_from_where_it_failed(tmp_path: Path) -> None:
    path = write_numbered(tmp_path, "mjpeg", num_frames=20)
    index = index_of(tmp_path)
    clips, wanted = loader(index), loader(index)
    next(clips), next(wanted)
    content, times = path.read_bytes(), path.stat()
    path.unlink()
    with pytest.raises(UserError, match=r"cannot (read|decode)"):
        take(clips, 9)
    position = clips.state_dict()["position"]
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    wanted.load_state_dict(clips.state_dict())
    assert torch.equal(next(clips).video_BTCHW, next(wanted).video_BTCHW)
    assert clips.state_dict()["position"] == position + 3
    clips.close()
    wanted.close()


def test_a_copied_file_that_is_replaced_later_is_noticed(tmp_path: Path) -> None:
    path = write_numbered(tmp_path, "mjpeg", num_frames=20)
    index = index_of(tmp_path)
    os.utime(path, ns=(1, 1))  # as a copy has it: told by its content
    clips = loader(index)
    next(clips)
    path.write_bytes(bytes(reversed(path.read_bytes())))
    # The second where it is replaced between the comparison and the reading.
    with pytest.raises(UserError, match=r"has changed since it was indexed|cannot decode"):
        take(clips, 9)
    clips.close()


# --- Clips that are replaced ----------------------------------------------------------------

HARMS = ("damage", "shorten", "remove", "replace")


@pytest.fixture
def spoilt(tmp_path: Path) -> tuple[VideoIndex, set[str]]:
    """12 videos of two classes, of which four were spoilt after they were indexed, and those."""
    for number in range(12):
        path = write_numbered(tmp_path / ("even", "odd")[number % 2], "mjpeg")
        path.rename(path.with_stem(f"{number:02d}"))
    index = index_of(tmp_path)
    bad = [index.path(place) for place in (0, 3, 7, 10)]
    for path, harm in zip(bad, HARMS, strict=True):
        spoil(path, harm)
    return index, {path.relative_to(tmp_path).as_posix() for path in bad}


def replacing(index: VideoIndex, **options: Any) -> ClipLoader:
    # Nearly all frames of a video: whatever is damaged is met.
    return loader(index, **{"num_frames": 24, "replace_failed": True, **options})


def clips_of(clips: ClipLoader, number: int) -> tuple[Tensor, Tensor]:
    """Clips and labels of so many batches."""
    batches = [next(clips) for _ in range(number)]
    return torch.cat([b.video_BTCHW for b in batches]), torch.cat([b.labels_B for b in batches])


@pytest.mark.parametrize("decoder", ["dali-cpu", "pyav"])
def test_a_failed_files_clips_are_replaced_by_the_same_ones_however_they_are_loaded(
    spoilt: tuple[VideoIndex, set[str]], decoder: str
) -> None:
    """By any number of threads and ranks, and after a resumption at any place."""
    index, bad = spoilt
    whole = replacing(index, batch_size=4, num_threads=4, decoder=decoder)
    video_BTCHW, labels_B = clips_of(whole, 6)  # two epochs
    failures = whole.take_failures()
    assert set(failures.problems) == bad
    # Each once in an epoch; a replacement that is broken, too, is no clip.
    assert failures.num_replaced == 8
    assert not whole.failure
    assert not whole.take_failures().num_replaced

    ranks = [
        replacing(index, batch_size=2, rank=rank, world_size=2, decoder=decoder) for rank in (0, 1)
    ]
    for rank, clips in enumerate(ranks):
        for_rank = clips_of(clips, 6)
        assert torch.equal(for_rank[0], video_BTCHW[rank::2])
        assert torch.equal(for_rank[1], labels_B[rank::2])
        clips.close()

    resumed = replacing(index, batch_size=4, decoder=decoder)
    resumed.load_state_dict(whole.state_dict() | {"position": 12})
    assert torch.equal(clips_of(resumed, 3)[0], video_BTCHW[12:])
    whole.close()
    resumed.close()


@pytest.mark.parametrize("decoder", ["dali-cpu", "pyav"])
@pytest.mark.parametrize("harm", HARMS)
def test_a_file_that_fails_in_mid_run_is_replaced(tmp_path: Path, decoder: str, harm: str) -> None:
    for name in ("good", "bad one", "better"):
        path = write_numbered(tmp_path, "mjpeg")
        path.rename(tmp_path / f"{name}.mkv")
    index = index_of(tmp_path)
    clips = replacing(index, decoder=decoder, num_threads=2)
    next(clips)
    spoil(tmp_path / "bad one.mkv", harm)
    for _ in range(8):
        assert next(clips).video_BTCHW.shape == (3, 24, 3, 64, 64)
    failures = clips.take_failures()
    assert list(failures.problems) == ["bad one.mkv"]
    assert str(tmp_path / "bad one.mkv") in failures.problems["bad one.mkv"]
    assert 4 <= failures.num_replaced <= 8  # up to four batches were decoded before
    assert clips.state_dict()["position"] == 27
    clips.close()


@pytest.mark.parametrize("decoder", ["dali-cpu", "pyav"])
def test_where_nothing_can_be_read_any_more_a_clip_is_repeated(
    tmp_path: Path, decoder: str
) -> None:
    """So that the ranks can end their step together, and be saved."""
    path = write_numbered(tmp_path, "mjpeg")
    index = index_of(tmp_path)
    clips = replacing(index, decoder=decoder)
    before = next(clips).video_BTCHW
    assert clips.failure is None
    path.unlink()
    for _ in range(9):  # more than were prefetched
        last = next(clips).video_BTCHW
    assert torch.equal(last, last[:1].expand_as(last))
    assert last.shape == before.shape
    assert re.fullmatch(
        rf"none of \d+ videos can be read, e\.g\. cannot (read|decode) {path}: .*",
        str(clips.failure),
    )
    assert clips.state_dict()["position"] == 30
    assert clips.take_failures().num_replaced >= 3
    clips.close()
    # There is none to be repeated yet.
    afresh = replacing(index, decoder="pyav")
    with pytest.raises(UserError, match=r"none of \d+ videos can be read"):
        next(afresh)
    afresh.close()
