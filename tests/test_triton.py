"""The Triton kernels, interpreted on the CPU, against the float64 reference; and compiled, though never run, for every GPU."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import problems
import pytest
import torch
from problems import answer, make, make_sub_centers
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import sst_fast
from sst_fast import AMSoftmax, ArcSoftmax, CircleLoss, CombinedMargin
from sst_fast.backends import triton as backend
from sst_fast.backends.backend import Problem
from sst_fast.backends.choose import BACKENDS
from sst_fast.functional import margin_softmax
from sst_fast.margins import FUSED, KINDS, Margin, MVSoftmax

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not backend.interpreted() or backend.compiled is None, reason="needs the interpreter and the extension"
)
if backend.interpreted():
    import interpreter  # noqa: F401

MARGINS = [
    *problems.MARGINS[:6], CombinedMargin(1.0, -0.2, 0.3, 0.0, "hold"), *problems.MARGINS[6:],
    AMSoftmax(torch.linspace(0.1, 0.5, 12)),
]  # fmt: skip


@pytest.fixture(params=["triton", "staged"])
def kernels(request):
    """The fused sweep, and the staged one."""
    return request.param


def both(kernels, problem, **options):
    """(loss, statistics, gradients) of the kernel, and of the reference in float64 on the same numbers."""
    results = []
    for name, p in ((kernels, problem), ("reference", problem.to(torch.float64))):
        x, w = p.embedding.detach().requires_grad_(), p.prototypes.detach()
        w.requires_grad_(options.get("prototypes", False))
        scale = (
            torch.as_tensor(options.get("scale", 30.0))
            .detach()
            .to(torch.promote_types(p.embedding.dtype, torch.float32))
        )
        scale.requires_grad_(options.get("trains_scale", False))
        positive = p.positive if p.positive is None else p.positive.detach().requires_grad_()
        rest = {name: value for name, value in options.items() if name not in ("prototypes", "trains_scale")}
        rest |= {"scale": scale, "sub_centers": p.sub_centers}
        loss, statistics = margin_softmax(x, w, p.target, reduction="none", backend=name, return_statistics=True,
                                          positive=positive, **p.options(), **rest)  # fmt: skip
        factors = torch.linspace(-1, 2, len(x), dtype=loss.dtype)
        leaves = [leaf for leaf in (x, w, positive, scale) if leaf is not None and leaf.requires_grad]
        results.append((loss.detach(), statistics, torch.autograd.grad(loss @ factors, leaves)))
    return results


def check(kernels, problem, tolerance=1e-5, **options):
    (loss, seen, gradients), (expected, known, exact) = both(kernels, problem, **options)
    assert gradients[0].dtype == problem.embedding.dtype
    assert (loss.double() - expected).abs().max() <= tolerance * max(1, expected.abs().max().item())
    for a, b in zip(gradients, exact, strict=True):
        assert (a.double() - b).norm() <= 3 * tolerance * max(b.norm().item(), 0.05)
    for name in ("target_cosine", "hardest_cosine"):
        assert torch.allclose(getattr(seen, name).double(), getattr(known, name).double(), atol=max(1e-5, tolerance))
    assert torch.allclose(seen.lse.double(), known.lse.double(), atol=1e-4 + 64 * tolerance)
    assert (seen.beats_target - known.beats_target).abs().max() <= (1 if tolerance < 1e-4 else 4)
    assert torch.equal(seen.hardest_slot < 0, known.hardest_slot < 0)


def test_every_margin_is_here():
    assert {margin.kind for margin in MARGINS} == set(FUSED) == set(range(len(KINDS)))


@pytest.mark.parametrize("margin", MARGINS, ids=repr)
def test_traits_are_the_margins_own(margin):
    from sst_fast.kernels import margins

    assert bool(margins.phi_is_identity.fn(margin.kind)) == (type(margin).phi is Margin.phi)
    assert bool(margins.needs_hard_mean.fn(margin.kind)) == margin.uses_hard_mean


@pytest.mark.parametrize("margin", MARGINS, ids=repr)
def test_every_margin(kernels, margin):
    check(kernels, make(12, 50, 24, identities=15, empty=0.2).to(torch.float32), margin=margin, scale=30.0)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "scale": 17.3}, {"prototypes": True}], ids=repr)
@pytest.mark.parametrize("margin", MARGINS, ids=repr)
def test_every_margin_in_float64(margin, options):
    """By the staged sweep: numbers reach it as exactly as tensors do."""
    problem = make(12, 50, 24, identities=15, empty=0.2)
    check("staged", problem, 1e-13, margin=margin, trains_scale=True, **options)


@pytest.mark.parametrize("margin", MARGINS[::3], ids=repr)
@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"gradient": "straight_through"}, {"scale": torch.linspace(1, 64, 12)}], ids=repr)  # fmt: skip
def test_options(kernels, margin, options):
    check(kernels, make(12, 50, 24, identities=15).to(torch.float32), margin=margin, **options)


@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 3), (1, 200, 16), (70, 33, 40), (33, 150, 128), (5, 40, 300)])
def test_sizes(kernels, n, k, d):
    check(kernels, make(n, k, d).to(torch.float32))


@pytest.mark.parametrize(("k", "start"), [(50, 0), (50, 45), (50, 30), (12, 5)])
@pytest.mark.parametrize("normalize", [False, True])
def test_window_wraps_round(kernels, k, start, normalize):
    problem = make(12, k, 20, start=start, identities=30, empty=0.2)
    if normalize:
        window = problem.window._replace(features=problem.window.features * 1.7)
        problem = replace(problem, prototypes=problem.prototypes * 0.6, window=window)
    check(kernels, problem.to(torch.float32), normalize_prototypes=normalize)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"normalize_prototypes": True}, {"gradient": "straight_through"}], ids=repr)  # fmt: skip
@pytest.mark.parametrize("margin", MARGINS[1::4], ids=repr)
def test_trainable_prototypes(kernels, margin, options):
    problem = make(12, 50, 24, identities=30, empty=0.1).to(torch.float32)
    check(kernels, problem, margin=margin, prototypes=True, scale=16.0, **options)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"normalize_prototypes": True}], ids=repr)
@pytest.mark.parametrize(("k", "start"), [(40, 37), (12, 5)])
def test_window_with_trainable_prototypes(kernels, k, start, options):
    problem = make(5, k, 20, start=start, identities=30, empty=0.1).to(torch.float32)
    problem = replace(problem, target=(problem.target + 3) % k)  # targets inside the window and outside
    check(kernels, problem, prototypes=True, scale=16.0, **options)
    w = problem.prototypes.clone().requires_grad_()
    margin_softmax(problem.embedding, w, problem.target, backend=kernels, **problem.options(), **options).backward()
    replaced = torch.zeros(k, dtype=torch.bool)
    replaced[problem.window.slots] = True
    assert not w.grad[replaced].any()
    assert w.grad[~replaced].any()


@pytest.mark.parametrize(
    "options", [{}, {"normalize_prototypes": True, "label_smoothing": 0.1}, {"prototypes": True}], ids=repr
)
@pytest.mark.parametrize("target", [None, "none", "some"])
@pytest.mark.parametrize("start", [None, 35])
def test_explicit_positive(kernels, start, target, options):
    problem = make(5, 40, 20, start=start, identities=30)
    left_out = {None: None, "none": torch.full_like(problem.target, -1), "some": problem.target.clone()}[target]
    if target == "some":
        left_out[::3] = -1
    positive = problem.embedding.roll(1, 1) + problem.embedding
    if "normalize_prototypes" not in options:
        positive = torch.nn.functional.normalize(positive)
    problem = replace(problem, target=left_out, positive=positive)
    check(kernels, problem.to(torch.float32), margin=ArcSoftmax(0.3), scale=16.0, **options)


@pytest.mark.parametrize("margin", MARGINS, ids=repr)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"start": 35}], ids=repr)
def test_trained_scale(kernels, margin, options):
    problem = make(12 if "start" not in options else 6, 50, 24, identities=15, start=options.get("start"))
    rest = {name: value for name, value in options.items() if name != "start"}
    check(kernels, problem.to(torch.float32), margin=margin, scale=torch.linspace(1, 40, 12), trains_scale=True, **rest)


@pytest.mark.parametrize("options", [{}, {"normalize_prototypes": True, "label_smoothing": 0.1}], ids=repr)
@pytest.mark.parametrize("margin", MARGINS[::4], ids=repr)
@pytest.mark.parametrize(("classes", "sub_centers", "dim"), [(30, 3, 24), (9, 16, 40), (41, 2, 300)])
def test_sub_centers(kernels, classes, sub_centers, dim, margin, options):
    problem = make_sub_centers(12, classes, sub_centers, dim)
    problem.slot_identity = torch.arange(classes) % 7 - 1
    problem.identity = problem.slot_identity[problem.target]
    check(kernels, problem.to(torch.float32), margin=margin, prototypes=True, scale=16.0, trains_scale=True, **options)


def test_sub_centers_that_tie_or_are_not_finite(kernels):
    """Equally near rows: the first is trained. A row that is not finite is not lost."""
    # Rows of 1/2, whose products are exact whatever their order.
    once = torch.stack([torch.eye(8).roll(k, 1)[:4].sum(0) / 2 for k in range(5)])
    problem = replace(make_sub_centers(5, 5, 1, 8).to(torch.float32), embedding=once.roll(1, 1), target=torch.arange(5))
    w = once.repeat_interleave(3, 0).requires_grad_()
    margin_softmax(problem.embedding, w, problem.target, sub_centers=3, scale=4.0, backend=kernels).backward()
    assert w.grad[::3].any(1).all()
    assert not w.grad.view(5, 3, 8)[:, 1:].any()
    bad = w.detach().clone()
    bad[7, 2] = torch.nan
    assert (
        margin_softmax(problem.embedding, bad, problem.target, sub_centers=3, reduction="none", backend=kernels)
        .isnan()
        .all()
    )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_results_are_those_of_the_cpu(kernels, reduction):
    """All that csrc/arguments.h lists: the gradient of each row's own loss in float32, weight and reduction in row_weight."""
    problem = make(6, 40, 20, start=35, identities=30).to(torch.float32, torch.float16)
    problem.target[2], problem.embedding[2] = -100, torch.nan
    call = replace(
        problem, weight=torch.linspace(0, 3, 12).half(), reduction=reduction, margin=ArcSoftmax(0.4), scale=16.0
    )
    *most, integers, numbers = call.packed()
    BACKENDS[kernels].load()
    integers[-2:] = [1, 1]  # need_scale_gradient, need_gradient
    found, expected = (torch.ops.sst_fast.margin_softmax(*most, integers, numbers, name) for name in (kernels, "cpu"))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        tolerance = 1e-3 if ours.is_floating_point() else 0
        if ours.shape == (12,):  # the ignored row sees nothing but ties
            ours, theirs = (t[torch.arange(12) != 2] for t in (ours, theirs))
        if ours.numel():
            assert (ours - theirs).abs().max() <= tolerance * max(1, theirs.abs().max())
    everything = [t.untyped_storage() for t in found]
    assert len({s.data_ptr() for s in everything}) == len(everything)  # nothing holds on to the scratch memory
    assert sum(s.nbytes() for s in everything) == sum(t.nbytes for t in found)


class Operations(TorchDispatchMode):
    """Names of all operations that are dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


def test_launches_of_a_step(monkeypatch):
    """Both directions of the loss, the gradient and the enqueue: three launches here, one each for the queue's operators."""
    launches, allocations, launch, carve = [], [], backend.launch, backend.carve

    def record(kernel, *rest, **constants):
        launches.append(kernel.fn.__name__)
        with _disable_current_modes():  # the interpreter's own
            launch(kernel, *rest, **constants)

    def allocate(*arrays):
        allocations.append(arrays)
        return carve(*arrays)

    monkeypatch.setattr(backend, "launch", record)
    monkeypatch.setattr(backend, "carve", allocate)
    criterion = sst_fast.SemiSiameseLoss(sst_fast.GalleryQueue(30, 16), backend="triton", keep="first")
    probes = [torch.randn(4, 16, requires_grad=True) for _ in range(2)]
    with Operations() as seen:
        criterion(*probes, torch.randn(4, 16), torch.randn(4, 16), torch.arange(4)).backward()
    queue = [name for name in seen.names if name in ("sst_fast::window", "sst_fast::enqueue")]
    assert launches == ["prepare_kernel", "sweep_kernel", "combine_kernel"]
    assert queue == ["sst_fast::window", "sst_fast::enqueue"]
    assert len(allocations) == 1

    p = make(4, 30, 16, start=3).to(torch.float32)
    *most, integers, numbers = replace(p, scale=16.0).packed()
    integers[-1] = 1
    with Operations() as seen:
        backend.margin_softmax(*most, integers, numbers)
    assert seen.names.count("empty") == 13 + 1  # the results, and one for all scratch memory
    assert set(seen.names) - {"view", "slice", "detach"} == {"empty", "sum"}


def test_the_device_of_the_tensors_is_the_one_that_is_launched_on(monkeypatch):
    """Triton launches on the current device."""
    current = []

    class On:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *_):
            current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **__: seen.append((grid, list(current)))

    seen = []
    monkeypatch.setattr(torch.cuda, "device", On)
    backend.launch(Kernel(), (3,), torch.device("cuda:1"))
    backend.launch(Kernel(), (4,), torch.device("cpu"))
    assert seen == [((3,), [torch.device("cuda:1")]), ((4,), [])]


def test_what_a_card_can_do(monkeypatch):
    def why_not(capability, **fields):
        monkeypatch.setattr(backend, "machine", lambda _: backend.Machine(capability, 100))
        return backend.Triton().why_not(Problem("margin_softmax", torch.device("cpu"))._replace(**fields))

    assert why_not((7, 5)) == "needs compute capability 8.0, this device has 7.5"
    eight_bits = {"queue_dtype": torch.float8_e4m3fn}
    assert why_not((8, 6), **eight_bits) == "float8 needs compute capability 8.9, this device has 8.6"
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)):
        assert why_not(capability) is None
        assert why_not(capability, queue_dtype=torch.bfloat16, trains_prototypes=True, window=True) is None
        assert why_not(capability, positive=True, window=True) is None
        assert capability < (8, 9) or why_not(capability, **eight_bits) is None


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this PyTorch has the older setting alone"
)
def test_precision_of_float32_products():
    """The newer setting is the one in force; once it is set, reading the older one raises."""
    try:
        for older, expected in (("high", "tf32"), ("highest", "ieee")):
            torch.set_float32_matmul_precision(older)
            assert backend.float32_precision() == expected
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert backend.float32_precision() == "tf32"
        with pytest.raises(RuntimeError, match="legacy"):
            torch.get_float32_matmul_precision()
        margin_softmax(torch.ones(1, 4), torch.ones(2, 4), torch.tensor([0]), backend="triton")
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("scale", [1.0, 64.0, 256.0])
@pytest.mark.parametrize("margin", [AMSoftmax(0.35), ArcSoftmax(0.5), CircleLoss()], ids=repr)
def test_extreme_cosines(kernels, margin, scale):
    eye = torch.eye(20, 24, dtype=torch.float64)
    problem = replace(
        make(1, 1, 24, masks=False), embedding=torch.cat([eye, -eye]), prototypes=torch.cat([eye, -eye, eye]),
        target=torch.arange(40),
    )  # fmt: skip
    loss = margin_softmax(problem.embedding.float(), problem.prototypes.float(), problem.target, margin=margin,
                          scale=scale, reduction="none", backend=kernels)  # fmt: skip
    assert torch.allclose(loss.double(), answer(problem, margin, scale)[0].loss, rtol=1e-5, atol=1e-5)


def test_targets_near_one(kernels):
    """Where an angular margin's slope magnifies the rounding of the target cosine."""
    problem = make(12, 50, 24)
    step = torch.logspace(-4, -1, 12, dtype=torch.float64)[:, None]
    near = problem.prototypes[problem.target] + step * problem.embedding
    check(kernels, replace(problem, embedding=near).to(torch.float32), margin=ArcSoftmax(0.5), scale=64.0)


@pytest.mark.parametrize("theta", [1e-6, 3e-5, 1e-3, math.pi - 1e-4])
def test_gradients_next_to_the_target(kernels, theta):
    """Each row's and each prototype's, where the slope of an angular margin goes as 1 / theta."""
    problem = make(3, 8, 48, masks=False)
    own, across = (normalize(t) for t in (problem.prototypes[problem.target], problem.embedding))
    across = normalize(across - (across * own).sum(1, keepdim=True) * own)
    problem = replace(problem, embedding=3 * (math.cos(theta) * own + math.sin(theta) * across)).to(torch.float32)
    found, exact = both(kernels, problem, margin=ArcSoftmax(0.5, beyond="cosine"), scale=8.0, prototypes=True,
                        normalize_prototypes=True)  # fmt: skip
    for a, b in zip(found[2], exact[2], strict=True):
        assert ((a.double() - b).norm(dim=1) <= 1e-5 * b.norm(dim=1)).all()


@pytest.mark.parametrize(
    ("dtypes", "tolerance"),
    [
        ((torch.float16,), 2e-3), ((torch.float32, torch.float16), 5e-3), ((torch.bfloat16,), 2e-2),
        ((torch.float32, torch.bfloat16), 2e-2), ((torch.float32, torch.float8_e4m3fn), 2e-2),
    ],
)  # fmt: skip
def test_half_precision(kernels, dtypes, tolerance):
    """The interpreter truncates to bfloat16 where a GPU rounds."""
    frozen = torch.float8_e4m3fn in dtypes
    check(kernels, make(6, 40, 24, start=30).to(*dtypes), tolerance, scale=16.0, normalize_prototypes=frozen)
    if not frozen:
        check(kernels, make(12, 40, 24).to(*dtypes), tolerance, scale=16.0, prototypes=True)


@pytest.mark.parametrize("factor", [3e-6, 1e-3])
def test_float16_prototypes_of_any_length(kernels, factor):
    """Their inverse norms exceed what float16 holds, and so would weights times these."""
    problem = make(12, 40, 24, identities=30)
    problem = replace(problem, prototypes=problem.prototypes * factor).to(torch.float32, torch.float16)
    (_, _, gradients), (_, _, exact) = both(kernels, problem, normalize_prototypes=True, scale=16.0)
    assert (gradients[0].double() - exact[0]).norm() <= 3e-3 * exact[0].norm()


def test_float16_weights_far_below_the_largest(kernels):
    """A slot's share of the gradient below 6e-8 counts, as long as the gradient itself can hold it."""
    eye = torch.eye(24, dtype=torch.float64)
    problem = replace(
        make(1, 1, 24, masks=False), embedding=eye[:2] + 0.1 * eye[2:4], prototypes=eye[:8], target=torch.arange(2)
    )
    problem = problem.to(torch.float32, torch.float16)
    found = []
    for name, p in ((kernels, problem), ("reference", problem.to(torch.float64))):
        w = p.prototypes.clone().requires_grad_()
        loss = margin_softmax(p.embedding, w, p.target, scale=12.0, reduction="none", backend=name)
        (loss.sum() * 1e4).backward()
        found.append(w.grad.double())
    assert (found[0] - found[1])[4:].norm() <= 0.01 * found[1][4:].norm()


def test_targets_that_are_no_slots_poison_their_own_rows(kernels):
    """A check would have to wait for the device."""
    problem = make(6, 40, 12, start=30).to(torch.float32)
    target = problem.target.clone()
    target[1], target[4] = 40, -3
    x = problem.embedding.clone().requires_grad_()
    loss = margin_softmax(x, problem.prototypes, target, reduction="none", backend=kernels, window=problem.window)
    loss.sum().backward()
    assert torch.isnan(loss).nonzero().flatten().tolist() == [1, 4]
    assert torch.isnan(x.grad).any(1).nonzero().flatten().tolist() == [1, 4]


def test_nothing_but_the_target_and_bad_rows(kernels):
    problem = make(6, 40, 12).to(torch.float32)
    x = problem.embedding.clone()
    x[2, 3] = torch.nan
    x[4] = 0
    x.requires_grad_()
    loss = margin_softmax(x, problem.prototypes, problem.target, reduction="none", backend=kernels)
    loss.sum().backward()
    assert torch.isnan(loss).tolist() == [i == 2 for i in range(6)]
    assert torch.isnan(x.grad).any(1).tolist() == [i == 2 for i in range(6)]
    empty = torch.full((40,), -1)
    alone = margin_softmax(x[:2], problem.prototypes, problem.target[:2], slot_identity=empty, backend=kernels)
    assert alone.item() == 0


@pytest.mark.parametrize("margin", [AMSoftmax(0.35), ArcSoftmax(0.5), MVSoftmax(0.5, 1.2, arc=True)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_that_is_not_finite_has_no_gradient_that_is(kernels, dtype, margin):
    """Its inverse norm is 0 like that of a row too short to have a direction, whose gradient is 0; there may be no negatives."""
    if kernels == "triton" and dtype == torch.float64:
        pytest.skip("has no float64")
    for scale, smoothing in ((30.0, 0.0), (1000.0, 0.0), (30.0, 0.1)):
        x = torch.tensor([[-math.inf, -0.4145, -0.5916]], dtype=dtype, requires_grad=True)
        w = normalize(torch.tensor([[-0.1755, -0.2551, -0.9509]], dtype=dtype))
        loss = margin_softmax(
            x, w, torch.tensor([0]), margin=margin, scale=scale, label_smoothing=smoothing, backend=kernels
        )
        loss.backward()
        assert loss.isnan()
        assert x.grad.isnan().any()


@pytest.mark.slow
def test_every_configuration_compiles():
    """In a process of its own, without the interpreter: fits shared memory, spills nothing, uses tensor cores.

    For one kind of GPU; ``python tests/compile_triton.py`` does all six, every night in the public CI.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_triton.py")
    done = subprocess.run([sys.executable, script, "90"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
