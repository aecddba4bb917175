"""`<output>/dataset_info.json`: what LLaMA-Factory, `data check` and `data show` know a folder of sets by.

    qwen-merge data convert geo3k --output elsewhere       adds geo3k to elsewhere/dataset_info.json

The repository's `data/dataset_info.json` names every set already. In any other folder a set is added when it is
complete; what else the file holds stays as it is, line for line, an entry of that name too, for it may have been
changed on purpose. The file is tracked: a set of one's own shows as the lines of its entry.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qwen_merge.data.disk import told
from qwen_merge.data.journal import write_whole
from qwen_merge.data.schema import ASSISTANT, USER
from qwen_merge.errors import UserError

NAME = "dataset_info.json"


def entry_of(file_name: str) -> dict:
    """The entry of a set in the record format."""
    return {
        "file_name": file_name,
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": USER, "assistant_tag": ASSISTANT},
    }


def read(output: Path) -> dict:
    """The sets that are named in a folder; none if it has no such file.

    Raises:
        UserError: the file is no JSON object. Asked before the work too, so that nobody learns it after hours.
    """
    path = Path(output) / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds {type(content).__name__}, not an object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); expected a JSON object with an entry for each set. It is left as it is: "
            "mend it, or move it away and give the command again."
        ) from None
    return content


def enlist(output: Path, name: str, file_name: str) -> None:
    """Add a set that is complete, unless an entry has its name or it has no row (LLaMA-Factory loads no empty folder).

    Raises:
        UserError: the file is there and broken, or cannot be written.
    """
    output = Path(output)
    if not any((output / file_name).glob("*.parquet")):
        return
    path = (output / NAME).resolve()  # a link stays one
    with told(path), _alone(output):
        known = read(output)
        if name not in known:
            text = with_entry(path.read_bytes().decode() if known else "{}", name, entry_of(file_name))
            write_whole(path, lambda file: file.write(text.encode()))


def with_entry(text: str, name: str, entry: dict) -> str:
    """The text of a JSON object with one entry more at its end, a line for each of the entry's keys."""
    before = text.rstrip().removesuffix("}").rstrip()
    lines = ",\n".join(f"    {_json(key)}: {_json(value)}" for key, value in entry.items())
    return f"{before}{'' if before == '{' else ','}\n  {_json(name)}: {{\n{lines}\n  }}\n}}\n"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two commands that finish two sets at once may not lose each other's entries."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
