"""Python in other processes, with the rounding and the instruction set that the environment asks for."""

import os
import socket
import subprocess
import sys
from pathlib import Path

__all__ = ["start", "start_two"]

TESTS = Path(__file__).resolve().parent


def start(code: str, **environment: str) -> subprocess.Popen[str]:
    """Start Python with one thread; conftest.py is imported first, for its environment variables."""
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    command = [sys.executable, "-c", f"import conftest\n{code}"]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def start_two(code: str) -> list[subprocess.Popen[str]]:
    """Start two processes that work together, as torchrun and accelerate launch start them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [start(code, RANK=rank, LOCAL_RANK=rank, **job) for rank in "01"]
