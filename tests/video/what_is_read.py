"""The table in docs/data.md of the codecs and containers that are read, and what decodes each.

python tests/video/what_is_read.py                 prints it
python tests/video/what_is_read.py docs/data.md    puts it between that file's markers
"""

import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from encoded_videos import ENCODINGS, HEIGHT, write_encoded

from engine.video.decoder_choice import obstacle
from engine.video.index import VideoIndex
from engine.video.indexing import build_index
from engine.video.streams import Decoder

BEGIN, END = "<!-- what is read -->", "<!-- /what is read -->"
COMMAND = ".venv/bin/python tests/video/what_is_read.py docs/data.md"
_CODECS = {
    "h264": "H.264",
    "hevc": "H.265",
    "mpeg4": "MPEG-4 (Xvid, DivX)",
    "vp8": "VP8",
    "vp9": "VP9",
    "av1": "AV1",
    "mjpeg": "Motion JPEG",
    "mpeg2video": "MPEG-2",
    "msmpeg4v3": "MS-MPEG-4 v3",
    "prores": "ProRes",
    "ffv1": "FFV1",
}
_CONTAINERS = ("mp4", "mov", "mkv", "webm", "avi")
_DECODERS: dict[str, Decoder] = {"PyAV": "pyav", "GPU": "dali-gpu", "CPU": "dali-cpu"}
_NOT_ALL = "¹"
_WHY_NOT_ALL = "whose times do not number its frames"
_NOTES = """\
All of it is decoded by PyAV, on the CPU, and tested frame by frame; an empty cell is not tested.
*GPU* and *CPU* are DALI's decoders. *CPU* is tested; *GPU* says what DALI and NVDEC are known to do
and was **not run yet**.

- ¹ Not all: DALI finds frames by their packets' times, which do not number them where AVI holds
  H.264 with B-frames or packed MPEG-4.
- DALI converts BT.601's colours only, and NVDEC decodes 8 bits and 4:2:0: other videos are PyAV's.
- Of several video streams PyAV reads the main one; a picture that is attached to a file, such as a
  cover, is no video.
- High dynamic range (PQ, HLG) is rejected, because without tone mapping its white would be grey.
- Damaged files are rejected where libav notices. VP8's and VP9's packets may end early unnoticed.
- Pixels that are not square are resampled to square ones, and turned videos are turned upright."""


def write_all(folder: Path) -> VideoIndex:
    """A square numbered video in every encoding, and their index."""
    for name in ENCODINGS:
        write_encoded(folder / "videos", name, width=HEIGHT)
    index, rejects = build_index(
        folder / "videos", folder / "index.jsonl", num_workers=0, progress=False
    )
    assert not rejects
    return index


def table(index: VideoIndex) -> str:
    """Markdown, from the index of the videos that `write_all` has written."""
    obstacles: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for entry in index.entries:
        path = Path(entry.path)
        assert entry.codec == ENCODINGS[path.stem].codec
        for name, decoder in _DECODERS.items():
            obstacles[entry.codec, path.suffix[1:]][name].append(obstacle(entry, decoder))
    assert {codec for codec, _ in obstacles} == set(_CODECS)
    assert {container for _, container in obstacles} == set(_CONTAINERS)
    lines = [("codec", *_CONTAINERS), ("---",) * (1 + len(_CONTAINERS))]
    for codec, title in _CODECS.items():
        cells = [_cell(obstacles.get((codec, container), {})) for container in _CONTAINERS]
        lines.append((title, *cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{_NOTES}"


def _cell(obstacles: dict[str, list[str]]) -> str:
    """The decoders of a codec in a container; empty where that is not tested."""
    names = []
    for name, of_videos in obstacles.items():
        if not all(of_videos):
            # The note says of this one only when it arises.
            assert all(not reason or reason.endswith(_WHY_NOT_ALL) for reason in of_videos)
            names.append(name + (_NOT_ALL if any(of_videos) else ""))
    return ", ".join(names)


def split(text: str) -> tuple[str, str, str]:
    """A text up to the markers, between them and after. Raises ValueError without one pair."""
    before, rest = text.split(BEGIN)
    between, after = rest.split(END)
    return before, between.strip(), after


def main() -> None:
    """Print the table, or write it."""
    with tempfile.TemporaryDirectory() as folder:
        made = table(write_all(Path(folder)))
    if not sys.argv[1:]:
        print(made)
        return
    path = Path(sys.argv[1])
    before, _, after = split(path.read_text())
    path.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}")


if __name__ == "__main__":
    main()
