"""Options and fixtures of the benchmarks; what a run says about the machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from bench import timing


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sst-fast")
    group.addoption("--size", choices=("smoke", "default", "full"), default="default", help="how much is measured")
    group.addoption("--seconds", type=float, default=3.0, help="for each problem, all its contenders together")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--no-memory", action="store_true", help="leave peak memory out")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = getattr(metafunc.module, "cases", None)
    if cases is not None and "case" in metafunc.fixturenames:
        config = metafunc.config
        found = cases(config.getoption("--size"), torch.device(config.getoption("--device")))
        metafunc.parametrize("case", found, ids=str)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    device = torch.device(config.getoption("--device"))
    machine_info.clear()
    machine_info |= timing.about(device) | {"bytes per second": timing.bandwidth(device)}


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, object]) -> None:
    for name in ("project", "branch"):
        commit_info.pop(name, None)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def seconds(pytestconfig: pytest.Config) -> float:
    """For each problem; none in the smoke form, where the least number of rounds is enough."""
    return 0.0 if pytestconfig.getoption("--size") == "smoke" else float(pytestconfig.getoption("--seconds"))


@pytest.fixture
def memory(pytestconfig: pytest.Config) -> bool:
    """Whether peak memory is taken."""
    return pytestconfig.getoption("--size") != "smoke" and not pytestconfig.getoption("--no-memory")


@pytest.fixture
def replay(benchmark: object) -> Callable[..., None]:
    """Hands durations measured elsewhere, and what else is known, to pytest-benchmark."""

    def record(durations: Sequence[float], group: str, **info: object) -> None:
        timing.REPLAY.load(durations)
        benchmark.group = group  # type: ignore[attr-defined]
        benchmark.extra_info.update(info)  # type: ignore[attr-defined]
        benchmark.pedantic(lambda: None, rounds=len(durations))  # type: ignore[attr-defined]

    return record
