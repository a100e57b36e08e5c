"""Settings for all tests."""

import os
import signal

# The suite runs in one process a core: more threads would only wait for each other. Before torch and NumPy are loaded,
# whose libraries read it once; processes that tests start inherit it.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

# A suite that is started in the background of a shell ignores Ctrl-C, and so would all that tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

#: Files whose tests share what takes long to make: each is given to one process as a whole, before all others.
TOGETHER = (
    "tests/benchmarks/test_clusters.py",
    "tests/test_conformance.py",
    "tests/test_docs.py",
    "tests/test_example.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Spread single tests over the processes, and some files as a whole.

    The marks by which pytest-xdist groups tests do nothing with versions of pytest in which a test's name is fixed.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", maxsplit=1)[0]
            return file if file in TOGETHER else nodeid

    return Scheduling(config, log)
