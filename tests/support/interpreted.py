"""Kernels of Triton on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def run_interpreted(code: str) -> None:
    """Run a program with Triton's interpreter in a process of its own; skip the test where Triton is not installed."""
    pytest.importorskip("triton", reason="needs triton, which comes with torch for GPUs")
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)
