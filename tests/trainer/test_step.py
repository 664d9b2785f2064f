"""The training step on its own: who changes, when, and by what gradient."""

from typing import Any

import pytest
import torch
from small_runs import Tiny, differences
from small_trainers import FACTS, RandomClips, make
from torch import Tensor, nn

from engine.batches import accumulation_steps
from engine.configuration import Config
from engine.errors import UserError
from engine.models.construction import build_generator
from engine.models.norms import FrameNorm, collect_statistics
from engine.models.spectral import spectral_weights
from engine.trainer.deepspeed_engines import frozen
from engine.trainer.fakes import FakeBatch, Fakes, Inputs, LatentSource
from engine.trainer.networks import StageBuilder
from engine.trainer.previous import PreviousStages, load_cascade
from engine.trainer.ranks import Ranks
from engine.trainer.reals import Reals
from engine.trainer.step import NonFiniteError


class GivenFakes:
    """Fakes that do not depend on the generator's weights, but send it gradients."""

    def __init__(self, config: Config, number: int) -> None:
        self._clips = RandomClips(config, number, 1)

    def draw(self, batch_size: int) -> Inputs:
        clips = [next(self._clips) for _ in range(batch_size)]
        return {
            "video": torch.cat([clip.video_BTCHW for clip in clips]) / 2,
            "labels": torch.cat([clip.labels_B for clip in clips]),
        }

    def run(self, generator: nn.Module, inputs: Inputs) -> FakeBatch:
        return FakeBatch(inputs["video"] + _nothing(generator), None, inputs["labels"])


def _nothing(network: nn.Module) -> Tensor:
    return torch.stack([0 * p.sum() for p in network.parameters()]).sum()


class GivenFakesBuilder(StageBuilder):
    def fakes(self, latents: LatentSource, reals: Reals | None) -> Fakes:
        return GivenFakes(self.config, self.number)


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def vectors(network: nn.Module) -> dict[str, Tensor]:
    return {name: b.detach().clone() for name, b in network.named_buffers()}


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
@pytest.mark.parametrize("number", [1, 2])
def test_each_step_changes_its_own_network_only(
    tiny: Tiny, ranks: Ranks, number: int, zero_stage: int
) -> None:
    trainer = make(ranks, tiny.config(f"training.zero_stage={zero_stage}"), number)
    G, D = trainer.g_engine.module, trainer.d_engine.module
    before = weights(G), weights(D), vectors(G), vectors(D)
    trainer.d_step()
    assert differences(before[0], weights(G)) == []
    assert differences(before[2], vectors(G)) == []
    # All gets a gradient but the last biases: where every score is within the margin, as with
    # few scores at the start, reals' and fakes' cancel.
    unmoved = before[1].keys() - {name[1:] for name in differences(before[1], weights(D))}
    assert all(name.endswith("tower.score.bias") for name in unmoved), unmoved

    before = weights(G), weights(D), vectors(G), vectors(D)
    trainer.g_step()
    assert differences(before[1], weights(D)) == []
    assert differences(before[3], vectors(D)) == []
    unmoved = before[0].keys() - {n[1:] for n in differences(before[0], weights(G))}
    # A bias in front of a batch norm has no gradient, up to rounding, and may stay.
    assert all("bias" in name for name in unmoved), unmoved


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_gradients_of_the_generators_step_do_not_reach_the_discriminators(
    tiny: Tiny, ranks: Ranks, zero_stage: int
) -> None:
    """With fakes that the weights do not change, D, G, D leaves D exactly as D, D does."""
    config = tiny.config(f"training.zero_stage={zero_stage}")
    with_g, without_g = (make(ranks, config, 1, GivenFakesBuilder) for _ in range(2))
    with_g.d_step()
    without_g.d_step()
    drawn = with_g._fakes._clips.state_dict(), with_g._random.get_state()  # type: ignore[attr-defined]
    with_g.g_step()
    assert all(p.grad is None or not p.grad.any() for p in with_g.d_engine.module.parameters())
    # G's step draws examples; give D's next step the same ones in both.
    with_g._fakes._clips.load_state_dict(drawn[0])  # type: ignore[attr-defined]
    with_g._random.set_state(drawn[1])
    norms = [trainer.d_step()["grad_norm_D"] for trainer in (with_g, without_g)]
    assert norms[0] == norms[1]
    networks = [trainer.d_engine.module for trainer in (with_g, without_g)]
    assert differences(*map(weights, networks)) == []


def test_reals_and_fakes_are_compared_within_themselves(tiny: Tiny, ranks: Ranks) -> None:
    """With minibatch_stddev, one pass over both gives each the scores of a pass of its own."""
    keys = ["training.micro_batch=4", "training.global_batch=4"]
    config = tiny.config(*keys, "stages.1.discriminators.minibatch_stddev=true")
    trainer = make(ranks, config, 1)
    network, found = trainer.d_engine.module, []
    hook = network.register_forward_hook(
        lambda _, args, scores: found.append((args, scores.all.detach())), with_kwargs=False
    )
    network_state = {name: value.clone() for name, value in network.state_dict().items()}
    trainer.d_step()
    hook.remove()
    ((args, both),) = found
    network.load_state_dict(network_state)
    with torch.no_grad():
        for half in range(2):
            alone = [None if given is None else given.chunk(2)[half] for given in args]
            torch.testing.assert_close(
                both.chunk(2)[half], network(*alone).all, rtol=1e-4, atol=1e-5
            )


class RepeatedFakes:
    """For G's update the inputs of the last D update again, generated anew."""

    def __init__(self, fakes: Fakes) -> None:
        self._fakes, self._num_drawn = fakes, 0
        self._last: Inputs = {}

    def draw(self, batch_size: int) -> Inputs:
        self._num_drawn += 1
        if self._num_drawn % 3:
            self._last = self._fakes.draw(batch_size)
        return self._last

    def run(self, generator: nn.Module, inputs: Inputs) -> FakeBatch:
        return self._fakes.run(generator, inputs)


class RepeatedFakesBuilder(StageBuilder):
    def fakes(self, latents: LatentSource, reals: Reals | None) -> Fakes:
        return RepeatedFakes(super().fakes(latents, reals))


@pytest.mark.parametrize(
    ("stage", "zero_stage"), [("1", 0), ("2", 1), ("2", 3), ("2, joint", 2), ("2, blocks", 3)]
)
def test_reused_fakes_are_those_of_the_last_d_update(
    tiny: Tiny, ranks: Ranks, stage: str, zero_stage: int
) -> None:
    """Bit for bit what generating them twice gives, with a pass of G less."""
    number = int(stage[0])
    changes = {"2, joint": ["stages.2.joint=true"], "2, blocks": ["training.checkpointing=blocks"]}
    keys = [f"training.zero_stage={zero_stage}", *changes.get(stage, [])]
    found = []
    for reuse, builder_class in (("true", StageBuilder), ("false", RepeatedFakesBuilder)):
        torch.manual_seed(0)
        config = tiny.config(*keys, f"training.reuse_fakes={reuse}")
        trainer = make(ranks, config, number, builder_class)
        passes: list[bool] = []
        norm = next(m for m in trainer.g_engine.module.modules() if isinstance(m, FrameNorm))
        norm.register_forward_pre_hook(lambda *_, p=passes: p.append(torch.is_grad_enabled()))
        measures = [trainer.train_step() for _ in range(2)]
        state = [weights(trainer.g_engine.module), weights(trainer.d_engine.module)]
        found.append((measures, state, passes))
    (reused, state, passes), (generated, expected, more_passes) = found
    assert reused == generated
    assert differences(state, expected) == []
    if stage != "2, blocks":  # in the backward pass a block runs again
        assert passes == [False, True] * 2
        assert more_passes == [False, False, True] * 2


def test_reused_fakes_are_not_accumulated(tiny: Tiny) -> None:
    keys = "stages.1.training.micro_batch=2", "training.reuse_fakes=true"
    training = tiny.config(*keys).stages[1].training
    message = "holds one pass of G, but 2 are accumulated; set micro_batch=4, or reuse_fakes=false"
    with pytest.raises(UserError, match=message):
        accumulation_steps(training, 1)
    assert accumulation_steps(training, 2) == 1


def test_frozen_restores_what_it_found(tiny: Tiny, ranks: Ranks) -> None:
    network = nn.Linear(2, 1)
    network.bias.requires_grad_(False)
    x = torch.ones(1, 2, requires_grad=True)

    def fail_within() -> None:
        with frozen(network):
            network(x).sum().backward()
            raise KeyError

    with pytest.raises(KeyError):
        fail_within()
    assert x.grad is not None
    assert x.grad.equal(network.weight.detach())
    assert network.weight.grad is None
    assert network.weight.requires_grad
    assert not network.bias.requires_grad


def test_spectral_vectors_move_once_per_update_not_per_pass(tiny: Tiny, ranks: Ranks) -> None:
    trainer = make(ranks, tiny.config("training.micro_batch=2"))
    seen: dict[str, list[Tensor]] = {"G": [], "D": []}
    for key, network in (("G", trainer.g_engine.module), ("D", trainer.d_engine.module)):
        layer = spectral_weights(network)[0]
        layer.register_forward_pre_hook(
            lambda module, _, key=key: seen[key].append(torch.cat([module.u, module.v]))
        )
    trainer.train_step()
    # D's passes: two per update of D, then two of G's update. G's: likewise, its own last.
    D, G = seen["D"], seen["G"]
    assert len(D) == len(G) == 6
    assert D[0].equal(D[1])
    assert D[2].equal(D[3])
    assert D[4].equal(D[5])
    assert not D[0].equal(D[2])
    assert not D[2].equal(D[4])
    assert all(g.equal(G[0]) for g in G)
    layer = spectral_weights(trainer.g_engine.module)[0]
    assert not torch.cat([layer.u, layer.v]).equal(G[0])
    # One power iteration on the updated weight, from where the vectors stood.
    matrix = layer.weight.detach().flatten(1)
    v = nn.functional.normalize(matrix.T @ G[0][: len(layer.u)], dim=0)
    u = nn.functional.normalize(matrix @ v, dim=0)
    torch.testing.assert_close((layer.u, layer.v), (u, v))


class SplitFakes:
    """The same batches of four, handed out in micro-batches of any size."""

    def __init__(self, fakes: Fakes) -> None:
        # All at once: a sequence of random numbers depends on how many are drawn at a time.
        self._batches = [fakes.draw(4) for _ in range(3)]
        self._fakes, self._position = fakes, 0

    def draw(self, batch_size: int) -> Inputs:
        batch, first = divmod(self._position, 4)
        self._position += batch_size
        mine = slice(first, first + batch_size)
        whole = self._batches[batch].items()
        return {name: v[mine] if isinstance(v, Tensor) else v for name, v in whole}

    def run(self, generator: nn.Module, inputs: Inputs) -> FakeBatch:
        return self._fakes.run(generator, inputs)


class SplitFakesBuilder(StageBuilder):
    def fakes(self, latents: LatentSource, reals: Reals | None) -> Fakes:
        return SplitFakes(super().fakes(latents, reals))


@pytest.mark.parametrize("number", [1, 2])
def test_accumulation_gives_the_gradient_of_the_whole_batch(
    tiny: Tiny, ranks: Ranks, number: int
) -> None:
    """One micro-batch of 4, 2 of 2 or 4 of 1, of the same examples, for D and then for G.

    D has no batch norm, and G's norms are on fixed statistics: those of micro-batches differ. With
    beta1 = 0 Adam's first moment is the gradient. All frames are judged, as which of them are drawn
    depends on the batch size.
    """
    gradients: dict[str, list[list[Tensor]]] = {"D": [], "G": []}
    norms: dict[str, list[Tensor]] = {"D": [], "G": []}
    for micro_batch in (4, 2, 1):
        config = tiny.config(
            f"training.micro_batch={micro_batch}",
            f"stages.{number}.discriminators.spatial_frames={2 + number}",
            "training.zero_stage=0",
            # G's gradient depends on D's update, in which Adam makes much of a rounding.
            "training.discriminator_lr=1e-12",
        )
        trainer = make(ranks, config, number, SplitFakesBuilder)
        G = trainer.g_engine.module
        inputs = trainer._fakes.draw(4)
        collect_statistics(G, lambda _: G(**inputs), 1)  # noqa: B023 — called here
        measures = trainer.d_step() | trainer.g_step()
        for name, engine in (("D", trainer.d_engine), ("G", trainer.g_engine)):
            norms[name].append(measures[f"grad_norm_{name}"])
            state = engine.optimizer.state
            gradients[name].append([state[p]["exp_avg"] for p in engine.module.parameters()])
    stage = tiny.config().stages[number]
    num_terms = 4 * stage.num_frames * stage.resolution**2
    for name, (whole, *split) in gradients.items():
        largest = max(gradient.abs().max().item() for gradient in whole)
        assert largest > 0.01
        # Sums over clips, frames and pixels in another order, through some 20 layers.
        tolerance = (num_terms**0.5 + 20) * torch.finfo(torch.float32).eps
        for other in split:
            torch.testing.assert_close(other, whole, rtol=0, atol=tolerance * largest)
        for norm in norms[name][1:]:
            torch.testing.assert_close(norm, norms[name][0], rtol=tolerance, atol=0)


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_reported_gradient_norm_is_that_of_the_applied_gradient(
    tiny: Tiny, ranks: Ranks, zero_stage: int
) -> None:
    config = tiny.config(f"training.zero_stage={zero_stage}", "training.micro_batch=2")
    trainer = make(ranks, config)
    reported = trainer.d_step()["grad_norm_D"]
    states = trainer.d_engine.optimizer.state.values()
    applied = torch.cat([state["exp_avg"].flatten() for state in states]).norm()
    torch.testing.assert_close(reported, applied, rtol=1e-5, atol=0)


@pytest.mark.parametrize("which", ["generator", "discriminators"])
def test_a_weight_that_is_no_number_stops_the_run(tiny: Tiny, ranks: Ranks, which: str) -> None:
    trainer = make(ranks, tiny.config("training.discriminator_steps=1"), 2)
    trainer.train_step()
    network = {"generator": trainer.g_engine, "discriminators": trainer.d_engine}[which].module
    name, parameter = next(iter(network.named_parameters()))
    with torch.no_grad():
        parameter.view(-1)[0] = torch.nan
    with pytest.raises(NonFiniteError) as error:
        trainer.train_step()
    text = str(error.value)
    assert text.startswith("stage 2, step 2: not finite: measures loss_D, ")
    assert f"; {which} {name}" in text
    assert "\n" not in text


def test_a_gradient_that_overflows_stops_the_run(tiny: Tiny, ranks: Ranks) -> None:
    """The losses are still finite, the squares in the norm are not."""
    trainer = make(ranks, tiny.config())
    for parameter in trainer.g_engine.module.parameters():
        parameter.register_hook(lambda grad: grad * 1e30)
    with pytest.raises(NonFiniteError, match="stage 1, step 1: not finite: measures grad_norm_G"):
        trainer.train_step()


@pytest.mark.parametrize("zero_stage", [0, 1])
@pytest.mark.parametrize("limit", [None, 0.01])
def test_gradients_are_clipped_when_asked(
    tiny: Tiny, ranks: Ranks, zero_stage: int, limit: float | None
) -> None:
    """Adam's first moment is the applied gradient itself, since its decay is 0."""
    overrides = [f"training.zero_stage={zero_stage}"]
    if limit is not None:
        overrides.append(f"training.max_gradient_norm={limit}")
    trainer = make(ranks, tiny.config(*overrides))
    measures = trainer.g_step()
    optimizer = trainer.g_engine.optimizer
    adam = optimizer.optimizer if zero_stage else optimizer
    moments = [state["exp_avg"].flatten() for state in adam.state.values()]
    applied = torch.cat(moments).norm().item()
    measured = measures["grad_norm_G"].item()
    assert measured > 0.1  # of the gradient before it is clipped
    assert applied == pytest.approx(measured if limit is None else limit, rel=1e-4)


def test_a_skipped_first_d_update_stops_the_run(tiny: Tiny, ranks: Ranks) -> None:
    """ZeRO skips an update whose gradient overflows; the second D update is in order again."""
    trainer = make(ranks, tiny.config("training.zero_stage=1"))
    D = trainer.d_engine.module
    hooks = [p.register_hook(lambda grad: grad * float("inf")) for p in D.parameters()]
    first_d_step = trainer.d_step

    def then_no_hooks(*arguments: Any, **options: Any) -> dict[str, Tensor]:
        measures = first_d_step(*arguments, **options)
        for hook in hooks:
            hook.remove()
        return measures

    trainer.d_step = then_no_hooks  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match="grad_norm_D"):
        trainer.train_step()


def test_joint_training_updates_every_stage(tiny: Tiny, ranks: Ranks) -> None:
    trainer = make(ranks, tiny.config("stages.2.joint=true"), 2)
    G = trainer.g_engine.module
    before = weights(G)
    trainer.train_step()
    moved = {name[1:] for name in differences(before, weights(G))}
    for stage in ("generators.0.", "generators.1."):
        names = {name for name in before if name.startswith(stage)}
        assert names
        assert all("bias" in name for name in names - moved)


@pytest.mark.parametrize(
    ("overrides", "scores"),
    [
        ((), "spatial temporal matching"),
        (("stages.2.discriminators.matching=false",), "spatial temporal"),
        (("stages.2.generator.temporal=conv_gru",), "spatial temporal matching"),
        (("data.num_classes=null",), "spatial temporal matching"),
        (("training.precision=bf16",), "spatial temporal matching"),
    ],
    ids=str,
)
def test_variants_train(tiny: Tiny, ranks: Ranks, overrides: tuple[str, ...], scores: str) -> None:
    trainer = make(ranks, tiny.config(*overrides), 2)
    before = weights(trainer.g_engine.module)
    measures = trainer.train_step()
    judged = {key.split("/")[1] for key in measures if key.startswith("score_fake/")}
    assert judged == set(scores.split())
    for kind in ("loss_D", "loss_G", "grad_norm_D", "grad_norm_G", "accuracy_D_real"):
        assert kind in measures
    assert measures["grad_norm_G"] > 0
    assert differences(before, weights(trainer.g_engine.module))


def test_condition_on_data_upsamples_real_windows(tiny: Tiny, ranks: Ranks) -> None:
    config = tiny.config("stages.2.training.condition_on=data")
    builder = StageBuilder(config, 2, ranks, FACTS)  # without previous stages
    clips = RandomClips(config, 2, 4)
    trainer = builder.trainer(clips)
    inputs = trainer._draw()
    again = RandomClips(config, 2, 4)
    expected = next(again)
    assert inputs["low_BTCHW"].equal(expected.video_BTCHW[:, ::2, :, ::2, ::2])
    assert inputs["labels_B"].equal(expected.labels_B)
    trainer.train_step()
    # Two D updates draw a batch to judge and one to upsample, G's one to upsample.
    assert clips.position == 4 * (1 + 2 * 2 + 1)


def test_previous_stages_are_frozen(tiny: Tiny, ranks: Ranks) -> None:
    states = {1: build_generator(tiny.config(), 1).state_dict()}
    previous = PreviousStages(load_cascade(tiny.config(), states, ranks.device), "")
    builder = StageBuilder(tiny.config(), 2, ranks, FACTS, previous)
    trainer = builder.trainer(RandomClips(tiny.config(), 2, 4))
    before = weights(previous.cascade) | vectors(previous.cascade)
    trainer.train_step()
    cascade = previous.cascade
    assert differences(before, weights(cascade) | vectors(cascade)) == []
    assert not trainer._draw()["low_BTCHW"].requires_grad
