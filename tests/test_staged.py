"""The staged sweep in Triton's interpreter: what it has beyond the fused one, whose tests (tests/test_triton.py) it passes too."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from problems import make, make_sub_centers
from test_triton import both, check
from torch.nn.functional import normalize

from sst_fast import AMSoftmax, ArcSoftmax, CircleLoss, MVSoftmax, NPCFace
from sst_fast.backends import model, staged, triton, tuned
from sst_fast.backends.backend import Problem
from sst_fast.backends.choose import BACKENDS
from sst_fast.functional import margin_softmax

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not triton.interpreted() or triton.compiled is None, reason="needs the interpreter and the extension"
)
DTYPES = [
    ((torch.float64,), 1e-12), ((torch.float32, torch.float64), 1e-6), ((torch.float32,), 1e-5), ((torch.float16,), 2e-3), ((torch.bfloat16,), 2e-2),
    ((torch.float32, torch.float8_e4m3fn), 2e-2),
]  # fmt: skip


@pytest.fixture
def short_chunks(monkeypatch):
    """One tile of slots at a time."""
    monkeypatch.setattr(staged, "WEIGHTS", 1)


@contextmanager
def tf32():
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels, in the order of their launches."""
    names, launch = [], staged.launch

    def record(kernel, *rest, **constants):
        names.append(kernel.fn.__name__.removesuffix("_kernel"))
        launch(kernel, *rest, **constants)

    monkeypatch.setattr(staged, "launch", record)
    monkeypatch.setattr(triton, "launch", record)
    return names


@pytest.mark.parametrize(("dtypes", "tolerance"), DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"normalize_prototypes": True}], ids=repr)
def test_many_chunks(short_chunks, dtypes, tolerance, options):
    """Of the queue and of the window."""
    if "normalize_prototypes" in options and torch.float8_e4m3fn not in dtypes:
        check(
            "staged", make(12, 300, 24, identities=200).to(*dtypes), tolerance, scale=16.0, prototypes=True, **options
        )
    n = 40 if torch.float64 in dtypes else 150  # whose tiles are smaller
    problem = make(n, 300, 24, start=270, identities=200, empty=0.2)
    check("staged", problem.to(*dtypes), tolerance, scale=16.0, **options)


@pytest.mark.parametrize(("dtypes", "tolerance"), [DTYPES[0], *DTYPES[2:5]], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"normalize_prototypes": True}, {"gradient": "straight_through"},
                {"normalize_prototypes": True, "label_smoothing": 0.1}], ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("start", [None, 290])
@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_weights_that_are_kept_and_that_are_not(monkeypatch, short_chunks, dtypes, tolerance, options, start, budget):
    """Some targets lie in the window, others outside, some are nearly parallel to their probes."""
    monkeypatch.setattr(staged, "KEPT", budget)
    problem = make(6 if start else 12, 300, 24, identities=200, empty=0.1, start=start)
    problem = replace(problem, target=(problem.target + 3) % 300)
    problem.embedding[:4] = problem.prototypes[problem.target[:4]] + 1e-2 * problem.embedding[:4]
    check("staged", problem.to(*dtypes), tolerance, margin=ArcSoftmax(0.3), scale=16.0, prototypes=True, **options)


@pytest.mark.parametrize("start", [None, 45])
@pytest.mark.parametrize("margin", [MVSoftmax(), ArcSoftmax(0.5)], ids=repr)
def test_kept_weights_of_rows_that_need_a_shift_of_their_own(launches, margin, start):
    """Their weights relative to the common shift would all be 0, or infinite."""
    problem = make(6 if start else 12, 50, 24, identities=30, start=start)
    w = normalize(problem.prototypes + 5 * normalize(torch.ones(1, 24, dtype=torch.float64)))
    x = problem.embedding.clone()
    x[::2] -= 100
    below = replace(problem, prototypes=w, embedding=x)
    above = replace(problem, prototypes=problem.prototypes * 8)
    for p in (below, above):
        for scale in (60.0, torch.linspace(50, 90, 12)):
            check("staged", p.to(torch.float32), 1e-4, margin=margin, scale=scale, prototypes=True, trains_scale=True)
    assert launches.count("keep") == launches.count("again") == 4


def test_kept_weights_are_not_made_again(launches, monkeypatch):
    """The products of a training step: one fewer where weights are kept. A second backward finds them as they were."""
    products, product = [], staged._product
    monkeypatch.setattr(staged, "_product", lambda *parts, **options: (products.append(1), product(*parts, **options)))
    problem = make(12, 50, 24).to(torch.float32)
    w = (2 * problem.prototypes).requires_grad_()
    x = problem.embedding.clone().requires_grad_()
    gradients = []
    with tf32():
        for budget in (0, 1 << 20):
            monkeypatch.setattr(staged, "KEPT", budget)
            launches.clear(), products.clear()
            loss = margin_softmax(x, w, problem.target, backend="staged", normalize_prototypes=True)
            for _ in range(2):
                gradients.append(torch.autograd.grad(loss, w, retain_graph=True)[0])
            assert launches.count("weigh") == (3 if budget == 0 else 1)
            assert len(products) == 3
    assert torch.equal(gradients[2], gradients[3])
    assert torch.allclose(gradients[0], gradients[2], atol=1e-5)


def test_what_is_kept_lives_as_long_as_the_graph(monkeypatch):
    """And only where somebody will want it."""

    def kept(x, w, budget=1 << 20):
        monkeypatch.setattr(staged, "KEPT", budget)
        loss = margin_softmax(x, w, problem.target, backend="staged")
        return [t for t in (getattr(loss.grad_fn, "_saved_kept", None),) if t is not None]

    problem = make(12, 50, 24).to(torch.float32)
    sizes, memory = [], staged.Staging.kept_memory
    monkeypatch.setattr(staged.Staging, "kept_memory", lambda p: (sizes.append(memory(p).shape), memory(p))[1])
    trained, frozen = problem.prototypes.clone().requires_grad_(), problem.prototypes
    x = problem.embedding.clone().requires_grad_()
    kept(x, trained), kept(x, frozen), kept(problem.embedding, trained), kept(x, trained, budget=12 * 639)
    with torch.no_grad():
        kept(x, trained)
    assert [tuple(size) for size in sizes] == [(12, 640), (0, 0), (0, 0), (0, 0), (0, 0)]


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), (torch.float64, torch.bfloat16)], ids=str)
def test_what_is_kept_has_the_shape_that_a_graph_was_promised(dtypes):
    """Schema and shapes of the operator; gradients traced and not. Padding of what is kept holds anything, so values are not compared."""
    BACKENDS["staged"].load()
    problem = make(4, 130, 16).to(*dtypes)
    leaves = [tensor.requires_grad_() for tensor in (problem.embedding, problem.prototypes)]
    torch.library.opcheck(
        torch.ops.sst_fast.margin_softmax, (*problem.packed(keep_weights=True), "staged"),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip

    def loss(x, w):
        return margin_softmax(x, w, problem.target, backend="staged")

    traced = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    found = [torch.autograd.grad(f(*leaves), leaves) for f in (loss, traced)]
    assert all(torch.equal(*pair) and pair[0].any() for pair in zip(*found, strict=True))


@pytest.mark.parametrize("zero", ["weight", "incoming"])
def test_a_row_that_counts_for_nothing_may_hold_anything(zero):
    """Its weights are kept, and are not a number."""
    problem = make(12, 50, 24).to(torch.float32)
    problem.embedding[3] = torch.nan
    x, w = problem.embedding.clone().requires_grad_(), problem.prototypes.clone().requires_grad_()
    factors = torch.ones(12)
    factors[3] = 0
    weight = factors if zero == "weight" else None
    loss = margin_softmax(x, w, problem.target, backend="staged", weight=weight, reduction="none")
    loss[3:4].detach().zero_()
    loss.backward(factors)
    assert w.grad.isfinite().all()
    assert w.grad.any()


@pytest.mark.parametrize("budget", [0, 1 << 20])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"normalize_prototypes": True}, {"trains_scale": True}], ids=repr
)
@pytest.mark.parametrize(("dtypes", "tolerance"), [DTYPES[0], *DTYPES[2:5]], ids=str)
def test_sub_centers_of_many_chunks(monkeypatch, short_chunks, dtypes, tolerance, options, budget):
    """Rows of a class stay in one tile; kept weights have a column for each row, as those that are made again."""
    monkeypatch.setattr(staged, "KEPT", budget)
    problem = make_sub_centers(20, 70, 3, 24)
    problem.slot_identity = torch.arange(70) % 30 - 1
    problem.identity = problem.slot_identity[problem.target]
    problem.embedding[:4] = problem.prototypes[3 * problem.target[:4] + 1] + 1e-2 * problem.embedding[:4]
    check("staged", problem.to(*dtypes), tolerance, margin=ArcSoftmax(0.3), scale=16.0, prototypes=True, **options)


def test_sub_centers_that_need_a_shift_of_their_own(launches):
    """Every cosine near -0.97: the second sweep chooses the same rows as the first."""
    problem = make_sub_centers(12, 20, 3, 24)
    w = normalize(problem.prototypes + 5 * normalize(torch.ones(1, 24, dtype=torch.float64)))
    below = replace(problem, prototypes=w, embedding=problem.embedding - 100)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        check("staged", below.to(dtype), tolerance, margin=ArcSoftmax(0.5), scale=60.0, prototypes=True)
    assert launches.count("again") == 2


@pytest.mark.parametrize("margin", [MVSoftmax(), NPCFace()], ids=repr)
def test_statistics_of_many_chunks(short_chunks, margin):
    check("staged", make(12, 600, 24, identities=500, empty=0.1).to(torch.float32), margin=margin, scale=30.0)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=repr)
def test_statistics_of_many_tiles(options):
    """More than are added up at a time: the hardest negatives are among the first of them, the last, and between."""
    problem = make(5, 34 * staged.TILE, 16, identities=3000, empty=0.1)
    hardest = torch.tensor([7, 34 * staged.TILE - 1, 33 * staged.TILE + 5, 2000, 32 * staged.TILE])
    problem.prototypes[hardest] = normalize(problem.embedding)
    problem.slot_identity[hardest] = 5000
    check("staged", problem.to(torch.float32), margin=NPCFace(), scale=30.0, **options)
    _, seen, _ = both("staged", problem.to(torch.float32), **options)[0]
    assert torch.equal(seen.hardest_slot, hardest)


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize(("n", "k", "d"), [(3, 40, 1100), (130, 140, 33)])
def test_any_number_of_features(precision, n, k, d):
    """Product 1 of float32 is the library's, or with tf32 made here."""
    try:
        torch.set_float32_matmul_precision(precision)
        check("staged", make(n, k, d).to(torch.float32), scale=16.0, prototypes=True, normalize_prototypes=True)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("far", [range(12), range(0, 12, 5)], ids=len)
@pytest.mark.parametrize("d", [24, 300])  # more columns than one program takes
def test_rows_that_need_a_shift_of_their_own(launches, dtype, far, d):
    """Every cosine near -0.97 where the scale leaves the common shift no room, and logits far above what cosines allow.

    A large scale magnifies the rounding of bfloat16: what is asked for is the exactness of the fused sweep.
    """
    problem = make(12, 50, d, identities=30)
    w = normalize(problem.prototypes + 5 * normalize(torch.ones(1, d, dtype=torch.float64)))
    x = problem.embedding.clone()
    x[list(far)] -= 100
    below = replace(problem, prototypes=w, embedding=x).to(dtype)
    above = replace(problem, prototypes=problem.prototypes * 8).to(dtype)
    for p, scale in ((below, 120.0), (above, 100.0)):
        errors = []
        for kernels in ("triton", "staged"):
            found, exact = both(kernels, p, scale=scale)
            errors.append(
                [
                    ((a - b).norm() / b.norm()).item()
                    for a, b in zip((found[0], *found[2]), (exact[0], *exact[2]), strict=True)
                ]
            )
        for fused, ours in zip(*errors, strict=True):
            assert ours <= 3 * fused + 1e-6
    assert launches.count("again") == 2


def test_which_shift(launches):
    """The common one where it does; each row's own needs one sweep more."""
    problem = make(12, 50, 24)

    def sweeps(dtype=torch.float32, **options):
        launches.clear()
        p = problem.to(torch.float32, dtype)
        x = p.embedding.clone().requires_grad_()
        margin_softmax(x, p.prototypes, p.target, backend="staged", **options)
        return launches.count("weigh")

    assert sweeps(scale=64.0) == sweeps(scale=120.0, dtype=torch.bfloat16) == 1
    assert sweeps(margin=CircleLoss(), scale=64.0) == sweeps(margin=MVSoftmax(), scale=32.0) == 1
    assert sweeps(scale=200.0) == sweeps(margin=CircleLoss(), scale=256.0) == 2
    assert sweeps(dtype=torch.float16, scale=16.0) == sweeps(label_smoothing=0.1) == 2


def test_launches(launches):
    """Without a gradient there is one sweep, which writes no weights."""
    problem = make(12, 50, 24).to(torch.float32)
    with torch.no_grad():
        margin_softmax(problem.embedding, problem.prototypes, problem.target, scale=200.0, backend="staged")
    assert launches == ["prepare", "weigh", "gather", "combine"]
    launches.clear()
    x = problem.embedding.clone().requires_grad_()
    w = problem.prototypes.clone().requires_grad_()
    margin_softmax(x, w, problem.target, backend="staged").backward()
    assert launches == ["prepare", "weigh", "again", "combine", "keep", "prepare"]


@pytest.mark.parametrize("kernels", ["triton", "staged"])
@pytest.mark.parametrize("options", [{}, {"normalize_prototypes": True}, {"label_smoothing": 0.1}], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_empty_slots_may_hold_anything(kernels, options, dtype, garbage):
    """Of the queue, of the window, and with trained prototypes: a weight of 0 times NaN is NaN."""
    for start in (None, 45):
        problem = make(6, 50, 24, start=start, identities=60, empty=0.2)
        clean = problem.prototypes.clone()
        taken = torch.zeros(50, dtype=torch.bool)
        taken[problem.target] = True
        problem.slot_identity[[7, 21]] = -1
        empty = (problem.slot_identity < 0) & ~taken
        clean[empty] = garbage
        problem = replace(problem, prototypes=clean)
        if start is not None:  # of the batch, row 2 is nobody's negative; its own probes are ignored
            window = problem.window
            features, ids = window.features.clone(), window.identities.clone()
            features[:, 2], ids[2] = garbage, -1
            target = problem.target.clone()
            target[[2, 8]] = -100
            problem = replace(problem, target=target, window=window._replace(features=features, identities=ids))
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        p = problem.to(torch.float32, dtype)
        x, w = p.embedding.clone().requires_grad_(), p.prototypes.clone().requires_grad_()
        found = torch.autograd.grad(
            margin_softmax(x, w, p.target, backend=kernels, scale=16.0, **p.options(), **options), (x, w)
        )
        q = problem.to(torch.float32, dtype).to(torch.float64)
        q.prototypes[~q.prototypes.isfinite()] = 0
        if q.window is not None:
            q.window.features[~q.window.features.isfinite()] = 0
        x, w = q.embedding.clone().requires_grad_(), q.prototypes.clone().requires_grad_()
        exact = torch.autograd.grad(
            margin_softmax(x, w, q.target, backend="reference", scale=16.0, **q.options(), **options), (x, w)
        )
        for a, b in zip(found, exact, strict=True):
            assert (a.double() - b).norm() <= 3 * tolerance * b.norm()


def test_memory_does_not_grow_with_the_queue(monkeypatch):
    sizes, carve = [], staged.carve

    def measure(device, *arrays):
        found = carve(device, *arrays)
        sizes.append(sum(array.nbytes for array in found))
        return found

    monkeypatch.setattr(staged, "carve", measure)
    monkeypatch.setattr(staged, "WEIGHTS", 12 * 256 * 4)
    for k in (300, 3000):
        problem = make(12, k, 24).to(torch.float32)
        x = problem.embedding.clone().requires_grad_()
        margin_softmax(x, problem.prototypes, problem.target, backend="staged").backward()
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("kernels", ["triton", "staged"])
def test_a_stored_tile_is_the_one_that_runs(kernels, monkeypatch, tmp_path):
    """For calls like the one it was measured for; its neighbours are candidates."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    problem = Problem("margin_softmax", torch.device("cpu"), torch.float32, torch.bfloat16, 24, probes=16, slots=64)
    around = BACKENDS[kernels].tiles(problem)
    assert len(set(around)) == len(around) >= 4
    cuts, launch = [], triton.launch

    def record(kernel, *rest, **constants):
        if kernel.fn.__name__ in ("sweep_kernel", "weigh_kernel"):
            cuts.append(tuple(constants[name] for name in ("BLOCK_N", "BLOCK_K", "num_warps", "num_stages")))
        launch(kernel, *rest, **constants)

    for module in (staged, triton):
        monkeypatch.setattr(module, "launch", record)
    mine = make(12, 50, 24).to(torch.float32, torch.bfloat16)
    tile = around[-1]
    try:
        for stored in (False, True):
            if stored:
                tuned.store(problem, kernels, {}, tile)
            check(kernels, mine, 2e-2)
            check(kernels, make(12, 80, 24).to(torch.float32, torch.bfloat16), 2e-2)
            check(kernels, mine, 2e-2, label_smoothing=0.1)
        tuned.try_tile(kernels, around[0])
        check(kernels, mine, 2e-2)
    finally:
        tuned.forget()
    assert [at for at, cut in enumerate(cuts) if cut == tile] == [len(cuts) // 2]
    assert cuts[-1] == around[0]


def test_what_it_takes():
    why_not = staged.Staged().why_not
    problem = Problem("margin_softmax", torch.device("cpu"))
    assert why_not(problem) is None
    assert why_not(problem._replace(dim=1 << 16, queue_dtype=torch.float8_e4m3fn)) is None
    assert why_not(problem._replace(dtype=torch.float64, sub_centers=True, trains_prototypes=True)) is None
    assert why_not(problem._replace(dim=1 << 17)) == "for up to 65536 features"
    assert why_not(problem._replace(operation="window")) == "not written: the queue is C++ and CUDA C++"


def test_same_bits_every_time(short_chunks):
    problem = make(150, 300, 24, start=200, identities=200).to(torch.float32, torch.bfloat16)
    first, second = (both("staged", problem)[0] for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[2][0], second[2][0])


def test_margins_that_follow_the_row():
    check("staged", make(12, 50, 24).to(torch.float32), margin=AMSoftmax(torch.linspace(0.1, 0.5, 12)))


def test_the_predicted_time_chooses(monkeypatch):
    """Few probes are the fused sweep's, as long as it has a tile for them."""
    for module in (staged, triton):
        monkeypatch.setattr(module, "machine", lambda _: triton.Machine((9, 0), 132))
    problem = Problem("margin_softmax", torch.device("cuda"), queue_dtype=torch.bfloat16)

    def volunteers(**fields):
        return staged.Staged().volunteers(problem._replace(**fields))

    assert volunteers(probes=1024)
    assert volunteers(probes=4096, slots=1 << 20)
    assert not volunteers(probes=16)
    assert volunteers(probes=16, dim=2048)
    assert not staged.Staged().volunteers(problem._replace(device=torch.device("cpu")))


def test_predicted_times_grow_with_the_problem():
    for time in (model.fused_time, model.staged_time):
        problem = Problem("margin_softmax", torch.device("cuda"), queue_dtype=torch.bfloat16)
        for architecture in model.RATES:
            base = time(problem, architecture, 100)
            assert 0 < base < time(problem._replace(slots=1 << 20), architecture, 100)
            assert base < time(problem._replace(probes=8192), architecture, 100)
    assert model.fused_time(problem._replace(dim=2048), 90, 100) == float("inf")
    assert "bfloat16, 4,096, 1,048,576, 512" in model.table()
