"""Judging damaged configurations, indexes, tensor files and exported folders.

Each is read as the engine reads it: it gives what it should, or one line for the user.
"""

import json
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from byte_mutants import changed_bytes, changed_tree, odd_value

from engine import Cascade
from engine.configuration import config_from_tree, load_config
from engine.errors import UserError
from engine.trainer.checkpoints import read_tensors, sha256
from engine.video.index import VideoIndex
from engine.video.loader import ClipLoader

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def judge_configuration(seed: int, folder: Path) -> str:
    """A shipped file with other bytes or other values, and sometimes an override."""
    choose = random.Random(seed)
    base, path = choose.choice(CONFIGS), folder / "changed.yaml"
    tree = yaml.safe_load(base.read_text())
    if choose.random() < 0.4:
        path.write_bytes(changed_bytes(base.read_bytes(), choose))
    else:
        path.write_text(yaml.safe_dump(changed_tree(tree, choose), allow_unicode=True))
    overrides = []
    if choose.random() < 0.3:
        key = choose.choice(("training", "stages.1.training", "data", "stages.2", "variant", "x.1"))
        name = choose.choice(("micro_batch", "path", "num_frames"))
        overrides = [f"{key}.{name}={odd_value(choose)}"]

    def read() -> None:
        config = load_config(path, overrides)
        assert config_from_tree(json.loads(json.dumps(config.to_tree())), "tree") == config
        for number in range(2, 1 + len(config.stages)):
            config.upsampling(number)

    return _reason(read)


def judge_index(made: Path, seed: int, folder: Path) -> str:
    """An index with other bytes or other values, of videos that lie in `made` beside it."""
    choose = random.Random(seed)
    shutil.copytree(made, folder / "data")
    path = folder / "data" / "index.jsonl"
    if choose.random() < 0.4:
        path.write_bytes(changed_bytes(path.read_bytes(), choose))
    else:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        place = choose.randrange(len(lines))
        lines[place] = changed_tree(lines[place], choose)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def read() -> None:
        index = VideoIndex.load(path)
        clips = ClipLoader(
            index,
            num_frames=2,
            frame_stride=2,
            resolution=16,
            view_resolution=8,
            batch_size=2,
            num_threads=1,
            replace_failed=choose.random() < 0.5,
        )
        try:
            assert next(clips).video_BTCHW.shape == (2, 2, 3, 8, 8)
        finally:
            clips.close()

    return _reason(read)


def judge_tensors(made: Path, seed: int, folder: Path) -> str:
    """One of the files in `made`, with other bytes, or with another pickle in a sound archive."""
    choose = random.Random(seed)
    base, path = choose.choice(sorted(made.iterdir())), folder / "tensors.pt"
    if choose.random() < 0.3:
        path.write_bytes(changed_bytes(base.read_bytes(), choose))
    else:
        with zipfile.ZipFile(base) as archive, zipfile.ZipFile(path, "w") as changed:
            for name in archive.namelist():
                content = archive.read(name)
                is_pickle = name.endswith("data.pkl")
                if is_pickle or choose.random() < 0.02:
                    content = changed_bytes(content, choose)
                changed.writestr(name, content)
    return _reason(lambda: read_tensors(path))


def judge_exported(made: Path, seed: int, folder: Path) -> str:
    """The exported folder `made` with one file changed; often with the hash that it then has."""
    choose = random.Random(seed)
    copy = folder / "exported"
    shutil.copytree(made, copy)
    config, weights = copy / "config.json", copy / "model.safetensors"
    if choose.random() < 0.4:
        weights.write_bytes(changed_bytes(weights.read_bytes(), choose))
        described = json.loads(config.read_text())
        if choose.random() < 0.8:
            described["weights_sha256"] = sha256(weights)
        config.write_text(json.dumps(described))
    elif choose.random() < 0.3:
        config.write_bytes(changed_bytes(config.read_bytes(), choose))
    else:
        config.write_text(json.dumps(changed_tree(json.loads(config.read_text()), choose)))
    return _reason(lambda: Cascade.from_pretrained(copy, "cpu").generate(num=1))


def _reason(read: Callable[[], Any]) -> str:
    """The line with which reading is refused; empty where it is not."""
    try:
        read()
    except UserError as refused:
        line = str(refused)
        assert line, "an empty line"
        assert "pydantic" not in line, line
        return line
    return ""
