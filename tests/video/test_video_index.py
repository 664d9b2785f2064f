import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numbered_videos import CODECS, damage, real_clip, write_numbered

from engine.configuration import Data
from engine.errors import UserError
from engine.video import indexing
from engine.video.dataset import open_dataset
from engine.video.index import VideoIndex, load_rejects
from engine.video.indexing import build_index
from engine.video.inspection import RejectedError, VideoFacts, inspect_video
from engine.video.writing import write_mp4


def index_of(root: Path, out: Path, **options: object) -> VideoIndex:
    return build_index(root, out, num_workers=0, progress=False, **options)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("codec", CODECS)
def test_facts_are_what_was_encoded(codec: str, tmp_path: Path) -> None:
    facts = inspect_video(write_numbered(tmp_path, codec, num_frames=37, width=80, height=48))
    assert (facts.num_frames, facts.fps, facts.width, facts.height) == (37, 25.0, 80, 48)
    assert facts.codec == codec.partition("-")[0].removesuffix("444")


@pytest.mark.parametrize(
    ("rotation", "size"), [(0, (80, 48)), (90, (48, 80)), (180, (80, 48)), (270, (48, 80))]
)
@pytest.mark.parametrize("codec", ["mjpeg", "h264"])  # in mkv and mp4
def test_turned_videos_have_the_displayed_size(
    codec: str, rotation: int, size: tuple[int, int], tmp_path: Path
) -> None:
    path = write_numbered(tmp_path, codec, num_frames=5, width=80, height=48, rotation=rotation)
    facts = inspect_video(path)
    assert (facts.rotation, (facts.width, facts.height)) == (rotation, size)


def test_other_orientations_are_rejected(tmp_path: Path) -> None:
    path = write_numbered(tmp_path, "h264", num_frames=5, rotation=30)
    with pytest.raises(RejectedError, match="quarter turns"):
        inspect_video(path)


@pytest.mark.parametrize("codec", ["mjpeg", "h264"])  # size in the frames, in the header too
def test_huge_frames_are_rejected(codec: str, tmp_path: Path) -> None:
    path = write_numbered(tmp_path, codec, num_frames=1, width=8208, height=4320)
    with pytest.raises(RejectedError, match="more than 35389440"):
        inspect_video(path)


def test_facts_of_a_real_clip() -> None:
    facts = inspect_video(real_clip("bikes"))
    assert (facts.num_frames, facts.width, facts.height, facts.codec) == (250, 640, 272, "h264")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("stub.mp4", b"\0" * 1000, "not a video"),
        ("text.mp4", b"no video here\n" * 50, "not a video"),
        ("empty.mkv", b"", "not a video"),
        # Each of these would make libav open something else, were it not for the whitelists.
        ("list.mp4", b"ffconcat version 1.0\nfile mjpeg.mkv\n", "not a video"),
        ("list.m3u8", b"#EXTM3U\n#EXTINF:1,\nhttp://localhost:1/x.ts\n", "not a video"),
        ("http:localhost", b"hello", "not a video"),
    ],
)
def test_what_is_no_video_is_rejected(
    name: str, content: bytes, reason: str, tmp_path: Path
) -> None:
    write_numbered(tmp_path, "mjpeg", num_frames=5)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RejectedError, match=reason):
        inspect_video(tmp_path / name)


def test_the_concat_file_would_otherwise_be_opened(tmp_path: Path) -> None:
    """Guards the test above: without whitelists libav does decode the listed file."""
    import av

    write_numbered(tmp_path, "mjpeg", num_frames=5)
    concat = tmp_path / "list.mp4"
    concat.write_text("ffconcat version 1.0\nfile mjpeg.mkv\n")
    with av.open(str(concat)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 5


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(RejectedError, match="not a regular file"):
        inspect_video(tmp_path / "pipe.mp4")


@pytest.mark.parametrize("codec", ["mjpeg", "vp9", "h264", "mpeg4"])
def test_flipped_bits_are_found(codec: str, tmp_path: Path) -> None:
    path = write_numbered(tmp_path, codec)
    damage(path, start=path.stat().st_size // 2)
    # libav of PyAV 19 gives up on the damaged container before the decoder sees its frames.
    with pytest.raises(RejectedError, match=r"damaged|truncated"):
        inspect_video(path)


def test_tags_need_not_be_text(tmp_path: Path) -> None:
    path = write_numbered(tmp_path, "mjpeg")
    before = inspect_video(path)
    content = path.read_bytes()
    assert content.count(b"Lavf") > 0  # libav's name for itself, a tag of the file
    path.write_bytes(content.replace(b"Lavf", b"\xff\xfe\xe9f"))
    assert replace(inspect_video(path), sha256="") == replace(before, sha256="")


@pytest.mark.parametrize(
    ("codec", "reason"),
    [("mjpeg", "truncated"), ("mjpeg444", "truncated|damaged"), ("h264", "truncated")],
)
def test_truncation_is_found(codec: str, reason: str, tmp_path: Path) -> None:
    path = write_numbered(tmp_path, codec)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(RejectedError, match=reason):
        inspect_video(path)


def test_truncation_after_a_whole_header_is_found(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), dtype=np.uint8)
    path = tmp_path / "x.mp4"
    write_mp4(path, frames, fps=25)  # the header first, for players that stream
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(RejectedError, match=r"truncated|damaged"):
        inspect_video(path)


def test_the_fingerprint_knows_how_files_are_read(tmp_path: Path) -> None:
    write_numbered(tmp_path / "v", "mjpeg", num_frames=5)
    index = index_of(tmp_path / "v", tmp_path / "index.jsonl")
    for change in ({"num_frames": 4}, {"width": 99}, {"rotation": 90}, {"matrix": "bt709"}):
        (entry,) = index.entries
        other = replace(index, entries=(replace(entry, **change),))
        assert other.fingerprint() != index.fingerprint()
    moved = replace(index, root=tmp_path)
    assert moved.fingerprint() == index.fingerprint()


def test_one_file_ends_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it does to the judge."""
    for name in ("a", "b"):
        path = write_numbered(tmp_path / "v", "mjpeg", num_frames=5)
        path.rename(path.with_stem(name))
    inspect = indexing.inspect_video

    def judge(path: Path) -> VideoFacts:
        if path.stem == "a":
            raise RuntimeError("no such thing")
        return inspect(path)

    monkeypatch.setattr(indexing, "inspect_video", judge)
    index = index_of(tmp_path / "v", tmp_path / "index.jsonl")
    assert [entry.path for entry in index.entries] == ["b.mkv"]
    (reject,) = load_rejects(tmp_path / "index.jsonl")
    assert reject.reason == "cannot be judged: RuntimeError('no such thing')"


def test_class_folders_with_spaces_and_unicode(tmp_path: Path) -> None:
    root = tmp_path / "my vidéos"
    write_numbered(root / "b class", "mjpeg", num_frames=5)
    write_numbered(root / "á" / "deeper", "h264", num_frames=6)
    write_numbered(root / ".hidden", "h264", num_frames=6)
    (root / "á" / "notes.txt").write_text("x")
    write_numbered(root, "vp9", num_frames=5)
    out = root / "index.jsonl"
    index = index_of(root, out)
    assert index.classes == ("b class", "á")
    found = {e.path: (e.label, e.num_frames) for e in index.entries}
    assert found == {"b class/mjpeg.mkv": (0, 5), "á/deeper/h264.mp4": (1, 6)}
    reasons = {reject.path: reject.reason for reject in load_rejects(out)}
    assert set(reasons) == {"vp9.webm", "á/notes.txt"}
    assert "class folders" in reasons["vp9.webm"]
    assert VideoIndex.load(out) == VideoIndex(root.resolve(), index.classes, index.entries)


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    write_numbered(tmp_path / "v", "mjpeg", num_frames=5)
    index = index_of(tmp_path / "v", tmp_path / "index.jsonl")
    assert index.classes == ()
    assert [entry.label for entry in index.entries] == [None]


def test_kinetics_annotations(tmp_path: Path) -> None:
    root = tmp_path / "clips"
    write_numbered(root / "x", "mjpeg", num_frames=5).rename(root / "x" / "-a_b_000010_000020.mkv")
    write_numbered(root, "mjpeg", num_frames=6).rename(root / "cd.mkv")
    write_numbered(root, "mjpeg", num_frames=7).rename(root / "unlisted.mkv")
    table = tmp_path / "train.csv"
    table.write_text(
        "label,youtube_id,time_start,time_end,split\n"
        'zumba,"-a_b",10,20,train\narchery,cd,0,10,train\nzumba,gone,3,13,train\n'
    )
    out = tmp_path / "index.jsonl"
    index = index_of(root, out, annotations=table)
    assert index.classes == ("archery", "zumba")
    found = {entry.path: entry.label for entry in index.entries}
    assert found == {"x/-a_b_000010_000020.mkv": 1, "cd.mkv": 0}
    assert [(r.path, r.reason) for r in load_rejects(out)] == [
        ("gone_000003_000013", "missing (line 4 of the annotations)"),
        ("unlisted.mkv", "not in the annotations"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label,youtube_id\na,b\n", "no column 'time_start'"),
        ("label,youtube_id,time_start,time_end\na,b,x,3\n", "line 2"),
        ("label,youtube_id,time_start,time_end\na,b,inf,3\n", "line 2"),
        ("label,youtube_id,time_start,time_end\na,b\n", "line 2: a column is empty"),
        ("", "no column"),
    ],
)
def test_bad_annotations_name_the_line(text: str, message: str, tmp_path: Path) -> None:
    write_numbered(tmp_path / "v", "mjpeg", num_frames=5)
    table = tmp_path / "t.csv"
    table.write_text(text)
    with pytest.raises(UserError, match=message):
        index_of(tmp_path / "v", tmp_path / "i.jsonl", annotations=table)


def test_a_folder_that_cannot_be_read_is_no_missing_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        write_numbered(tmp_path / "v" / name, "mjpeg", num_frames=5)
    closed, listed = str((tmp_path / "v/a").resolve()), os.scandir

    def scandir(path: str) -> object:
        if str(path) == closed:
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=f"cannot read {closed}: Permission denied"):
        index_of(tmp_path / "v", tmp_path / "i.jsonl")
    assert not (tmp_path / "i.jsonl").exists()


def test_only_an_index_of_the_same_folder_is_replaced(tmp_path: Path) -> None:
    a, b, out = tmp_path / "a", tmp_path / "b", tmp_path / "i.jsonl"
    for folder in (a, b):
        write_numbered(folder, "mjpeg", num_frames=5)
    out.write_text("label,youtube_id,time_start,time_end\n")
    with pytest.raises(UserError, match=r"i\.jsonl is there already and is not a video index"):
        index_of(a, out)
    assert out.read_text().startswith("label")
    out.unlink()
    index_of(a, out)
    index_of(a, out)
    before = out.read_bytes()
    with pytest.raises(UserError, match=f"is the index of {a}, not of {b}; choose another"):
        index_of(b, out)
    assert out.read_bytes() == before
    a.rename(tmp_path / "moved")
    assert index_of(tmp_path / "moved", out).root == tmp_path / "moved"


def test_pipes_are_not_looked_into(tmp_path: Path) -> None:
    write_numbered(tmp_path / "v", "mjpeg", num_frames=5)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is there already and is not a video index"):
        index_of(tmp_path / "v", tmp_path / "pipe")


def test_an_interrupted_runs_verdicts_are_kept_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in "vw":
        for name in "ab":
            write_numbered(tmp_path / folder / name, "mjpeg", num_frames=5)
    out, partial = tmp_path / "index.jsonl", tmp_path / "index.partial.jsonl"

    def interrupted(path: Path) -> object:
        if "b" in path.parts:
            raise KeyboardInterrupt
        return inspect_video(path)

    with monkeypatch.context() as patch:
        patch.setattr(indexing, "inspect_video", interrupted)
        with pytest.raises(KeyboardInterrupt):
            index_of(tmp_path / "v", out)
    before = partial.read_bytes()
    with pytest.raises(UserError, match=f"{partial} is an interrupted index of {tmp_path / 'v'}, "):
        index_of(tmp_path / "w", out)
    assert partial.read_bytes() == before
    index_of(tmp_path / "v", out)
    assert not partial.exists()


LATIN = os.fsdecode(b"caf\xe9")  # as archives made on other systems have them


def test_names_that_are_not_utf8_keep_their_class(tmp_path: Path) -> None:
    """Or the labels of the classes behind it would be others."""
    root, out = tmp_path / "v", tmp_path / "index.jsonl"
    for folder in ("a", "b", f"b/{LATIN}"):
        write_numbered(root / folder, "mjpeg", num_frames=5)
    (root / "a" / "mjpeg.mkv").rename(root / "a" / f"{LATIN}.mkv")
    (root / f"{LATIN}.txt").touch()
    index = index_of(root, out)
    assert VideoIndex.load(out) == index
    assert index.classes == ("a", "b")
    assert [(entry.path, entry.label) for entry in index.entries] == [("b/mjpeg.mkv", 1)]
    assert [(reject.path, reject.reason) for reject in load_rejects(out)] == [
        (r"a/caf\udce9.mkv", "its name is not UTF-8"),
        (r"b/caf\udce9/mjpeg.mkv", "its name is not UTF-8"),
        (r"caf\udce9.txt", "lies outside the class folders"),
    ]


def test_a_class_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    write_numbered(tmp_path / "v" / LATIN, "mjpeg", num_frames=5)
    with pytest.raises(UserError, match=r"v/caf\\udce9: the class's name is not UTF-8; rename it"):
        index_of(tmp_path / "v", tmp_path / "index.jsonl")


def test_a_root_that_is_not_utf8_needs_its_index_inside(tmp_path: Path) -> None:
    root = tmp_path / LATIN
    write_numbered(root, "mjpeg", num_frames=5)
    with pytest.raises(UserError, match=r"caf\\udce9: the folder's name is not UTF-8; rename it"):
        index_of(root, tmp_path / "index.jsonl")
    index_of(root, root / "index.jsonl")
    assert VideoIndex.load(root / "index.jsonl").path(0).exists()


def test_names_that_are_not_utf8_are_rejected(tmp_path: Path) -> None:
    root, out = tmp_path / "v", tmp_path / "i.jsonl"
    write_numbered(root, "mjpeg", num_frames=5).rename(root / "good.mkv")
    bad = os.fsdecode(os.fsencode(root / "caf") + b"\xe9.mkv")
    write_numbered(root, "mjpeg", num_frames=5).rename(bad)
    assert [entry.path for entry in index_of(root, out).entries] == ["good.mkv"]
    assert [(r.path, r.reason) for r in load_rejects(out)] == [
        (r"caf\udce9.mkv", "its name is not UTF-8")
    ]
    assert len(VideoIndex.load(out).entries) == 1


def test_an_interrupted_run_goes_on_and_judges_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = tmp_path / "v", tmp_path / "index.jsonl"
    for name in "abcd":
        write_numbered(root / name, "mjpeg", num_frames=5)
    (root / "a" / "bad.mp4").write_text("x")
    judged: list[str] = []

    def interrupted(path: Path) -> object:
        if len(judged) == 3:
            raise KeyboardInterrupt
        judged.append(str(path.relative_to(root)))
        return inspect_video(path)

    monkeypatch.setattr(indexing, "inspect_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        index_of(root, out)
    assert not out.exists()
    assert len(judged) == 3

    later: list[str] = []

    def counted(path: Path) -> object:
        later.append(str(path.relative_to(root)))
        return inspect_video(path)

    monkeypatch.setattr(indexing, "inspect_video", counted)
    index = index_of(root, out)
    assert sorted(judged + later) == sorted([f"{n}/mjpeg.mkv" for n in "abcd"] + ["a/bad.mp4"])
    assert len(index.entries) == 4
    assert not list(tmp_path.glob("*partial*"))

    # A finished index serves the next run in the same way; what has changed is judged again.
    later.clear()
    write_numbered(root / "b", "mjpeg", num_frames=9)
    again = index_of(root, out)
    assert later == ["b/mjpeg.mkv"]
    assert [entry.num_frames for entry in again.entries] == [5, 9, 5, 5]
    assert [reject.path for reject in load_rejects(out)] == ["a/bad.mp4"]


def test_verdicts_of_an_older_version_are_judged_again(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "v", "mjpeg", num_frames=5)
    status = path.stat()
    stamp = {"size_bytes": status.st_size, "modified_ns": status.st_mtime_ns}
    older = {"path": path.name, "num_frames": 7, **stamp}  # it knew no rotation
    (tmp_path / "index.partial.jsonl").write_text(json.dumps(older) + "\n")
    index = index_of(tmp_path / "v", tmp_path / "index.jsonl")
    assert [(entry.num_frames, entry.rotation) for entry in index.entries] == [(5, 0)]


def _crash_on_bad(root: Path, path: str) -> dict:
    if "bad" in path:
        os._exit(1)
    return {"path": path}


def test_a_file_that_kills_the_decoder_is_one_reject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "bad", "c"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(indexing, "_verdict", _crash_on_bad)
    verdicts = {v["path"]: v for v in indexing._judge_files(tmp_path, ["a", "bad", "c"], 1)}
    assert set(verdicts) == {"a", "bad", "c"}
    assert [p for p, v in verdicts.items() if v.get("reason") == "crashes the decoder"] == ["bad"]


def test_nothing_usable_says_why(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    with pytest.raises(UserError, match="is empty"):
        index_of(tmp_path / "v", tmp_path / "i.jsonl")
    (tmp_path / "v" / "x.mp4").write_text("x")
    with pytest.raises(UserError, match=r"no usable video .* x\.mp4: not a video"):
        index_of(tmp_path / "v", tmp_path / "i.jsonl")
    assert not (tmp_path / "i.jsonl").exists()


def test_fingerprint_sees_content_labels_and_paths_but_not_the_root(tmp_path: Path) -> None:
    write_numbered(tmp_path / "v" / "a", "mjpeg", num_frames=5)
    index = index_of(tmp_path / "v", tmp_path / "v" / "index.jsonl")
    (tmp_path / "v").rename(tmp_path / "moved")
    moved = VideoIndex.load(tmp_path / "moved" / "index.jsonl")
    assert moved.path(0).exists()  # a root beside the index moves with it
    assert moved.fingerprint() == index.fingerprint()
    write_numbered(tmp_path / "moved" / "a", "mjpeg", num_frames=6)
    changed = index_of(tmp_path / "moved", tmp_path / "moved" / "index.jsonl")
    assert changed.fingerprint() != index.fingerprint()
    (tmp_path / "moved" / "a").rename(tmp_path / "moved" / "b")
    renamed = index_of(tmp_path / "moved", tmp_path / "moved" / "index.jsonl")
    assert renamed.fingerprint() != changed.fingerprint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 7}, "line 2: label 7, but there are 1 classes"),
        ({"label": None}, "line 2: label is missing"),
        ({"path": "../../etc/passwd"}, "leads out of the data set"),
        ({"path": "/etc/passwd"}, "leads out of the data set"),
        ({"path": "a/\0"}, "leads out of the data set"),
        ({"fps": 0.0}, "must be positive"),
        ({"width": 2**63}, "is more than any video's"),
        ({"num_frames": 10**30}, "is more than any video's"),
        ({"fps": float("nan")}, "must be positive"),
        ({"num_frames": "5"}, "num_frames"),
        ({"num_frames": 0}, "must be positive"),
        ({"rotation": 45}, "rotation 45 is no quarter turn"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_bad_index_line_is_named(change: dict, message: str, tmp_path: Path) -> None:
    write_numbered(tmp_path / "v" / "a", "mjpeg", num_frames=5)
    out = tmp_path / "index.jsonl"
    index_of(tmp_path / "v", out)
    header, entry = out.read_text().splitlines()
    out.write_text(header + "\n" + json.dumps({**json.loads(entry), **change}) + "\n")
    with pytest.raises(UserError, match=message) as caught:
        VideoIndex.load(out)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("root", ["../../..", "v/../../w", "..", "v\0"])
def test_a_root_that_climbs_is_refused(root: str, tmp_path: Path) -> None:
    """`prepare.py` never writes one: the videos lie below the index, or at an absolute path."""
    write_numbered(tmp_path / "x" / "v" / "a", "mjpeg", num_frames=5)
    out = tmp_path / "x" / "index.jsonl"
    index_of(tmp_path / "x" / "v", out)
    header, entry = out.read_text().splitlines()
    assert json.loads(header)["root"] == "v"
    planted = json.dumps({**json.loads(header), "root": root}) + "\n" + entry + "\n"
    out.write_text(planted)
    data = Data(path=str(out))
    with pytest.raises(UserError) as caught:
        open_dataset(data, make=True, say=print)
    assert str(caught.value) == (
        f"{out}, line 1: root {root!r} leads out of the index's own folder; make it again with "
        "engine/prepare.py"
    )
    # Nor is it taken for an index that may be overwritten.
    with pytest.raises(UserError, match="is not a video index; choose another --out"):
        index_of(tmp_path / "x" / "v", out)
    assert out.read_text() == planted


@pytest.mark.parametrize("text", ["", "not json\n", '{"some": "json"}\n', "[]\n"])
def test_other_files_are_no_index(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(UserError, match="is not a video index"):
        VideoIndex.load(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match="No such file"):
        VideoIndex.load(tmp_path / "missing.jsonl")
