"""Training: one loop for Semi-Siamese and for conventional training (learned class weights), resumable at any step."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn

from sst_fast import data, distributed, functional
from sst_fast.data.pairs import begun, outlast
from sst_fast.evaluation import Scores, collapse, evaluate
from sst_fast.loss import MarginSoftmaxHead, SemiSiameseLoss
from sst_fast.margins import Margin
from sst_fast.queue import GalleryQueue
from sst_fast.samplers import IdentitySampler
from sst_fast.semi_siamese import SemiSiamese
from sst_fast.train import backbones, checkpoint, export
from sst_fast.train.checkpoint import State
from sst_fast.train.config import Config, device_named
from sst_fast.train.progress import Progress, say

METRICS = ("loss", "target_cosine", "hardest_cosine")
WATCHED = 512  # images whose embeddings' collapse is told each epoch


class Conventional(nn.Module):
    """A backbone with learned class weights under the same margin-softmax: what shallow data makes collapse."""

    def __init__(self, backbone: nn.Module, classes: int, dim: int, margin: Margin, scale: float) -> None:
        super().__init__()
        self.probe = backbone
        self.criterion = MarginSoftmaxHead(classes, dim, margin, scale)

    def forward(self, image_a: Tensor, image_b: Tensor, identity: Tensor) -> Tensor:
        """Mean loss over the 2B images."""
        embedding = torch.cat([self.probe(image_a), self.probe(image_b)])
        loss: Tensor = self.criterion(embedding, identity.repeat(2))
        return loss

    def update_gallery(self) -> None:
        """There is none."""


class Stopped(Exception):
    """A signal came (SIGTERM or SIGINT); everything up to the last step is in the checkpoint."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


@dataclass
class Run:
    """A finished run: the probe network and one row of metrics per epoch; on rank 0 the last scores on test identities."""

    network: nn.Module
    history: list[dict[str, float]]
    scores: Scores | None
    rank: int = 0


HELD_OUT = "held_out.json"  # in a run's folder: the names that data.test_share held out when it began


def split(config: Config) -> tuple[data.Faces, data.Faces | None]:
    """Training identities, and those to verify on if ``data.test_share`` or ``data.test_root`` asks for them.

    A run that goes on holds out the identities that it held out before, however many there are now.
    """
    faces = identities(config.data.root, "data.root")
    order: list[int] = torch.randperm(len(faces.names), generator=torch.Generator().manual_seed(config.seed)).tolist()
    held = order[: round(config.data.test_share * len(order))]
    if held and _latest(config).exists() and (_latest(config).parent / HELD_OUT).exists():
        names = set(json.loads((_latest(config).parent / HELD_OUT).read_text(encoding="utf-8")))
        held = [i for i, name in enumerate(faces.names) if name in names]
    kept = sorted(set(order) - set(held))
    if len(kept) < 2:
        raise ValueError(f"data.test_share: {config.data.test_share} leaves fewer than two identities for training")
    train, test = faces.subset(kept), faces.subset(sorted(held)) if held else None
    if config.data.test_root:
        test = identities(config.data.test_root, "data.test_root")
    if config.data.images_per_identity:
        train = train.shallow(config.data.images_per_identity, config.seed)
    return train, test


def identities(root: str, option: str) -> data.Faces:
    """The data set that the user gave as ``option``, which errors then name."""
    if not root:
        raise ValueError(f"{option} must be given: a folder of identities, a list file or 'orl'")
    try:
        return data.faces(root)
    except (ValueError, OSError) as error:
        raise type(error)(f"{option}: {str(error).removeprefix('data.root: ')}") from None


def train(config: Config, train_faces: data.Faces, test_faces: data.Faces | None, label: str | None = None) -> Run:
    """Trains as ``config`` says and verifies the last state on ``test_faces``; resumes what it finds in ``config.out``.

    Under ``torchrun`` every process calls it; they share the batch, and rank 0 writes and verifies. The folder then holds
    ``checkpoint.pt``, ``config.yaml``, ``metrics.csv`` and ``spectrum.csv`` (a row an epoch), ``scores.json`` (of the last
    state) and ``tensorboard``.

    Raises:
        ValueError: the configuration is impossible, another process trains into the folder, or its checkpoint cannot go on.
        OSError: something cannot be written. Stopped: SIGTERM or SIGINT came; the same call goes on from there.
    """
    with contextlib.ExitStack() as stack:
        device = stack.enter_context(processes(config.device))
        requests = stack.enter_context(Requests(config.checkpoint_minutes))
        rank, world = distributed.ranks()
        config.check(len(train_faces.names), world)
        out, latest = Path(config.out), _latest(config)
        if rank == 0:
            stack.enter_context(checkpoint.alone_in(out))
        torch.manual_seed(config.seed)
        state = start(config, train_faces.names, device, rank, world)
        if latest.exists():
            for text in checkpoint.load(latest, state):
                say(text)
        elif config.method == "sst" and (text := too_short(config, len(train_faces.names))):
            say(text)
        if rank == 0:
            _write_beginning(config, test_faces)
        model: nn.Module = state.model
        if config.compile:
            model.compile()
        if world > 1:
            model = nn.parallel.DistributedDataParallel(model, [device.index] if device.type == "cuda" else None)
        crops = (config.data.size, config.data.channels)
        skipped = data.Unreadable(out / "unreadable.txt") if config.data.on_error == "skip" else None
        pairs = data.Pairs(train_faces, *crops, config.seed, augment=config.data.augment, skipped=skipped)
        workers = config.data.workers
        if workers < 0:
            workers = min(8, (os.cpu_count() or 1) // world) if device.type == "cuda" else 0
        paths, numbers = data.flat(test_faces or train_faces)
        kept: list[int] = []
        watched = torch.cat(
            list(data.image_batches(paths[:WATCHED], *crops, workers=workers, skipped=skipped, kept=kept))
        )
        scores, before = None, state.seconds[-1] if state.seconds else 0.0
        label = label or config.method
        begin = state.sampler.epoch + state.sampler.done / len(state.sampler.order)
        with Progress(label, out, epochs=config.epochs, epoch=begin, step=state.step, images=state.images) as progress:
            for epoch in range(state.sampler.epoch, config.epochs):
                pairs.epoch = epoch
                lr = config.lr * config.lr_factor(epoch)
                for group in state.optimizer.param_groups:
                    group["lr"] = lr
                if not train_epoch(state, model, pairs, workers, device, progress, requests):
                    raise Stopped(
                        f"stopped in epoch {epoch + 1}, identity {state.sampler.done}; the same command goes on from {out}",
                        requests.signal or signal.SIGTERM,
                    )
                last, better = epoch + 1 == config.epochs, False
                row = {"epoch": epoch + 1, "step": state.step, **means(state, device), "lr": lr}
                state.sampler.set_epoch(epoch + 1)
                state.sums, state.count = [0.0] * len(METRICS), 0
                if rank == 0:
                    seen = collapse(backbones.embed(state.model.probe, watched.split(256)), numbers[kept])
                    row |= seen.row()
                    if test_faces and config.verify_every and ((epoch + 1) % config.verify_every == 0 or last):
                        scores = verify(state.model.probe, test_faces, *crops, workers=workers, skipped=skipped)
                        row["accuracy"], row["tar_at_far_1e-3"] = scores.accuracy, scores.tar[0.001]
                        say(f"{label}: epoch {epoch + 1}/{config.epochs}, {told(scores)}")
                        better = scores.accuracy > state.best
                        state.best = max(state.best, scores.accuracy)
                state.history.append(row)
                state.seconds.append(before + progress.seconds)
                if rank == 0:
                    progress.epoch(state.history, state.seconds, seen.spectrum)
                better = bool(distributed.from_first(torch.tensor(better)))
                if isinstance(state.model, SemiSiamese) and not config.shard:
                    distributed.assert_same(dict(state.model.criterion.queue.named_buffers()))
                if (epoch + 1) % config.checkpoint_every == 0 or last or better:
                    checkpoint.save(out, state, best=better)
        if test_faces and rank == 0:
            scores = scores or verify(state.model.probe, test_faces, *crops, workers=workers, skipped=skipped)
            with checkpoint.replacing(out / "scores.json") as temporary:
                temporary.write_text(json.dumps({"epoch": len(state.history), **figures(scores)}, indent=2) + "\n")
        if skipped and rank == 0:
            say(f"{len(skipped)} images could not be read and were skipped: {skipped.path}")
        return Run(state.model.probe, state.history, scores, rank)


def too_short(config: Config, identities: int) -> str:
    """A warning if the gallery network will hardly leave its untrained start; '' as a rule."""
    updates = config.epochs * math.ceil(math.ceil(identities / config.batch) / config.accumulate)
    left = config.untrained_share(updates)
    if left < 0.1:
        return ""
    return (
        f"momentum={config.momentum:g} is high for so short a run: after its {updates} updates the gallery network still is "
        f"to {100 * left:.0f} % what it was untrained; set momentum_warmup (20 is the default) or a lower momentum"
    )


def figures(scores: Scores) -> dict[str, Any]:
    """The numbers among the scores, without the curves."""
    names = ("accuracy", "eer", "tar", "rank1", "rank5", "effective_rank")
    return {name: getattr(scores, name) for name in names}


def told(scores: Scores) -> str:
    """The same in a line."""
    parts = []
    for name, value in figures(scores).items():
        if isinstance(value, dict):
            parts += [f"{name} at {at:g} {each:.4f}" for at, each in value.items()]
        else:
            parts.append(f"{name.replace('_', ' ')} {value:.4f}")
    return ", ".join(parts)


def _latest(config: Config) -> Path:
    return Path(config.out) / "checkpoint.pt"


def _write_beginning(config: Config, test_faces: data.Faces | None) -> None:
    """What the run's folder says of it: its configuration, and who is held out."""
    out = Path(config.out)
    with checkpoint.replacing(out / "config.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")
    if test_faces and config.data.test_share and not config.data.test_root:
        with checkpoint.replacing(out / HELD_OUT) as temporary:
            temporary.write_text(json.dumps(list(test_faces.names)), encoding="utf-8")


def start(config: Config, names: Sequence[str], device: torch.device, rank: int = 0, world: int = 1) -> State:
    """Networks, queue, optimizer, sampler before the first step, for identities of these names."""
    network = backbones.build(config.backbone, config.dim, config.data.size, config.width, config.data.channels)
    if config.init:
        ours = export.ProbeInfo(config.backbone, config.dim, config.width, config.data.size, config.data.channels)
        network.load_state_dict(export.load_probe(config.init, ours, option="init")[0].state_dict())
    model: SemiSiamese | Conventional
    if config.method == "sst":
        size, spare = (config.queue_size // world, config.batch) if config.shard else (config.queue_size, 0)
        queue = GalleryQueue(size, config.dim, getattr(torch, config.queue_dtype), spare=spare)
        criterion = SemiSiameseLoss(queue, config.margin, config.scale, keep=config.keep, shard=config.shard)
        model = SemiSiamese(
            network, criterion, config.momentum, warmup=config.momentum_warmup, batchnorm=config.batchnorm,
            galleries=config.galleries,
        )  # fmt: skip
    else:
        model = Conventional(network, len(names), config.dim, config.margin, config.scale)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    placed: Any = model.to(device)  # PyTorch's stubs know memory_format in some versions only
    placed.to(memory_format=layout).train()
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], config.lr, momentum=0.9, weight_decay=config.weight_decay
    )
    held = config.queue_size // (2 if config.keep == "both" else 1) if config.method == "sst" else 0
    sampler = IdentitySampler(
        len(names), config.batch, queue_size=held, scheme=config.sampler, seed=config.seed, rank=rank, world=world
    )
    return State(
        config, model, optimizer, torch.amp.GradScaler(device.type, enabled=config.precision == "float16"), sampler, names,
        sums=[0.0] * len(METRICS),
    )  # fmt: skip


def train_epoch(
    state: State, model: nn.Module, pairs: data.Pairs, workers: int, device: torch.device, progress: Progress,
    requests: Requests,
) -> bool:  # fmt: skip
    """The rest of an epoch; whether it came to its end. Sums are kept on the device: no step waits for it."""
    config, sampler = state.config, state.sampler
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    loader = torch.utils.data.DataLoader(
        pairs, batch_sampler=sampler, num_workers=workers, pin_memory=device.type == "cuda", generator=torch.Generator(),
        worker_init_fn=outlast,
    )  # fmt: skip # a generator of its own: workers' seeds shall not move the training's
    ddp = model if isinstance(model, nn.parallel.DistributedDataParallel) else None
    sums = torch.tensor(state.sums, dtype=torch.float64, device=device)
    sizes = [len(each) for each in sampler]
    for number, batch in enumerate(begun(loader), 1):
        a, b = (images.to(device, non_blocking=True, memory_format=layout) for images in batch[:2])
        identity = batch[2].to(device, non_blocking=True)
        steps = number % config.accumulate == 0 or number == len(sizes)
        first = (number - 1) // config.accumulate * config.accumulate
        share = len(identity) / sum(
            sizes[first : first + config.accumulate]
        )  # the step is on the mean of its identities
        with ddp.no_sync() if ddp is not None and not steps else contextlib.nullcontext():
            with torch.autocast(device.type, config.dtype, enabled=config.precision != "float32"):
                loss = model(a, b, identity)
            state.scaler.scale(loss * share).backward()
        if steps:
            state.scaler.step(state.optimizer)
            state.scaler.update()
            state.optimizer.zero_grad(set_to_none=True)
            state.model.update_gallery()
        seen = state.model.criterion.statistics
        assert isinstance(seen, functional.Statistics)
        hardest = seen.hardest_cosine.clamp_min(-1)  # no negative at all in the very first steps
        values = torch.stack([loss.detach().double(), seen.target_cosine.double().mean(), hardest.double().mean()])
        sums += values * len(identity)
        state.count += len(identity)
        state.step += 1
        images = 2 * len(identity) * sampler.world
        state.images += images
        sampler.step()
        progress.advance(
            sampler.epoch + sampler.done / len(sampler.order), images, dict(zip(METRICS, values, strict=True))
        )
        if steps and (asked := requests.agreed()):
            state.sums = sums.tolist()
            checkpoint.save(Path(config.out), state)
            if asked == "stop":
                return False
    state.sums = sums.tolist()
    return True


def means(state: State, device: torch.device) -> dict[str, float]:
    """Of the epoch's metrics, over the pairs of all ranks."""
    total = distributed.mean(torch.tensor([*state.sums, state.count], dtype=torch.float64, device=device))
    return dict(zip(METRICS, (total[:-1] / total[-1]).tolist(), strict=True))


def verify(
    network: nn.Module, faces: data.Faces, size: int, channels: int, workers: int = 0, skipped: data.Unreadable | None = None
) -> Scores:  # fmt: skip
    """Scores of a network on all images of ``faces``, without those that cannot be read if ``skipped`` is to name them."""
    images, labels = data.flat(faces)
    kept: list[int] = []
    batches = data.image_batches(images, size, channels, workers=workers, skipped=skipped, kept=kept)
    return evaluate(backbones.embed(network, batches), labels[kept])


@contextlib.contextmanager
def processes(device: str) -> Iterator[torch.device]:
    """This process's device; joins the others first if ``torchrun`` has started it."""
    place = device_named(device)
    joins = dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized()
    if joins:
        if place.type == "cuda" and place.index is None:
            place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(place)
        dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    together = False
    try:
        yield place
        together = True
    except Stopped:
        together = True
        raise
    finally:
        if joins:
            if together:  # none leaves while another still hears from it
                dist.barrier()
            dist.destroy_process_group()


class Requests:
    """What all ranks agree to do after a step: '' (go on), 'save' (so many minutes have passed) or 'stop' (a signal came).

    SIGTERM and SIGINT are noted instead of died from while the block runs (in the main thread; elsewhere nothing is noted); a
    second one stops at once. The answer is that of the step before: the exchange runs beside the step, on the host, and
    nothing waits for the device.
    """

    WORDS = ("", "save", "stop")
    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes
        self.signal = 0  # the one that came
        self.came = 0.0  # when
        self.before: dict[signal.Signals, Any] = {}
        self.saved = time.monotonic()
        self.pending: tuple[Any, Tensor] | None = None

    def __enter__(self) -> Requests:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.pending is not None and (kind is None or kind is Stopped):  # as on all ranks
            self.pending[0].wait()

    def agreed(self) -> str:
        """The answer, the same on every rank; all ranks ask."""
        now = time.monotonic()
        mine = 2 if self.signal else int(0 < self.seconds < now - self.saved)
        if distributed.ranks()[1] > 1:
            before, flag = self.pending, torch.tensor(mine)
            self.pending = dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True), flag
            if before is None:
                return ""
            before[0].wait()
            mine = int(before[1])
        if mine:
            self.saved = now
        return self.WORDS[mine]

    def _note(self, number: int, _: object) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self.came = number, now
        elif now - self.came > (
            2 if dist.is_torchelastic_launched() else 0
        ):  # torchrun passes a terminal's signal on again
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(signal.Signals(number))
