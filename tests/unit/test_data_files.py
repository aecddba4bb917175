"""The files of a set: shards, manifest, journal, and what a killed run leaves.

.venv/bin/python -m pytest tests/unit/test_data_files.py
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen_merge.data import dataset_info
from qwen_merge.data import shards as shards_module
from qwen_merge.data.counts import Counts
from qwen_merge.data.journal import Journal
from qwen_merge.data.manifest import Manifest, manifest_path, option_changes, require_writable, write_json
from qwen_merge.data.schema import SCHEMA, Record, table
from qwen_merge.data.shards import ShardInfo, ShardWriter
from qwen_merge.data.units import run_units
from qwen_merge.data.workspace import State, Workspace
from qwen_merge.errors import UserError


def record(number: int, size: int = 400) -> Record:
    turns = [{"role": "user", "content": f"<image>\nq{number}"}, {"role": "assistant", "content": f"a{number}"}]
    return Record(turns, [bytes([number % 256]) * size])


def write(folder, count: int, max_bytes: int, prefix: str = "part-00000"):
    with ShardWriter(folder, prefix, max_bytes) as writer:
        for number in range(count):
            writer.add(record(number))
        return writer.close()


# Records


def test_a_table_of_records_is_what_arrow_makes_of_lists():
    records = [
        Record(
            [{"role": "user", "content": "<image><image>问题 é"}, {"role": "assistant", "content": ""}],
            [b"\0\xff", b""],
        ),
        Record([], []),
        record(3),
    ]
    images = [[{"bytes": data, "path": None} for data in each.images] for each in records]
    columns = [[each.messages for each in records], images]
    expected = pa.table([pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], SCHEMA)
    made = table(records)
    made.validate(full=True)
    assert made.equals(expected, check_metadata=True)
    assert made.to_pylist() == expected.to_pylist()
    assert not made.equals(table([*records[:2], record(4)]))  # control
    assert table([]).equals(pa.table([[], []], SCHEMA))


def test_writing_shards_does_not_import_pandas(tmp_path):
    """A second of each worker's start, and 60 MB."""
    program = """
import sys
from pathlib import Path
import pyarrow as pa
from qwen_merge.data.schema import Record
from qwen_merge.data.shards import ShardWriter
with ShardWriter(Path(sys.argv[1]), "part-00000") as writer:
    writer.add(Record([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], [b"x"]))
    writer.close()
print("pandas" in sys.modules)
pa.array(["x"])
print("pandas" in sys.modules)
"""
    said = subprocess.check_output([sys.executable, "-c", program, tmp_path / "set"], text=True)
    assert said.split() == ["False", "True"]  # the second is the control


# Shards


def test_the_record_format_has_no_huggingface_metadata():
    made = table([record(1)])
    assert made.schema == SCHEMA
    assert made.schema.metadata is None
    assert made.to_pylist() == [
        {
            "messages": [{"role": "user", "content": "<image>\nq1"}, {"role": "assistant", "content": "a1"}],
            "images": [{"bytes": b"\1" * 400, "path": None}],
        }
    ]


def test_shards_are_bounded_complete_and_in_order(tmp_path):
    made = write(tmp_path / "set", 30, 5000)
    assert [shard.name for shard in made] == [f"part-00000-{number:03d}.parquet" for number in range(3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
    rows = []
    for shard in made:
        data = (tmp_path / "set" / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert sum(len(image) for row in _rows(tmp_path / "set" / shard.name) for image in row.images) <= 5000
        rows += _rows(tmp_path / "set" / shard.name)
    assert rows == [record(number) for number in range(30)]


def _rows(path) -> list[Record]:
    rows = pq.read_table(path).to_pylist()
    return [Record(row["messages"], [image["bytes"] for image in row["images"]]) for row in rows]


def test_a_record_larger_than_a_shard_has_one_of_its_own(tmp_path):
    with ShardWriter(tmp_path / "set", "p", 1000) as writer:
        for size in (10, 5000, 10):
            writer.add(record(1, size))
        made = writer.close()
    assert [shard.rows for shard in made] == [1, 1, 1]


def test_row_groups_bound_what_a_writer_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "ROW_GROUP_BYTES", 2000)
    (made,) = write(tmp_path / "set", 30, 10**9)
    metadata = pq.read_metadata(tmp_path / "set" / made.name)
    sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    assert sum(sizes) == 30
    assert max(sizes) == 4  # of 417 bytes each


def test_the_same_records_give_the_same_bytes(tmp_path):
    assert write(tmp_path / "a", 30, 5000) == write(tmp_path / "b", 30, 5000)


def test_nothing_is_in_the_folder_before_close(tmp_path):
    with ShardWriter(tmp_path / "set", "p", 1000) as writer:
        for number in range(30):
            writer.add(record(number))
        assert len(names(writer.staging)) == 14  # two records each, the last two are still in memory
        assert not (tmp_path / "set").exists()
    assert list(tmp_path.iterdir()) == []


def test_no_record_no_shard(tmp_path):
    assert write(tmp_path / "set", 0, 1000) == []
    assert list((tmp_path / "set").iterdir()) == []


# Counts and manifest


def test_counts_keep_three_examples_of_each_reason():
    counts = Counts(rows_in=5)
    for number in range(4):
        counts.drop("bad", f"row {number}")
    counts.drop("long", "x" * 150 + "middle" + "y" * 150)
    assert counts.drops["bad"] == {"rows": 4, "examples": ["row 0", "row 1", "row 2"]}
    (example,) = counts.drops["long"]["examples"]
    assert len(example) == 200
    assert example.startswith("xxx")
    assert example.endswith("yyy")
    assert Counts.from_json(json.loads(json.dumps(counts.to_json()))) == counts


def test_merged_counts_are_those_of_one_pass():
    whole, parts = Counts(), [Counts(), Counts(), Counts()]
    for number in range(12):
        for counts in (whole, parts[number // 4]):
            counts.rows_in += 1
            if number % 3:
                counts.drop(("a", "b")[number % 2], str(number))
            else:
                counts.rows_out += 1
    merged = Counts()
    for part in parts:
        merged.merge(part)
    assert merged == whole
    assert parts[0].drops["b"]["examples"] == ["1"]  # merging changed no part


def manifest(shards, counts: Counts | None = None, options: dict | None = None) -> Manifest:
    rows = sum(shard.rows for shard in shards)
    return Manifest("s", "hub/s", "abc", options or {}, 0, counts or Counts(rows, rows), shards)


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    made = manifest(write(tmp_path / "set", 30, 5000), options={"seed": 1})
    path = manifest_path(tmp_path, "set")
    made.write(path)
    assert path == tmp_path / "set.manifest.json"
    assert Manifest.read(path) == made
    assert set(made.versions) >= {"python", "qwen-merge", "pyarrow", "pillow", "datasets"}


def test_a_manifest_that_loses_a_row_is_refused(tmp_path):
    shards = write(tmp_path / "set", 30, 5000)
    with pytest.raises(ValueError, match="29 rows were counted, the shards hold 30"):
        manifest(shards, Counts(29, 29)).write(tmp_path / "m.json")
    with pytest.raises(ValueError, match="does not account for every row"):
        manifest(shards, Counts(31, 30)).write(tmp_path / "m.json")
    assert not (tmp_path / "m.json").exists()


def test_a_file_that_is_no_manifest_is_a_user_error(tmp_path):
    (tmp_path / "m.json").write_text("{}")
    with pytest.raises(UserError, match="is not a manifest"):
        Manifest.read(tmp_path / "m.json")


def test_changed_options_are_named_with_both_values():
    old = {"seed": 0, "max_rows": None, "limit": 5}
    assert option_changes(old, dict(old)) == []
    assert option_changes(old, {"seed": 1, "max_rows": 7, "limit": 5}) == [
        "--max-rows: not given before, 7 now",
        "--seed: 0 before, 1 now",
    ]


# Journal


def test_a_torn_line_is_passed_over_and_cut_off(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append({"text": "é \ud800 \u2028"})
        journal.extend([{"number": number} for number in range(3)])
    expected = [{"text": "é \ud800 \u2028"}, {"number": 0}, {"number": 1}, {"number": 2}]
    whole = path.read_bytes()
    assert Journal(path).read() == expected
    for torn in (b'{"number": 3', b'{"number": 3}', b"\xff", b"x" * 200_000):
        path.write_bytes(whole + torn)
        assert Journal(path).read() == expected
        with Journal(path) as journal:
            journal.append("next")
        assert Journal(path).read() == [*expected, "next"]
    path.write_bytes(b"torn")
    with Journal(path) as journal:
        journal.append(1)
    assert path.read_bytes() == b"1\n"


def test_a_line_that_is_not_json_is_no_torn_line(tmp_path):
    (tmp_path / "j").write_text('1\n{"a":\n2\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        Journal(tmp_path / "j").read()


def test_a_journal_survives_kill_9(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from qwen_merge.data.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "for number in range(10**6):\n"
        "    journal.append(number)\n"
        "    if number == 50: os.write(1, b'.'); sys.stdout.flush()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "j")], stdout=subprocess.PIPE)
    assert process.stdout.read(1) == b"."
    process.kill()
    process.wait()
    process.stdout.close()
    numbers = Journal(tmp_path / "j").read()
    assert numbers == list(range(len(numbers)))
    assert len(numbers) >= 51


# Workspace


def finish(space: Workspace, rows: int = 3, options: dict | None = None) -> Manifest:
    with ShardWriter(space.shards, "part-00000", 10**6) as writer:
        for number in range(rows):
            writer.add(record(number))
        made = manifest(writer.close(), options=options or {"seed": 0})
    space.finish(made)
    return made


def names(folder) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_set_appears_when_it_is_complete(tmp_path):
    with Workspace(tmp_path, "group/set") as space:
        assert space.begin({"seed": 0}) is State.NEW
        space.journal.append(1)
        assert names(tmp_path / "group") == [".set.working"]
        made = finish(space)
    assert names(tmp_path / "group") == ["set", "set.manifest.json"]
    assert names(tmp_path / "group/set") == ["part-00000-000.parquet"]
    assert Manifest.read(tmp_path / "group/set.manifest.json") == made
    with Workspace(tmp_path, "group/set") as space:
        assert space.begin({"seed": 0}) is State.FINISHED
        with pytest.raises(UserError, match=r"made with other options: --seed: 0 before, 1 now\. Give --overwrite"):
            space.begin({"seed": 1})


def test_a_half_done_set_asks_for_one_of_two_options(tmp_path):
    with Workspace(tmp_path, "set") as space:
        space.begin({"seed": 0})
        space.journal.append("unit 0")
    with Workspace(tmp_path, "set") as space:
        with pytest.raises(UserError, match=r"half done .* Give --resume to go on with it, or --overwrite"):
            space.begin({"seed": 0})
        with pytest.raises(UserError, match="begun with other options: --seed: 0 before, 1 now"):
            space.begin({"seed": 1}, resume=True)
        assert space.begin({"seed": 0}, resume=True) is State.RESUMED
        assert space.journal.read() == ["unit 0"]
    with Workspace(tmp_path, "set") as space:
        assert space.begin({"seed": 1}, overwrite=True) is State.NEW
        assert space.journal.read() == []


def test_the_old_set_stays_until_the_new_one_is_complete(tmp_path):
    with Workspace(tmp_path, "set") as space:
        space.begin({"seed": 0})
        old = finish(space, 3)
    with Workspace(tmp_path, "set") as space:
        assert space.begin({"seed": 1}, overwrite=True) is State.NEW
        assert Manifest.read(tmp_path / "set.manifest.json") == old
    with Workspace(tmp_path, "set") as space:
        with pytest.raises(UserError, match="--resume"):
            space.begin({"seed": 1})
        assert space.begin({"seed": 1}, resume=True) is State.RESUMED
        new = finish(space, 5, {"seed": 1})
    assert Manifest.read(tmp_path / "set.manifest.json") == new
    assert len(_rows(tmp_path / "set/part-00000-000.parquet")) == 5
    assert names(tmp_path) == ["set", "set.manifest.json"]


def test_two_processes_do_not_make_one_set(tmp_path):
    with Workspace(tmp_path, "set") as space, Workspace(tmp_path, "set") as other:
        space.begin({})
        with pytest.raises(UserError, match="another process is working on"):
            other.begin({}, resume=True)
        space.close()
        assert other.begin({}, resume=True) is State.RESUMED


def test_a_folder_of_someone_else_is_not_touched(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/mine.parquet").write_text("")
    with Workspace(tmp_path, "set") as space, pytest.raises(UserError, match="did not make it"):
        space.begin({}, resume=True)
    assert names(tmp_path) == ["set"]


class Killed(BaseException):
    """Not an error that anything would handle."""


@pytest.mark.parametrize("overwritten", [False, True])
@pytest.mark.parametrize("moment", range(12))
def test_a_kill_at_any_moment_of_the_end_is_mended_by_the_next_run(tmp_path, monkeypatch, moment, overwritten):
    """The end is cut before its n-th change of the file system. What is then there is the old set, the new one, or none
    that has a manifest; the next run ends with the new one."""
    if overwritten:
        with Workspace(tmp_path, "set") as space:
            space.begin({"seed": 0})
            finish(space, 3)
    with Workspace(tmp_path, "set") as space:
        space.begin({"seed": 1}, overwrite=overwritten)
        monkeypatch.setattr(space, "finish", lambda made: _cut(monkeypatch, moment, space, made))
        finish(space, 5, {"seed": 1})

    if (tmp_path / "set.manifest.json").exists() and (tmp_path / "set").exists():
        listed = Manifest.read(tmp_path / "set.manifest.json")
        assert names(tmp_path / "set") == [shard.name for shard in listed.shards]
        assert len(_rows(tmp_path / "set" / listed.shards[0].name)) == listed.counts.rows_out
    with Workspace(tmp_path, "set") as space:
        if space.begin({"seed": 1}, resume=True) is not State.FINISHED:
            finish(space, 5, {"seed": 1})
    assert Manifest.read(tmp_path / "set.manifest.json").counts.rows_out == 5
    assert len(_rows(tmp_path / "set/part-00000-000.parquet")) == 5
    assert [name for name in names(tmp_path) if name != ".set.working"] == ["set", "set.manifest.json"]


def _cut(monkeypatch, moment: int, space: Workspace, made: Manifest) -> None:
    changes = iter(range(100))

    def counted(original):
        def change(*arguments, **options):
            if next(changes) >= moment:
                raise Killed
            return original(*arguments, **options)

        return change

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        for name in ("rename", "replace", "unlink", "rmdir"):
            patch.setattr(os, name, counted(getattr(os, name)))
        Workspace.finish(space, made)


@pytest.mark.parametrize("moment", range(8))
def test_a_kill_while_a_set_is_begun_anew_leaves_no_journal_without_its_shards(tmp_path, monkeypatch, moment):
    """begin() is cut before its n-th removal. The folder lists its names in any order: here the shards come first."""
    with Workspace(tmp_path, "set") as space:
        space.begin({"seed": 0})
        shards = write(space.shards, 30, 5000)
        space.journal.append({"converted": 0, "shards": [shard.to_json() for shard in shards]})
    changes = iter(range(100))

    def counted(original):
        def change(*arguments, **options):
            if next(changes) >= moment:
                raise Killed
            return original(*arguments, **options)

        return change

    listed = Path.iterdir
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(Path, "iterdir", lambda path: iter(sorted(listed(path), key=lambda entry: not entry.is_dir())))
        for name in ("unlink", "rmdir"):
            patch.setattr(os, name, counted(getattr(os, name)))
        with Workspace(tmp_path, "set") as space:
            space.begin({"seed": 0}, overwrite=True)

    with Workspace(tmp_path, "set") as space:
        if space.begin({"seed": 0}, resume=True) is State.RESUMED:
            assert all(space.has(ShardInfo(**shard) for shard in line["shards"]) for line in space.journal.entries())
        else:
            assert not space.journal.read()
            assert names(space.shards) == []


def test_a_shard_that_is_gone_or_cut_is_not_claimed(tmp_path):
    with Workspace(tmp_path, "set") as space:
        space.begin({"seed": 0})
        made = write(space.shards, 30, 5000)
        assert space.has(made)
        path = space.shards / made[1].name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        assert not space.has(made)
        with pytest.raises(UserError, match=r"1 shards .* such as part-00000-001\.parquet"):
            space.finish(manifest(made))
        path.unlink()
        assert not space.has(made)
        with pytest.raises(UserError, match="missing"):
            space.finish(manifest(made))
        assert not (tmp_path / "set").exists()
        path.write_bytes(whole)
        space.finish(manifest(made))
    assert len(names(tmp_path / "set")) == len(made)


def test_what_killed_writers_left_is_removed_by_a_restart(tmp_path):
    with Workspace(tmp_path, "set") as space:
        space.begin({})
        writer = ShardWriter(space.shards, "part-00000", 1000)
        for number in range(9):
            writer.add(record(number))
        assert writer.staging.is_dir()
        folder = space.folder
    with Workspace(tmp_path, "set") as space:
        assert space.begin({}, resume=True) is State.RESUMED
        assert names(folder) == ["options.json", "shards"]


@pytest.mark.parametrize("content", ["", "[]", '{"seed"'])
def test_options_that_cannot_be_read_are_explained(tmp_path, content):
    with Workspace(tmp_path, "set") as space:
        space.begin({"seed": 0})
        (space.folder / "options.json").write_text(content)
    with Workspace(tmp_path, "set") as space:
        with pytest.raises(UserError, match=r"options\.json cannot be read .* --overwrite"):
            space.begin({"seed": 0}, resume=True)
        assert space.begin({"seed": 0}, overwrite=True) is State.NEW


# A full disk, which a limit of the size of files stands for, and folders that cannot be written to

LIMITED = """
import json, resource, sys
from pathlib import Path
from qwen_merge.data.manifest import write_json
from qwen_merge.data.schema import Record
from qwen_merge.data.shards import ShardInfo, ShardWriter
from qwen_merge.data.units import run_units
from qwen_merge.data.units import run_units
from qwen_merge.errors import UserError

folder, limit, what = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

def write(unit):
    with ShardWriter(folder / "shards", "part") as writer:
        for number in range(500):
            writer.add(Record([{"role": "user", "content": "q"}], [bytes([number % 256]) * 400]))
        return {"shards": [shard.name for shard in writer.close()]}

def plain(unit):
    with open(folder / "plain", "wb", buffering=0) as file:
        for _ in range(100):
            file.write(bytes(4096))
    return {}

resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    if what == "shards":
        write({})
    elif what == "json":
        write_json(folder / "a.json", "x" * 400_000)
    else:
        run_units([{"a unit": 1}], plain)
except UserError as error:
    print("USER", error)
else:
    print("FINE")
"""


@pytest.mark.parametrize("what", ["shards", "json", "units"])
@pytest.mark.parametrize("limit", [10, 4_000, 100_000, 195_000, 1_000_000])
def test_a_full_disk_is_explained_and_leaves_nothing_half(tmp_path, what, limit):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), str(limit), what], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    if limit == 1_000_000:  # control: there is room
        assert done.stdout == "FINE\n"
    else:
        assert done.stdout.startswith("USER ")
        assert "File too large. Make room" in done.stdout
        assert "--resume" in done.stdout
        assert names(tmp_path) == (["plain"] if what == "units" else [])


def test_a_folder_that_cannot_be_made_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    for action in (
        lambda: write_json(tmp_path / "file/a.json", {}),
        lambda: require_writable(tmp_path / "file/a.json"),
        lambda: require_writable(tmp_path),
        lambda: ShardWriter(tmp_path / "file/set", "part"),
        lambda: run_units([{}], lambda unit: {"size": os.path.getsize(tmp_path / "absent")}),
        lambda: Manifest.read(tmp_path / "absent"),
    ):
        with pytest.raises(UserError):
            action()
    require_writable(tmp_path / "new/a.json")
    assert names(tmp_path) == ["file", "new"]


@pytest.mark.parametrize("content", ["", "[]", '"x"', "3", "null", '{"rows_in": "a", "rows_out": 1, "drops": []}'])
def test_no_manifest_gives_a_traceback(tmp_path, content):
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(UserError, match="is not a manifest"):
        Manifest.read(tmp_path / "m.json")


# dataset_info.json


def test_a_finished_set_is_named_for_llamafactory_and_nothing_else_changes(tmp_path):
    info = tmp_path / "dataset_info.json"
    (tmp_path / "sets/geo3k").mkdir(parents=True)
    dataset_info.enlist(tmp_path, "geo3k", "sets/geo3k")
    assert not info.exists()  # no row: LLaMA-Factory refuses an empty folder
    (tmp_path / "sets/geo3k/part-00000-000.parquet").touch()
    dataset_info.enlist(tmp_path, "geo3k", "sets/geo3k")
    entry = {
        "file_name": "sets/geo3k",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
    assert json.loads(info.read_text()) == {"geo3k": entry}
    repository = json.loads((Path(__file__).parents[2] / "data/dataset_info.json").read_text())
    assert repository["geo3k"] == {**entry, "file_name": "llavaonevision_converted/geo3k"}  # as the kit's own entries

    others = {"mine": {"file_name": "我的.json", "num_samples": 3}, "geo3k": {"file_name": "other"}}
    info.write_text(json.dumps(others))
    before = info.read_bytes(), info.stat().st_ino
    dataset_info.enlist(tmp_path, "geo3k", "sets/geo3k")
    assert (info.read_bytes(), info.stat().st_ino) == before  # of that name there is one, whatever it says
    info.rename(tmp_path / "elsewhere.json")
    info.symlink_to("elsewhere.json")
    dataset_info.enlist(tmp_path, "again", "sets/geo3k")
    assert info.is_symlink()
    assert list(json.loads(info.read_text()).items()) == [*others.items(), ("again", entry)]


@pytest.mark.parametrize("content", [b"", b'{"geo3k": {', b"[]", b"\xff\xfe"])
def test_a_broken_dataset_info_is_told_and_left_as_it_is(tmp_path, content):
    info = tmp_path / "dataset_info.json"
    info.write_bytes(content)
    (tmp_path / "geo3k").mkdir()
    (tmp_path / "geo3k/part-00000-000.parquet").touch()
    for work in (lambda: dataset_info.read(tmp_path), lambda: dataset_info.enlist(tmp_path, "geo3k", "geo3k")):
        with pytest.raises(UserError, match=r"dataset_info\.json cannot be read .*expected a JSON object.*mend it"):
            work()
    assert info.read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset_info.json", "geo3k"]


def _enlist(numbers: list[int], folder: str) -> None:
    for number in numbers:
        dataset_info.enlist(Path(folder), f"set{number}", "all")


def test_sets_that_are_finished_at_once_are_all_named(tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "all/part-00000-000.parquet").touch()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_enlist, args=(list(range(first, 60, 3)), str(tmp_path))) for first in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert set(json.loads((tmp_path / "dataset_info.json").read_text())) == {f"set{number}" for number in range(60)}
