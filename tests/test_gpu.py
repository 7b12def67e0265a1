"""What only a GPU can show: CUDA queue and compiled Triton kernels against the references, no waiting, graph capture."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from problems import MARGINS, make

from sst_fast import AMSoftmax, GalleryQueue, SemiSiamese, SemiSiameseLoss, Window, backends, check
from sst_fast.backends import choose as decisions
from sst_fast.functional import margin_softmax

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TINY = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def decide_anew():
    """No decision of an earlier test stays."""
    yield
    decisions.forget()


@contextmanager
def no_waiting():
    """RuntimeError if anything waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu(problem):
    """The same problem on the device."""
    moved = {name: value.cuda() for name, value in vars(problem).items() if isinstance(value, torch.Tensor)}
    window = problem.window and Window(*(value if value is None else value.cuda() for value in problem.window))
    return replace(problem, **moved, window=window)


def loss_of(problem, backend, **options):
    x = problem.embedding.detach().requires_grad_()
    w = problem.prototypes.detach()
    loss = margin_softmax(x, w, problem.target, reduction="none", backend=backend, **problem.options(), **options)
    factors = torch.linspace(-1, 2, len(x), dtype=loss.dtype, device=loss.device)
    return loss.detach(), torch.autograd.grad(loss @ factors, x)[0]


def agree(problem, tolerance, backend="triton", **options):
    """The kernel on the GPU with the float64 reference on the CPU."""
    loss, gradient = (t.cpu().double() for t in loss_of(on_gpu(problem), backend, **options))
    expected, exact = loss_of(problem.to(torch.float64), "reference", **options)
    assert (loss - expected).abs().max() <= tolerance * max(1, expected.abs().max().item())
    assert (gradient - exact).norm() <= 3 * tolerance * max(exact.norm().item(), 0.05)


@pytest.mark.parametrize(
    ("dtypes", "tolerance"),
    [
        ((torch.float32,), 1e-4),
        ((torch.float16,), 5e-3),
        ((torch.bfloat16,), 2e-2),
        ((torch.float32, torch.float8_e4m3fn), 2e-2),
    ],
    ids=str,
)
@pytest.mark.parametrize(("n", "k", "dim"), [(12, 300, 24), (200, 5000, 512), (130, 1000, 1100)])
def test_staged_sweep_equals_the_reference(dtypes, tolerance, n, k, dim):
    problem = make(n, k, dim, start=k - 10, identities=2 * k, empty=0.1).to(*dtypes)
    for options in ({}, {"label_smoothing": 0.1}, {"normalize_prototypes": True}):
        agree(problem, tolerance, "staged", scale=16.0, **options)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
@pytest.mark.parametrize("dim", [3, 64, 512])
def test_queue_equals_the_reference_and_never_waits(dtype, dim):
    queues = [GalleryQueue(50, dim, dtype, device="cuda", backend=backend) for backend in ("cuda", "reference")]
    number = 0
    for count in (7, 50, 13, 1, 49, 20):
        batch, ids = torch.randn(count, dim, device="cuda"), torch.arange(number, number + count, device="cuda")
        number += count
        with no_waiting():
            queues[0].enqueue(batch, ids)
            queues[0].window(batch, ids)
            queues[0].contains(ids)
            queues[0].age()
        queues[1].enqueue(batch, ids)
        gone = [queue.dequeue(5) for queue in queues]
        assert torch.equal(*gone)
        assert torch.equal(*(queue.identities for queue in queues))
        assert torch.equal(*(queue.state[:2] for queue in queues))
        a, b = (queue.features.float() for queue in queues)
        assert (a - b).abs().max() <= torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
@pytest.mark.parametrize("dim", [3, 64, 512])
def test_window_equals_the_reference(dtype, dim):
    queues = [GalleryQueue(50, dim, dtype, device="cuda", backend=backend) for backend in ("cuda", "reference")]
    for queue in queues:
        queue.enqueue(torch.ones(45, dim, device="cuda"), torch.arange(45, device="cuda"))
    for groups, count, batch_dtype in ((1, 1, torch.float32), (2, 13, torch.bfloat16), (3, 50, torch.float64)):
        batch = 3 * torch.randn(groups, count, dim, device="cuda").to(batch_dtype)
        batch[0, 0] = 0
        found, expected = (queue.window(batch, torch.arange(count, device="cuda")) for queue in queues)
        assert (found.features.float() - expected.features.float()).abs().max() <= torch.finfo(dtype).eps
        assert torch.equal(found.start, expected.start)
        assert torch.equal(found.slots, expected.slots)


def test_queue_small_rows_of_every_batch_dtype():
    for dtype in DTYPES:
        queue = GalleryQueue(9, 40, device="cuda")
        batch = torch.randn(4, 40, device="cuda").to(dtype)
        queue.enqueue(batch, torch.arange(4, device="cuda"))
        assert torch.allclose(queue.features[:4], F.normalize(batch.float()), atol=1e-6)


def test_queue_moves_on_in_a_replayed_graph():
    queue = GalleryQueue(10, 16, device="cuda")
    batch, ids = torch.randn(4, 16, device="cuda"), torch.arange(4, device="cuda")
    queue.enqueue(batch, ids)  # loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        queue.enqueue(batch, ids)
    queue.clear()
    for step in range(4):
        ids.copy_(torch.arange(4 * step, 4 * step + 4, device="cuda"))
        graph.replay()
    assert queue.state[:2].tolist() == [6, 10]
    assert queue.identities.tolist() == [10, 11, 12, 13, 14, 15, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("margin", "dim"),
    [(MARGINS[1], 512), (MARGINS[2], 512)]
    + [pytest.param(margin, dim, marks=pytest.mark.slow) for margin in MARGINS for dim in (64, 512)],
    ids=repr,
)
def test_every_margin(margin, dim):
    torch.set_float32_matmul_precision("highest")
    agree(make(33, 700, dim, start=600, identities=90, empty=0.1).to(torch.float32), 1e-5, margin=margin, scale=30.0)


@pytest.mark.parametrize("dim", [512, *(pytest.param(d, marks=pytest.mark.slow) for d in (48, 128, 256, 1024))])
@pytest.mark.parametrize(
    ("n", "k"), [(130, 77), *(pytest.param(n, k, marks=pytest.mark.slow) for n, k in [(1, 1), (1, 5000), (64, 4096)])]
)
def test_sizes_and_half_precision(n, k, dim):
    torch.set_float32_matmul_precision("highest")
    problem = make(n, k, dim, identities=2 * k)
    agree(problem.to(torch.float32), 1e-5)
    agree(problem.to(torch.bfloat16), 2e-2, scale=16.0)
    agree(problem.to(torch.float16), 5e-3, scale=16.0)
    agree(problem.to(torch.float32, torch.bfloat16), 2e-2, scale=16.0)
    if torch.cuda.get_device_capability() >= (8, 9):
        agree(problem.to(torch.float32, torch.float8_e4m3fn), 4e-2, scale=16.0, normalize_prototypes=True)


@pytest.mark.parametrize("scale", [1.0, 64.0, 256.0])  # no constants of the kernel: compiled once
def test_scales(scale):
    torch.set_float32_matmul_precision("highest")
    agree(make(40, 3000, 512, start=2990).to(torch.float32), 2e-5, scale=scale)


HOPPER = backends(queue_dtype=torch.bfloat16)["margin_softmax"].implementations["hopper"]
needs_hopper = pytest.mark.skipif(HOPPER != "available", reason=HOPPER)


@needs_hopper
@pytest.mark.parametrize("margin", MARGINS, ids=repr)
def test_hopper_small(margin):
    problem = make(33, 300, 128, start=290, identities=150, empty=0.1)
    agree(problem.to(torch.bfloat16), 2e-2, "hopper", margin=margin, scale=16.0)
    agree(problem.to(torch.float16), 5e-3, "hopper", margin=margin, scale=16.0)


@needs_hopper
@pytest.mark.parametrize("dim", [128, 256, 512])
@pytest.mark.parametrize(
    ("n", "k", "start"), [(1, 1, None), (130, 77, None), (64, 4096, 4080), (256, 5000, 0), (512, 20000, 19900)]
)
def test_hopper_sizes(n, k, start, dim):
    problem = make(n, k, dim, start=start, identities=2 * k)
    agree(problem.to(torch.bfloat16), 2e-2, "hopper", scale=16.0)
    agree(problem.to(torch.bfloat16), 6e-2, "hopper", scale=64.0)
    agree(problem.to(torch.float16), 5e-3, "hopper", scale=16.0)
    agree(problem.to(torch.float32, torch.float8_e4m3fn), 5e-3, "hopper", scale=16.0)
    if dim > 128:
        found = loss_of(on_gpu(problem.to(torch.float32, TINY)), "hopper", scale=16.0, product_dtype=TINY)
        expected = loss_of(problem.to(torch.float32, TINY).to(torch.float64), "reference", scale=16.0)
        for a, b in zip(found, expected, strict=True):
            assert (a.cpu().double() - b).norm() <= 16.0 * 0.1 / dim**0.5 * max(b.norm().item(), 0.05)


@pytest.mark.parametrize("backend", ["staged", "triton", pytest.param("hopper", marks=needs_hopper)])
def test_loss_neither_waits_nor_varies_and_can_be_captured(backend, monkeypatch):
    monkeypatch.setenv("SST_FAST_BACKEND", f"margin_softmax={backend}")
    decisions.forget()  # the environment is read when the first decision is made
    problem = on_gpu(make(64, 4096, 512, start=4000, identities=300).to(torch.bfloat16))
    first = loss_of(problem, backend)
    with no_waiting():
        again = loss_of(problem, backend)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    x = problem.embedding.detach().requires_grad_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            margin_softmax(x, problem.prototypes, problem.target, **problem.options()).backward()
            x.grad = None
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = margin_softmax(x, problem.prototypes, problem.target, **problem.options())
        loss.backward()
    for seed in range(2):
        other = make(64, 4096, 512, start=4000, identities=300, seed=seed).to(torch.bfloat16).embedding.cuda()
        with torch.no_grad():
            x.copy_(other)
        graph.replay()
        leaf = other.clone().requires_grad_()
        expected = margin_softmax(leaf, problem.prototypes, problem.target, **problem.options())
        expected.backward()
        assert torch.equal(loss, expected)
        assert torch.equal(x.grad, leaf.grad)


def test_no_logits_are_kept():
    x = torch.randn(1024, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = F.normalize(torch.randn(131072, 512, device="cuda")).bfloat16()
    y = torch.arange(1024, device="cuda")
    margin_softmax(x, w, y).backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    margin_softmax(x, w, y).backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20  # the logits alone would take 512 MiB in float32


def test_trainable_prototypes():
    torch.set_float32_matmul_precision("highest")
    problem = make(50, 900, 128).to(torch.float32)
    results = []
    for p, backend in ((on_gpu(problem), "triton"), (problem.to(torch.float64), "reference")):
        w = (1.5 * p.prototypes).requires_grad_()
        margin_softmax(p.embedding, w, p.target, backend=backend, normalize_prototypes=True).backward()
        results.append(w.grad.cpu().double())
    assert (results[0] - results[1]).norm() <= 3e-5 * results[1].norm()


@pytest.mark.parametrize("start", [None, 890])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_prototypes_and_a_window(start, dtype):
    torch.set_float32_matmul_precision("highest")
    example = replace(make(25, 900, 512, start=start, identities=700), normalize_prototypes=True).to(dtype)
    row = check.compare(example, "triton", torch.device("cuda"), trains=True)
    assert row.verdict == "right", row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_explicit_positives(dtype):
    problem = make(33, 700, 512, identities=300)
    problem = replace(problem, positive=F.normalize(problem.embedding.roll(1, 1) + problem.embedding), scale=16.0)
    row = check.compare(problem.to(dtype), "triton", torch.device("cuda"))
    assert row.verdict == "right", row


@pytest.mark.parametrize("setting", ["older", "newer"])
def test_tf32_by_either_setting(setting):
    matmul = torch.backends.cuda.matmul
    if setting == "newer" and not hasattr(matmul, "fp32_precision"):
        pytest.skip("this PyTorch has the older setting alone")
    problem = make(33, 700, 512, start=690).to(torch.float32)
    before = matmul.fp32_precision if setting == "newer" else torch.get_float32_matmul_precision()
    try:
        if setting == "newer":
            matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        agree(problem, 5e-3, scale=16.0)
    finally:
        if setting == "newer":
            matmul.fp32_precision = before
        else:
            torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["triton", pytest.param("hopper", marks=needs_hopper)])
def test_kernels_run_where_the_tensors_are(backend):
    example = make(33, 700, 512, start=690).to(torch.bfloat16)
    row = check.compare(example, backend, torch.device("cuda:1"))  # cuda:0 is the current device
    assert row.verdict == "right", row
    assert check.check_queue("cuda", torch.device("cuda:1"), torch.float32).verdict == "right"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_of_training_under_autocast(dtype, compiled):
    torch.manual_seed(0)
    criterion = SemiSiameseLoss(GalleryQueue(64, 32, torch.bfloat16), AMSoftmax(0.35))
    model = SemiSiamese(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 32)), criterion, 0.9).cuda()
    run = torch.compile(model, fullgraph=True) if compiled else model
    optimizer = torch.optim.SGD(model.probe.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    losses = []
    everyone = torch.randn(4, 8, 3, 4, 4, device="cuda")
    for step in range(60):
        ids, images = torch.arange(8, device="cuda") + 8 * (step % 4), everyone[step % 4]
        with torch.autocast("cuda", dtype):
            loss = run(images + torch.randn_like(images), images + torch.randn_like(images), ids)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model.update_gallery()
        losses.append(loss.item())
    assert all(map(torch.isfinite, torch.tensor(losses)))
    assert sum(losses[-8:]) < sum(losses[8:16])
