"""Tables of the newest benchmark results, one file for the GPU and one for the CPU."""

import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file, its folder is on the path and the repository is not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import results, step_report
from benchmarks.markdown import table
from benchmarks.results import Device, Document, Feed, Row
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
Table = Iterator[Sequence[str]]


def main(arguments: list[str]) -> None:
    """Parse, read, print or write."""
    parser = ArgumentParser(__doc__ or "", EPILOG)
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="result files instead of the newest"
    )
    parser.add_argument(
        "--results", type=Path, default=results.FOLDER, metavar="DIR", help="where the files are"
    )
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="put the tables between this file's markers"
    )
    parser.add_argument(
        "--brief", action="store_true", help="only forward + backward passes and whole steps"
    )
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
    if before.count(BEGIN) != 1 or before.count(END) != 1:
        raise UserError(f"{path} must hold {BEGIN} and {END} once each")
    head, rest = before.split(BEGIN)
    if END not in rest:
        raise UserError(f"{path} has {END} before {BEGIN}")
    tail = rest.split(END)[1]
    path.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}")


def render(found: dict[str, Document]) -> str:
    """Markdown: the GPU's tables, or that it was not run, the CPU's, then whole iterations."""
    not_run = [("operator", "result"), *((name, "not run") for name in MEASURED_ON_A_GPU)]
    parts = [] if "cuda" in found else ["**GPU:** not run.", table(not_run)]
    for kind in ("cuda", "cpu"):
        parts += _parts(found[kind]) if kind in found else []
    return "\n\n".join([*parts, *step_report.parts(found)])


def render_document(document: Document) -> str:
    """Markdown of one file."""
    return "\n\n".join(_parts(document) + step_report.parts({document.device.kind: document}))


def _parts(document: Document) -> list[str]:
    parts = [_heading(document)]
    if any(row.operator != step_report.OPERATOR for row in document.rows):
        parts.append(table(_measured(document)))
    if document.counts:
        parts.append(table(_counted(document)))
    if document.feeds:
        parts.append(table(_fed(document)))
    if document.failed:
        parts.append("**Refused or broken:** " + "; ".join(sorted(document.failed)) + ".")
    if document.skipped:
        parts += ["Not measured:", "\n".join(_skipped(document))]
    return parts


def _heading(document: Document) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in document.versions.items() if v is not None)
    commit = "no commit known" if document.commit is None else f"commit {document.commit[:10]}"
    changed = " with changes" if document.dirty else ""
    rates = "; ".join(
        f"copy {rates.copy_gb_per_s:.0f} GB/s, {rates.matmul_dtype} matmul "
        f"{rates.matmul_tflop_per_s:.3g} TFLOP/s"
        for rates in document.rates
    )
    quick = ", --quick" if document.quick else ""
    return (
        f"**{_device(document.device)}**, {document.date:%Y-%m-%d}, {commit}{changed}{quick}; "
        f"{versions}." + (f" Measured in the same run: {rates}." if rates else "")
    )


def _device(device: Device) -> str:
    if device.kind == "cuda":
        return f"{device.name}, driver {device.driver or 'unknown'}"
    return f"{device.name}, {device.num_threads} thread{'s' * (device.num_threads != 1)}"


def _measured(document: Document) -> Table:
    """A line per case: our time, what it comes to, and the other sides' times over ours."""
    cases: defaultdict[tuple[str, ...], dict[str, Row]] = defaultdict(dict)
    for row in document.rows:
        if row.operator != step_report.OPERATOR:
            cases[row.key[:3]][row.side] = row
    sides = [side for side in SIDES if any(side in rows for rows in cases.values())]
    on_gpu = document.device.kind == "cuda"
    yield [
        *("operator", "size, direction", f"{'ms' if on_gpu else 'CPU ms'} (p20 to p80)"),
        *("GB/s, of copy", "TFLOP/s, of matmul", *["peak MB (reference)"] * on_gpu),
        *(f"{side} / ours" for side in sides),
    ]
    for (operator, shape, direction), rows in cases.items():
        if "ours" not in rows:
            continue
        ours = rows["ours"]
        memory = f"{_megabytes(ours)} ({_megabytes(rows.get('reference'))})"
        yield [
            *(operator, f"{shape}, {direction.replace('_', ' + ')}"),
            ours.seconds.text(scale=1e3),
            _rate(ours.gb_per_s, ours.share_of_copy),
            _rate(ours.tflop_per_s, ours.share_of_matmul),
            *[memory] * on_gpu,
            *(step_report.ratio(rows.get(side)) for side in sides),
        ]


def _counted(document: Document) -> Table:
    yield ["counted on the meta device", "of", "plain PyTorch", "ours", "unit"]
    for count in document.counts:
        plain = "" if count.plain is None else _number(count.plain)
        yield [count.what, count.of, plain, _number(count.ours), count.unit]


def _fed(document: Document) -> Table:
    """A line per data set, decoder and number of threads, from all parts of the loader."""
    loaded: defaultdict[tuple[str, str], dict[str, Feed]] = defaultdict(dict)
    for feed in document.feeds:
        length = re.fullmatch(r"loader_length\[(\d+)\]", feed.case)
        clips = feed.clips + (f", from a video of {int(length[1])} frames" if length else "")
        loaded[clips, f"{feed.decoder}, {feed.num_threads}"][feed.part] = feed
    on_gpu = any("transfer" in parts for parts in loaded.values())
    yield [
        *("loader: clips", "decoder, threads", "clips/s (p20 to p80)", "decoding alone", "needed"),
        *("times that", "CPU ms per clip: decode, to crop, all"),
        *("cores to feed one GPU (for 2x)", *["transfer alone"] * on_gpu),
    ]
    for (clips, decoder), parts in loaded.items():
        decode, pipeline, whole = (parts[name] for name in ("decode", "pipeline", "loader"))
        median, low, high = (1 / whole.seconds[place] for place in (0, 2, 1))
        transfer = parts.get("transfer")
        # With NVDEC the process's CPU time is mostly waiting for the GPU.
        cores = None if whole.decoder == "dali-gpu" else whole.needed_per_s * whole.cpu_seconds
        yield [
            *(clips, decoder, f"{median:.0f} ({low:.0f} to {high:.0f})"),
            *(f"{1 / decode.seconds.median:.0f}", f"{whole.needed_per_s:.3g}"),
            f"{median / whole.needed_per_s:.2g}",
            ", ".join(f"{1e3 * part.cpu_seconds:.2f}" for part in (decode, pipeline, whole)),
            "" if cores is None else f"{cores:.2g} ({2 * cores:.2g})",
            *[f"{1 / transfer.seconds.median:.0f}" if transfer else ""] * on_gpu,
        ]


def _skipped(document: Document) -> Iterator[str]:
    """One line per reason, because cases of one operator share theirs."""
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for skip in document.skipped:
        reasons[skip.reason].append(skip.case)
    for reason, cases in reasons.items():
        some = cases[0] if len(cases) == 1 else f"{len(cases)} cases ({cases[0]}, ...)"
        yield f"- {some}: {reason}"


def _rate(rate: float | None, share: float | None) -> str:
    return "" if rate is None or share is None else f"{rate:.3g}, {share:.2f}"


def _megabytes(row: Row | None) -> str:
    return "" if row is None or row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) or value >= 100 else f"{value:.2f}"


if __name__ == "__main__":
    run(main)
