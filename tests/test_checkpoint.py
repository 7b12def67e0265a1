"""Runs that were interrupted: exactly where they were, or as well as can be under other sizes."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from runs import Command, config, options, ranks

from sst_fast import GalleryQueue
from sst_fast.train import loop

pytestmark = pytest.mark.usefixtures("one_thread")


def wait_for(path, *processes):
    """Until the file is there, or a process has ended."""
    while not path.exists() and all(process.poll() is None for process in processes):
        time.sleep(0.02)



def same(a, b):
    """Two model state dicts, bit for bit."""
    for name, value in a.items():
        assert (value == b[name]) if name == "_extra_state" else torch.equal(value, b[name]), name


def weights(run):
    return [v for v in run.network.state_dict().values()]


@pytest.mark.parametrize("method", ["sst", "conventional"])
def test_interrupted_training_resumes_exactly(faces, tmp_path, method):
    whole = config(faces, tmp_path / "whole", method=method)
    expected = loop.train(whole, *loop.split(whole))
    broken = config(faces, tmp_path / "broken", method=method)
    original, calls = loop.train_epoch, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.train(broken, *loop.split(broken))
    resumed = loop.train(broken, *loop.split(broken))
    assert len(resumed.history) == 4
    assert resumed.history == expected.history
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(expected), strict=True))


@pytest.mark.slow
def test_killed_training_ends_bit_identical(faces, tmp_path):
    """A real process, killed (-9) and terminated (SIGTERM, which saves in the middle of an epoch) at random moments."""

    def steps_done(out):
        path = out / "checkpoint.pt"
        return len(torch.load(path, weights_only=True)["history"]) if path.exists() else 0

    sizes = {"epochs": 30}
    whole = Command(["train", *options(faces, tmp_path / "whole", **sizes)], tmp_path / "whole.txt")
    rng, out, codes = random.Random(0), tmp_path / "broken", []
    for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        before = steps_done(out)
        process = Command(["train", *options(faces, out, **sizes)], tmp_path / "broken.txt")
        while process.poll() is None and steps_done(out) == before:
            time.sleep(0.02)
        time.sleep(rng.random() / 4)
        process.send_signal(how)
        codes.append(process.wait())
        assert codes[-1] in (0, -signal.SIGKILL, 128 + how), process.told()
        if codes[-1] == 128 + how:
            assert "the same command goes on" in process.told()
            assert "Traceback" not in process.told()
    assert any(codes)
    last = Command(["train", *options(faces, out, **sizes)], tmp_path / "broken.txt")
    assert last.wait() == 0, last.told()
    assert whole.wait() == 0, whole.told()
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "broken")]
    same(states[0]["model"], states[1]["model"])
    assert states[0]["history"] == states[1]["history"]
    tables = [list(csv.DictReader((tmp_path / name / "metrics.csv").open())) for name in ("whole", "broken")]
    for row in tables[0] + tables[1]:
        assert float(row.pop("seconds")) > 0
    assert tables[0] == tables[1]
    assert not [path.name for path in out.glob(".*") if path.name != ".lock"]


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_are_stopped_and_go_on(faces, tmp_path, shard):
    """Under torchrun: SIGTERM saves on all ranks; the same two end bit-identical; one process alone goes on, and says so."""
    sizes = {"epochs": 12, "batch": 6, "queue_size": 14, "shard": shard}
    whole = ranks(["train", *options(faces, tmp_path / "whole", **sizes)], tmp_path / "whole.txt", 2)
    out = tmp_path / "broken"
    if shard:
        process = ranks(["train", *options(faces, out, **sizes)], tmp_path / "broken.txt", 2)
        wait_for(out / "checkpoint.pt", *process)
        for each in process:
            each.send_signal(signal.SIGTERM)
        assert [each.wait() for each in process] == [128 + signal.SIGTERM] * 2, process[0].told()
    else:  # torchrun itself once, which passes the signal on
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m",
                   "sst_fast.cli", "train", *options(faces, out, **sizes)]  # fmt: skip
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        wait_for(out / "checkpoint.pt", process)
        process.send_signal(signal.SIGTERM)
        process.communicate()
        assert process.returncode != 0
    stopped = torch.load(out / "checkpoint.pt", weights_only=True)
    assert len(stopped["ranks"]) == 2
    assert 0 < len(stopped["history"]) < 12
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "checkpoint.pt").write_bytes((out / "checkpoint.pt").read_bytes())
    again = ranks(["train", *options(faces, out, **sizes)], tmp_path / "again.txt", 2)
    for each in again + whole:
        assert each.wait() == 0, each.told()
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "broken")]
    same(states[0]["model"], states[1]["model"])
    assert states[0]["history"] == states[1]["history"]
    if shard:
        for a, b in zip(*(state["ranks"] for state in states), strict=True):
            same(a["queue"], b["queue"])
        assert not torch.equal(*(rank["queue"]["identities"][:4] for rank in states[0]["ranks"]))
    one = Command(["train", *options(faces, alone, **sizes | {"shard": False})], tmp_path / "alone.txt")
    assert one.wait() == 0, one.told()
    told = one.told()
    assert "was written by 2 processes, now there are 1" in told
    assert "features, the rest starts empty" in told


def test_other_sizes_load_and_keep_the_newest(faces, tmp_path, capsys):
    first = config(faces, tmp_path / "run", epochs=4, keep="first")
    with pytest.MonkeyPatch.context() as patch:
        original, calls = loop.train_epoch, []

        def two(*arguments):
            calls.append(1)
            if len(calls) > 2:
                raise KeyboardInterrupt
            return original(*arguments)

        patch.setattr(loop, "train_epoch", two)
        with pytest.raises(KeyboardInterrupt):
            loop.train(first, *loop.split(first))
        before = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
        calls.clear()
        calls += [1, 1]
        other = replace(first, queue_size=5, batch=5)
        capsys.readouterr()
        with pytest.raises(KeyboardInterrupt):
            loop.train(other, *loop.split(other))
    told = capsys.readouterr().err
    assert "with batch=3, now it is 5" in told
    assert "with queue_size=7, now it is 5" in told
    assert "keeps its newest 5 of 7 features" in told
    run = loop.train(other, *loop.split(other))
    assert len(run.history) == 4
    assert run.history[:2] == before["history"]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_queues_of_any_size_take_over_the_newest(world):
    """From two shards of five slots, wrapped round, to ``world`` shards of three: the newest, oldest first."""
    shards = [GalleryQueue(5, 2, spare=2) for _ in range(2)]
    number = 0
    for _ in range(4):
        for shard in shards:
            shard.enqueue(torch.randn(2, 2), torch.tensor([number, number + 1]))
            number += 2
    new = [GalleryQueue(3, 2, torch.float64) for _ in range(world)]
    for rank, queue in enumerate(new):
        kept = queue.load_newest(*(shard.state_dict() for shard in shards), rank=rank, world=world)
        assert kept == (min(3 * world, 10), 10)
    held = [int(i) for queue in new for i in queue.identities if i >= 0]
    # The five newest of each shard, in turns.
    expected = [13, 15, 12, 14, 9, 11, 8, 10, 5, 7][: 3 * world]
    assert sorted(held) == sorted(expected)
    for queue in new:
        filled = len(queue)
        assert queue.identities[:filled].tolist() == [i for i in expected[::-1] if i in queue.identities.tolist()]
        assert int(queue.state[0]) == filled % 3
        for slot in range(filled):
            identity = int(queue.identities[slot])
            source = next(s for s in shards if identity in s.identities.tolist())
            row = source.features[source.identities.tolist().index(identity)]
            assert torch.equal(queue.features[slot].float(), row)
    queue = GalleryQueue(4, 3)
    with pytest.raises(ValueError, match="features of size 3, got 2"):
        queue.load_newest(shards[0].state_dict())


def test_last_and_best_checkpoints_are_kept(faces, tmp_path):
    run = config(faces, tmp_path, epochs=5, verify_every=2, keep_checkpoints=2)
    done = loop.train(run, *loop.split(run))
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == [
        "best.pt", "checkpoint-00004.pt", "checkpoint-00005.pt", "checkpoint.pt",
    ]  # fmt: skip
    accuracies = {i: row["accuracy"] for i, row in enumerate(done.history, 1) if "accuracy" in row}
    assert set(accuracies) == {2, 4, 5}
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert best["best"] == max(accuracies.values())
    assert len(best["history"]) == min(i for i, a in accuracies.items() if a == best["best"])
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert "accuracy" in header.split(",")
    assert len(rows) == 5


def test_minutes_between_checkpoints(faces, tmp_path):
    """Within the first epoch there is a checkpoint already."""
    run = config(faces, tmp_path, epochs=1, checkpoint_minutes=1e-9)
    saved = []
    with pytest.MonkeyPatch.context() as patch:
        original = loop.checkpoint.save
        patch.setattr(
            loop.checkpoint,
            "save",
            lambda folder, state, **rest: (saved.append(state.sampler.done), original(folder, state, **rest)),
        )
        loop.train(run, *loop.split(run))
    assert saved == [3, 6, 9, 0]


def test_fine_tuning_starts_from_the_probe_network(faces, tmp_path):
    deep = config(faces, tmp_path / "deep", method="conventional", epochs=1)
    trained = loop.train(deep, *loop.split(deep)).network.state_dict()
    shallow = config(faces, tmp_path / "shallow", init=str(tmp_path / "deep"))
    begin = loop.start(shallow, range(9), torch.device("cpu")).model
    same(trained, begin.probe.state_dict())
    same(trained, begin.gallery.state_dict())
    loop.train(replace(shallow, epochs=1), *loop.split(shallow))
    with pytest.raises(ValueError, match=r"init: .*dim=16.*the configuration asks for .*dim=8"):
        loop.start(replace(shallow, dim=8), range(9), torch.device("cpu"))
