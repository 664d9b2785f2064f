"""docs/data.md says what is read, and by what: it is what the tests find."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from encoded_videos import ENCODINGS, HEIGHT
from numbered_videos import read_number
from what_is_read import COMMAND, split, table, write_all

from engine.video.decoder_choice import obstacle
from engine.video.index import VideoIndex
from engine.video.loader import ClipLoader
from engine.video.streams import Decoder

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> VideoIndex:
    return write_all(tmp_path_factory.mktemp("encoded"))


def test_the_pages_table_is_what_is_found(encoded: VideoIndex) -> None:
    assert len(encoded.entries) == len(ENCODINGS)
    _, found, _ = split(PAGE.read_text())
    assert found == table(encoded), f"{COMMAND} writes it"


@pytest.mark.parametrize(
    "decoder",
    [
        "dali-cpu",
        pytest.param(
            "dali-gpu",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_dali_decodes_what_the_table_says(encoded: VideoIndex, decoder: Decoder) -> None:
    entries = tuple(entry for entry in encoded.entries if not obstacle(entry, decoder))
    assert entries
    index = replace(encoded, entries=entries)
    loaders = [
        ClipLoader(
            index,
            num_frames=4,
            frame_stride=3,
            resolution=HEIGHT,
            view_resolution=HEIGHT,
            batch_size=len(entries),
            decoder=chosen,
            device=torch.device("cuda" if chosen == "dali-gpu" else "cpu"),
            num_threads=1,
        )
        for chosen in (decoder, "pyav")
    ]
    sampler = loaders[0].sampler
    for batch in range(3):
        numbers_of_clips = range(batch * len(entries), (batch + 1) * len(entries))
        videos = {sampler.request(number).video for number in numbers_of_clips}
        assert len(videos) == len(entries)  # each once
        by_dali, by_pyav = (
            (next(loader).video_BTCHW.cpu().double() + 1) * 127.5 for loader in loaders
        )
        # Chroma is enlarged by two builds of libswscale, or by another way.
        assert (by_dali - by_pyav).abs().max() <= 3.01
        numbers = [
            [read_number(frame) for frame in clip]
            for clip in by_dali.permute(0, 1, 3, 4, 2).numpy()
        ]
        assert [np.diff(of_clip).tolist() for of_clip in numbers] == [[3, 3, 3]] * len(entries)
    for loader in loaders:
        loader.close()
