"""A uniform, seeded sample of at most N rows, in two passes and without holding rows: `--max-rows`.

Every row that its text makes eligible gets a number from its place and the seed (a hash), and the rows with the
smallest are taken. The first pass reads text only (parquet lets it skip the pictures), the second converts. The same
rows are drawn whatever the number of workers. A sampled row whose picture turns out broken is dropped, not replaced.
What was drawn lies in files; one that does not load when a set is resumed, after a power cut perhaps, is made again.

    qwen-merge data convert LLaVA_ReCap_CC12M --max-rows 2000000
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qwen_merge.data import conversations, rows
from qwen_merge.data.disk import told
from qwen_merge.data.journal import write_whole
from qwen_merge.data.progress import Progress
from qwen_merge.data.sets import SETS
from qwen_merge.data.units import run_units
from qwen_merge.data.workspace import Workspace

NOT_SAMPLED = "not in the sample"


def priority(seed: int, unit: int, row: int) -> int:
    """A row's place in the draw, 0 to 2**64 - 1; the smallest are taken."""
    text = f"{seed}:{unit}:{row}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def draw_unit(unit: dict) -> dict:
    """First pass: write the eligible rows of one unit and their priorities."""
    entry = SETS[unit["set"]]
    index = rows.load_index(unit["index"])
    drawn = []
    for number, row in rows.rows_of(unit, rows.TEXT_COLUMNS[entry.kind]):
        try:
            rows.messages_of(entry, row, index)
        except conversations.Dropped:
            continue
        drawn.append((priority(unit["seed"], unit["unit"], number), number))
    path = _drawn_path(Path(unit["folder"]), unit["unit"])
    path.parent.mkdir(exist_ok=True)
    _save(path, np.array(drawn, dtype=np.uint64).reshape(-1, 2))
    return {"drawn": unit["unit"], "eligible": len(drawn)}


def draw(
    plan: dict,
    units: int,
    maximum: int,
    space: Workspace,
    engine: str,
    workers: int,
    say: Callable[[str], None],
) -> None:
    """Find the priority up to which rows are taken, and note it in the journal. Memory: some 50 bytes a row taken."""
    lines = space.journal.read()
    if any("threshold" in line for line in lines) and all(
        _load(_chosen_path(space.folder, unit)) is not None for unit in range(units)
    ):
        return
    done = {
        line["drawn"]
        for line in lines
        if "drawn" in line and _load(_drawn_path(space.folder, line["drawn"]), line["eligible"]) is not None
    }
    progress = Progress(plan["set"], "looked through", units, len(done), say)

    def finished(result: dict) -> None:
        space.journal.append(result)
        progress.step(0)

    run_units(
        [{**plan, "unit": unit} for unit in range(units) if unit not in done], draw_unit, engine, workers, finished
    )
    best = np.zeros((0, 2), dtype=np.uint64)  # priority, unit * 2**32 + row: no two rows are equal
    for unit in range(units):
        drawn = np.load(_drawn_path(space.folder, unit))
        drawn[:, 1] += np.uint64(unit << 32)
        best = np.concatenate([best, drawn])
        if len(best) > 2 * maximum or unit == units - 1:
            best = best[np.lexsort((best[:, 1], best[:, 0]))[:maximum]]
    owners = best[:, 1] >> np.uint64(32)
    for unit in range(units):
        _save(_chosen_path(space.folder, unit), np.sort(best[owners == unit, 1] & np.uint64(2**32 - 1)))
    space.journal.append({"threshold": int(best[:, 0].max()) if len(best) else 0, "rows": len(best)})


def _drawn_path(folder: Path, unit: int) -> Path:
    return folder / "sample" / f"drawn-{unit:05d}.npy"


def _chosen_path(folder: Path, unit: int) -> Path:
    return folder / "sample" / f"chosen-{unit:05d}.npy"


def chosen(folder: Path, unit: int) -> set[int]:
    return set(np.load(_chosen_path(folder, unit)).tolist())


def _save(path: Path, array: np.ndarray) -> None:
    with told(path):
        write_whole(path, lambda file: np.save(file, array))


def _load(path: Path, rows: int | None = None) -> np.ndarray | None:
    """What `_save` wrote; None if the file is missing, torn, or has not that many rows."""
    try:
        array = np.load(path)
    except (OSError, EOFError, ValueError):
        return None
    return array if rows in (None, len(array)) else None
