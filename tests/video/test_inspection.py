"""What a full decode finds out about one file."""

import os
import struct
import zlib
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream
from encoded_videos import write_encoded
from numbered_videos import numbered_frame, read_number

from engine.video.containers import RejectedError
from engine.video.decoding import decode_window
from engine.video.indexing import build_index
from engine.video.inspection import inspect_video
from engine.video.keyframes import checksum, unpack
from engine.video.loader import ClipLoader
from engine.video.writing import write_mp4


def write(
    path: Path,
    encoder: str,
    times: Iterable[int],
    *,
    ticks_per_second: int = 1000,
    size: tuple[int, int] = (96, 64),
    aspect: Fraction | None = None,
    duration: int | None = None,
) -> Path:
    """A numbered video whose frames are shown at these times."""
    path.parent.mkdir(exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=25, options={"g": "12"})
        assert isinstance(stream, VideoStream)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if encoder == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, ticks_per_second)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, *size), format="rgb24")
            frame.pts, frame.time_base = time, stream.codec_context.time_base
            container.mux(stream.encode(frame))
        last = stream.encode()
        if duration is not None:
            for packet in last:
                packet.duration = duration
        container.mux(last)
    return path


def without(path: Path, lost: Callable[[int, Packet], bool]) -> Path:
    """The same file less some packets."""
    copied = path.with_stem(f"{path.stem}-less")
    with av.open(str(path)) as source, av.open(str(copied), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        for number, packet in enumerate(packets):
            if not lost(number, packet):
                packet.stream = stream
                container.mux(packet)
    return copied


class TestTimes:
    def test_a_last_frame_may_be_held(self, tmp_path: Path) -> None:
        path = write(tmp_path / "held.webm", "libvpx-vp9", range(0, 400, 40), duration=2000)
        facts = inspect_video(path)
        assert (facts.num_frames, facts.fps) == (10, 25.0)

    def test_one_frame_is_a_video(self, tmp_path: Path) -> None:
        for name, encoder in (("x.webm", "libvpx-vp9"), ("x.mp4", "libx264"), ("x.avi", "mpeg4")):
            assert inspect_video(write(tmp_path / name, encoder, [0])).num_frames == 1

    @pytest.mark.parametrize("name", ["x.mkv", "x.mp4"])
    def test_the_rate_is_that_of_the_frames(self, name: str, tmp_path: Path) -> None:
        """A header may say anything: screen recorders say the clock's rate."""
        path = write(tmp_path / name, "libx264", range(0, 5000, 100))
        assert inspect_video(path).fps == pytest.approx(10, rel=0.01)

    def test_rounded_times_do_not_hide_a_standard_rate(self, tmp_path: Path) -> None:
        path = tmp_path / "x.mkv"  # whose clock has milliseconds
        frames = np.zeros((50, 32, 32, 3), np.uint8)
        write_mp4(tmp_path / "x.mp4", frames, fps=30000 / 1001)
        with av.open(str(tmp_path / "x.mp4")) as source, av.open(str(path), "w") as container:
            stream = container.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    container.mux(packet)
        assert inspect_video(path).fps == pytest.approx(29.97003, abs=1e-4)

    def test_variable_rates_are_no_damage(self, tmp_path: Path) -> None:
        times = np.cumsum([0, *([33, 50, 17, 200, 33, 66] * 6)])
        for name, encoder in (("x.mkv", "libx264"), ("x.webm", "libvpx-vp9"), ("y.mkv", "mpeg4")):
            facts = inspect_video(write(tmp_path / name, encoder, times.tolist()))
            assert facts.num_frames == 37

    def test_a_rate_of_nothing_is_none(self, tmp_path: Path) -> None:
        path = write_encoded(tmp_path, "mjpeg-avi")
        content = bytearray(path.read_bytes())
        scale = content.index(b"strh") + 28  # dwScale and dwRate
        content[scale : scale + 8] = struct.pack("<II", 2**31 - 1, 1)
        path.write_bytes(content)
        with pytest.raises(RejectedError, match="no frame rate"):
            inspect_video(path)

    @pytest.mark.parametrize("encoder", ["libx264", "libx265"])
    def test_a_frame_that_a_camera_dropped_is_no_damage(self, encoder: str, tmp_path: Path) -> None:
        """Phones do. These decoders tell when a packet is lost, so times need not."""
        times = [40 * n for n in range(60) if n not in (17, 18, 41)]
        assert inspect_video(write(tmp_path / "x.mkv", encoder, times)).num_frames == 57

    def test_a_pause_is_no_damage(self, tmp_path: Path) -> None:
        times = [40 * n + (5000 if n > 30 else 0) for n in range(60)]
        assert inspect_video(write(tmp_path / "x.webm", "libvpx-vp9", times)).num_frames == 60

    def test_frames_at_one_time_are_no_reason_to_fail(self, tmp_path: Path) -> None:
        """More frames than a clock of milliseconds can tell apart, and one jump."""
        path = tmp_path / "x.mkv"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libvpx", rate=25)
            assert isinstance(stream, VideoStream)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            stream.codec_context.time_base = Fraction(1, 10_000)
            for number in range(40):
                frame = av.VideoFrame.from_ndarray(numbered_frame(number, 64, 64), "rgb24")
                frame.pts, frame.time_base = number + 900 * (number > 20), Fraction(1, 10_000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        assert inspect_video(path).num_frames == 40


class TestGeometry:
    @pytest.mark.parametrize(
        ("aspect", "size", "shown"),
        [
            (Fraction(64, 45), (180, 144), (256, 144)),  # 16:9 PAL, a quarter of it
            (Fraction(8, 9), (180, 120), (160, 120)),
            (None, (96, 64), (96, 64)),
        ],
    )
    @pytest.mark.parametrize("name", ["x.mp4", "x.mkv", "x.avi"])
    def test_the_size_is_that_which_is_shown(
        self,
        name: str,
        aspect: Fraction | None,
        size: tuple[int, int],
        shown: tuple,
        tmp_path: Path,
    ) -> None:
        encoder = "mpeg4" if name == "x.avi" else "libx264"
        facts = inspect_video(write(tmp_path / name, encoder, [0, 40], size=size, aspect=aspect))
        assert (facts.width, facts.height) == shown

    @pytest.mark.parametrize(
        ("name", "encoder", "decoder"),
        [
            ("x.mp4", "libvpx-vp9", "dali-cpu"),
            ("x.mp4", "libvpx-vp9", "pyav"),
            ("x.mp4", "libx264", "pyav"),
        ],
    )
    @pytest.mark.parametrize("resolution", [144, 36])
    def test_circles_stay_round(
        self, name: str, encoder: str, decoder: str, resolution: int, tmp_path: Path
    ) -> None:
        width, height, aspect = 180, 144, Fraction(64, 45)
        y, x = np.mgrid[:height, :width]
        inside = ((x + 0.5 - width / 2) * float(aspect)) ** 2 + (y + 0.5 - height / 2) ** 2 < 50**2
        circle = np.where(inside[..., None], 230, 20).astype(np.uint8).repeat(3, axis=-1)
        folder = tmp_path / "v"
        folder.mkdir()
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(encoder, rate=25, options={"crf": "4", "b": "0"})
            assert isinstance(stream, VideoStream)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.sample_aspect_ratio = aspect
            for _ in range(3):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(circle, format="rgb24")))
            container.mux(stream.encode())
        index, _ = build_index(folder, tmp_path / "i.jsonl", num_workers=0, progress=False)
        clips = ClipLoader(
            index,
            num_frames=2,
            frame_stride=1,
            resolution=resolution,
            view_resolution=resolution,
            batch_size=1,
            decoder=decoder,
            random_crop=False,
        )
        bright = next(clips).video_BTCHW[0, 0].mean(0) > 0
        clips.close()
        wide, high = int(bright.any(0).sum()), int(bright.any(1).sum())
        assert abs(wide - high) <= 2
        assert abs(high - 100 * resolution / 144) <= 2

    def test_absurd_pixels_are_rejected(self, tmp_path: Path) -> None:
        path = write(
            tmp_path / "x.mp4", "libx264", [0, 40], size=(180, 144), aspect=Fraction(100, 1)
        )
        with pytest.raises(RejectedError, match="pixels of 100 x 1"):
            inspect_video(path)


class TestStreams:
    @pytest.mark.parametrize("suffix", ["mp4", "mkv"])
    def test_a_cover_is_not_the_video(self, suffix: str, tmp_path: Path) -> None:
        path = tmp_path / f"x.{suffix}"
        with av.open(str(path), "w") as container:
            cover = container.add_stream("mjpeg", rate=25)
            film = container.add_stream("libx264", rate=25)
            assert isinstance(cover, VideoStream)
            assert isinstance(film, VideoStream)
            cover.width, cover.height, cover.pix_fmt = 640, 480, "yuvj420p"
            film.width, film.height, film.pix_fmt = 96, 64, "yuv420p"
            cover.disposition = Disposition.attached_pic
            picture = av.VideoFrame.from_ndarray(np.full((480, 640, 3), 90, np.uint8), "rgb24")
            container.mux(cover.encode(picture))
            container.mux(cover.encode())
            for number in range(30):
                frame = av.VideoFrame.from_ndarray(numbered_frame(number, 96, 64), "rgb24")
                container.mux(film.encode(frame))
            container.mux(film.encode())
        facts = inspect_video(path)
        assert (facts.codec, facts.num_frames, facts.width) == ("h264", 30, 96)
        assert not facts.times_number_frames  # DALI might choose the cover
        window = decode_window(
            path,
            start_frame=20,
            num_frames=3,
            frame_stride=1,
            video_frames=30,
            keyframes=unpack(facts.keyframes),
        )
        assert [read_number(frame) for frame in window] == [20, 21, 22]


def test_upside_down_pictures_have_a_checksum() -> None:
    """As files of uncompressed video may have them."""
    picture = np.arange(48 * 64, dtype=np.uint8).reshape(48, 64)
    checksums = []
    for extradata in (None, b"BottomUp\0"):
        decoder = av.CodecContext.create("rawvideo", "r")
        assert isinstance(decoder, av.VideoCodecContext)
        decoder.width, decoder.height, decoder.pix_fmt = 64, 48, "gray"
        decoder.extradata = extradata
        (frame,) = decoder.decode(Packet(picture.tobytes()))
        assert frame.planes[0].line_size == (64 if extradata is None else -64)
        checksums.append(checksum(frame))
    assert checksums == 2 * [zlib.crc32(picture.tobytes())]


class TestDamage:
    """Decoders conceal it: pictures that nobody filmed would be trained on."""

    @pytest.mark.parametrize(
        "name", ["h264-mp4-gop12-b0", "mpeg4-mkv-gop12-b0", "vp8-webm-plain", "vp9-webm-plain"]
    )
    def test_lost_packets_are_found(self, name: str, tmp_path: Path) -> None:
        path = write_encoded(tmp_path, name)
        assert inspect_video(path).num_frames == 45
        with pytest.raises(RejectedError, match="lost"):
            inspect_video(without(path, lambda number, packet: number == 17))

    def test_lost_references_of_irregular_videos_are_found(self, tmp_path: Path) -> None:
        times = np.cumsum([0, *([33, 50, 17, 200, 33, 66] * 6)]).tolist()
        path = write(tmp_path / "x.mkv", "libx264", times)
        assert inspect_video(path).num_frames == 37
        with pytest.raises(RejectedError, match=r"lost|damaged"):
            inspect_video(without(path, lambda number, packet: number == 9))

    def test_a_demuxer_that_finds_its_place_again_has_lost_something(self, tmp_path: Path) -> None:
        """Of pictures by themselves, so that nothing else tells."""
        path = write_encoded(tmp_path, "mjpeg-mkv")
        content = bytearray(path.read_bytes())
        with av.open(str(path)) as container:
            block = [packet.pos or 0 for packet in container.demux(video=0)][17]
        content[block : block + 8] = bytes(8)
        path.write_bytes(content)
        with pytest.raises(RejectedError, match=r"damaged at frame 18: .* invalid as first byte"):
            inspect_video(path)

    def test_a_decoder_that_conceals_damage_is_listened_to(self, tmp_path: Path) -> None:
        path = write_encoded(tmp_path, "ffv1-mkv")
        content = bytearray(path.read_bytes())
        with av.open(str(path)) as container:
            block = [packet.pos or 0 for packet in container.demux(video=0)][17]
        content[block + 60] ^= 1
        path.write_bytes(content)
        with pytest.raises(RejectedError, match="damaged at frame 18: slice CRC mismatch"):
            inspect_video(path)

    @pytest.mark.parametrize("codec", ["mpeg4", "vp9", "h264"])
    def test_a_file_that_starts_between_keyframes(self, codec: str, tmp_path: Path) -> None:
        """Is rejected, or begins with the first picture that is whole."""
        encoding = {
            "mpeg4": "mpeg4-mkv-gop12-b0",
            "vp9": "vp9-webm-plain",
            "h264": "h264-mkv-gop12-b0",
        }[codec]
        path = without(write_encoded(tmp_path, encoding), lambda number, packet: number < 7)
        if codec == "h264":
            facts = inspect_video(path)
            window = decode_window(
                path, start_frame=0, num_frames=5, frame_stride=1, video_frames=facts.num_frames
            )
            assert [read_number(frame) for frame in window] == [12, 13, 14, 15, 16]
        else:
            with pytest.raises(RejectedError, match=r"starts between keyframes|damaged"):
                inspect_video(path)

    def test_pixels_that_change_their_shape_are_rejected(self, tmp_path: Path) -> None:
        square = write(tmp_path / "a.avi", "mpeg4", range(0, 400, 40))
        wide = write(tmp_path / "b.avi", "mpeg4", range(0, 400, 40), aspect=Fraction(4, 3))
        path = tmp_path / "both.avi"
        with av.open(str(path), "w") as container:
            number = 0
            for part in (square, wide):
                with av.open(str(part)) as source:
                    if not number:
                        stream = container.add_stream_from_template(source.streams.video[0])
                    for packet in source.demux(video=0):
                        if packet.size:
                            packet.stream, packet.pts, packet.dts = stream, number, number
                            packet.time_base = Fraction(1, 25)
                            container.mux(packet)
                            number += 1
        with pytest.raises(RejectedError, match="pixel shape changes at frame 1"):
            inspect_video(path)

    def test_dropped_pictures_that_nothing_refers_to_are_no_damage(self, tmp_path: Path) -> None:
        path = without(
            write_encoded(tmp_path, "mjpeg-mkv"), lambda number, packet: number in (9, 10)
        )
        assert inspect_video(path).num_frames == 43

    @pytest.mark.parametrize("name", ["h264-mp4-gop12-b3", "mpeg4-avi-gop12-b0", "vp9-webm-plain"])
    def test_every_cut_is_found(self, name: str, tmp_path: Path) -> None:
        path = write_encoded(tmp_path, name)
        content = path.read_bytes()
        for part in (0.3, 0.6, 0.9, 0.999):
            path.write_bytes(content[: int(len(content) * part)])
            with pytest.raises(RejectedError, match=r"truncated|not a video|damaged"):
                inspect_video(path)

    def test_a_header_that_is_cut_is_no_fault_of_the_disk(self, tmp_path: Path) -> None:
        path = write_encoded(tmp_path, "vp9-webm-plain")
        path.write_bytes(path.read_bytes()[:130])
        with pytest.raises(RejectedError, match="truncated: 130 of"):
            inspect_video(path)

    def test_an_impossible_length_is_no_cut(self, tmp_path: Path) -> None:
        path = write_encoded(tmp_path, "vp9-webm-plain")
        content = path.read_bytes()
        path.write_bytes(content[:4] + b"\x01" + b"\xff" * 6 + b"\xfe" + content[12:])
        with pytest.raises(RejectedError, match="not a video"):
            inspect_video(path)

    def test_what_follows_a_file_is_no_cut(self, tmp_path: Path) -> None:
        for name in ("h264-mp4-gop12-b3", "mpeg4-avi-gop12-b0", "vp9-webm-plain"):
            path = write_encoded(tmp_path, name)
            path.write_bytes(path.read_bytes() + b"\0" * 1000)
            assert inspect_video(path).num_frames == 45


def test_writing_av1_leaves_this_process_s_priority_as_it_was(tmp_path: Path) -> None:
    before = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority
    write_encoded(tmp_path, "av1-mp4", num_frames=2)
    assert (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority) == before
