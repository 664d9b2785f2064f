"""Tables of the newest benchmark results, one file for the GPU and one for the CPU."""

import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file, its folder is on the path and the repository is not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import results, step_report
from benchmarks.markdown import cell, declared, table
from benchmarks.results import Count, Document, Feed, Row, by_case
from engine.command_line import ArgumentParser, run
from engine.errors import UserError

BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
EPILOG = f"""\
examples:
  python benchmarks/report.py                      print the newest results
  python benchmarks/report.py --brief              shorter ones
  python benchmarks/report.py --write docs/benchmarks.md
                                    put them between {BEGIN} and {END}
  python benchmarks/report.py benchmarks/results/FILE.json
"""
SIDES = ("reference", "compiled", "plain", "parametrizations")
# What a GPU file would hold; listed as not run while there is none.
MEASURED_ON_A_GPU = (
    *("frame_norm", "conv_gru", "separable_conv3d", "upsample_conv", "conv2d", "conv_pool2d"),
    *("conv_pool3d", "spectral_norm", "training_step", "loader"),
)
COUNTED = {
    "counted on the meta device": "{count.what}",
    "of": "{count.of}",
    "plain PyTorch": "{plain}",
    "ours": "{ours}",
    "unit": "{count.unit}",
}
FED = {
    "loader: clips": "{clips}",
    "decoder, threads": "{loader.decoder}, {loader.num_threads}",
    "clips/s (p20 to p80)": "{loader.per_s:.0f}",
    "decoding alone": "{decode.per_s.median:.0f}",
    "needed": "{loader.needed_per_s:.3g}",
    "times that": "{times:.2g}",
    "CPU ms per clip: decode, to crop, all": (
        "{decode.cpu_ms:.2f}, {pipeline.cpu_ms:.2f}, {loader.cpu_ms:.2f}"
    ),
    "cores to feed one GPU (for 2x)": "{cores:.2g} ({twice:.2g})",
}


def main(arguments: list[str]) -> None:
    """Parse, read, print or write."""
    parser = ArgumentParser(__doc__ or "", EPILOG)
    path: dict[str, Any] = {"type": Path, "metavar": "FILE"}
    folder = path | {"metavar": "DIR", "default": results.FOLDER}
    add = parser.add_argument
    add("files", nargs="*", **path, help="result files instead of the newest")
    add("--results", **folder, help="where the files are")
    add("--write", **path, help="put the tables between this file's markers")
    add("--brief", action="store_true", help="only forward + backward passes and whole steps")
    options = parser.parse_args(arguments)
    found = documents(options.files, options.results)
    if options.brief:
        found = {kind: shortened(document) for kind, document in found.items()}
    text = render(found)
    if options.write is None:
        print(text)
    else:
        write_between_markers(options.write, text)


def documents(files: Sequence[Path], folder: Path) -> dict[str, Document]:
    """By kind of device. Raises UserError for none, for unreadable ones and for two of a kind."""
    found = {} if files else results.newest(folder)
    for path in files:
        document = results.read(path)
        if document.device.kind in found:
            raise UserError(f"{path} is a second file of a {document.device.kind} run")
        found[document.device.kind] = document
    if not found:
        raise UserError(f"no results in {folder}; make some: pytest benchmarks/ --benchmark")
    return found


def shortened(document: Document) -> Document:
    """Without what is only a part of another row, and without the list of what was skipped."""
    whole = [row for row in document.rows if row.direction.endswith(("backward", "step"))]
    return document.model_copy(update={"rows": whole, "skipped": []})


def write_between_markers(path: Path, text: str) -> None:
    """Replace what stands between the markers. Raises UserError without exactly one pair."""
    try:
        before = path.read_text()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    between = re.compile(f"{BEGIN}.*{END}", re.DOTALL)
    if before.count(BEGIN) != 1 or before.count(END) != 1 or not between.search(before):
        raise UserError(f"{path} must hold {BEGIN} and {END} once each, in this order")
    path.write_text(between.sub(lambda _: f"{BEGIN}\n\n{text}\n\n{END}", before))


def render(found: dict[str, Document]) -> str:
    """Markdown: the GPU's tables, or that it was not run, the CPU's, then whole iterations."""
    not_run = table([("operator", "result"), *((name, "not run") for name in MEASURED_ON_A_GPU)])
    parts = [] if "cuda" in found else ["**GPU:** not run.", not_run]
    for kind in ("cuda", "cpu"):
        parts += _parts(found[kind]) if kind in found else []
    return "\n\n".join([*parts, *step_report.parts(found)])


def render_document(document: Document) -> str:
    """Markdown of one file."""
    return "\n\n".join(_parts(document) + step_report.parts({document.device.kind: document}))


def _parts(document: Document) -> list[str]:
    parts = [_heading(document)]
    rows = [row for row in document.rows if row.operator != step_report.OPERATOR]
    if rows:
        parts.append(_measured(rows, on_gpu=document.device.kind == "cuda"))
    if document.counts:
        parts.append(declared(COUNTED, map(_counted, document.counts)))
    if document.feeds:
        parts.append(_fed(document.feeds))
    if document.failed:
        parts.append("**Refused or broken:** " + "; ".join(sorted(document.failed)) + ".")
    if document.skipped:
        parts += ["Not measured:", "\n".join(_skipped(document))]
    return parts


def _heading(document: Document) -> str:
    device = document.device
    where = f"{device.name}, {device.num_threads} thread{'s' * (device.num_threads != 1)}"
    if device.kind == "cuda":
        where = f"{device.name}, driver {device.driver or 'unknown'}"
    versions = ", ".join(f"{k} {v}" for k, v in document.versions.items() if v is not None)
    commit = "no commit known" if document.commit is None else f"commit {document.commit[:10]}"
    changed = " with changes" if document.dirty else ""
    rates = "; ".join(
        f"copy {rates.copy_gb_per_s:.0f} GB/s, {rates.matmul_dtype} matmul "
        f"{rates.matmul_tflop_per_s:.3g} TFLOP/s"
        for rates in document.rates
    )
    quick = ", --quick" if document.quick else ""
    return f"**{where}**, {document.date:%Y-%m-%d}, {commit}{changed}{quick}; {versions}." + (
        f" Measured in the same run: {rates}." if rates else ""
    )


def _measured(rows: Sequence[Row], *, on_gpu: bool) -> str:
    """A line per case: our time, what it comes to, and the other sides' times over ours."""
    cases = by_case(rows)
    columns = {
        "operator": "{ours.operator}",
        "size, direction": "{ours.shape}, {passes}",
        f"{'ms' if on_gpu else 'CPU ms'} (p20 to p80)": "{ms:.3g}",
        "GB/s, of copy": "{ours.gb_per_s:.3g}, {ours.share_of_copy:.2f}",
        "TFLOP/s, of matmul": "{ours.tflop_per_s:.3g}, {ours.share_of_matmul:.2f}",
    }
    if on_gpu:
        columns["peak MB (reference)"] = "{ours.peak_mb:.0f} ({of_reference})"
    found = {row.side for row in rows}
    columns |= {f"{side} / ours": f"{{{side}.of_ours:.2f}}" for side in SIDES if side in found}
    for case in cases:
        case["passes"] = case["ours"].direction.replace("_", " + ")
        case["ms"] = case["ours"].seconds.times(1e3)
        case["of_reference"] = cell("{reference.peak_mb:.0f}", case)
    return declared(columns, cases)


def _counted(count: Count) -> dict[str, Any]:
    plain = None if count.plain is None else _number(count.plain)
    return {"count": count, "plain": plain, "ours": _number(count.ours)}


def _fed(feeds: Sequence[Feed]) -> str:
    """A line per data set, decoder and number of threads, from all parts of the loader."""
    loaded: defaultdict[tuple[str, str, int], dict[str, Any]] = defaultdict(dict)
    for feed in feeds:
        length = re.fullmatch(r"loader_length\[(\d+)\]", feed.case)
        clips = feed.clips + (f", from a video of {int(length[1])} frames" if length else "")
        loaded[clips, feed.decoder, feed.num_threads][feed.part] = feed
    on_gpu = any("transfer" in parts for parts in loaded.values())
    for (clips, *_), parts in loaded.items():
        whole: Feed = parts["loader"]
        parts |= {"clips": clips, "times": 1 / whole.seconds.median / whole.needed_per_s}
        if whole.decoder != "dali-gpu":  # with NVDEC CPU time is mostly waiting for the GPU
            parts["cores"] = whole.needed_per_s * whole.cpu_seconds
            parts["twice"] = 2 * parts["cores"]
    transfer = {"transfer alone": "{transfer.per_s.median:.0f}"} if on_gpu else {}
    return declared(FED | transfer, loaded.values())


def _skipped(document: Document) -> Iterator[str]:
    """One line per reason, because cases of one operator share theirs."""
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for skip in document.skipped:
        reasons[skip.reason].append(skip.case)
    for reason, cases in reasons.items():
        some = cases[0] if len(cases) == 1 else f"{len(cases)} cases ({cases[0]}, ...)"
        yield f"- {some}: {reason}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) or value >= 100 else f"{value:.2f}"


if __name__ == "__main__":
    run(main)
