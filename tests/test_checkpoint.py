"""Runs that were interrupted: exactly where they were, or as well as can be under other sizes."""

import csv
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from runs import Command, config, forkserver, make_faces, options, ranks
from torch.utils.data import DataLoader
from torch.utils.data._utils import worker

from sst_fast import GalleryQueue, data
from sst_fast.data.pairs import begun, outlast
from sst_fast.margins import CurricularFace
from sst_fast.train import checkpoint, loop
from sst_fast.train.cli import main
from sst_fast.train.config import DataConfig

pytestmark = pytest.mark.usefixtures("one_thread")


def wait_for(path, *processes):
    """Until the file is there, or a process has ended."""
    while not path.exists() and all(process.poll() is None for process in processes):
        time.sleep(0.02)


def same(a, b):
    """Two model state dicts, bit for bit."""
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


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


def readers(pid):
    """The processes that read images for this one and are ready: they ignore SIGINT and handle SIGTERM. Python forks them from it,
    from a server that it has begun, or from the server that forked it."""
    states = {}
    for number in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{number}/status") as file:
                states[int(number)] = dict(line.split(":", 1) for line in file)
        except OSError:
            pass  # it has ended meanwhile

    def has(state, what, number):
        return int(state.get(what, "0"), 16) >> (number - 1) & 1

    if pid not in states:
        return []
    parents = {pid, int(states[pid]["PPid"])} | {
        number for number, state in states.items() if int(state["PPid"]) == pid
    }
    return [
        number
        for number, state in states.items()
        if number != pid
        and int(state["PPid"]) in parents
        and has(state, "SigIgn", signal.SIGINT)
        and has(state, "SigCgt", signal.SIGTERM)
    ]


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_a_signal_to_every_process_saves(faces, tmp_path, start_method):
    """Schedulers send SIGTERM to the processes that read images too: the training must not miss them before it has saved."""
    out = tmp_path / "run"
    arguments = ["train", *options(faces, out, epochs=500, **{"data.workers": 1})]
    process = Command(arguments, tmp_path / "told.txt", start_method=start_method)
    while process.poll() is None:
        if found := readers(process.process.pid):
            os.kill(found[0], signal.SIGTERM)
            process.send_signal(signal.SIGTERM)
            break
    assert process.wait() == 128 + signal.SIGTERM, process.told()
    assert "the same command goes on" in process.told()
    assert (out / "checkpoint.pt").exists()


def test_a_signal_while_readers_start_ends_none_of_them(monkeypatch):
    original = worker.signal_handling._set_worker_signal_handlers

    def slow():
        original()
        time.sleep(1)

    monkeypatch.setattr(worker.signal_handling, "_set_worker_signal_handlers", slow)
    loader = DataLoader(range(3), num_workers=1, worker_init_fn=outlast, multiprocessing_context="fork")
    batches = begun(loader)
    time.sleep(0.5)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(batches._workers[0].pid, number)
    assert [int(batch) for batch in batches] == [0, 1, 2]


@pytest.mark.slow
def test_killed_training_ends_bit_identical(faces, tmp_path):
    """A real process, killed (-9) and terminated (SIGTERM, which saves in the middle of an epoch) at random moments."""

    def steps_done(out):
        path = out / "checkpoint.pt"
        return len(torch.load(path, weights_only=True)["history"]) if path.exists() else 0

    sizes = {"epochs": 12}
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
    sizes = {"epochs": 8, "batch": 6, "queue_size": 14, "shard": shard}
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
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        wait_for(out / "checkpoint.pt", process)
        process.send_signal(signal.SIGTERM)
        process.communicate()
        assert process.returncode != 0
    stopped = torch.load(out / "checkpoint.pt", weights_only=True)
    assert len(stopped["ranks"]) == 2
    assert 0 < len(stopped["history"]) < 8
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of faces and a run of one epoch on all of them; tests copy what they change."""
    root = tmp_path_factory.mktemp("trained")
    settings = config(make_faces(root / "faces", people=6), root / "run", epochs=1, data=DataConfig("", 32, 1))
    loop.train(settings, data.folder(root / "faces"), None)
    return root


def go_on(trained, tmp_path, people=None, **changes):
    """What a run that goes on from a copy of ``trained`` with these changes says, and what it gives."""
    shutil.copytree(trained / "run", tmp_path / "run")
    faces = people or data.folder(trained / "faces")
    settings = config("", tmp_path / "run", **{"data": DataConfig("", 32, 1), "epochs": 2} | changes)
    return loop.train(settings, faces, None)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"epochs": 3}, ["epochs=1, now it is 3"]),
        (
            {"lr": 0.001, "weight_decay": 0.5},
            ["epochs=1, now it is 2", "lr=0.005, now it is 0.001", "weight_decay=0.0005"],
        ),
        ({"data": DataConfig("elsewhere", 32, 1)}, ["data.root='', now it is 'elsewhere'"]),
        ({"momentum": 0.5, "scale": 16.0, "margin": CurricularFace(0.4)}, ["margin=", "momentum=0.9", "scale=30.0"]),
        ({"precision": "float16"}, ["precision='float32', now it is 'float16'"]),
    ],
)
def test_what_is_safe_may_change_and_is_told(trained, tmp_path, capsys, changes, told):
    done = go_on(trained, tmp_path, **changes)
    err = capsys.readouterr().err
    assert all(sum(part in line for line in err.splitlines()) == 1 for part in told), err
    assert len(done.history) == changes.get("epochs", 2)
    assert [row["epoch"] for row in done.history] == list(range(1, len(done.history) + 1))
    assert done.history[-1]["lr"] == pytest.approx(changes.get("lr", 0.005) * 0.1 ** sum(
        len(done.history) - 1 >= share * len(done.history) for share in (0.48, 0.72, 0.9)))  # fmt: skip


def test_a_changed_weight_decay_holds(trained, tmp_path):
    """It comes back with the optimizer's state otherwise."""
    settings = config("", trained / "run", data=DataConfig("", 32, 1), epochs=1, weight_decay=0.25)
    state = loop.start(settings, data.folder(trained / "faces").names, torch.device("cpu"))
    checkpoint.load(trained / "run/checkpoint.pt", state)
    assert [group["weight_decay"] for group in state.optimizer.param_groups] == [0.25]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 8}, "written with dim=16, now it is 8; choose another out"),
        ({"seed": 5}, "written with seed=0, now it is 5"),
        ({"data": DataConfig("", 48, 1)}, "written with data.size=32, now it is 48"),
        ({"data": DataConfig("", 32, 1, test_share=0.1)}, "written with data.test_share=0.0, now it is 0.1"),
        ({"method": "conventional"}, "written with method='sst', now it is 'conventional'"),
    ],
)
def test_checkpoint_of_another_configuration_is_refused(trained, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        go_on(trained, tmp_path, **changes)


def test_a_data_set_that_grew_is_recognised_by_names(trained, tmp_path, capsys):
    """A new identity that comes first moves all numbers; what the queue holds and the sampler remembers move along."""
    faces = data.folder(shutil.copytree(trained / "faces", tmp_path / "more"))
    shutil.copytree(tmp_path / "more/p0", tmp_path / "more/a-new")
    grown = data.folder(tmp_path / "more")
    saved = torch.load(trained / "run/checkpoint.pt", weights_only=True)
    state = loop.start(config("", tmp_path, data=DataConfig("", 32, 1), epochs=1), grown.names, torch.device("cpu"))
    (said,) = checkpoint.load(trained / "run/checkpoint.pt", state)
    assert "1 identities are new" in said
    names = lambda numbers, faces: [faces.names[i] for i in numbers]
    held = saved["model"]["criterion.queue.identities"].tolist()
    assert names(state.model.criterion.queue.identities.tolist(), grown) == names(held, faces)
    assert names(state.sampler.recent, grown) == names(saved["sampler"]["recent"].tolist(), faces)
    done = go_on(trained, tmp_path, grown, epochs=3)
    assert len(done.history) == 3
    with pytest.raises(ValueError, match=r"data.root: 2 identities that .* was trained on are gone \(p2, p3\)"):
        checkpoint.load(trained / "run/checkpoint.pt", replace(state, names=["p0", "p1", "p4", "p5", "x", "y"]))


def test_learned_class_weights_belong_to_their_identities(faces, tmp_path):
    run = config(faces, tmp_path / "run", method="conventional", epochs=1)
    two = data.folder(faces).subset([0, 1])
    loop.train(run, two, None)
    with pytest.raises(ValueError, match=r"data.root: the identities are not those of .*checkpoint.pt"):
        loop.train(run, data.folder(faces).subset([1, 0]), None)


def test_held_out_identities_stay_so_when_the_data_set_grows(faces, tmp_path):
    run = config(faces, tmp_path / "run", epochs=1)
    train, test = loop.split(run)
    loop.train(run, train, test)
    for i in range(5):
        shutil.copytree(faces / "p0", faces / f"new{i}")
    again = loop.split(run)
    assert list(again[1].names) == list(test.names)
    assert set(again[0].names) == set(train.names) | {f"new{i}" for i in range(5)}
    assert set(loop.split(replace(run, out=str(tmp_path / "other")))[1].names) != set(test.names)


def test_any_flipped_bit_is_refused_or_harmless(trained, tmp_path):
    whole = (trained / "run/checkpoint.pt").read_bytes()
    expected = checkpoint.read(trained / "run/checkpoint.pt")["model"]
    path, refused = tmp_path / "checkpoint.pt", 0
    rng = random.Random(0)
    for place in [rng.randrange(len(whole)) for _ in range(40)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            found = checkpoint.read(path)["model"]
        except ValueError as error:
            refused += "damaged" in str(error)
        else:
            same(expected, found)
    assert refused > 20


def files_of_other_kinds(trained, folder):
    """name -> file that is not a checkpoint, and what is said of it."""
    whole = (trained / "run/checkpoint.pt").read_bytes()
    network = torch.nn.Linear(2, 2)
    (folder / "short.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("no checkpoint at all\n")
    torch.save(network, folder / "module.pt")
    torch.save(network, folder / "old_module.pt", _use_new_zipfile_serialization=False)
    shutil.copy(trained / "run/metrics.csv", folder / "metrics.csv")
    (folder / "probe.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch" + bytes(100))
    (folder / "probe.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    torch.save(network.state_dict(), folder / "plain.pt")
    torch.save({"a": 3}, folder / "other.pt")
    return {
        "short.pt": "is cut short or damaged", "empty.pt": "is empty", "text.pt": "is no file of PyTorch",
        "module.pt": "save the network's state_dict() instead", "old_module.pt": "save the network's state_dict() instead",
        "metrics.csv": "is no file of PyTorch", "probe.onnx": "is no file of PyTorch",
        "probe.safetensors": "is no whole .safetensors file", "plain.pt": "holds weights alone", "other.pt": "holds weights alone",
    }  # fmt: skip


def test_files_of_other_kinds_are_named_in_one_line(trained, tmp_path, capsys):
    for name, message in files_of_other_kinds(trained, tmp_path).items():
        capsys.readouterr()
        assert main(["eval", str(tmp_path / name), str(trained / "faces")]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"sst-fast eval: run: {tmp_path / name}")
        assert message in line
        if name.endswith(".safetensors"):
            continue
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        shutil.copy(tmp_path / name, out / "checkpoint.pt")
        assert main(["train", *options(trained / "faces", out)]) == 1
        (line,) = capsys.readouterr().err.splitlines()[:1]
        assert "checkpoint.pt" in line
        assert "is not the checkpoint of a run" in line or message in line


def test_only_what_may_differ_may_be_missing(trained, tmp_path):
    """Another queue size loads the queue apart; everything else must be there."""
    saved = torch.load(trained / "run/checkpoint.pt", weights_only=True)
    gone = next(name for name in saved["model"] if name.startswith("probe."))
    del saved["model"][gone]
    torch.save(saved, tmp_path / "checkpoint.pt")
    for size in (7, 5):
        settings = config("", tmp_path, data=DataConfig("", 32, 1), epochs=1, queue_size=size)
        state = loop.start(settings, saved["names"], torch.device("cpu"))
        with pytest.raises(ValueError, match=f"does not fit: it lacks {gone}"):
            checkpoint.load(tmp_path / "checkpoint.pt", state)


def test_a_full_disk_is_said_and_leaves_the_last_checkpoint(trained, tmp_path, capsys):
    shutil.copytree(trained / "run", tmp_path / "run")
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        # The limit of a file's size fails as a full disk does, with another error number.
        code = main(["train", *options(trained / "faces", tmp_path / "run", epochs=2)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be written: File too large (what was there before stays)" in told
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob(".checkpoint*"))


def test_one_folder_one_training(trained, tmp_path, capsys):
    """Another process is refused while one trains, and what killed ones left is removed."""
    out = tmp_path / "run"
    out.mkdir()
    for name in (".checkpoint.pt.999999999", ".best.pt.999999999"):
        (out / name).write_bytes(b"half")
    first = Command(["train", *options(trained / "faces", out, epochs=10000)], tmp_path / "first.txt")
    wait_for(out / "checkpoint.pt", first)
    assert main(["train", *options(trained / "faces", out)]) == 1
    assert f"out: process {first.process.pid} on" in capsys.readouterr().err
    assert not list(out.glob(".*.999999999"))
    first.send_signal(signal.SIGKILL)
    first.wait()
    with checkpoint.alone_in(out):  # a lock ends with its process
        pass


def test_a_second_signal_stops_at_once():
    """The first is noted, the second kills: in a process of its own, before any step could take notice."""
    pid = os.fork()
    if not pid:
        with loop.Requests(0):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGINT


def _save_on(rank, port, folder, received):
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    state = loop.start(config("", folder, shard=True, queue_size=8, batch=4), range(9), torch.device("cpu"), rank, 2)
    original, count = dist.distributed_c10d._tensor_to_object, []
    dist.distributed_c10d._tensor_to_object = lambda *a, **k: (count.append(1), original(*a, **k))[1]
    checkpoint.save(folder, state)
    received.put((rank, len(count)))
    dist.barrier()
    dist.destroy_process_group()


def test_shards_travel_to_the_rank_that_writes_alone(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = forkserver()
    received = context.Queue()
    processes = [context.Process(target=_save_on, args=(rank, port, tmp_path, received)) for rank in range(2)]
    for process in processes:
        process.start()
    assert dict(received.get(timeout=60) for _ in processes) == {0: 2, 1: 0}
    for process in processes:
        process.join()
    assert len(checkpoint.read(tmp_path / "checkpoint.pt")["ranks"]) == 2
