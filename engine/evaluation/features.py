"""Features of clips, in bounded memory, kept on the disk so that nothing is computed twice.

A shard holds the features of a few clips. Its name is a hash of everything that they depend on:
the protocol with the weights' sha256, how clips are shown, each video's content and which frames
of it. So another protocol never finds them, a renamed file does, and an interrupted run goes on
where it stopped. Shards are written whole or not at all.

Several ranks each compute every `world_size`-th shard (`extract`), on one shared folder; when all
have, any of them has the whole (`merge`). Which rank computes a shard changes no bit of the key.

Shapes: B, N clips, T frames, H x W pixels, C = 3 (RGB), F features of a layer.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from engine.durable_files import PARTIAL, make_writable_folder, put_in_place, writing
from engine.errors import UserError
from engine.evaluation.clips import Selection, View, clips_of
from engine.evaluation.feature_networks import FeatureNetwork, check_finite
from engine.evaluation.frame_features import frame_features
from engine.evaluation.i3d_weights import fingerprint
from engine.evaluation.protocol import EvaluationProtocol
from engine.processors import cores_per_process

FORMAT = 1
"""Of shards; to be raised when features change for a reason that the key does not hold."""
CLIPS_PER_SHARD = 32
Features = Mapping[str, NDArray[np.float32]]
"""Layers by name, each [N, F], a row per clip."""


class Throughput(NamedTuple):
    """What an extraction did."""

    num_computed: int
    num_cached: int
    seconds: float
    """Of computing, decoding included."""

    @staticmethod
    def total(parts: Iterable["Throughput"]) -> "Throughput":
        """Of all extractions together."""
        computed, cached, seconds = zip(*parts, strict=True)
        return Throughput(sum(computed), sum(cached), sum(seconds))

    def line(self) -> str:
        """For a person."""
        rate = f", {self.num_computed / self.seconds:.2f} videos/s" if self.num_computed else ""
        return f"{self.num_computed} clips computed{rate}; {self.num_cached} found in the cache"


def features_of_clips(
    clips: Iterable[NDArray[np.uint8]],
    protocol: EvaluationProtocol,
    network: FeatureNetwork | None,
    *,
    batch_size: int = 4,
    names: list[str] | None = None,
) -> Features:
    """Features of uint8 clips [T, H, W, C] of one size, without files or a cache.

    Memory holds `batch_size` clips. With no `network` only the layers of `frame_features`. Raises
    UserError where features are not finite or the network refuses the clips; ValueError where
    there are no clips.
    """
    found: list[dict[str, Tensor]] = []
    waiting = iter(clips)
    batches = iter(lambda: list(islice(waiting, batch_size)), [])
    for number, batch in enumerate(batches):
        clips_BTHWC = torch.from_numpy(np.stack(batch))
        layers = frame_features(clips_BTHWC, protocol.psd_frames, protocol.psd_radius)
        if network is not None:
            places = torch.arange(max(clips_BTHWC.shape[1], _least(network, protocol)))
            shown_BTHWC = clips_BTHWC[:, places % clips_BTHWC.shape[1]]
            layers |= network(shown_BTHWC, protocol.network_resize)
        first = number * batch_size
        shown = names[first:] if names else [f"clip {first + n}" for n in range(len(batch))]
        check_finite(layers, shown)
        found.append(layers)
    if not found:
        raise ValueError("no clips")
    return {name: torch.cat([layers[name] for layers in found]).numpy() for name in found[0]}


def extract(
    selection: Selection,
    numbers: range,
    view: View,
    protocol: EvaluationProtocol,
    network: FeatureNetwork | None,
    cache: Path,
    *,
    batch_size: int = 4,
    rank: int = 0,
    world_size: int = 1,
) -> Throughput:
    """Compute those shards of the selection's clips `numbers` that are this rank's and missing.

    Every rank is called with the same arguments but `rank`, and a `cache` that all see. Call
    `merge` when all are back, for instance behind a barrier.
    """
    make_writable_folder(cache)
    mine = list(_shards(selection, numbers, view, protocol, network, cache))[rank::world_size]
    num_cached = num_computed = 0
    num_threads = cores_per_process()
    began = time.monotonic()
    label = selection.role if view == "plain" else f"{selection.role}, {view}"
    with tqdm(total=sum(len(part) for part, _ in mine), desc=label, unit="video") as bar:
        for part, path in mine:
            if _read(path) is not None:
                num_cached += len(part)
                bar.update(len(part))
            else:
                names = [selection.source.names[selection.clips[n].number] for n in part]
                clips = clips_of(
                    selection,
                    part,
                    view,
                    protocol,
                    num_ahead=max(batch_size, num_threads),
                    num_threads=num_threads,
                )
                found = features_of_clips(
                    _counted(clips, bar), protocol, network, batch_size=batch_size, names=names
                )
                _write(path, found)
                num_computed += len(part)
    seconds = time.monotonic() - began
    return Throughput(num_computed, num_cached, seconds)


def merge(
    selection: Selection,
    numbers: range,
    view: View,
    protocol: EvaluationProtocol,
    network: FeatureNetwork | None,
    cache: Path,
) -> Features:
    """The features of all clips `numbers`, in their order. Raises UserError where a shard is not
    there: a rank has not finished.
    """
    parts = []
    shards = list(_shards(selection, numbers, view, protocol, network, cache))
    for number, (_, path) in enumerate(shards):
        found = _read(path)
        if found is None:
            raise UserError(
                f"features are missing in {cache}: shard {number} of {len(shards)} ({path.name}); "
                "the rank that computes it has not finished"
            )
        parts.append(found)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _counted(
    clips: Iterable[NDArray[np.uint8]], bar: "tqdm[NoReturn]"
) -> Iterator[NDArray[np.uint8]]:
    """The same clips; the bar moves when the next is asked for."""
    for clip in clips:
        yield clip
        bar.update()


def _least(network: FeatureNetwork, protocol: EvaluationProtocol) -> int:
    protocol.check_frames(network.least_frames)
    return network.least_frames


def _shards(
    selection: Selection,
    numbers: range,
    view: View,
    protocol: EvaluationProtocol,
    network: FeatureNetwork | None,
    cache: Path,
) -> Iterator[tuple[range, Path]]:
    """The clips of each shard, and its file."""
    about = [FORMAT, protocol.fingerprint(), network.sha256 if network else None, view]
    for first in range(numbers.start, numbers.stop, CLIPS_PER_SHARD):
        part = range(first, min(first + CLIPS_PER_SHARD, numbers.stop))
        clips = [[selection.clips[n].digest, selection.clips[n].places] for n in part]
        key = hashlib.sha256(json.dumps([about, clips]).encode()).hexdigest()
        yield part, cache / f"{key[:32]}.safetensors"


def _write(path: Path, found: Features) -> None:
    tensors = {name: torch.from_numpy(np.ascontiguousarray(each)) for name, each in found.items()}
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")  # ranks may be on one machine
    with writing(path, SafetensorError):
        save_file(tensors, partial, metadata={"state": fingerprint(tensors)})
        partial.chmod(0o644)  # safetensors makes files that no other user's rank may read
        put_in_place(partial, path)


def _read(path: Path) -> dict[str, NDArray[np.float32]] | None:
    """A shard; None where there is none, or one that is damaged and will be computed again."""
    try:
        with safe_open(path, framework="pt") as file:
            state = (file.metadata() or {}).get("state")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    if state != fingerprint(tensors):
        return None
    return {name: tensor.numpy() for name, tensor in tensors.items()}
