"""The units of a conversion, done by one process, by several, or by Ray: `qwen-merge data convert --engine ray`.

A unit is a piece of work that can be done anywhere and again: usually one source file that becomes some shards. What is
done for a unit is the same function under every engine, so the rows are the same too; an engine only decides where and
in which order. What travels is JSON: a unit goes out, a small result comes back; rows and pictures never pass through
the process that hands out the work. On a cluster the output has to lie on a file system that all nodes share.

A worker that is lost (killed, out of memory, its node gone) costs its unit's time and nothing else: the unit is done
again elsewhere. So `work` must be idempotent: it writes under names of its own and renames when complete.
"""

import functools
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

from qwen_merge.data.disk import told
from qwen_merge.errors import UserError

ENGINES = ("processes", "ray")
ATTEMPTS = 4  # of one unit; losing a worker each time is no accident, it needs more than the machine has
OBJECT_STORE = 100_000_000  # bytes for a local Ray: only JSON passes through it (Ray refuses less than 75 MB)
SOURCES = str(Path(__file__).resolve().parents[2])  # where this package is imported from

Work = Callable[[dict], dict]


def run_units(
    units: list[dict],
    work: Work,
    engine: str = "processes",
    workers: int = 1,
    on_done: Callable[[dict], None] = lambda result: None,
) -> None:
    """Do every unit once and hand each result to `on_done`, in this process, as it comes (any order).

    Args:
        units: JSON-able; what a unit is, only `work` knows.
        work: a function at a module's top (or a functools.partial of one), unit in, JSON-able result out, idempotent.
        engine: "processes" (one worker: in this very process; more: a spawned process each) or "ray" (a local Ray of
            `workers` CPUs, or the cluster of RAY_ADDRESS, of which at most `workers` CPUs are used).
        workers: units done at a time.
        on_done: called with a unit's result; when it raises, the run ends.

    Raises:
        UserError: as `work` raises it, and for its OSErrors (a full disk); an unknown engine; Ray is missing or cannot
            be reached; a unit's worker was lost every time it was tried.
        RuntimeError: `work` raised anything else in another process; the traceback is in the message.
    """
    if engine not in ENGINES:
        raise UserError(f"--engine {engine!r} is unknown; expected one of {', '.join(ENGINES)}.")
    if workers < 1:
        raise UserError(f"--workers {workers}: expected at least 1.")
    if not units:
        return
    if engine == "ray":
        _by_ray(units, work, workers, on_done)
    elif workers == 1:
        for unit in units:
            with told(_short(unit)):
                result = work(unit)
            on_done(result)
    else:
        _by_processes(units, work, min(workers, len(units)), on_done)


def _attempt(work: Work, unit: dict) -> str:
    """What became of a unit, as JSON. An exception travels as text: its class need not exist where it arrives."""
    try:
        with told(_short(unit)):
            return json.dumps({"result": work(unit)})
    except UserError as error:
        return json.dumps({"user_error": str(error)})
    except Exception:
        return json.dumps({"bug": traceback.format_exc()})


def _result(outcome: str) -> dict:
    content = json.loads(outcome)
    if "user_error" in content:
        raise UserError(content["user_error"])
    if "bug" in content:
        raise RuntimeError(f"a worker failed:\n{content['bug']}")
    return content["result"]


# Processes. Not concurrent.futures: there one killed worker breaks the whole pool and nobody learns which unit it had.


class _Worker:
    def __init__(self, work: Work):
        context = multiprocessing.get_context("spawn")  # a fork would copy Arrow's threads in whatever state they are
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        self.process.start()
        theirs.close()  # so that a dead worker reads as the end of the pipe
        self.unit: int | None = None

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


def _serve(connection: Connection, work: Work) -> None:
    """What a worker process runs: units in, outcomes out, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    threading.Thread(target=_die_with_parent, daemon=True).start()
    while True:
        try:
            connection.send(_attempt(work, connection.recv()))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


def _die_with_parent() -> None:
    """A killed command must not leave workers behind that write while its successor does the same units again."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _by_processes(units: list[dict], work: Work, count: int, on_done: Callable[[dict], None]) -> None:
    waiting = deque(range(len(units)))
    losses = dict.fromkeys(waiting, 0)
    workers: dict[Connection, _Worker] = {}
    try:
        while waiting or any(worker.unit is not None for worker in workers.values()):
            while len(workers) < count:
                worker = _Worker(work)
                workers[worker.connection] = worker
            for worker in workers.values():
                if worker.unit is None and waiting:
                    worker.unit = waiting.popleft()
                    # a worker that died idle shows as the end of its pipe below, and its unit goes to another
                    _try_to_send(worker.connection, units[worker.unit])
            for connection in multiprocessing.connection.wait(list(workers)):
                assert isinstance(connection, Connection)
                worker = workers[connection]
                try:
                    outcome = connection.recv()
                except (EOFError, ConnectionResetError):
                    del workers[connection]
                    worker.end()
                    if worker.unit is not None:
                        losses[worker.unit] += 1
                        _check_losses(units[worker.unit], losses[worker.unit], worker.process.exitcode)
                        waiting.appendleft(worker.unit)
                    continue
                worker.unit = None
                on_done(_result(outcome))
    finally:
        for worker in workers.values():
            worker.end()


def _try_to_send(connection: Connection, unit: dict) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):
        connection.send(unit)


def _check_losses(unit: dict, losses: int, exitcode: int | None) -> None:
    how = f"signal {-exitcode}" if exitcode is not None and exitcode < 0 else f"exit code {exitcode}"
    if losses >= ATTEMPTS:
        raise _lost_too_often(unit, how)
    logging.getLogger(__name__).warning("a worker was lost (%s); its unit is done again: %s", how, _short(unit))


def _lost_too_often(unit: dict | None, how: str) -> UserError:
    which = f" in the unit {_short(unit)}" if unit is not None else ""
    return UserError(
        f"a worker was lost {ATTEMPTS} times{which} (last: {how}). Signal 9 is usually the kernel's when memory is "
        "full: use fewer --workers or a machine with more memory, and go on with --resume."
    )


def _short(unit: dict) -> str:
    text = json.dumps(unit, ensure_ascii=False)
    return text if len(text) <= 300 else text[:300] + "…"


# Ray Data. Each unit is a row and a block of its own, so that a lost worker costs one unit.


def _by_ray(units: list[dict], work: Work, workers: int, on_done: Callable[[dict], None]) -> None:
    with _ray(workers) as ray:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        # What a task may give back, in bytes. Ray Data lets no more tasks run than the object store could hold such
        # answers of: at its default of 128 MB a small store means one task at a time, whatever the CPUs.
        context.target_max_block_size = 1 << 20
        rows = [{"unit": json.dumps([number, unit])} for number, unit in enumerate(units)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fewer units than workers, and of names that newer versions change
            results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
                functools.partial(_ray_row, work),
                num_cpus=1,
                compute=ray.data.TaskPoolStrategy(size=min(workers, len(units))),
                max_retries=ATTEMPTS - 1,  # Ray Data's own default is for ever
            )
        missing = set(range(len(units)))
        try:
            for row in results.iter_rows():
                number, outcome = json.loads(row["outcome"])
                result = _result(outcome)
                if number in missing:  # at least once is what Ray promises
                    missing.remove(number)
                    on_done(result)
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
            raise _lost_too_often(None, type(error).__name__) from error
        if missing:
            raise RuntimeError(f"Ray gave no result for {len(missing)} of {len(units)} units, such as {min(missing)}.")


def _ray_row(work: Work, row: dict) -> dict:
    number, unit = json.loads(row["unit"])
    return {"outcome": json.dumps([number, _attempt(work, unit)])}


@contextmanager
def _ray(workers: int) -> Iterator:
    """The `ray` module, connected; disconnected again unless it was before.

    Raises:
        UserError: Ray is not installed, or the cluster of RAY_ADDRESS does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read at import, and by the processes that Ray starts
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(
            f"--engine ray needs Ray, which is not installed ({error}). "
            "Install it with `pip install 'qwen-merge[ray]'`, or use --engine processes."
        ) from error
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if ray.is_initialized():  # by a caller, who knows better
        yield ray
        return
    # Workers must import this package, and whatever module `work` comes from.
    paths = [SOURCES, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    path = os.pathsep.join(dict.fromkeys(path for path in paths if path))
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            environment = {"env_vars": {"PYTHONPATH": path}}
            ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
        else:
            with _environment("PYTHONPATH", path):  # inherited: a runtime_env costs 10 s more to begin with
                ray.init(
                    address="local",
                    num_cpus=workers,
                    num_gpus=0,
                    object_store_memory=OBJECT_STORE,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _node_ip_address="127.0.0.1",  # asked for nothing outside this machine
                )
    except Exception as error:  # Ray raises a plain one when its own processes do not start in time
        where = f"the Ray cluster at RAY_ADDRESS={address}" if address else "a local Ray"
        mend = "Mend or unset RAY_ADDRESS, or use --engine processes." if address else "Use --engine processes."
        raise UserError(f"{where} cannot be used: {error}. {mend}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
