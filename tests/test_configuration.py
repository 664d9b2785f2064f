"""Configuration files: what is shipped loads, what is wrong is said in one line."""

import json
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.batches import accumulation_steps, share_among
from engine.configuration import Config, config_from_tree, load_config, variant_names
from engine.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = [
    pytest.param(path, variant, id=f"{path.stem}-{variant}" if variant else path.stem)
    for path in sorted(CONFIGS.glob("*.yaml"))
    for variant in variant_names(path)
]

SMALL = """
name: small
variant: short
variants:
  short: {stages.2.num_frames: 4}
  long: {stages.2.num_frames: 8, training.iterations: 7}
data: {num_classes: 3}
training: {iterations: 5, global_batch: 4, micro_batch: 2}
stages:
  1:
    resolution: 8
    num_frames: 4
    frame_stride: 2
    generator: {temporal: conv_gru, channels: 4, multipliers: [2]}
    discriminators: {channels: 4, multipliers: [1, 2]}
  2:
    resolution: 16
    num_frames: 6
    frame_stride: 1
    generator: {temporal: separable_conv, channels: 4, multipliers: [2, 1]}
    discriminators: {channels: 4, multipliers: [1, 2]}
    training: {micro_batch: 1}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def written(folder: Path, text: str) -> Path:
    path = folder / "written.yaml"
    path.write_text(text)
    return path


def refusal(path: Path, *overrides: str) -> str:
    """The message with which a configuration is refused."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert "pydantic" not in message
    return message


# --- What is shipped ------------------------------------------------------------------------


def test_the_promised_files_are_shipped() -> None:
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    papers = {"kinetics600", "bdd100k", "dvdgan", "kinetics600-joint", "bdd100k-table2"}
    assert names == {"sample", "ucf101", "kinetics600-256"} | papers


@pytest.mark.parametrize(("path", "variant"), SHIPPED)
def test_shipped_file_loads_and_survives_a_round_trip(path: Path, variant: str | None) -> None:
    config = load_config(path, [f"variant={variant}"] if variant else [])
    assert config.name == path.stem
    tree = config.to_tree()
    assert config_from_tree(tree, "tree") == config
    assert config_from_tree(yaml.safe_load(yaml.safe_dump(tree)), "yaml") == config
    text = json.dumps(tree)
    through_json = json.loads(text)
    assert config_from_tree(through_json, "json") == config
    assert through_json == json.loads(text), "config_from_tree changed what it was given"


def paper_sizes(name: str, *overrides: str) -> list[tuple[int, int, int]]:
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    return [(s.resolution, s.num_frames, s.frame_stride) for s in config.stages.values()]


def test_sizes_are_the_papers() -> None:
    assert paper_sizes("kinetics600") == [(32, 25, 8), (128, 12, 4)]
    assert paper_sizes("kinetics600", "variant=window3") == [(32, 25, 8), (128, 6, 4)]
    assert paper_sizes("bdd100k") == [(32, 25, 8), (64, 12, 4), (128, 12, 2)]
    assert paper_sizes("bdd100k-table2") == [(32, 25, 8), (128, 6, 4)]
    assert paper_sizes("kinetics600-joint") == [(32, 6, 8), (64, 6, 4)]
    for num_frames in (6, 12, 48):
        assert paper_sizes("dvdgan", f"variant=frames{num_frames}") == [(128, num_frames, 4)]


@pytest.mark.parametrize(("variant", "window"), [("window6", 6), ("window3", 3)])
def test_kinetics_window_is_what_stage_2_upsamples(variant: str, window: int) -> None:
    config = load_config(CONFIGS / "kinetics600.yaml", [f"variant={variant}"])
    given = config.upsampling(2)
    assert (given.resolution, given.num_frames, given.frame_step) == (32, window, 2)
    # 25 frames of stage 1 unroll to the paper's 128x128/50.
    assert config.stages[1].num_frames * given.frame_step == 50


def test_training_of_the_paper_sized_files() -> None:
    for name, iterations in (("kinetics600", 300_000), ("dvdgan", 300_000), ("bdd100k", 35_000)):
        for stage in load_config(CONFIGS / f"{name}.yaml").stages.values():
            training = stage.training
            assert (training.iterations, training.global_batch) == (iterations, 512)
            assert (training.generator_lr, training.discriminator_lr) == (1e-4, 5e-4)
            assert training.adam_betas == (0.0, 0.999)
            assert (training.discriminator_steps, training.micro_batch) == (2, "auto")
            assert (training.precision, training.zero_stage) == ("bf16", 1)
    assert load_config(CONFIGS / "bdd100k.yaml").data.num_classes is None


# --- Defaults, variants, overrides ----------------------------------------------------------


def test_training_defaults_reach_every_stage_and_yield_to_it(small: Path) -> None:
    config = load_config(small)
    assert [stage.training.iterations for stage in config.stages.values()] == [5, 5]
    assert [stage.training.micro_batch for stage in config.stages.values()] == [2, 1]


def test_precedence_is_override_then_variant_then_file(small: Path) -> None:
    assert load_config(small).stages[2].num_frames == 4
    assert load_config(small, ["variant=long"]).stages[2].num_frames == 8
    overridden = load_config(small, ["variant=long", "stages.2.num_frames=2"])
    assert overridden.stages[2].num_frames == 2
    assert overridden.stages[1].training.iterations == 7
    without = written(small.parent, SMALL.replace("variant: short", ""))
    assert load_config(without).stages[2].num_frames == 6
    assert variant_names(small) == ["short", "long"]
    assert variant_names(without) == [None, "short", "long"]
    assert variant_names(CONFIGS / "bdd100k.yaml") == [None]


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("training.generator_lr=1e-3", lambda c: c.stages[1].training.generator_lr == 1e-3),
        ("training.generator_lr=2e2", lambda c: c.stages[2].training.generator_lr == 200.0),
        ("stages.2.training.seed=9", lambda c: c.stages[2].training.seed == 9),
        ("stages.2.training.seed=9", lambda c: c.stages[1].training.seed == 0),
        ("stages.1.generator.multipliers=[8]", lambda c: c.stages[1].generator.multipliers == (8,)),
        ("training.ema_decay=0.99", lambda c: c.stages[1].training.ema_decay == 0.99),
        ("data.path=a=b", lambda c: c.data.path == "a=b"),
        ("data.num_classes=null", lambda c: c.data.num_classes is None),
        ("data.procedural={num_frames: 7}", lambda c: c.data.procedural.num_frames == 7),
    ],
)
def test_override(small: Path, override: str, found: Any) -> None:
    assert found(load_config(small, ["data.path=clips", override]))


def test_sections_shared_by_a_yaml_alias_are_set_apart(small: Path) -> None:
    text = SMALL.replace("discriminators: {", "discriminators: &d {", 1)
    *head, tail = text.split("discriminators: {channels: 4, multipliers: [1, 2]}")
    aliased = written(small.parent, "discriminators: *d".join([*head, tail]))
    config = load_config(aliased, ["stages.2.discriminators.channels=6"])
    assert [config.stages[n].discriminators.channels for n in (1, 2)] == [4, 6]


# --- Derived sizes --------------------------------------------------------------------------


def test_derived_sizes(small: Path) -> None:
    config = load_config(small)
    assert [stage.num_upsamplings for stage in config.stages.values()] == [1, 2]
    assert [stage.num_source_frames for stage in config.stages.values()] == [7, 4]
    assert config.resolution == 16
    given = config.upsampling(2)
    assert (given.resolution, given.num_frames, given.frame_step) == (8, 2, 2)


def test_accumulation_steps(small: Path) -> None:
    training = load_config(small, ["training.global_batch=24"]).stages[1].training
    assert [accumulation_steps(training, world_size) for world_size in (1, 2, 4)] == [12, 6, 3]


@pytest.mark.parametrize(
    ("global_batch", "world_size", "line"),
    [
        (10, 2, "2 processes x micro_batch 2; nearest that work: micro_batch 1 or 5, or "
                "global_batch 8 or 12"),
        (3, 1, "1 process x micro_batch 2; nearest that work: micro_batch 1 or 3, or "
               "global_batch 2 or 4"),
        # No micro-batch makes up for samples that the ranks cannot share evenly.
        (10, 4, "4 processes x micro_batch 2; nearest that work: global_batch 8 or 16"),
        # One sample for each of eight: less than the micro-batch, which share_among lowers.
        (4, 8, "8 processes x micro_batch 2; nearest that work: global_batch 8"),
        # Mistyped, and answered all the same: 11 x 51679 x 14072887, and a prime.
        (512, 2 * 10**9, "2000000000 processes x micro_batch 2; nearest that work: global_batch "
                         "2000000000"),
        (8 * 10**12 + 3, 1, "1 process x micro_batch 2; nearest that work: micro_batch 1 or 11, or "
                            "global_batch 8000000000002 or 8000000000004"),
        (10**15 + 37, 1, "1 process x micro_batch 2; nearest that work: micro_batch 1, or "
                         "global_batch 1000000000000036 or 1000000000000038"),
    ],
)  # fmt: skip
@pytest.mark.timeout(20)  # counting up to them took minutes
def test_batch_that_does_not_divide(
    small: Path, global_batch: int, world_size: int, line: str
) -> None:
    training = load_config(small, [f"training.global_batch={global_batch}"]).stages[1].training
    with pytest.raises(UserError) as caught:
        accumulation_steps(training, world_size)
    assert str(caught.value) == f"training.global_batch {global_batch} is no multiple of {line}"


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world_size"),
    [(512, 12, 8), (512, 4, 100), (500, 7, 4), (9, 8, 2), (7, 4, 8), (97, 2, 1)],
)
def test_batches_that_are_offered_are_the_nearest_that_are_accepted(
    small: Path, global_batch: int, micro_batch: int, world_size: int
) -> None:
    """As train.py goes about it: `share_among`, then `accumulation_steps`."""

    def refused(global_batch: int, micro_batch: int) -> str:
        keys = (
            f"training.global_batch={global_batch}",
            f"stages.1.training.micro_batch={micro_batch}",
        )
        config = share_among(load_config(small, keys), 1, world_size)
        training = config.stages[1].training
        try:
            steps = accumulation_steps(training, world_size)
        except UserError as error:
            return str(error)
        assert steps * training.micro_batch * world_size == global_batch
        return ""

    def nearest(sizes: Iterable[int], accepted: Callable[[int], bool]) -> list[str]:
        return [str(size) for size in islice(filter(accepted, sizes), 1)]

    def micro_works(size: int) -> bool:
        return not refused(global_batch, size)

    def global_works(size: int) -> bool:
        return not refused(size, micro_batch)

    line = refused(global_batch, micro_batch).partition("nearest that work: ")[2]
    micros, _, globals_ = line.rpartition("global_batch ")
    assert globals_.split(" or ") == [
        *nearest(range(global_batch - 1, 0, -1), global_works),
        *nearest(range(global_batch + 1, 2000), global_works),
    ]
    offered = [word for word in micros.replace(",", "").split() if word.isdecimal()]
    # Larger than a rank's share is accepted too, but lowered to it.
    share = global_batch // world_size
    assert offered == [
        *nearest(range(micro_batch - 1, 0, -1), micro_works),
        *nearest(range(micro_batch + 1, share + 1), micro_works),
    ]


# --- What is refused ------------------------------------------------------------------------

UNREACHABLE = "cannot be reached from the 4x4 base by doubling; use 4, 8, 16, 32, ..."

# fmt: off
MISTAKES_IN_A_KEY = {
    # sizes
    "stages.1.resolution=30": f"stages.1: resolution 30 {UNREACHABLE}",
    "stages.1.resolution=2": f"stages.1: resolution 2 {UNREACHABLE}",
    "stages.2.resolution=32":
        "stages.2: generator.multipliers has 2 units, but 32x32 needs at least 3 "
        "(one per doubling)",
    # unknown and missing keys
    "trainng.seed=1": "unknown key trainng; did you mean training?",
    "training.rate=1": "unknown key stages.1.training.rate",
    "training.generator_l=1":
        "unknown key stages.1.training.generator_l; did you mean generator_lr?",
    "stages.1.generator.channel=1":
        "unknown key stages.1.generator.channel; did you mean channels?",
    "data.procedural.frames=1":
        "unknown key data.procedural.frames; did you mean num_frames?",
    "stages.1.generator={}": "missing key stages.1.generator.temporal",
    "stages.4={}": "missing key stages.4.resolution",
    "stages.two={}": "stages must be numbered 1, 2, ... (found 'two')",
    "stages.²={}": "stages must be numbered 1, 2, ... (found '²')",  # a digit, but no number
    # sections
    "training=3": "training must be a mapping of keys (found 3)",
    "stages=[1]": "stages must be a mapping of keys (found a list of 1)",
    "stages.1.training=3": "stages.1.training must be a mapping of keys (found 3)",
    "stages.1.generator=4": "stages.1.generator must be a mapping of keys (found 4)",
    # types and values
    "training.iterations=abc":
        "stages.1.training.iterations should be a valid integer (found 'abc')",
    "training.iterations=1.5": "stages.1.training.iterations should be a valid integer (found 1.5)",
    "training.iterations=":
        "stages.1.training.iterations should be a valid integer (found nothing)",
    "stages.2.training.iterations=true":
        "stages.2.training.iterations should be a valid integer (found True)",
    "training.micro_batch=0":
        "stages.1.training.micro_batch: should be a whole number greater than 0, or auto (found 0)",
    "training.iterations=0": "stages.1.training.iterations should be greater than 0 (found 0)",
    "training.seed=-1":
        "stages.1.training.seed should be greater than or equal to 0 (found -1)",
    "data.procedural.seed=-1":
        "data.procedural.seed should be greater than or equal to 0 (found -1)",
    "training.generator_lr=.inf":
        "stages.1.training.generator_lr should be a finite number (found inf)",
    "training.adam_betas=[0.5]":
        "stages.1.training.adam_betas has too few items (found a list of 1)",
    "training.adam_betas=[0, 0.9, 1]":
        "stages.1.training.adam_betas should have at most 2 items (found a list of 3)",
    "training.adam=sgd":
        "stages.1.training.adam should be 'auto', 'torch', 'deepspeed' or 'apex' (found 'sgd')",
    "training.offload_optimizer=cpu":
        "stages.1.training.offload_optimizer should be a valid boolean (found 'cpu')",
    "training.precision=fp16":
        "stages.1.training.precision should be 'fp32' or 'bf16' (found 'fp16')",
    "training.checkpointing=units":
        "stages.1.training.checkpointing should be 'none', 'norms' or 'blocks' (found 'units')",
    "training.acceleration=jit":
        "stages.1.training.acceleration should be 'none', 'compile' or 'cuda_graphs' (found 'jit')",
    "training.zero_stage=4":
        "stages.1.training.zero_stage should be less than or equal to 3 (found 4)",
    "stages.1.generator.multipliers=[]":
        "stages.1.generator.multipliers should have at least 1 item (found a list of 0)",
    "stages.1.generator.multipliers=3":
        "stages.1.generator.multipliers should be a list (found 3)",
    "stages.1.generator.multipliers=[2, x]":
        "stages.1.generator.multipliers.1 should be a valid integer (found 'x')",
    "stages.2.generator.low_frames=linear":
        "stages.2.generator.low_frames should be 'repeat' or 'interpolate' (found 'linear')",
    "stages.2.generator.edge_frames=-1":
        "stages.2.generator.edge_frames should be greater than or equal to 0 (found -1)",
    "stages.2.discriminators.minibatch_stddev=1":
        "stages.2.discriminators.minibatch_stddev should be a valid boolean (found 1)",
    "stages.2.training.sample_bank={}": "missing key stages.2.training.sample_bank.num_videos",
    "stages.2.training.sample_bank={num_videos: 8, refresh: 1}":
        "unknown key stages.2.training.sample_bank.refresh; did you mean refresh_every?",
    "stages.2.training.sample_bank={num_videos: 8, refresh_every: 0}":
        "stages.2.training.sample_bank.refresh_every should be greater than 0 (found 0)",
    "data.path=7": "data.path should be a valid string (found 7)",
    "data.path={a: 1}": "data.path should be a valid string (found a mapping)",
}

MISTAKES_BETWEEN_KEYS = {
    "stages.2.resolution=4": "stage 2 (4 pixels) must be a whole multiple of stage 1 (8 pixels)",
    "stages.1.frame_stride=3":
        "stage 2: num_frames 4 is not a multiple of its temporal upsampling factor 3",
    "stages.2.frame_stride=4": "stage 2: frame_stride 4 does not divide stage 1's 2",
    "stages.2.num_frames=10":
        "stage 2 upsamples windows of 5 frames, but stage 1 generates only 4",
    "stages.1.joint=true": "stage 1: joint training starts with stage 2",
    "stages.2.discriminators.pool_time=true":
        "stage 2: discriminators.pool_time needs at least 4 frames, and there are 2",
    "stages.2.discriminators.minibatch_stddev=true":
        "stage 2: discriminators.minibatch_stddev needs samples to compare; set "
        "stages.2.training.micro_batch to 2 or more",
    "training.sample_bank={num_videos: 8}":
        "stage 1: no stage before it to bank samples of; set stages.1.training.sample_bank to null",
    "stages.2.training={sample_bank: {num_videos: 8}, condition_on: data}":
        "stage 2: condition_on=data needs no bank of generated samples; set "
        "stages.2.training.sample_bank to null",
    "stages={}": "stages must be numbered 1, 2, ...; found []",
    "data.procedural={}": "data.procedural needs data.path, the folder to make videos in",
    "data={path: a, procedural: {num_frames: 6}}":
        "data.procedural.num_frames 6 is too few: a clip of stage 1 spans 7 frames",
}

MISTAKES_IN_AN_OVERRIDE = {
    "stages.7.seed=1": "cannot set stages.7.seed: there is no stages.7, only 1, 2",
    "name.first=1": "cannot set name.first: name is not a section",
}
# fmt: on


@pytest.mark.parametrize(("override", "line"), MISTAKES_IN_A_KEY.items())
def test_mistake_in_a_key_names_file_key_and_override(
    small: Path, override: str, line: str
) -> None:
    assert refusal(small, override) == f"{small}: {line}, from --set {override}"


@pytest.mark.parametrize(("override", "line"), MISTAKES_BETWEEN_KEYS.items())
def test_stages_that_do_not_fit_together(small: Path, override: str, line: str) -> None:
    # These concern several keys, and any of them may be the one to change.
    assert refusal(small, override) == f"{small}: {line}"


def test_joint_training_has_no_bank(small: Path) -> None:
    overrides = "stages.2.training.sample_bank={num_videos: 8}", "stages.2.joint=true"
    assert refusal(small, *overrides) == (
        f"{small}: stage 2: joint training freezes no stage to bank samples of; set "
        "stages.2.training.sample_bank to null"
    )


@pytest.mark.parametrize(("override", "line"), MISTAKES_IN_AN_OVERRIDE.items())
def test_override_of_what_is_not_there(small: Path, override: str, line: str) -> None:
    assert refusal(small, override) == f"{small}: {line}"


@pytest.mark.parametrize("chosen", ["tall", "[1]"])
def test_variant_that_is_not_offered(small: Path, chosen: str) -> None:
    shown = repr(yaml.safe_load(chosen))
    line = f"{small} has no variant {shown}; it has: short, long"
    assert refusal(small, f"variant={chosen}") == line
    none = CONFIGS / "bdd100k.yaml"
    assert refusal(none, "variant=tall") == f"{none} has no variant 'tall'; it has no variants"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seed", "--set seed: expected key.path=value"),
        ("=3", "--set =3: expected key.path=value"),
        ("a..b=3", "--set a..b=3: expected key.path=value"),
        ("name=[", "--set name=[: the value is not YAML: "),
        ("name=2026-13-13", "--set name=2026-13-13: the value is not YAML: month must be in 1..12"),
    ],
)
def test_override_that_is_not_one(small: Path, override: str, line: str) -> None:
    assert refusal(small, override).startswith(line)


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        (SMALL, "", "does not hold a mapping of configuration keys"),
        (SMALL, "- 1", "does not hold a mapping of configuration keys"),
        (SMALL, "[" * 5000, "is not valid YAML: it is nested too deeply"),
        ("data:", "data: }", "is not valid YAML: "),
        ("name: small", "name: small\nname: other", "key 'name' is given twice (line 3)"),
        ("name: small", "", "missing key name"),
        ("name: small", "name: small\ndate: 1", "unknown key date; did you mean data?"),
        ("training: {", "training: 3 #", "training must be a mapping of keys (found 3)"),
        ("training: {", "training: #", "training must be a mapping of keys (found nothing)"),
        ("data: {num_classes: 3}", "data:", "data must be a mapping of keys (found nothing)"),
        ("variant: short", "variant: tall", "has no variant 'tall'; it has: short, long"),
        ("short: {stages.2.num_frames: 4}", "short: 4", "variants.short must map dotted keys"),
        ("short: {stages.2.num_frames: 4}", "short: {4: 4}", "variants.short must map dotted keys"),
        ("short: {stages.2.num_frames: 4}", "4: {}", "variants must map names to settings"),
        ("short: {stages.2", "short: {stages.9", "there is no stages.9, only 1, 2"),
        ("  1:\n", "  3:\n", "stages must be numbered 1, 2, ...; found [2, 3]"),
        ("training: {micro_batch: 1}", "training: 1", "stages.2.training must be a mapping"),
    ],
)
def test_mistaken_file_is_refused_in_one_line(
    tmp_path: Path, before: str, after: str, line: str
) -> None:
    assert before in SMALL
    path = written(tmp_path, SMALL.replace(before, after))
    message = refusal(path)
    assert message.startswith(str(path))
    assert line in message
    assert "--set" not in message


def test_variants_that_are_no_mapping(tmp_path: Path) -> None:
    path = written(tmp_path, "name: x\nvariants: [a]\n")
    line = f"{path}: variants must map names to settings (found a list of 1)"
    assert refusal(path) == line
    with pytest.raises(UserError, match="variants must map names"):
        variant_names(path)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    assert refusal(missing) == f"cannot read configuration {missing}: No such file or directory"
    assert refusal(tmp_path) == f"cannot read configuration {tmp_path}: Is a directory"
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\xd8")
    assert refusal(binary).startswith(f"{binary} is not valid YAML: ")


def test_snapshot_with_a_mistake_names_its_source(small: Path) -> None:
    tree = load_config(small).to_tree()
    tree["stages"][2]["generator"]["heads"] = 8
    with pytest.raises(UserError, match=r"^runs/x/config: unknown key stages\.2\.generator\.heads"):
        config_from_tree(tree, "runs/x/config")


def test_a_loaded_configuration_does_not_change(small: Path) -> None:
    config: Any = load_config(small)
    with pytest.raises(ValueError, match="frozen"):
        config.stages[1].num_frames = 8
    assert isinstance(config, Config)


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "..", ".", "", "a/b", "~root", "a\nb"])
def test_a_name_leads_nowhere(name: str) -> None:
    """It is a folder's below runs/."""
    with pytest.raises(UserError, match="name"):
        load_config("configs/sample.yaml", [f"name={json.dumps(name)}"])
