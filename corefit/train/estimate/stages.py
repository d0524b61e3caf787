"""How much memory each stage needs, from the networks' configs alone: no weight is read or allocated."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, cast

import attrs
from attrs import evolve, frozen

from corefit.data import buckets, coding
from corefit.pipeline.pipeline import Pipeline
from corefit.system import memory
from corefit.train import sharding, weights
from corefit.train.estimate import held, phases
from corefit.train.estimate.device import Device
from corefit.train.estimate.forwards import Forwards, Memo
from corefit.train.estimate.phases import ACTIVATIONS, MISSED, Estimate, Phase
from corefit.train.frozen import Frozen, bytes_of
from corefit.types import Sized, SizedText
from corefit.types.objective import weighted_objectives
from corefit.types.stage import Stage

MASTER = 4
"""Bytes of a trainable number, of its gradient and of each of its moments: all are float32."""
MACHINE = 8
"""Processes on one machine, at most."""
PIXEL = 12
"""Bytes of a pixel: three colors in float32."""
LOSS = 6
"""Latents that a loss holds for each of its rows beside what the network keeps: input, target, error, square."""


def estimates(
    pipeline: Pipeline, device: Device, world: int = 1, *, graphs: bool = True, memo: Memo | None = None
) -> list[Estimate]:
    """Estimate every stage; return nothing for a backbone that is not Sized.

    world   number of processes, over which each step's rows, and sharded weights, are split
    graphs  whether to estimate what forwards take too, and so the phases, which takes seconds
    memo    what forwards took in estimates before, which is added to
    """
    if not isinstance(pipeline.backbone, Sized):
        return []
    known = {} if memo is None else memo
    return [_Case.of(pipeline, stage, device, world, known).estimate(graphs) for stage in pipeline.stage]


@frozen(eq=False, kw_only=True)
class _Case:
    """A stage on a device, with its blank networks.

    rows   rows of a micro-batch on one process
    share  rows of a step on one process
    shape  latents of a row, of the bucket that has most
    size   media of that bucket, in pixels
    vae    the blank VAE that the backbone decodes and encodes with; None where it does not say what that is
    """

    pipeline: Pipeline
    stage: Stage
    device: Device
    world: int
    backbone: Any
    beside: Frozen
    forwards: Forwards
    rows: int
    share: int
    shape: tuple[int, ...]
    size: tuple[int, ...]
    vae: Any

    @staticmethod
    def of(pipeline: Pipeline, stage: Stage, device: Device, world: int, memo: Memo) -> _Case:
        backbone = blank(pipeline, stage, device)
        half = device.half(pipeline.precision)
        share = max(1, stage.rows // max(1, world // pipeline.context_parallel))
        sizes = buckets.sizes(pipeline.data.size, pipeline.data.aspects, backbone)
        size = max(sizes, key=lambda each: math.prod(backbone.latent_shape(each)))
        beside = Frozen.of(pipeline, stage, backbone)
        return _Case(
            pipeline=pipeline,
            stage=stage,
            device=device,
            world=world,
            backbone=backbone,
            beside=beside,
            forwards=Forwards(
                backbone=backbone,
                key=_key(pipeline, stage, half, device.gpu),
                half=half,
                gpu=device.gpu,
                most=MISSED * device.memory * pipeline.context_parallel,
                memo=memo,
            ),
            rows=min(stage.micro_batch or 1, share),
            share=share,
            shape=backbone.latent_shape(size),
            size=tuple(size),
            vae=beside.decoder or held.decoder_of(backbone),  # only the last one made is what the backbone uses
        )

    @property
    def parts(self) -> int:
        """How many processes hold one set of shards; 1 where weights are whole on each."""
        return max(1, self.world // self.pipeline.replicate) if self.pipeline.shard else 1

    @property
    def half(self) -> bool:
        """Whether networks compute in bfloat16."""
        return self.forwards.half

    def estimate(self, graphs: bool) -> Estimate:
        stage, parameters = self.stage, list(self.backbone.transformer.parameters())
        trained = [p for p in parameters if p.requires_grad]
        trainable = sum(p.numel() for p in trained)
        copies = held.copies(stage)
        sums = 1 + (len(weighted_objectives(stage.objective)) > 1)  # a sum's so far, while the next part makes its own
        found = Estimate(
            stage=stage.name,
            parameters=held.numbers(self.backbone.transformer),
            trainable=trainable,
            weights=held.weights(self.backbone, self.device.gpu) / self.parts,
            gradients=sums * trainable * MASTER / self.parts,
            optimizer=sum(held.optimizer(stage, p) for p in trained) / self.parts,
            exchanged=trainable * MASTER if self.world > self.parts and not self.pipeline.shard else 0.0,
            copies=0.0 if held.copies_wait(stage, self.device.gpu) else copies * trainable * MASTER / self.parts,
            gathered=max(p.numel() for p in parameters) * MASTER if self.parts > 1 else 0.0,
            decoder=bytes_of(self.beside.decoder) if self.beside.decoder else 0.0,
            rewards=sum(map(bytes_of, self.beside.rewards)),
            kept=self._kept(),
            activations=self._training() if graphs else None,
        )
        beyond = self._scores_with_a_graph and (found.activations or 0) > MISSED * self.device.memory
        found = evolve(found, beyond=beyond, unsharded=self._unsharded(found, copies))
        return evolve(found, phases=tuple(self._phases(found)), host=self._host(found, copies)) if graphs else found

    @property
    def _scores_with_a_graph(self) -> bool:
        return "reward_gradient" in self.stage.objective.uses

    # what is held

    def _row(self) -> float:
        """Bytes of a row's latents, float32."""
        return 4.0 * math.prod(self.shape)

    def _condition(self) -> float:
        """Bytes of a row's condition, which text encoders gave in their dtype."""
        numbers = sum(math.prod(one) for one in self.backbone.condition_shapes().values())
        return numbers * (2.0 if self.half else 4.0)

    def _kept(self) -> float:
        """Bytes of a step's rows on this process, and of what its objectives keep of rollouts."""
        objectives = [each.value for each in weighted_objectives(self.stage.objective)]
        media = max(held.media(each) for each in objectives)
        latents = media + max(held.rollout_latents(each) for each in objectives)
        conditions = 1 + max(held.copies_conditions(each) for each in objectives)
        return self.share * (latents * self._row() + conditions * self._condition())

    def _unsharded(self, e: Estimate, copies: int) -> float:
        """Bytes of weights that are gathered from shards: all where that is asked for or room is found, or two blocks.

        While one block computes, the next one is gathered. The outermost module's own weights stay gathered.
        """
        if self.parts == 1:
            return 0.0
        kept = sharding.kept_bytes(self.backbone.transformer, copies)
        if sharding.keeps(self.pipeline.gather, kept, self.device.memory - e.certain):
            return float(kept)
        return held.two_blocks(self.backbone.transformer)

    def _training(self) -> int | None:
        """Estimate what a term's forward and backward take; a compiled network takes less, for it recomputes some."""
        if not self.backbone.condition_shapes():
            return None
        each = held.graph_rows(self.stage.objective, self.backbone)
        scored = self.beside if self._scores_with_a_graph else None
        found = self.forwards.training(self.rows, each, self.shape, scored)
        if found is None:
            return None
        loss = LOSS * self.rows * held.loss_rows(self.stage.objective) * self._row()
        return math.ceil(found / self.pipeline.context_parallel + loss)

    # what is done

    def _phases(self, e: Estimate) -> Iterator[Phase]:
        """Yield the phases of the stage, in order; those of encoding and of the base come before the first stage."""
        between = {"weights": e.weights, "optimizer": e.optimizer, "copies": e.copies, "rewards": e.rewards}
        if self.stage is self.pipeline.stage[0]:
            yield from self._encoding()
        yield Phase(phases.READING, {"weights": e.weights, "rewards": e.rewards})
        trained = {"gradients": e.gradients, "exchanged gradients": e.exchanged}
        within = {**between, "gathered": e.unsharded, "rows": e.kept, "decoder": e.decoder}
        if held.samples(self.stage.objective):
            rows = self.rows * held.guided_rows(self.stage.objective, self.backbone)
            yield self._with(phases.SAMPLING, within, self.forwards.sampling(rows, self.shape))
        if self.beside.decoder is not None:
            yield self._elastic(phases.DECODING, within, self.rows, self.forwards.decoding(1, self.shape, self.beside))
        training = self._with(phases.TRAINING, {**within, **trained}, e.activations)
        yield evolve(training, known=training.known and not e.beyond)
        yield Phase(phases.SAVING, {**between, "decoder": e.decoder, "largest weight": e.gathered})
        if self.pipeline.eval:
            yield from self._evaluating(e)

    def _with(self, name: str, parts: Mapping[str, float], found: int | None) -> Phase:
        return Phase(name, {**parts, ACTIVATIONS: float(found or 0)}, known=found is not None)

    def _elastic(self, name: str, parts: Mapping[str, float], rows: int, each: int | None) -> Phase:
        """Return a phase that takes as many of `rows` at once as fit, one at the least (corefit.data.coding)."""
        if each is None:
            return self._with(name, parts, None)
        room = self.device.memory - sum(parts.values())
        most = min(coding.fitting(rows, each, self.device.memory), max(1, int(room // max(1, each))))
        return self._with(name, parts, most * each)

    def _encoding(self) -> Iterator[Phase]:
        """Yield the phases before the first stage: prompts are encoded, and media where a stage trains on them."""
        network, beside, encoded = self.vae, 0.0, self.pipeline.data.encoded is not None
        if isinstance(self.backbone, SizedText) and (self.pipeline.eval or not encoded):
            sizes = self.backbone.encoder_bytes()
            every, here = sum(sizes.values()), any(count for name, count in sizes.items() if name != "vae")
            most = self.backbone.encoding_bytes(self.device.memory)
            beside = every - bytes_of(network) if network is not None and most >= every else 0.0  # or they take turns
            # what text encoders compute is not estimated; on the CPU they take nothing of a device
            yield Phase(phases.ENCODING_TEXTS, {"text encoders": most}, known=not here)
        if self.pipeline.needs_media and network is not None and not encoded:
            found = self.forwards.encoding(1, self.size, network)
            rows = self.pipeline.data.encode_batch
            parts = {"encoder": float(bytes_of(network)), "text encoders": max(0.0, beside)}
            yield self._elastic(phases.ENCODING_MEDIA, parts, rows, found)

    def _evaluating(self, e: Estimate) -> Iterator[Phase]:
        """Yield generating and decoding the samples of [eval]; the decoder stays from the first batch on.

        Samples that are shown wait in main memory.
        """
        settings, network = self.pipeline.eval, self.vae
        assert settings is not None
        rows, size = settings.batch, self.pipeline.data.size
        parts = {"weights": e.weights, "gathered": e.unsharded, "rewards": e.rewards}
        parts["rows"] = rows * (2 * self._row() + self._condition())
        parts["decoder"] = float(bytes_of(network)) if network is not None else 0.0
        if not self.device.gpu:
            parts["samples"] = settings.shown * PIXEL * math.prod(size)
        twice = 1 if settings.guidance == 1 or self.backbone.distilled else 2
        shape = self.backbone.latent_shape(size)
        yield self._with(phases.EVAL_SAMPLING, parts, self.forwards.sampling(rows * twice, shape))
        if network is not None:
            found = self.forwards.decoding(1, shape, evolve(self.beside, decoder=network))
            yield self._elastic(phases.EVAL_DECODING, parts, rows, found)

    def _host(self, e: Estimate, copies: int) -> float:
        """Return the main memory that the processes of a machine take beside Python's, where the device is a GPU.

        Whole weights pass through it while they are read, copies may stay there, and two steps' rows wait there.
        """
        if not self.device.gpu:
            return 0.0
        here = min(self.world, MACHINE)
        read = 0.0 if self.parts > 1 else held.whole_weights(self.backbone)
        stays = copies * e.trainable * MASTER / self.parts if held.copies_wait(self.stage, self.device.gpu) else 0.0
        waiting = 2 * self.share * (held.media(self.stage.objective) * self._row() + self._condition())
        offloaded = read if held.weights(self.backbone, True) < read else 0.0
        return here * (max(read, waiting + offloaded) + stays)


def blank(pipeline: Pipeline, stage: Stage, device: Device) -> Any:
    """Return a copy of the backbone, set up for training, whose weights have a shape and no memory."""
    with memory.uncollected("torch"):
        import torch

    small = device.half(pipeline.precision) and pipeline.freezes_in_half(stage)
    backbone: Any = evolve(cast(Any, pipeline.backbone))
    backbone.load_blank(torch.bfloat16 if small else torch.float32)
    weights.make_trainable(backbone, pipeline.mode(stage))
    return backbone


def _key(pipeline: Pipeline, stage: Stage, half: bool, gpu: bool) -> Hashable:
    """Return what determines the networks of a stage, as text."""
    backbone: Any = pipeline.backbone
    keys = [repr(getattr(backbone, each.name)) for each in attrs.fields(type(backbone)) if each.init]
    exact = pipeline.freezes_in_half(stage)
    return (type(backbone), *keys, repr(pipeline.mode(stage)), exact, half, gpu, repr(stage.reward))
