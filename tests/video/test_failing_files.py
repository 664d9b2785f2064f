"""Files that fail while clips of them are loaded: named in one line, and nothing is lost."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from clip_loading import index_of, loader, write_all_numbered
from numbered_videos import damage, write_numbered
from small_runs import environment

from engine.errors import UserError
from engine.video.dali_stream import DaliStream
from engine.video.index import VideoIndex
from engine.video.loader import ClipLoader


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> VideoIndex:
    return write_all_numbered(tmp_path_factory.mktemp("numbered"))


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
    if harm == "damage":
        damage(bad, start=2000, length=40000)
        # Bits that rot leave no trace in size and time.
        os.utime(bad, ns=(0, index.entries[0].modified_ns))
    elif harm == "shorten":
        bad.write_bytes(bad.read_bytes()[:20000])
    elif harm == "remove":
        bad.unlink()
    else:
        # Of the old size; DALI would open what it lists.
        listed = f"ffconcat version 1.0\nfile '{tmp_path / 'good.mkv'}'\n".encode()
        bad.write_bytes(listed + b"#" * (bad.stat().st_size - len(listed)))
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
    with pytest.raises(UserError, match="has changed since it was indexed"):
        take(clips, 9)
    clips.close()
