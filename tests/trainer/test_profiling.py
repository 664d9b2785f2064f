"""train.py --profile: what it writes adds up, belongs to the right module, and changes nothing."""

import gzip
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks, ranks_of
from small_runs import Tiny, contents, differences, full_disk, logged
from small_trainers import make
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from engine.errors import UserError
from engine.models.features import Features
from engine.models.norms import Modulation
from engine.models.prepared import Prepared, PreparedLayer, layers_of
from engine.trainer.profiling import timeline
from engine.trainer.profiling.counts import CountedWork, OperatorCounter
from engine.trainer.profiling.module_table import StepCosts
from engine.trainer.profiling.places import (
    BACKWARD,
    BLOCKS,
    CONVOLUTION,
    D_UPDATE,
    FORWARD,
    G_UPDATE,
    IDLE,
    OTHER,
    PRODUCT,
    RECOMPUTED,
    REST,
    STEP,
    Place,
    Range,
    named_parts,
)
from engine.trainer.profiling.step_profile import StepProfile
from engine.trainer.profiling.timeline import Peak
from engine.trainer.ranks import Ranks

# ------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def profiled(tiny: Tiny, cascade_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 2, seven steps of which two are timed, and one after the profile."""
    out = tmp_path_factory.mktemp("profiled")
    tiny.trained(2, out, "--previous", cascade_run, "--max-steps", "7", "--profile")
    return out / "stage2"


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The trace and the table's numbers."""
    with gzip.open(folder / "profile/trace.json.gz", "rt") as text:
        trace = json.load(text)
    return trace, json.loads((folder / "profile/modules.json").read_text())


def test_rows_add_up_to_the_step(profiled: Path) -> None:
    trace, document = read(profiled)
    steps = [e["dur"] for e in trace["traceEvents"] if e.get("name") == "update: step"]
    assert len(steps) == document["num_steps"] == 2
    step_seconds = sum(steps) / 2 / 1e6
    # A trace's times are rounded to a nanosecond: half a microsecond per thousand events.
    assert document["step_seconds"] == pytest.approx(step_seconds, rel=0, abs=1e-9)
    entries = document["entries"]
    total = sum(entry["seconds"] for entry in entries)
    assert total == pytest.approx(step_seconds, abs=1e-9 * len(trace["traceEvents"]))
    rest = sum(entry["seconds"] for entry in entries if entry["part"] == REST)
    assert 0 < rest < step_seconds / 2
    tables = (profiled / "profile/modules.md").read_text().split("---: |\n")[1:]
    assert len(tables) == 4
    for table in tables:
        # The first percentage of a row is its share; that of the last one, the total's, is 100.
        *shares, total = map(float, re.findall(r"^\|.*? ([\d.]+) %", table, re.MULTILINE))
        assert total == 100
        assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))


def test_every_phase_and_block_has_its_row(profiled: Path) -> None:
    _, document = read(profiled)
    seconds: dict[str, float] = defaultdict(float)
    for entry in document["entries"]:
        seconds[entry["part"]] += entry["seconds"]
    blocks = [f"G.units.{unit}.{block}" for unit in (0, 1) for block in ("temporal", "block1")]
    blocks += [f"D.{tower}.tower.blocks.0" for tower in ("spatial", "temporal", "matching")]
    phases = ["loader", "latents and frozen stages", "power iteration", REST]
    phases += [f"{network} {what}" for network in "GD" for what in ("gradients", "optimizer")]
    assert {name for name in (*blocks, *phases) if not seconds[name] > 0} == set()


def test_training_is_the_same_with_a_profile(
    tiny: Tiny, cascade_run: Path, profiled: Path, tmp_path: Path
) -> None:
    plain = tiny.trained(2, tmp_path, "--previous", cascade_run, "--max-steps", "7")
    assert logged(profiled) == logged(tmp_path / "stage2")
    assert differences(contents(profiled / "checkpoints" / plain.name), contents(plain)) == []


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--profile", "0"), "--profile must time at least 1 step"),
        (("--profile", "some"), "argument --profile: invalid int value: 'some'"),
        (
            ("--profile", "3", "--max-steps", "6"),
            "--profile 3 takes 7 steps, 6 are left; raise --max-steps",
        ),
        (
            ("--profile", "--set", "training.acceleration=compile"),
            "--profile looks into blocks, which acceleration=compile hides; add --set "
            "stages.1.training.acceleration=none",
        ),
    ],
)
def test_mistakes(tiny: Tiny, tmp_path: Path, options: tuple[str, ...], line: str) -> None:
    assert line in tiny.train(1, tmp_path, *options).error


@pytest.mark.parametrize("num_steps", [3, 4, 5])
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_a_profile_that_is_given_up_leaves_nothing(
    tiny: Tiny, ranks: Ranks, tmp_path: Path, micro_batch: int, num_steps: int
) -> None:
    """Before, in and after the profiler's warm-up: the run ends as it would without."""
    trainer = make(ranks, tiny.config(f"training.micro_batch={micro_batch}"))
    watched = StepProfile(trainer, tmp_path, num_steps=2, title="", dtype=torch.float32)
    for _ in range(num_steps):
        watched.train_step()
    watched.close()
    assert list(tmp_path.rglob("*.*")) == []


@pytest.mark.parametrize(
    ("free_bytes", "line"),
    [
        (0, "cannot write {folder}: File too large"),
        # What torch.profiler writes elsewhere before it is compressed.
        (50_000, "cannot write {folder}/trace.json.gz: it is cut short; is "),
        (None, "cannot write {folder}: Is a directory"),
    ],
)
def test_a_disk_that_refuses(
    tiny: Tiny, ranks: Ranks, tmp_path: Path, free_bytes: int | None, line: str
) -> None:
    watched = StepProfile(
        make(ranks, tiny.config()), tmp_path, num_steps=1, title="", dtype=torch.float32
    )
    for _ in range(4):
        watched.train_step()
    if free_bytes is None:
        (watched.folder / "modules.md").mkdir(parents=True)
        free_bytes = 100_000_000
    with full_disk(free_bytes), pytest.raises(UserError) as raised:
        watched.train_step()
    assert str(raised.value).startswith(line.format(folder=watched.folder))


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [2, 1])  # 1 is accumulated, or 4 are
def test_one_of_two_ranks_is_profiled(
    tiny: Tiny, forks: Forks, tmp_path: Path, micro_batch: int
) -> None:
    """The other one waits, and both train as they would without."""
    global_batch = 4 if micro_batch == 2 else 8
    settings = f"training.micro_batch={micro_batch}", f"training.global_batch={global_batch}"
    fixed = ("--max-steps", "6", "--set", settings[0], "--set", settings[1])
    runs = [
        tiny.options(1, tmp_path / "plain", *fixed),
        tiny.options(1, tmp_path / "profiled", *fixed, "--profile", "2"),
    ]
    done = forks.job("train", runs, ranks_of(2))
    assert done.code == 0, done.out + done.err
    assert logged(tmp_path / "plain/stage1") == logged(tmp_path / "profiled/stage1")
    _, document = read(tmp_path / "profiled/stage1")
    communicating = {e["part"] for e in document["entries"] if e["kind"] == "communication"}
    assert "D gradients" in communicating


# ---------------------------------------------------------------- FLOPs of the right modules


def video_of(x: Tensor | Features) -> Tensor:
    """Generators' blocks take and return it with its moments."""
    return x.video if isinstance(x, Features) else x


def flops_alone(block: nn.Module, inputs: tuple[Any, ...], *, x_grad: bool) -> tuple[int, int]:
    """Forward and backward of one block by PyTorch's own counter.

    Its norms' gains and biases are given: a pass takes those of all blocks at once.
    """
    # No copy: the strides of x may mean something.
    leaves = tree_map_only(Tensor, lambda v: v.detach().requires_grad_(v.requires_grad), inputs)
    x = video_of(leaves[0]).requires_grad_(x_grad)
    ones: dict[PreparedLayer, Tensor] = {
        m: torch.ones(len(x), m.channels) for m in layers_of(block, Modulation)
    }
    with Prepared(ones):
        with FlopCounterMode(display=False) as forward:
            y = video_of(block(*leaves))
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("number", [1, 2])
def test_every_block_gets_its_own_flops(tiny: Tiny, ranks: Ranks, number: int) -> None:
    """In a D update D runs forward and back once, G forward; in a G update both forward and back.

    What D does in the G update for its parameters it does not do: they are frozen.
    """
    trainer = make(ranks, tiny.config(), number)
    trainer.train_step()
    networks = {"G": trainer.g_engine.module, "D": trainer.d_engine.module}
    seen: dict[str, list[tuple[tuple[Any, ...], bool]]] = defaultdict(list)
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=f"{network}.{path}": seen[name].append(
                (inputs, torch.is_grad_enabled())
            )
        )
        for network, whole in networks.items()
        for path, module in whole.named_modules()
        if isinstance(module, BLOCKS)
    ]
    counter = OperatorCounter()
    with (
        FlopCounterMode(display=False) as everything,
        named_parts(trainer, counter.enter, counter.leave),
        counter,
    ):
        trainer.train_step()
    for hook in hooks:
        hook.remove()
    assert sum(c.flops for c in counter.counted.values()) == everything.get_total_flops()

    got: dict[tuple[str, str, str], int] = defaultdict(int)
    for place, counted in counter.counted.items():
        got[place.part, place.update, place.direction] += counted.flops
    assert len(seen) > 4
    for name, calls in seen.items():
        block = networks[name[0]].get_submodule(name[2:])
        # Two D updates, one G update.
        assert len(calls) == 3, name
        (inputs, graded), (last, _) = calls[0], calls[-1]
        forward, backward = flops_alone(block, inputs, x_grad=video_of(inputs[0]).requires_grad)
        assert forward > 0
        assert got[name, D_UPDATE, FORWARD] == 2 * forward
        assert got[name, D_UPDATE, BACKWARD] == (2 * backward if graded else 0), name
        forward, backward = flops_alone(block, last, x_grad=True)
        assert got[name, G_UPDATE, FORWARD] == forward
        if name[0] == "G":
            assert got[name, G_UPDATE, BACKWARD] == backward, name
        else:
            for parameter in block.parameters():
                parameter.requires_grad_(False)
            assert got[name, G_UPDATE, BACKWARD] == flops_alone(block, last, x_grad=True)[1], name
    assert not any(place.direction == RECOMPUTED for place in counter.counted)


class Doubled(torch.autograd.Function):
    """x @ w, whose backward pass is opaque: a single product for x, and twice it for w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grads[0] @ w.T, x.T @ grads[0] + 0 * (x.T @ grads[0])


N = 32
PRODUCT_FLOPS = 2 * N**3


class Toy(nn.Module):
    """Three products: a plain one, one of our kind, and one that is computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(N, N) for _ in range(3))

    def step(self, x: Tensor, ranges: Any) -> None:
        def part(name: str, function: Any, *args: Any) -> Any:
            ranges.enter(Range(part=name))
            try:
                return function(*args)
            finally:
                ranges.leave()

        ranges.enter(Range(update=STEP))
        ranges.enter(Range(update=G_UPDATE))
        a, b, c = self.weights
        h = part("plain", torch.mm, x, a)
        h = part("custom", Doubled.apply, h, b)
        h = checkpoint(lambda h: part("again", lambda: (h @ c).sin()), h, use_reentrant=False)
        loss = (h @ a).sum()  # in no part
        part("gradients", loss.backward)
        ranges.leave()
        ranges.leave()


def test_backward_and_recomputation_belong_to_the_part_that_made_the_graph() -> None:
    torch.manual_seed(0)
    counter = OperatorCounter()
    with counter:
        Toy().step(torch.randn(N, N), counter)
    flops = {place: c.flops for place, c in counter.counted.items() if c.flops}
    expected = {
        ("plain", FORWARD): 1,
        ("plain", BACKWARD): 1,  # x wants no gradient
        ("custom", FORWARD): 1,
        ("custom", BACKWARD): 3,
        ("again", FORWARD): 1,
        ("again", RECOMPUTED): 1,
        ("again", BACKWARD): 2,
        (REST, FORWARD): 1,
        (REST, BACKWARD): 2,
    }
    assert flops == {
        Place(G_UPDATE, part, direction, PRODUCT): n * PRODUCT_FLOPS
        for (part, direction), n in expected.items()
    }


def test_bytes_are_inputs_and_outputs() -> None:
    counter, x = OperatorCounter(), torch.zeros(8, 4)
    with counter:
        x.T + x[0, 0].expand(4, 8)  # views move nothing, and what is repeated is read once
        x.copy_(torch.empty(8, 4))
    assert sum(c.num_bytes for c in counter.counted.values()) == (128 + 4 + 128) + (128 + 128)


class Recorded:
    """Ranges as a profile opens them."""

    def __init__(self) -> None:
        self.open: list[record_function] = []

    def enter(self, entered: Range) -> None:
        self.open.append(record_function(entered.label))
        self.open[-1].__enter__()

    def leave(self) -> None:
        self.open.pop().__exit__(None, None, None)


def test_a_real_trace_is_charged_to_the_same_places(tmp_path: Path) -> None:
    """The trace's way to attribute, by PyTorch's numbers, against the counter's, by its own."""
    torch.manual_seed(0)
    toy, x = Toy(), torch.randn(N, N)
    toy.step(x, Recorded())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        toy.step(x, Recorded())
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text())
    counter = OperatorCounter()
    with counter:
        toy.step(x, counter)
    seconds = timeline.times(trace, "cpu")
    (step,) = (e for e in trace["traceEvents"] if e["name"] == "update: step")
    assert sum(seconds.values()) == pytest.approx(step["dur"] / 1e6, rel=1e-6)
    assert {p for p in seconds if p.kind == PRODUCT} == {
        p for p, c in counter.counted.items() if c.flops
    }
    # At the peak there are at least h of three parts, all N x N.
    peak = timeline.peak(trace, "cpu")
    assert sum(peak.by_part.values()) == peak.num_bytes >= 3 * 4 * N * N
    assert peak.by_part["plain"] == peak.by_part["custom"] == 4 * N * N


# ------------------------------------------------- a GPU's trace, written by hand (none was seen)

HOST, AUTOGRAD, STREAM = 1, 2, 7


def event(cat: str, name: str, tid: int, start: float, end: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "tid": tid, "ts": start, "dur": end - start,
            "args": {key.replace("_", " "): value for key, value in args.items()}}  # fmt: skip


def launch(tid: int, at: float, start: float, end: float, number: int) -> list[dict[str, Any]]:
    return [
        event("cuda_runtime", "cudaLaunchKernel", tid, at, at + 1, correlation=number),
        event("kernel", "some_kernel", STREAM, start, end, correlation=number),
    ]


GPU_TRACE = {
    "traceEvents": [
        event("user_annotation", Range(update=STEP).label, HOST, 0, 100),
        event("user_annotation", Range(part="loader").label, HOST, 2, 20),
        event("user_annotation", Range(update=G_UPDATE).label, HOST, 20, 95),
        event("user_annotation", Range(part="G").label, HOST, 20, 40),
        event("cpu_op", "aten::convolution", HOST, 22, 30, Sequence_number=5),
        *launch(HOST, 24, 30, 50, 1),
        # Somebody else's range changes nothing, and a kernel of a second stream overlaps.
        event("user_annotation", "Optimizer.step#Adam", HOST, 32, 38),
        *launch(HOST, 34, 45, 60, 2),
        event("user_annotation", Range(part="G gradients").label, HOST, 40, 90),
        event("cpu_op", "autograd::engine::evaluate_function: ConvolutionBackward0", AUTOGRAD,
              45, 60, Sequence_number=5),
        event("cpu_op", "aten::convolution_backward", AUTOGRAD, 46, 58),
        *launch(AUTOGRAD, 50, 62, 80, 3),
        event("cpu_op", "autograd::engine::evaluate_function: torch::autograd::AccumulateGrad",
              AUTOGRAD, 65, 70),
        *launch(AUTOGRAD, 66, 80, 84, 4),
        {"ph": "i", "name": "[memory]", "tid": HOST, "ts": 25, "args": {
            "Addr": 1, "Bytes": 100, "Device Type": 1}},
        {"ph": "i", "name": "[memory]", "tid": HOST, "ts": 26, "args": {
            "Addr": 9, "Bytes": 999, "Device Type": 0}},
        {"ph": "i", "name": "[memory]", "tid": AUTOGRAD, "ts": 47, "args": {
            "Addr": 2, "Bytes": 30, "Device Type": 1}},
        {"ph": "i", "name": "[memory]", "tid": AUTOGRAD, "ts": 59, "args": {
            "Addr": 1, "Bytes": -100, "Device Type": 1}},
        {"ph": "i", "name": "[memory]", "tid": AUTOGRAD, "ts": 66, "args": {
            "Addr": 3, "Bytes": 50, "Device Type": 1}},
    ]
}  # fmt: skip


def test_a_device_is_charged_by_what_it_runs_and_what_it_waits_for() -> None:
    seconds = timeline.times(GPU_TRACE, "cuda")
    microseconds = {place: round(1e6 * value, 6) for place, value in seconds.items()}
    assert microseconds == {
        Place(STEP, REST, FORWARD, IDLE): 2 + 5,
        Place(STEP, "loader", FORWARD, IDLE): 18,
        Place(G_UPDATE, "G", FORWARD, IDLE): 10,
        Place(G_UPDATE, "G", FORWARD, CONVOLUTION): 20,
        Place(G_UPDATE, "G", FORWARD, OTHER): 10,  # the overlapped half is the other kernel's
        Place(G_UPDATE, "G gradients", FORWARD, IDLE): 2 + 6,
        Place(G_UPDATE, "G", BACKWARD, CONVOLUTION): 18,
        Place(G_UPDATE, "G gradients", BACKWARD, OTHER): 4,
        Place(G_UPDATE, REST, FORWARD, IDLE): 5,
    }
    assert sum(microseconds.values()) == 100


def test_memory_at_the_peak_is_of_the_device_alone() -> None:
    assert timeline.peak(GPU_TRACE, "cuda") == Peak(130, {"G": 130})
    assert timeline.peak(GPU_TRACE, "cpu") == Peak(999, {"G": 999})


def test_a_table_by_hand() -> None:
    """Two seconds at 1 TFLOP/s: HFU of G is 1.5 / 1.5, of the step 1.5 / 2."""
    forward, backward = (Place(G_UPDATE, "G.units.0", d, CONVOLUTION) for d in (FORWARD, BACKWARD))
    costs = StepCosts.of(
        {Place(): 1.0, forward: 1.0, backward: 2.0},  # of two steps
        {forward: CountedWork(int(5e11), 10**9), backward: CountedWork(10**12, 3 * 10**9)},
        weights={},
        num_steps=2,
        num_micro_batches=3,
        num_looked_at=3,
        device_type="cuda",
        plain_step_seconds=1.9,
        matmul_flop_per_s=1e12,
        matmul_dtype="bfloat16",
        peak=Peak(5 * 10**6, {"G.units.0": 4 * 10**6, REST: 10**6}),
    )
    lines = costs.markdown("a title").splitlines()
    assert "| G | 500.00 | 1000.00 | 75.0 % | 1.5 | 4 | 100.0 % |" in lines
    assert "| G.units.0 | 500.00 | 1000.00 | 75.0 % | 1.5 | 4 | 100.0 % | 4 |" in lines
    assert "| rest | 500.00 | 0.00 | 25.0 % | 0 | 0 |  | 1 |" in lines
    assert lines[-1] == "| total | 1000.00 | 1000.00 | 100.0 % | 1.5 | 4 | 75.0 % | 5 |"
