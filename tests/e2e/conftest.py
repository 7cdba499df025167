import pytest

from harness import Server


@pytest.fixture(scope="module")
def server():
    """One server for the tests of a file; it must be alive, idle and clean at the end."""
    with Server("--max-num-seqs", 32, "--state-memory", "64MiB") as running:
        yield running
        running.wait_idle()
        assert running.alive()
        assert running.stop() == 0, "\n".join(running.log[-20:])
