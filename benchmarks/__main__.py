"""Run every benchmark of this machine: `python -m benchmarks [NAME ...]`."""

from __future__ import annotations

import subprocess
import sys

ALL = ("session_speed", "cpu_decode", "app_latency", "attention_long", "attention_view", "map_frames")

if __name__ == "__main__":
    for name in sys.argv[1:] or ALL:
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
