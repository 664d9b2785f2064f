"""What the pages say is there is there: links, anchors, paths, options and generated tables."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_runs import REPOSITORY

from benchmarks import report, results
from engine.configuration import load_config

PAGES = sorted(
    page.relative_to(REPOSITORY)
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md")
    for page in REPOSITORY.glob(pattern)
)
LOG = Path("benchmarks/NOTES.md")  # dated: an old entry names what there was
MOST_LINES_OF_README = 150

_FENCE = re.compile(r"^( *)(```|~~~).*?^ *\2[^\n]*$", re.M | re.S)
_SPAN = re.compile(r"`([^`\n]+)`")
_INLINE = re.compile(r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(<?([^()\s>]+)>?(?: \"[^\"]*\")?\)")
_REFERENCE = re.compile(r"^ *\[[^\]]+\]: +<?(\S+?)>?$", re.M)
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.M)
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:")  # https:, mailto:
_PATH = re.compile(r"(?:\.ci|benchmarks|configs|csrc|docs|engine|kernels|tests)/[\w./*-]+")
_COMMAND = re.compile(r"\b(engine/\w+\.py|benchmarks/report\.py)((?:[^\n\\]|\\\n)*)")
_PAPER = "| in the paper | in the code |"


def links(text: str) -> Iterator[str]:
    """Targets of the links and images outside of code."""
    # Spans are emptied, not taken out: a link's text may be one.
    prose = _SPAN.sub("``", _FENCE.sub("", text))
    yield from _INLINE.findall(prose)
    yield from _REFERENCE.findall(prose)


def anchors(text: str) -> set[str]:
    """Names that GitHub gives to a page's headings."""
    found: set[str] = set()
    for heading in _HEADING.findall(_FENCE.sub("", text)):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        number = 0
        while (name if not number else f"{name}-{number}") in found:
            number += 1
        found.add(name if not number else f"{name}-{number}")
    return found


def broken_links(page: Path) -> list[str]:
    """Targets inside the repository that are not there, or have no such heading."""
    broken = []
    for target in links(page.read_text()):
        if _ELSEWHERE.match(target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        is_wrong = path.startswith("/") or not file.exists()
        if is_wrong or (anchor and (file.is_dir() or anchor not in anchors(file.read_text()))):
            broken.append(target)
    return broken


def is_there(path: str) -> bool:
    """Whether a path below the repository, or something that a pattern stands for, exists."""
    return any(REPOSITORY.glob(path))


def paper_table(page: Path) -> list[str]:
    """What stands as code in the right column of the table from the paper to the code."""
    _, _, rest = page.read_text().partition(_PAPER + "\n")
    assert rest, f"{page} has no table that begins with {_PAPER}"
    rows = rest.partition("\n\n")[0].splitlines()[1:]
    return [span for row in rows for span in _SPAN.findall(row.split("|")[2])]


def test_pages_are_found() -> None:
    expected = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", str(LOG), "docs/training.md"}
    assert expected <= {str(page) for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(REPOSITORY / page) == []


@pytest.mark.parametrize("page", sorted({*PAGES} - {LOG}), ids=str)
def test_paths_are_there(page: Path) -> None:
    spans = _SPAN.findall(_FENCE.sub("", (REPOSITORY / page).read_text()))
    named = {word for span in spans for word in span.split() if _PATH.fullmatch(word)}
    # Compiled on installation, and not kept in the repository.
    assert [path for path in sorted(named) if not is_there(path) and path[-3:] != ".so"] == []


@pytest.mark.parametrize("page", sorted({*PAGES} - {LOG}), ids=str)
def test_commands_have_options_that_the_scripts_know(page: Path) -> None:
    shared = '"--help"' + (REPOSITORY / "engine" / "command_line.py").read_text()
    for script, arguments in _COMMAND.findall((REPOSITORY / page).read_text()):
        known = shared + (REPOSITORY / script).read_text()
        command = re.split(r"[#`|;]", arguments)[0]
        for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", command):
            assert f'"{option}"' in known, f"{script} has no {option}"


@pytest.mark.parametrize("page", ["README.md", "docs/decisions.md"])
def test_the_paper_is_where_the_table_says(page: str) -> None:
    named = paper_table(REPOSITORY / page)
    settings = [span.removeprefix("--set ") for span in named if span.startswith("--set ")]
    paths = [span.split()[0] for span in named if "/" in span]
    assert len(paths) >= 10
    assert [path for path in paths if not is_there(path)] == []
    for setting in settings:
        override = setting.replace("stages.N.", "stages.2.").replace("…", "conv_gru")
        # Joint training has no frozen stage, and so no bank of its samples.
        load_config(
            REPOSITORY / "configs/kinetics600.yaml",
            ["stages.2.training.sample_bank=null", override],
        )


def test_the_paper_s_experiments_are_shipped() -> None:
    """Every row of the table of trainings has a configuration with the stages that it names."""
    rows = re.findall(
        r"^\|[^|]+\| `--config (\S+)(?: --set (\S+))?` \| ([\d, ]+) \| [\d.+ ]+ \|$",
        (REPOSITORY / "docs" / "reproduce.md").read_text(),
        re.M,
    )
    assert len(rows) == 15
    for file, override, stages in rows:
        config = load_config(REPOSITORY / file, [override] if override else [])
        assert {int(number) for number in stages.split(",")} <= config.stages.keys()


def test_benchmarks_page_has_the_newest_results() -> None:
    page = REPOSITORY / "docs" / "benchmarks.md"
    shown = page.read_text().split(report.BEGIN)[1].split(report.END)[0].strip()
    made = report.render(report.documents((), results.FOLDER))
    assert shown == made, "python benchmarks/report.py --write docs/benchmarks.md writes it"


def test_readme_is_short() -> None:
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    assert len(lines) <= MOST_LINES_OF_README


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("[a](other.md)", []),
        ("[a](other.md#some-heading-with-code)", []),
        ("[a](other.md#twice-1), [`b`](#here)", []),
        ("![a](missing.png)", ["missing.png"]),
        ("[a](other.md#twice-2)", ["other.md#twice-2"]),
        ("[`a`](#nowhere)", ["#nowhere"]),
        ("[a](/other.md)", ["/other.md"]),
        ("[a [b]](gone.md) and [c](gone-too.md)", ["gone.md", "gone-too.md"]),
        ("[a]\n\n[a]: gone.md", ["gone.md"]),
        ("[a](https://example.org/gone), `[a](code.md)`\n\n```\n[a](fenced.md)\n```", []),
    ],
)
def test_a_broken_link_is_found(text: str, broken: list[str], tmp_path: Path) -> None:
    headings = "# Some heading, with `code`\n## Twice\n## Twice\n```\n# Fenced\n```\n"
    (tmp_path / "other.md").write_text(headings)
    page = tmp_path / "page.md"
    page.write_text(f"# Here\n\n{text}\n")
    assert broken_links(page) == broken
