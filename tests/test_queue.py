"""The gallery queue on every backend: state, rows that are not finite, bad input. test_fuzz.py sets it beside a plain list."""

import pytest
import torch
import torch.nn.functional as F

from sst_fast import GalleryQueue
from sst_fast.backends.choose import backends
from sst_fast.functional import margin_softmax

BACKENDS = [name for name, state in backends("cpu")["enqueue"].implementations.items() if state == "available"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
QUEUE_DTYPES = [*DTYPES, torch.float8_e4m3fn]


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_queue_at_once_and_zero_rows(backend):
    queue = GalleryQueue(5, 3, backend=backend)
    queue.enqueue(torch.ones(2, 3), torch.arange(2))
    queue.enqueue(torch.cat([torch.zeros(1, 3), torch.ones(4, 3)]), torch.arange(10, 15))
    assert len(queue) == 5
    assert queue.identities.tolist() == [13, 14, 10, 11, 12]
    assert torch.equal(queue.features[2], torch.zeros(3))


def test_contains_and_clear():
    queue = GalleryQueue(4, 2)
    queue.enqueue(torch.ones(2, 2), torch.tensor([7, 9]))
    assert queue.contains(torch.tensor([7, 8, -1])).tolist() == [True, False, False]
    queue.clear()
    assert len(queue) == 0
    assert not queue.contains(torch.tensor([7])).any()


def test_state_dict_round_trip():
    queue = GalleryQueue(7, 4, torch.bfloat16)
    for _ in range(3):
        queue.enqueue(torch.randn(3, 4), torch.arange(3))
    copy = GalleryQueue(7, 4, torch.bfloat16)
    copy.load_state_dict(queue.state_dict())
    batch, ids = torch.randn(3, 4), torch.arange(3)
    for one in (queue, copy):
        one.enqueue(batch, ids)
    assert all(torch.equal(a, b) for a, b in zip(queue.buffers(), copy.buffers(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("position", "fill"), [(99, 5), (-1, 0), (0, 8), (3, -2)])
def test_a_state_outside_the_queue_is_refused(backend, position, fill):
    """As a damaged checkpoint leaves it: slots follow from it, so nothing may be read or written by it."""
    queue = GalleryQueue(7, 4, backend=backend)
    state = {**queue.state_dict(), "state": torch.tensor([position, fill, 0, 0])}
    queue.load_state_dict(state)
    found = rf"position in \[0, 7\) and a fill in \[0, 7\], got {position} and {fill}"
    for call in (
        lambda: queue.dequeue(2),
        lambda: queue.enqueue(torch.ones(2, 4), torch.arange(2)),
        lambda: queue.window(torch.ones(2, 4), torch.arange(2)),
    ):
        with pytest.raises(ValueError, match=found):
            call()
    assert all(torch.equal(buffer, state[name]) for name, buffer in queue.named_buffers())


@pytest.mark.parametrize("dtype", QUEUE_DTYPES)
@pytest.mark.parametrize("source", [torch.float32, torch.float8_e4m3fn])
def test_the_newest_of_another_queue(dtype, source):
    old, new = GalleryQueue(6, 4, source), GalleryQueue(3, 4, dtype)
    old.enqueue(torch.randn(5, 4), torch.arange(5))
    assert new.load_newest(old.state_dict()) == (3, 5)
    assert new.identities.tolist() == [2, 3, 4]
    assert torch.equal(new.features.float(), old.features.float()[2:5].to(dtype).float())


def test_loads_a_state_from_before_rejected_rows_were_counted():
    queue, old = GalleryQueue(7, 4), GalleryQueue(7, 4)
    old.enqueue(torch.randn(3, 4), torch.arange(3))
    before = {**old.state_dict(), "state": old.state[:3].clone()}
    torch.nn.Sequential(queue).load_state_dict({f"0.{name}": value for name, value in before.items()})
    assert all(torch.equal(a, b) for a, b in zip(queue.buffers(), old.buffers(), strict=True))
    assert before["state"].shape == (3,)


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("dtype", QUEUE_DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_is_not_finite_is_nobodys_negative(backend, dtype, unit):
    queue = GalleryQueue(6, 4, dtype, backend=backend)
    rows = F.normalize(torch.randn(4, 4))
    rows[1, 2], rows[2, 3] = torch.nan, torch.inf
    queue.enqueue(rows, torch.arange(4), unit=unit)
    assert queue.identities.tolist() == [0, -1, -1, 3, -1, -1]
    assert (len(queue), queue.rejected) == (4, 2)
    assert torch.equal(queue.features[1:3].float(), torch.zeros(2, 4))
    assert torch.allclose(queue.features.float()[[0, 3]], rows[[0, 3]], atol=0.07)
    queue.enqueue(rows[:2], torch.arange(2))
    assert queue.rejected == 3
    queue.clear()
    assert (len(queue), queue.rejected) == (0, 3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_row_that_is_not_finite_spoils_its_own_probes_only(backend, dtype, bad):
    """Its probes' loss is NaN, so that a gradient scaler skips the step; all others' is as if the slot were empty."""
    queue = GalleryQueue(20, 8, dtype, backend=backend)
    queue.enqueue(torch.randn(20, 8), torch.arange(20))
    good = torch.randn(2, 4, 8)
    features, identities = good.clone(), torch.arange(20, 24)
    features[1, 2, 5] = bad
    window = queue.window(features, identities)
    assert window.identities.tolist() == [20, 21, -1, 23]
    probes = torch.randn(8, 8).requires_grad_()
    losses = []
    for seen in (window, queue.window(good, identities)._replace(identities=window.identities)):
        loss = margin_softmax(
            probes, queue.features, window.slots.repeat(2), window=seen, identity=identities.repeat(2),
            slot_identity=queue.identities, reduction="none", backend=backend,
        )  # fmt: skip
        rows = torch.arange(8) != 6
        losses.append((loss, *torch.autograd.grad(loss[rows].sum(), probes)))
    (spoilt, gradient), (whole, expected) = losses
    assert spoilt.isnan().tolist() == (~rows).tolist()
    assert torch.allclose(spoilt[rows], whole[rows])
    assert torch.allclose(gradient[rows], expected[rows], atol=1e-6)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension is not built")
def test_opcheck():
    queue = GalleryQueue(7, 4)
    buffers = (queue.features, queue.identities, queue.state)
    torch.library.opcheck(torch.ops.sst_fast.enqueue, (torch.randn(3, 4), torch.arange(3), *buffers))
    torch.library.opcheck(torch.ops.sst_fast.dequeue, (2, *buffers[1:]))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend):
    eager, compiled = (GalleryQueue(7, 4, backend=backend) for _ in range(2))
    step = torch.compile(lambda x, ids: compiled.enqueue(x * 2, ids), fullgraph=True)
    for _ in range(3):
        batch, ids = torch.randn(3, 4), torch.arange(3)
        eager.enqueue(batch * 2, ids)
        step(batch, ids)
    assert all(torch.allclose(a, b) for a, b in zip(eager.buffers(), compiled.buffers(), strict=True))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q: q.enqueue(torch.ones(8, 4), torch.arange(8)), ValueError, "batch of 8 does not fit into a queue of 7 slots"),
        (lambda q: q.enqueue(torch.ones(2, 5), torch.arange(2)), ValueError, r"features must have shape \[any, 4\], got \[2, 5\]"),
        (lambda q: q.enqueue(torch.ones(2, 4), torch.arange(3)), ValueError, r"identities must have shape \[2\], got \[3\]"),
        (lambda q: q.enqueue(torch.ones(2, 4), torch.tensor([1, -1])), ValueError, "identities must be >= 0 .*got -1"),
        (lambda q: q.enqueue(torch.ones(2, 4).int(), torch.arange(2)), TypeError, "features must be .*got int32"),
        (lambda q: q.window(torch.ones(4), torch.arange(2)), ValueError, r"features must have shape \[H, B, D\]"),
        (lambda q: q.dequeue(8), ValueError, r"count must be in \[0, 7\], got 8"),
        (lambda q: GalleryQueue(0, 4), ValueError, "size must be an integer >= 1, got 0"),
        (lambda q: GalleryQueue(4, 4, torch.int8), TypeError, "dtype must be"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(GalleryQueue(7, 4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        (2, IndexError, r"group must be an integer in \[0, 2\), got 2"),
        (-1, IndexError, r"group must be an integer in \[0, 2\), got -1"),
        (torch.tensor(5), IndexError, r"group must be in \[0, 2\), got 5"),
        (torch.tensor(-1), IndexError, r"group must be in \[0, 2\), got -1"),
        (torch.tensor([], dtype=torch.int64), ValueError, r"group must have shape \[\], got \[0\]"),
        (torch.tensor(1.0), TypeError, "group must be int64, got float32"),
        (torch.tensor(1, device="meta"), ValueError, "group must be on cpu .*, got meta"),
    ],
)
def test_a_group_that_the_window_has_not_is_refused(backend, group, error, message):
    """By the queue, and by the operator, which C++ programs call."""
    queue = GalleryQueue(7, 4, backend=backend)
    window = queue.window(torch.ones(2, 3, 4), torch.arange(3))
    with pytest.raises(error, match=message):
        queue.enqueue_window(window, group)
    if backend == "cpu" and isinstance(group, torch.Tensor) and group.device.type == "cpu":
        buffers = (queue.features, queue.identities, queue.state)
        with pytest.raises((IndexError, TypeError), match="enqueue: group must be"):
            torch.ops.sst_fast.enqueue(window.features, window.identities, *buffers, True, group)
    with pytest.raises(ValueError, match=r"features must have shape \[any, 4\], got \[3, 5\]"):
        queue.enqueue_window(GalleryQueue(7, 5).window(torch.ones(2, 3, 5), torch.arange(3)))
    assert len(queue) == 0


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension is not built")
def test_native_operators_serve_cpp_programs():
    """Registered in C++, found by schema through the dispatcher, as a C++ program finds them."""
    features, ids = torch.randn(3, 4), torch.arange(3)
    queue, held, state = torch.zeros(5, 4), torch.full((5,), -1), torch.zeros(4, dtype=torch.int64)
    torch.ops.sst_fast.enqueue(features, ids, queue, held, state)
    assert held.tolist() == [0, 1, 2, -1, -1]
    assert torch.allclose(queue[:3], F.normalize(features))
    assert torch.ops.sst_fast.dequeue(2, held, state).tolist() == [0, 1]
    schema = str(torch.ops.sst_fast.enqueue.default._schema)
    assert "Tensor(a!) queue, Tensor(b!) queue_identities, Tensor(c!) state" in schema
