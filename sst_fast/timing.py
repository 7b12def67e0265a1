"""How time is taken, and the limit that it is compared with: the library's own matrix products."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Call = Callable[[], object]
_CYCLES = 2.5e9  # a second has no more of a GPU's cycles
_LONGEST = 0.02  # seconds that a device is kept waiting for the host


def race(
    contenders: Mapping[str, Sequence[Call]],
    device: torch.device,
    seconds: float,
    least: int = 5,
    most: int = 200,
    warm_up: int = 2,
) -> dict[str, list[float]]:
    """Seconds of every call; contenders take turns, each round in another order, for about so long or ``most`` rounds.

    Each contender is a list of calls on different copies of the inputs, used in rotation, so that on a GPU nothing is found in
    the cache. On CUDA the time is that between two events in the stream, elsewhere the clock's. The first ``warm_up`` rounds do not count.

    On an idle GPU two events measure how fast the host starts kernels. So the device is first given a sleep in which the host
    can start all of them: what is measured is the device's time. A call that itself waits for the device cannot hide that.
    """
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    host = dict.fromkeys(names, 0.0)  # seconds until a call returns
    cuda = device.type == "cuda"
    collecting = gc.isenabled()
    gc.disable()
    try:
        begin, number = time.perf_counter(), 0
        while number < least + warm_up or (number < most + warm_up and time.perf_counter() - begin < seconds):
            turn = number % len(names)
            measured = []
            for name in names[turn:] + names[:turn]:
                call = contenders[name][number % len(contenders[name])]
                if cuda:
                    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                    if number >= 2:
                        torch.cuda._sleep(int(_CYCLES * min(1.5 * host[name] + 2e-5, _LONGEST)))
                    events[0].record()
                start = time.perf_counter()
                call()
                taken = time.perf_counter() - start
                if cuda:
                    events[1].record()
                    measured.append((name, events))
                    host[name] = taken if number < 2 else min(host[name], taken)
                else:
                    times[name].append(taken)
            if cuda:
                torch.cuda.synchronize(device)
                for name, (first, last) in measured:
                    times[name].append(first.elapsed_time(last) / 1e3)
            number += 1
            if number == warm_up:
                begin = time.perf_counter()
    finally:
        if collecting:
            gc.enable()
    return {name: values[warm_up:] for name, values in times.items()}


def copies(tensors: Sequence[Tensor]) -> int:
    """So many copies of the inputs exceed twice the GPU's second-level cache; 1 on the CPU."""
    if tensors[0].device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(tensors[0].device).L2_cache_size
    size = sum(t.numel() * t.element_size() for t in tensors)
    return max(1, -(-2 * cache // size))


def bare_products(x: Tensor, w: Tensor, count: int) -> Call:
    """The library's own products of ``x`` [N, D] and ``w`` [K, D], outputs allocated once: as many as a loss needs that keeps
    no logits: 1 for its value, 2 with the gradient for x, 4 with that for w. A float8 ``w`` counts as float16."""
    if w.dtype == torch.float8_e4m3fn:
        w = w.to(torch.float16)
    x = x.to(w.dtype)
    cosines = x @ w.T
    x_out, w_out = torch.empty_like(x), torch.empty_like(w)

    def run() -> None:
        torch.mm(x, w.T, out=cosines)
        if count > 1:
            torch.mm(cosines, w, out=x_out)
        if count > 2:
            torch.mm(x, w.T, out=cosines)
            torch.mm(cosines.T, x, out=w_out)

    return run
