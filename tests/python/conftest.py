"""Fixtures shared by all Python tests."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from support.engines import Engines

_ENGINES = pytest.StashKey[Engines]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a real vLLM carry the mark `vllm`: `make check` leaves them out."""
    for item in items:
        if "engines" in getattr(item, "fixturenames", ()):
            item.add_marker("vllm")


@pytest.fixture(scope="session")
def engines(request: pytest.FixtureRequest) -> Iterator[Engines]:
    """Running vLLM servers, shared by configuration."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def say(line: str) -> None:
        with capture.global_and_fixture_disabled():
            print(line, flush=True)

    shared = Engines(say)
    request.config.stash[_ENGINES] = shared
    yield shared
    shared.close()
    assert not shared.wrongly_said


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows the ends of the server logs."""
    report = yield
    if report.failed and "engines" in getattr(item, "fixturenames", ()) and _ENGINES in item.config.stash:
        report.sections.append(("server logs", item.config.stash[_ENGINES].log_tails()))
    return report
