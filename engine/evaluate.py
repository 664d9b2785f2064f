"""Evaluate videos against real ones: FVD, FID, KVD, IS and others, with intervals and controls."""

import argparse
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from engine.command_line import REPOSITORY, ArgumentParser, report, run
from engine.durable_files import make_writable_folder, write_json
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.trainer.ranks import Ranks

EPILOG = """\
examples:
  python engine/evaluate.py --real data/ucf101/test --generated samples/samples.npz \\
      --set resolution=128 --out fvd.json
  python engine/evaluate.py --real data/ucf101/test --checkpoint runs/ucf101 --num 512
  python engine/evaluate.py --real real --generated fake --metric fvd,kvd --protocol fvd2048_128f
  python engine/evaluate.py --real real --generated fake --metric motion,psd     # needs no network

A source is a folder of videos (mp4, webm, avi, mov, mkv), a folder of folders of frames (png, jpg,
webp), or an npz with "videos", uint8 [N, T, H, W, 3]. Evaluate what engine/sample.py writes with
--format npz or png: H.264 changes fine detail.

Beside every value stand the same metric of real clips, of real clips with shuffled frames, and of
real clips frozen at their first frame, of equally many clips. Where these do not come out in that
order the metric is blind to it, and the table says so.

The I3D network's weights are made once with `make i3d`. Features are kept in data/features by the
content of the videos and by the protocol; an interrupted run goes on where it was. Started by
torchrun or deepspeed, all processes generate and extract shares, each on its own GPU.

protocols: stylegan-v (= fvd2048_16f), fvd2048_128f, fvd2048_128f_subsample8f, original-fvd, paper
(SSW-GAN), dvdgan. --set changes one of their keys; engine/evaluation/protocol.py defines them.
"""


def _parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__ or "", EPILOG)
    add = parser.add_argument
    add("--real", type=Path, required=True, metavar="PATH", help="real videos")
    add("--generated", type=Path, metavar="PATH", help="videos to be judged")
    add(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="in their place: folder of a run, stage or checkpoint, or one that engine/export.py "
        "wrote; its videos are generated into --clips",
    )
    add(
        "--num",
        type=int,
        metavar="N",
        help="so many of them (default: as many as there are real videos, or the protocol's)",
    )
    add("--seed", type=int, default=0, help="of what is generated (default: %(default)s)")
    add(
        "--clips",
        type=Path,
        metavar="DIR",
        help="where it is kept, for the next evaluation too (default: below data/generated)",
    )
    add("--protocol", default="stylegan-v", metavar="NAME", help="(default: %(default)s)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="changes",
        help="change a key of the protocol, e.g. resolution=128 or num_videos=512; repeatable",
    )
    add("--metric", metavar="A,B", help="(default: all)")
    add(
        "--per-class", action="store_true", help="also of each class: a folder's, or an npz's label"
    )
    add("--weights", type=Path, metavar="FILE", help="I3D weights (default: data/i3d)")
    add(
        "--network",
        type=Path,
        metavar="FILE.pt",
        help="a TorchScript network in place of I3D; a program, so trust it",
    )
    add(
        "--network-input",
        choices=("float", "uint8"),
        default="float",
        help="what it takes: float32 [B, 3, T, 224, 224] in [-1, 1], or uint8 clips as they are "
        "(default: %(default)s)",
    )
    add("--out", type=Path, metavar="FILE.json", help="write everything there")
    add("--report", type=Path, metavar="FILE.html", help="a page with the table and playing clips")
    add("--resamples", type=int, default=200, metavar="N", help="(default: %(default)s)")
    add("--batch", type=int, default=4, metavar="B", help="clips at a time (default: %(default)s)")
    add(
        "--cache",
        type=Path,
        default=REPOSITORY / "data" / "features",
        metavar="DIR",
        help="where features are kept (default: data/features)",
    )
    add(
        "--follow-symlinks",
        action="store_true",
        help="also read symbolic links that lead out of a folder of videos; an error otherwise",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed passes it
    return parser


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line's options."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.batch < 1:
        parser.error("--batch must be at least 1")
    if options.resamples < 2:
        parser.error("--resamples must be at least 2")
    if options.weights is not None and options.network is not None:
        parser.error("--weights are I3D's; with --network there are none")
    for name, suffix in (("out", ".json"), ("report", ".html")):
        path = getattr(options, name)
        if path is not None and path.suffix != suffix:
            parser.error(f"--{name} {path}: the name must end in {suffix}")
        if path is not None and path.is_dir():
            parser.error(f"--{name} {path} is a folder")
    if (options.generated is None) == (options.checkpoint is None):
        parser.error("name either --generated or --checkpoint")
    if options.checkpoint is None:
        for name in ("num", "clips"):
            if getattr(options, name) is not None:
                parser.error(f"--{name} is for --checkpoint")
    if options.num is not None and options.num < 2:
        parser.error("--num must be at least 2")
    if not 0 <= options.seed < 2**63:
        parser.error("--seed must be 0 to 2^63 - 1")
    for name in ("real", "generated", "checkpoint"):
        if str(getattr(options, name)) == ".":  # what Path makes of a variable that is not set
            parser.error(f"--{name} names nothing")
    generated = options.generated
    if generated is not None and os.path.realpath(options.real) == os.path.realpath(generated):
        parser.error("--real and --generated are the same videos")
    return options


def main(arguments: list[str]) -> None:
    """Check, then evaluate on however many ranks a launcher has started."""
    options = parse(arguments)
    # Imported late: torch is slow, and mistakes should be told at once.
    from engine.trainer.ranks import Ranks

    ranks = Ranks.from_environment()
    if ranks.world_size == 1:
        evaluate_on(options, ranks)
        return
    from engine.trainer.failing_ranks import give_up

    if not ranks.is_main:
        os.environ["TQDM_DISABLE"] = "1"  # rank 0's progress stands for all
    try:
        ranks.connect()
        evaluate_on(options, ranks)
        ranks.barrier()
    except Exception as error:
        give_up(error, ranks, tell=tell_failure)
    finally:
        ranks.disconnect()


def tell_failure(error: Exception) -> None:
    """One line for the user's mistakes, a traceback for ours."""
    if isinstance(error, UserError):
        report(error)
    else:
        traceback.print_exception(error)
        sys.stderr.flush()


def evaluate_on(options: argparse.Namespace, ranks: "Ranks") -> None:
    """Extract, measure, print, write. Collective."""
    import torch

    from engine.evaluation.evaluation import evaluate_together
    from engine.evaluation.feature_networks import FeatureNetwork, I3DNetwork, TorchScriptNetwork
    from engine.evaluation.generated_videos import generated_videos, protocol_changes
    from engine.evaluation.i3d_weights import weights_path
    from engine.evaluation.metric_definitions import find_metrics
    from engine.evaluation.protocol import find_protocol
    from engine.evaluation.video_sources import open_source
    from engine.exported import find_trained
    from engine.trainer.ranks import check_shared

    changes = list(options.changes)
    trained = None
    if options.checkpoint is not None:
        trained = find_trained(options.checkpoint)
        changes = [*protocol_changes(trained, changes), *changes]
    protocol = find_protocol(options.protocol, changes)
    metrics = find_metrics(options.metric)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU was found")
    if options.device == "cpu":
        ranks = replace(ranks, device=torch.device("cpu"))
    real = open_source(options.real, follow_symlinks=options.follow_symlinks)
    for file in (options.out, options.report):
        if file is not None:
            make_writable_folder(file.parent)
    make_writable_folder(options.cache)
    check_shared(options.cache, ranks)
    network: FeatureNetwork | None = None
    if any(metric.needs_network for metric in metrics):
        if options.network is not None:
            network = TorchScriptNetwork(options.network, ranks.device, options.network_input)
        else:
            network = I3DNetwork.load(weights_path(options.weights), ranks.device)
    folder = options.generated
    if trained is not None:
        num = options.num or min(protocol.num_videos or len(real), len(real))
        folder = generated_videos(
            trained, protocol, num, seed=options.seed, folder=options.clips, ranks=ranks
        )
    evaluation = evaluate_together(
        real,
        open_source(folder, follow_symlinks=options.follow_symlinks),
        protocol,
        metrics,
        network,
        options.cache,
        ranks,
        num_resamples=options.resamples,
        batch_size=options.batch,
        per_class=options.per_class,
    )
    if evaluation is None:
        return
    print(f"\n{evaluation.table()}")
    if options.out is not None:
        write_json(options.out, evaluation.to_tree())
        print(f"wrote: {options.out}")
    if options.report is not None:
        from engine.evaluation.html_report import write_report

        write_report(options.report, evaluation, trained)
        print(f"wrote: {options.report}")


if __name__ == "__main__":
    run(main)
