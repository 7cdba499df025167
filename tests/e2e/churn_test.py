"""Short streams by the thousand: memory, descriptors and threads stay flat, and nothing is lost.

GLA_CHURN_STREAMS sets how many (default 20,000; 100,000 is the release's figure)."""

import json
import os
import subprocess

from harness import BIN, SANITIZED, Server

STREAMS = int(os.environ.get("GLA_CHURN_STREAMS", 20000))


def load(server, streams):
    result = subprocess.run([str(BIN / "gla-load"), "--users", "16", "--requests", str(streams),
                             "--prompt-tokens", "2", "--new-tokens", "2", "--json", "--target",
                             server.target], capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_short_streams_leave_the_process_as_it_was():
    with Server() as server:
        load(server, STREAMS // 5)
        server.wait_idle()
        before = (server.rss_kib(), server.num_fds(), server.num_threads())
        done = load(server, STREAMS - STREAMS // 5)
        server.wait_idle()
        after = (server.rss_kib(), server.num_fds(), server.num_threads())
        print(f"{STREAMS} streams: RSS {before[0]} -> {after[0]} KiB, descriptors {before[1]} -> "
              f"{after[1]}, threads {before[2]} -> {after[2]}, "
              f"{done['requests_per_second']:.0f} streams/s")
        assert SANITIZED or after[0] - before[0] <= 2048, (before, after)
        assert after[1] <= before[1] + 2 and after[2] <= before[2] + 2, (before, after)
        assert server.metric("gla_requests_total", method="Generate", code="OK") == STREAMS
        assert server.metric("gla_generated_tokens_total") == 2 * STREAMS
        assert server.stop() == 0
