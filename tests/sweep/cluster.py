"""A cluster of two workers in a process of its own, which tests may kill: prints its address and its workers' ids."""

from __future__ import annotations

import json
import sys

from distributed import LocalCluster

if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit="2GiB") as cluster:
        workers = [nanny.process.pid for nanny in cluster.workers.values()]  # type: ignore[union-attr]
        sys.stdout.write(json.dumps({"address": cluster.scheduler_address, "workers": workers}) + "\n")
        sys.stdout.flush()
        sys.stdin.read()  # until whoever started it is gone
