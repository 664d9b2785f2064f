"""The judgement of one video file. A module of its own, because processes that are started for it
import no more than this.
"""

from pathlib import Path

from engine.video.containers import RejectedError
from engine.video.inspection import VideoFacts, inspect_video


def judged(path: Path) -> VideoFacts | str:
    """What a full decode finds in a file, or why the file cannot be used."""
    try:
        return inspect_video(path)
    except RejectedError as rejected:
        return str(rejected)
