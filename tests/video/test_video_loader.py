import functools
import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_loading import index_of, loader, write_all_numbered
from numbered_videos import decode_all, read_number, real_clip, write_numbered
from numpy.typing import NDArray
from PIL import Image

from engine.errors import UserError
from engine.video.decoder_choice import open_stream
from engine.video.index import VideoIndex
from engine.video.loader import LoadedClips
from engine.video.sampler import ClipSampler
from engine.video.streams import Decoder, IndexedFiles, StreamSettings


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> VideoIndex:
    return write_all_numbered(tmp_path_factory.mktemp("numbered"))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> VideoIndex:
    root = tmp_path_factory.mktemp("real clips")
    for name in ("bikes", "carphone_pristine"):
        (root / name).mkdir()
        shutil.copy(real_clip(name), root / name / "clip é.mp4")
    return index_of(root)


def requests(index: VideoIndex, numbers: range, **options: Any) -> list:
    settings: dict[str, Any] = {
        "num_frames": 4,
        "frame_stride": 3,
        "seed": 1,
        "random_crop": True,
        "horizontal_flip": False,
    }
    sampler = ClipSampler([e.num_frames for e in index.entries], **{**settings, **options})
    return [sampler.request(number) for number in numbers]


def to_levels(clips: LoadedClips) -> NDArray[np.float64]:
    """Back to 0..255, [B, T, H, W, C]."""
    return (clips.video_BTCHW.permute(0, 1, 3, 4, 2).double().numpy() + 1) * 127.5


@pytest.mark.parametrize("decoder", ["dali-cpu", "pyav"])
def test_exactly_the_requested_frames_come(numbered: VideoIndex, decoder: str) -> None:
    # The videos' height, 64, is the resolution: nothing is resized.
    clips = loader(numbered, decoder=decoder, random_crop=False, batch_size=12, num_threads=2)
    for batch in range(3):
        got = next(clips)
        for video, request in zip(
            to_levels(got), requests(numbered, range(batch * 12, batch * 12 + 12)), strict=True
        ):
            # The central 64 of 96 columns show bits 2..6 whole (bars are 12 wide).
            numbers = [read_number(np.pad(f, ((0, 0), (16, 16), (0, 0)))) for f in video]
            bits = 0b01111100
            wanted = [(request.start_frame + 3 * step) & bits for step in range(4)]
            assert [number & bits for number in numbers] == wanted
    clips.close()


@pytest.mark.parametrize("decoder", ["dali-cpu", "pyav"])
def test_videos_of_the_right_size_are_as_if_resized(
    numbered: VideoIndex, tmp_path: Path, decoder: Decoder
) -> None:
    """One of another size in the data set, and all of them go through the resize."""
    shutil.copytree(numbered.root, tmp_path / "mixed")
    write_numbered(tmp_path / "mixed/other size", "mjpeg", num_frames=12, width=80, height=48)
    mixed = index_of(tmp_path / "mixed")
    places = {entry.path: place for place, entry in enumerate(mixed.entries)}
    asked = requests(numbered, range(12))
    moved = [replace(r, video=places[numbered.entries[r.video].path]) for r in asked]
    clips = []
    for index, batch in ((numbered, asked), (mixed, moved)):
        settings = StreamSettings(
            batch_size=12,
            num_frames=4,
            frame_stride=3,
            resolution=64,
            device=torch.device("cpu"),
            num_threads=1,
        )
        stream = open_stream(IndexedFiles(index), itertools.repeat(batch), decoder, settings)
        clips.append(next(stream).clips_BTHWC)
        stream.close()
    assert torch.equal(clips[0], clips[1])


decode_once = functools.lru_cache(maxsize=2)(decode_all)


def reference(index: VideoIndex, request: Any, resolution: int) -> NDArray[np.float64]:
    """The same clip by other means: full decode, slice, Pillow's antialiased bilinear, numpy."""
    frames = decode_once(index.path(request.video))[request.start_frame :: 3][:4]
    frames = np.rot90(frames, index.entries[request.video].rotation // 90, axes=(1, 2))
    shown = index.entries[request.video].width, index.entries[request.video].height
    size = (
        int(shown[0] * resolution / min(shown) + 0.5),
        int(shown[1] * resolution / min(shown) + 0.5),
    )
    resized = np.stack(
        [np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BILINEAR)) for f in frames]
    )
    top = int((size[1] - resolution) * request.crop_y + 0.5)
    left = int((size[0] - resolution) * request.crop_x + 0.5)
    crop = resized[:, top : top + resolution, left : left + resolution].astype(float)
    return crop[:, :, ::-1] if request.flip else crop


@pytest.mark.parametrize("resolution", [32, 144])
def test_real_clips_equal_an_independent_reference(real: VideoIndex, resolution: int) -> None:
    clips = loader(real, resolution=resolution, view_resolution=resolution, horizontal_flip=True)
    got = np.concatenate([to_levels(next(clips)) for _ in range(3)])
    clips.close()
    wanted = requests(real, range(9), horizontal_flip=True)
    assert {request.flip for request in wanted} == {True, False}
    for video, request in zip(got, wanted, strict=True):
        error = np.abs(video - reference(real, request, resolution))
        # Where a video is enlarged, PyTorch and Pillow round a few values differently.
        assert error.max() < 1.01
        assert error.mean() < 0.02


@pytest.mark.parametrize("decoder", ["dali-cpu", "pyav"])
def test_turned_videos_are_seen_upright(decoder: str, tmp_path: Path) -> None:
    for rotation in (0, 90, 180, 270):
        path = write_numbered(tmp_path, "mjpeg", num_frames=40, rotation=rotation)
        path.rename(path.with_stem(str(rotation)))
    index = index_of(tmp_path)
    clips = loader(index, decoder=decoder, resolution=32, view_resolution=32, batch_size=8)
    got = to_levels(next(clips))
    clips.close()
    wanted = requests(index, range(8))
    assert {index.entries[request.video].rotation for request in wanted} == {0, 90, 180, 270}
    for video, request in zip(got, wanted, strict=True):
        # As between Pillow and DALI, plus what two libswscales make of 4:2:0 chroma.
        assert np.abs(video - reference(index, request, 32)).max() < 3.02


def test_dali_and_pyav_agree(numbered: VideoIndex) -> None:
    # 4:2:0 chroma is enlarged by two builds of libswscale; luma is the same.
    one, other = loader(numbered, decoder="dali-cpu"), loader(numbered, decoder="pyav")
    for _ in range(4):
        assert np.abs(to_levels(next(one)) - to_levels(next(other))).max() <= 2.01
    one.close()
    other.close()


def test_the_view_is_every_kth_pixel_of_the_same_clip(numbered: VideoIndex) -> None:
    whole, view = (
        loader(numbered, horizontal_flip=True),
        loader(numbered, horizontal_flip=True, view_resolution=16),
    )
    for _ in range(3):
        full, small = next(whole), next(view)
        assert small.video_BTCHW.shape == (3, 4, 3, 16, 16)
        assert torch.equal(small.video_BTCHW, full.video_BTCHW[..., ::4, ::4])
        assert torch.equal(small.labels_B, full.labels_B)
        assert small.video_BTCHW.permute(0, 1, 3, 4, 2).is_contiguous()
    assert full.video_BTCHW.dtype == torch.float32
    assert full.labels_B.dtype == torch.int64
    levels = to_levels(full)
    assert np.abs(levels - levels.round()).max() < 1e-4  # u8 / 127.5 - 1, exactly
    with pytest.raises(ValueError, match="no nearest view"):
        loader(numbered, view_resolution=24)


def test_labels_belong_to_the_videos(numbered: VideoIndex) -> None:
    clips = loader(numbered, batch_size=12)
    labels = next(clips).labels_B.tolist()
    clips.close()
    wanted = [numbered.entries[request.video].label for request in requests(numbered, range(12))]
    assert labels == wanted
    assert sorted(set(labels)) == [0, 1, 2, 3]


@pytest.mark.parametrize("decoder", ["dali-cpu", "pyav"])
def test_resume_is_exact(numbered: VideoIndex, decoder: str) -> None:
    options = {"decoder": decoder, "horizontal_flip": True}
    clips = loader(numbered, **options)
    for _ in range(5):  # past the end of an epoch of 12, in the middle of the next
        next(clips)
    state = clips.state_dict()
    assert state["position"] == 15
    wanted = [next(clips) for _ in range(3)]
    clips.close()
    for resumed in (loader(numbered, **options), clips):  # a fresh one, and one that has run on
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        for batch in wanted:
            got = next(resumed)
            assert torch.equal(got.video_BTCHW, batch.video_BTCHW)
            assert torch.equal(got.labels_B, batch.labels_B)
        resumed.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 5}, r"num_frames differs .*\(4, now 5\)"),
        ({"frame_stride": 2}, "frame_stride"),
        ({"seed": 2}, "seed"),
        ({"view_resolution": 32}, "view_resolution"),
        ({"horizontal_flip": True}, "horizontal_flip"),
        ({"random_crop": False}, "random_crop"),
    ],
)
def test_a_position_in_another_stream_is_refused(
    numbered: VideoIndex, change: dict, message: str
) -> None:
    state = loader(numbered).state_dict()
    with pytest.raises(UserError, match=message):
        loader(numbered, **change).load_state_dict(state)


def test_other_ranks_and_batches_go_on_with_the_next_clips(numbered: VideoIndex) -> None:
    """Of three at a time to one rank, and two at a time to each of two."""
    clips = loader(numbered)
    for _ in range(3):
        next(clips)
    state = clips.state_dict()
    wanted = torch.cat([next(clips).video_BTCHW for _ in range(4)])
    clips.close()
    ranks = [loader(numbered, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(state)
    got = []
    for _ in range(3):
        batches = [next(rank).video_BTCHW for rank in ranks]
        got.append(torch.stack(batches, dim=1).flatten(0, 1))
    assert torch.equal(torch.cat(got), wanted)
    for rank in ranks:
        rank.close()


def test_a_position_in_another_data_set_is_refused(numbered: VideoIndex) -> None:
    state = loader(numbered).state_dict()
    fewer = VideoIndex(numbered.root, numbered.classes, numbered.entries[:-1])
    with pytest.raises(UserError, match="data set differs"):
        loader(fewer).load_state_dict(state)


def test_two_ranks_share_an_epoch_and_equal_one_rank(numbered: VideoIndex) -> None:
    alone = loader(numbered, batch_size=6)
    ranks = [loader(numbered, batch_size=3, rank=r, world_size=2) for r in range(2)]
    for _ in range(2):  # 12 videos: one epoch
        whole = next(alone)
        parts = [next(rank) for rank in ranks]
        videos = torch.stack([part.video_BTCHW for part in parts], dim=1).flatten(0, 1)
        assert torch.equal(videos, whole.video_BTCHW)
    assert alone.state_dict() == ranks[0].state_dict() == ranks[1].state_dict()
    drawn = [r.video for r in requests(numbered, range(12))]
    assert sorted(drawn) == list(range(12))
    for each in (alone, *ranks):
        each.close()


def test_a_copied_data_set_is_recognised_by_content(numbered: VideoIndex, tmp_path: Path) -> None:
    shutil.copytree(numbered.root, tmp_path / "copy", copy_function=shutil.copyfile)  # new times
    copy = VideoIndex.load(tmp_path / "copy" / "index.jsonl")
    assert copy.root != numbered.root
    clips, copied = loader(numbered), loader(copy)
    copied.load_state_dict(clips.state_dict())
    assert torch.equal(next(clips).video_BTCHW, next(copied).video_BTCHW)
    clips.close()
    copied.close()


def test_another_decoder_is_not_taken_unasked(numbered: VideoIndex) -> None:
    state = loader(numbered, decoder="dali-cpu").state_dict()
    with pytest.raises(UserError, match=r"decoded by dali-cpu, .* --set data\.decoder=pyav"):
        loader(numbered).load_state_dict(state)
    asked = loader(numbered, decoder="pyav")
    asked.load_state_dict({**state, "position": 6})
    assert asked.state_dict()["position"] == 6


def test_a_class_of_short_videos_is_counted_as_unseen(numbered: VideoIndex) -> None:
    entries = tuple(e for e in numbered.entries if e.label != 3 or e.num_frames == 20)
    index = VideoIndex(numbered.root, numbered.classes, entries)
    text = loader(index, num_frames=10).description  # windows of 28 frames
    assert text.startswith("6 videos, 4 classes (1 without a usable video), ")


def test_description_counts_what_is_left_out(numbered: VideoIndex) -> None:
    text = loader(numbered, num_frames=10, resolution=128).description  # windows of 28 frames
    assert text.startswith("8 videos, 4 classes, ")
    assert "4 videos too short, left out" in text
    assert "8 smaller than 128 pixels, enlarged" in text
    with pytest.raises(UserError, match=r"need 118; the longest has 80"):
        loader(numbered, num_frames=40)


def test_unlabelled_videos_have_label_zero(tmp_path: Path) -> None:
    write_numbered(tmp_path, "mjpeg", num_frames=20)
    clips = loader(index_of(tmp_path))
    assert next(clips).labels_B.tolist() == [0, 0, 0]
    assert clips.description == "1 video, MJPEG via PyAV (CPU)"
    clips.close()


def test_the_console_stays_ours(
    numbered: VideoIndex, real: VideoIndex, capfd: pytest.CaptureFixture
) -> None:
    for index in (numbered, real):
        clips = loader(index)
        next(clips)
        clips.close()
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("decoder", ["dali-cpu", "dali-gpu", "pyav"])
def test_the_gpu_pipeline_gives_the_same_clips(numbered: VideoIndex, decoder: str) -> None:
    entries = tuple(e for e in numbered.entries if not e.path.startswith("mjpeg444"))
    index = VideoIndex(numbered.root, numbered.classes, entries)
    cpu = loader(index, decoder="pyav")
    gpu = loader(index, decoder=decoder, device=torch.device("cuda", 0))
    for _ in range(3):
        one, other = next(cpu), next(gpu)
        assert other.video_BTCHW.device.type == other.labels_B.device.type == "cuda"
        assert torch.equal(one.labels_B, other.labels_B.cpu())
        # NVDEC's colour conversion is its own: a few levels, most at chroma edges.
        difference = (one.video_BTCHW - other.video_BTCHW.cpu()).abs() * 127.5
        assert difference.mean() < 4
    cpu.close()
    gpu.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("codec", ["mjpeg", "h264"])
def test_turned_videos_are_upright_on_the_gpu(codec: str, tmp_path: Path) -> None:
    for rotation in (0, 90, 180, 270):
        path = write_numbered(tmp_path, codec, num_frames=40, rotation=rotation)
        path.rename(path.with_stem(str(rotation)))
    index = index_of(tmp_path)
    cpu = loader(index, decoder="pyav", batch_size=4)
    gpu = loader(index, decoder="dali-gpu", batch_size=4, device=torch.device("cuda", 0))
    difference = (next(cpu).video_BTCHW - next(gpu).video_BTCHW.cpu()).abs() * 127.5
    assert difference.mean() < 4  # a wrong turn moves whole bars: tens of levels
    cpu.close()
    gpu.close()
