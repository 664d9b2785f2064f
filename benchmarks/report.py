"""Tables of the newest benchmark results, one file for the GPU and one for the CPU."""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file, its folder is on the path and the repository is not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import results, step_report
from benchmarks.markdown import line
from benchmarks.results import Count, Device, Document, Feed, Row
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
    "frame_norm",
    "conv_gru",
    "separable_conv3d",
    "upsample_conv",
    "conv2d",
    "conv_pool2d",
    "conv_pool3d",
    "spectral_norm",
    "training_step",
    "loader",
)


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
    if not files:
        found = results.newest(folder)
        if not found:
            raise UserError(f"no results in {folder}; make some: pytest benchmarks/ --benchmark")
        return found
    found = {}
    for path in files:
        document = results.read(path)
        if document.device.kind in found:
            raise UserError(f"{path} is a second file of a {document.device.kind} run")
        found[document.device.kind] = document
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
    parts = [_of_document(found["cuda"]) if "cuda" in found else _not_run()]
    if "cpu" in found:
        parts.append(_of_document(found["cpu"]))
    return "\n\n".join(part for part in (*parts, step_report.render(found)) if part)


def render_document(document: Document) -> str:
    """Markdown of one file."""
    parts = _of_document(document), step_report.render({document.device.kind: document})
    return "\n\n".join(part for part in parts if part)


def _of_document(document: Document) -> str:
    parts = [_heading(document)]
    if any(row.operator != step_report.OPERATOR for row in document.rows):
        parts.append("\n".join(_measured(document)))
    if document.counts:
        parts.append("\n".join(_counted(document.counts)))
    if document.feeds:
        parts.append("\n".join(_fed(document.feeds)))
    if document.failed:
        parts.append("**Refused or broken:** " + "; ".join(sorted(document.failed)) + ".")
    if document.skipped:
        parts.append("\n".join(_skipped(document)))
    return "\n\n".join(parts)


def _not_run() -> str:
    lines = ["**GPU:** not run.", "", "| operator | result |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | not run |" for name in MEASURED_ON_A_GPU)])


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
    threads = "1 thread" if device.num_threads == 1 else f"{device.num_threads} threads"
    return f"{device.name}, {threads}"


def _measured(document: Document) -> Iterator[str]:
    """A line per case: our time, what it comes to, and the other sides' times over ours."""
    cases: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in document.rows:
        if row.operator != step_report.OPERATOR:
            cases.setdefault(row.key[:3], {})[row.side] = row
    sides = [side for side in SIDES if any(side in rows for rows in cases.values())]
    clock = "ms" if document.device.kind == "cuda" else "CPU ms"
    on_gpu = document.device.kind == "cuda"
    memory = ["peak MB (reference)"] if on_gpu else []
    header = ["operator", "size, direction", f"{clock} (p20 to p80)", "GB/s, of copy"]
    header += ["TFLOP/s, of matmul", *memory, *(f"{side} / ours" for side in sides)]
    yield line(header)
    yield "|" + "---|" * len(header)
    for (operator, shape, direction), rows in cases.items():
        ours = rows.get("ours")
        if ours is None:
            continue
        cells = [operator, f"{shape}, {direction.replace('_', ' + ')}", _milliseconds(ours)]
        cells += [_rate(ours.gb_per_s, ours.share_of_copy)]
        cells += [_rate(ours.tflop_per_s, ours.share_of_matmul)]
        if on_gpu:
            cells.append(f"{_megabytes(ours)} ({_megabytes(rows.get('reference'))})")
        yield line([*cells, *(_ratio(rows.get(side)) for side in sides)])


def _counted(counts: Sequence[Count]) -> Iterator[str]:
    yield line(["counted on the meta device", "of", "plain PyTorch", "ours", "unit"])
    yield "|---|---|---|---|---|"
    for count in counts:
        plain = "" if count.plain is None else _number(count.plain)
        yield line([count.what, count.of, plain, _number(count.ours), count.unit])


def _fed(feeds: Sequence[Feed]) -> Iterator[str]:
    """A line per data set, decoder and number of threads, from all parts of the loader."""
    loaded: dict[tuple[str, str, int], dict[str, Feed]] = {}
    for feed in feeds:
        length = re.fullmatch(r"loader_length\[(\d+)\]", feed.case)
        clips = feed.clips + (f", from a video of {int(length[1])} frames" if length else "")
        loaded.setdefault((clips, feed.decoder, feed.num_threads), {})[feed.part] = feed
    header = ["loader: clips", "decoder, threads", "clips/s (p20 to p80)", "decoding alone"]
    header += ["needed", "times that", "CPU ms per clip: decode, to crop, all"]
    header += ["cores to feed one GPU (for 2x)"]
    on_gpu = any("transfer" in parts for parts in loaded.values())
    header += ["transfer alone"] if on_gpu else []
    yield line(header)
    yield "|" + "---|" * len(header)
    for (clips, decoder, num_threads), parts in loaded.items():
        decode, pipeline, whole = (parts[name] for name in ("decode", "pipeline", "loader"))
        median, low, high = (1 / whole.seconds[place] for place in (0, 2, 1))
        cells = [clips, f"{decoder}, {num_threads}", f"{median:.0f} ({low:.0f} to {high:.0f})"]
        cells += [f"{1 / decode.seconds.median:.0f}", f"{whole.needed_per_s:.3g}"]
        cells += [f"{median / whole.needed_per_s:.2g}"]
        cells += [", ".join(f"{1e3 * part.cpu_seconds:.2f}" for part in (decode, pipeline, whole))]
        # With NVDEC the process's CPU time is mostly waiting for the GPU.
        cores = whole.needed_per_s * whole.cpu_seconds
        cells += ["" if decoder == "dali-gpu" else f"{cores:.2g} ({2 * cores:.2g})"]
        if on_gpu:
            transfer = parts.get("transfer")
            cells += [f"{1 / transfer.seconds.median:.0f}" if transfer else ""]
        yield line(cells)


def _skipped(document: Document) -> Iterator[str]:
    """One line per reason, because cases of one operator share theirs."""
    reasons: dict[str, list[str]] = {}
    for skip in document.skipped:
        reasons.setdefault(skip.reason, []).append(skip.case)
    yield "Not measured:"
    yield ""
    for reason, cases in reasons.items():
        some = cases[0] if len(cases) == 1 else f"{len(cases)} cases ({cases[0]}, ...)"
        yield f"- {some}: {reason}"


def _milliseconds(row: Row) -> str:
    median, low, high = (1e3 * seconds for seconds in row.seconds)
    return f"{median:.3g} ({low:.3g} to {high:.3g})"


def _rate(rate: float | None, share: float | None) -> str:
    return "" if rate is None or share is None else f"{rate:.3g}, {share:.2f}"


def _megabytes(row: Row | None) -> str:
    return "" if row is None or row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"


def _ratio(row: Row | None) -> str:
    if row is None or row.of_ours is None:
        return ""
    return f"{row.of_ours.median:.2f} ({row.of_ours.p20:.2f} to {row.of_ours.p80:.2f})"


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) or value >= 100 else f"{value:.2f}"


if __name__ == "__main__":
    run(main)
