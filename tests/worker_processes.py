"""The worker processes of a command under way: found, watched, and killed with a unit in hand."""

import signal
import subprocess
import time
from collections.abc import Callable

import psutil
import pytest


def family(pid: int) -> list[psutil.Process]:
    """A process's descendants, the nearest first."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def until(condition: Callable[[], object], seconds: float, what: str, process: subprocess.Popen | None = None):
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if found := condition():
            return found
        if process is not None and process.poll() is not None:
            pytest.fail(f"it ended before {what}:\n{process.communicate()[0]}")
        time.sleep(0.02)
    return pytest.fail(f"{seconds} s and not yet {what}")


def at_work(process: subprocess.Popen, engine: str) -> list[psutil.Process]:
    """The workers that have a unit in hand; Ray writes a worker's task into its title."""
    found = []
    for member in family(process.pid):
        try:
            line = " ".join(member.cmdline())
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if line.startswith("ray::Map(") if engine == "ray" else "spawn_main" in line:
            found.append(member)
    return found


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill_one(process: subprocess.Popen, engine: str) -> None:
    """SIGKILL a worker that has a unit in hand. It is stopped first, so that it cannot finish the unit meanwhile."""

    def killed() -> bool:
        for worker in at_work(process, engine):
            worker.send_signal(signal.SIGSTOP)
            if worker in at_work(process, engine):
                worker.send_signal(signal.SIGKILL)
                return True
            worker.send_signal(signal.SIGCONT)
        return False

    until(killed, 60, "a worker was at work", process)
