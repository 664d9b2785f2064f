"""The reasons why files are no part of an index: which are alike, and which say most to a user."""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from engine.video.index import Reject

VIDEO_SUFFIXES = {
    *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".mts", ".m2ts", ".ts"),
    *(".wmv", ".flv", ".ogv", ".3gp", ".3g2", ".vob"),
}
"""What a name that promises a video ends in, whether or not its format can be read here."""
NOT_LISTED = "not in the annotations"
OTHER_CLASS = "its class"
OUTSIDE = "lies outside the class folders"
BESIDE = "lies in a folder beside the videos"
MISSING = "missing"
DUPLICATE = "duplicate of"
# The user's lists and folders leave these out: nothing is wrong with the file itself.
_LEFT_OUT = (NOT_LISTED, OTHER_CLASS, OUTSIDE, BESIDE)


def looks_like_video(path: str) -> bool:
    """Whether the file's name promises a video; a caption's or a thumbnail's does not."""
    return PurePosixPath(path).suffix.lower() in VIDEO_SUFFIXES


def by_kind(rejects: Iterable[Reject]) -> list[tuple[int, Reject]]:
    """How many rejects have each kind of reason, with the first of them; the most telling first.

    Videos that cannot be used come before videos that a list leaves out, these before other files,
    and these before rows without a file; within each, the most frequent kind comes first.
    """
    counts: dict[tuple[int, str], int] = {}
    examples: dict[tuple[int, str], Reject] = {}
    for reject in rejects:
        key = _rank(reject), _kind(reject.reason)
        counts[key] = counts.get(key, 0) + 1
        examples.setdefault(key, reject)
    ordered = sorted(counts, key=lambda key: (key[0], -counts[key]))
    return [(counts[key], examples[key]) for key in ordered]


def unusable(rejects: Iterable[Reject]) -> list[Reject]:
    """The videos among them that cannot be used: not those left out, missing or there twice."""
    return [
        reject
        for reject in rejects
        if _rank(reject) == 0 and not reject.reason.startswith(DUPLICATE)
    ]


def _rank(reject: Reject) -> int:
    if reject.reason.startswith(MISSING):
        return 3
    if not looks_like_video(reject.path) and not reject.path.endswith("/"):  # a folder
        return 2
    return 1 if reject.reason.startswith(_LEFT_OUT) else 0


def _kind(reason: str) -> str:
    """The reason without what differs from file to file: numbers and quoted names."""
    return re.sub(r"""\d+|'[^']*'|"[^"]*\"""", "#", reason)
