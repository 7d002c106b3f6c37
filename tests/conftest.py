"""
What the tests share. Libraries are imported where they are needed: pytest-xdist's first process, which only hands the
tests out, does not wait for them.
"""

import gc
import signal
from collections import Counter
from collections.abc import Iterator

import pytest


NUM_SHOWN_FAILURES = 3

# A shell starts what is in the background with SIGINT ignored, and so would be all processes that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """What is imported stays. The garbage collector would look through all of it again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture
def pipe():
    """A tiny pipeline of two stages."""
    from helpers import tiny_pipeline

    return tiny_pipeline()


@pytest.fixture
def no_grad():
    """Switches gradients off."""
    import torch

    with torch.no_grad():
        yield


@pytest.fixture
def fresh_compiler():
    """No graphs from other tests, and none for them. One graph more than a model may have is an error."""
    import torch

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch.compiler.reset()


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """`datasets` keeps what it has read of a folder; each module has a place of its own for that."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Shows one failure of each of the first tests that failed, and counts the others; `-vv` shows all."""
    if terminalreporter.verbosity >= 2:
        return (yield)
    stats = terminalreporter.stats
    failures = {kind: stats[kind] for kind in ("failed", "error") if kind in stats}
    counts = Counter(name_of(report) for reports in failures.values() for report in reports)
    for kind, reports in failures.items():
        first_ones = {name_of(report): report for report in reversed(reports)}  # one of each
        stats[kind] = [report for report in reports if report in first_ones.values()][:NUM_SHOWN_FAILURES]
        for report in stats[kind]:
            report.sections = [(title, "\n".join(text.splitlines()[-10:])) for title, text in report.sections]
            counts[name_of(report)] -= 1
    result = yield
    stats.update(failures)
    for name, count in (+counts).most_common(20):
        terminalreporter.write_line(f"FAILED {name}: {count} more")
    return result


def name_of(report: pytest.TestReport) -> str:
    """The test without its parameters."""
    return report.nodeid.partition("[")[0]
