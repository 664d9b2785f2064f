"""What tests of the loader share."""

from pathlib import Path
from typing import Any

from numbered_videos import DALI_CPU, write_numbered

from engine.video.index import VideoIndex
from engine.video.indexing import build_index
from engine.video.loader import ClipLoader


def index_of(root: Path) -> VideoIndex:
    return build_index(root, root / "index.jsonl", num_workers=0, progress=False)[0]


def loader(index: VideoIndex, **options: Any) -> ClipLoader:
    settings: dict[str, Any] = {
        "num_frames": 4,
        "frame_stride": 3,
        "resolution": 64,
        "view_resolution": 64,
        "batch_size": 3,
        "seed": 1,
        "num_threads": 1,
    }
    return ClipLoader(index, **{**settings, **options})


def write_all_numbered(root: Path) -> VideoIndex:
    """12 numbered videos, 4 classes of one codec each, which DALI decodes on the CPU."""
    for codec in DALI_CPU:
        for part, length in (("long", 80), ("middle", 40), ("brief", 20)):
            path = write_numbered(root, codec, num_frames=length)
            (root / codec).mkdir(exist_ok=True)
            path.rename(root / codec / f"{part}{path.suffix}")
    return index_of(root)
