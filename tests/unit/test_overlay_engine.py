"""Putting overlays on and taking them off: bytes, refusals, hard links, kills, older kits. No upstream is imported."""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_merge.errors import UserError
from qwen_merge.overlays import diff, engine, manifest
from qwen_merge.overlays.engine import State
from qwen_merge.overlays.manifest import Overlay, Release, Touched

TABLE = "".join(f"entry_{i} = {i}\n" for i in range(40))
PATCH = """\
--- a/table.py
+++ b/table.py
@@ -5,4 +5,5 @@
 entry_4 = 4
 entry_5 = 5
+ours = True
 entry_6 = 6
 entry_7 = 7
@@ -30,3 +31,3 @@
 entry_29 = 29
-entry_30 = 30
+entry_30 = 31
 entry_31 = 31
"""
EDITED = TABLE.replace("entry_6 =", "ours = True\nentry_6 =").replace("entry_30 = 30", "entry_30 = 31")


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_overlay(folder: Path, patch: str = PATCH, after: str = EDITED, module: str = "VALUE = 1\n") -> Overlay:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.patch").write_text(patch)
    (folder / "module.py").write_text(module)
    return Overlay(
        upstream="upstream",
        folder=folder,
        version_file="__init__.py",
        version_pattern='__version__ = "([^"]+)"',
        releases=(
            Release("1.0", "abc", "PyPI", {"sub/table.py": Touched("table.patch", sha256(TABLE), sha256(after))}),
        ),
        new_files={"ours/module.py": folder / "module.py"},
        hunks={},
    )


def make_package(folder: Path) -> Path:
    package = folder / "upstream"
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "1.0"\n')
    (package / "sub" / "table.py").write_text(TABLE)
    return package


def contents(package: Path) -> dict[str, bytes]:
    return {str(path.relative_to(package)): path.read_bytes() for path in package.rglob("*") if path.is_file()}


@pytest.fixture
def overlay(tmp_path):
    return make_overlay(tmp_path / "overlay")


@pytest.fixture
def package(tmp_path):
    return make_package(tmp_path)


def test_apply_then_revert_gives_the_exact_bytes_back(overlay, package):
    original = contents(package)
    engine.apply(overlay, package)
    assert (package / "sub/table.py").read_text() == EDITED
    assert (package / "ours/module.py").read_text() == "VALUE = 1\n"
    applied = contents(package)
    assert {file.state for file in engine.apply(overlay, package)} == {State.APPLIED}
    assert contents(package) == applied, "a second apply changed something"
    engine.revert(overlay, package)
    assert contents(package) == original
    assert not (package / "ours").exists()


def test_revert_without_apply_changes_nothing(overlay, package):
    original = contents(package)
    engine.revert(overlay, package)
    assert contents(package) == original


def test_revert_keeps_a_folder_that_holds_something_else(overlay, package):
    engine.apply(overlay, package)
    (package / "ours/theirs.py").write_text("")
    engine.revert(overlay, package)
    assert [path.name for path in (package / "ours").iterdir()] == ["theirs.py"]


def test_another_version_is_refused_by_name(overlay, package):
    (package / "__init__.py").write_text('__version__ = "2.0"\n')
    with pytest.raises(UserError, match=r"is version 2\.0; this overlay is for 1\.0"):
        engine.apply(overlay, package)


@pytest.mark.parametrize("step", [engine.apply, engine.revert])
def test_an_edited_file_is_refused_and_named(overlay, package, step):
    if step is engine.revert:
        engine.apply(overlay, package)
    with open(package / "sub/table.py", "a") as file:
        file.write("mine = 1\n")
    before = contents(package)
    with pytest.raises(UserError, match=r"sub/table\.py"):
        step(overlay, package)
    assert contents(package) == before


def test_a_foreign_file_in_the_place_of_a_new_one_is_refused(overlay, package):
    (package / "ours").mkdir()
    (package / "ours/module.py").write_text("somebody = 'else'\n")
    before = contents(package)
    with pytest.raises(UserError, match=r"ours/module\.py"):
        engine.apply(overlay, package)
    assert contents(package) == before


def test_a_hard_linked_file_leaves_the_other_link_alone(overlay, package, tmp_path):
    cache = tmp_path / "cache.py"
    os.link(package / "sub/table.py", cache)
    engine.apply(overlay, package)
    assert cache.read_text() == TABLE
    assert cache.stat().st_nlink == 1
    engine.revert(overlay, package)
    assert cache.read_text() == TABLE


def test_the_file_mode_survives(overlay, package):
    (package / "sub/table.py").chmod(0o751)
    engine.apply(overlay, package)
    assert (package / "sub/table.py").stat().st_mode & 0o777 == 0o751


def test_an_error_in_the_middle_undoes_everything(overlay, package):
    # The last file to be replaced cannot be: its folder is where a file of the overlay should go.
    overlay.new_files["sub/table.py/below"] = overlay.folder / "module.py"
    before = contents(package)
    with pytest.raises(UserError, match="Nothing was changed"):
        engine.apply(overlay, package)
    assert contents(package) == before


KILLED = """
import os, sys
from pathlib import Path
from qwen_merge.overlays import engine
sys.path.insert(0, {tests!r})
from test_overlay_engine import make_overlay
os.replace = (lambda real: lambda *a: (print("step", flush=True), sys.stdin.readline(), real(*a)))(os.replace)
getattr(engine, {step!r})(make_overlay(Path({overlay!r})), Path({package!r}))
"""


@pytest.mark.parametrize("step", ["apply", "revert"])
@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_in_the_middle_is_finished_or_undone_by_the_next_run(tmp_path, step, renames):
    package, overlay = make_package(tmp_path), make_overlay(tmp_path / "overlay")
    original = contents(package)
    engine.apply(overlay, package)
    applied = contents(package)
    if step == "apply":
        engine.revert(overlay, package)
    script = KILLED.format(
        tests=str(Path(__file__).parent), step=step, overlay=str(tmp_path / "overlay"), package=str(package)
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    for _ in range(renames):
        if process.stdout.readline() == "step\n":
            process.stdin.write("\n")
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for target, wanted in ((engine.apply, applied), (engine.revert, original)):
        target(overlay, package)
        assert contents(package) == wanted


def test_a_newer_kit_replaces_what_an_older_one_put_on(tmp_path, package):
    original = contents(package)
    engine.apply(make_overlay(tmp_path / "old"), package)
    newer_text = EDITED.replace("ours = True", "ours = 'newer'")
    newer = make_overlay(tmp_path / "new", PATCH.replace("ours = True", "ours = 'newer'"), newer_text, "VALUE = 2\n")
    assert {file.state for file in engine.plan(newer, package)} == {State.OUTDATED}
    engine.apply(newer, package)
    assert (package / "sub/table.py").read_text() == newer_text
    assert (package / "ours/module.py").read_text() == "VALUE = 2\n"
    engine.revert(newer, package)
    assert contents(package) == original


@pytest.mark.parametrize(
    "record", ["{bad", "[]", "null", '"x"', '{"files": []}', '{"files": null}', '{"files": {"sub/table.py": {}}}']
)
def test_a_broken_record_is_taken_for_none(overlay, package, record):
    original = contents(package)
    engine.apply(overlay, package)
    (package / engine.RECORD).write_text(record)
    assert {file.state for file in engine.plan(overlay, package)} == {State.APPLIED}
    engine.revert(overlay, package)
    assert contents(package) == original


def test_a_record_cannot_name_files_outside_the_package(overlay, package, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine\n")
    engine.apply(overlay, package)
    record = json.loads((package / engine.RECORD).read_text())
    record["new_files"]["../victim"] = sha256("mine\n")
    (package / engine.RECORD).write_text(json.dumps(record))
    engine.revert(overlay, package)
    assert victim.read_text() == "mine\n"


@pytest.mark.parametrize("path", ["ours/module.py", engine.RECORD])
@pytest.mark.parametrize("step", [engine.apply, engine.revert])
def test_a_folder_where_a_file_belongs_is_refused_and_named(overlay, package, path, step):
    (package / path).mkdir(parents=True)
    before = contents(package)
    with pytest.raises(UserError, match=path.replace(".", r"\.")):
        step(overlay, package)
    assert contents(package) == before


def test_two_runs_at_once_wait_for_each_other(tmp_path, package):
    from concurrent.futures import ThreadPoolExecutor

    overlay = make_overlay(tmp_path / "overlay")
    for step, wanted in ((engine.apply, State.APPLIED), (engine.revert, State.PRISTINE)):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _, step=step: step(overlay, package), range(8)))
        assert {file.state for file in engine.plan(overlay, package)} == {wanted}


def test_nothing_is_applied_when_one_of_several_upstreams_does_not_fit(tmp_path):
    from qwen_merge.overlays import command

    for upstream in manifest.UPSTREAMS:
        (tmp_path / upstream).mkdir()
        (tmp_path / upstream / "__init__.py").write_text('__version__ = "4.52.3"\n')
    before = contents(tmp_path)
    arguments = argparse.Namespace(action="apply", upstreams=[], root=tmp_path)
    with pytest.raises(UserError, match="llamafactory"):
        command.run(arguments)
    assert contents(tmp_path) == before


def test_a_diff_must_fit_exactly_once():
    with pytest.raises(diff.DiffError, match="fits 0 places"):
        diff.apply(PATCH, "something else\n")
    with pytest.raises(diff.DiffError, match="fits 2 places"):
        diff.apply(PATCH, TABLE + TABLE)
    assert diff.apply(PATCH, diff.apply(PATCH, TABLE), reverse=True) == TABLE


@pytest.mark.parametrize("upstream", manifest.UPSTREAMS)
def test_every_hunk_says_why_it_is_there_and_when_it_can_go(upstream):
    overlay = manifest.load(upstream)
    patches = {touched.patch for release in overlay.releases for touched in release.files.values()}
    assert patches == set(overlay.hunks) == {path.name for path in overlay.folder.glob("*.patch")}
    for patch, hunks in overlay.hunks.items():
        assert len(diff.parse(overlay.patch_text(patch))) == len(hunks), patch
        assert all(set(hunk) == {"why", "until"} and hunk["why"] for hunk in hunks), patch
    assert all(source.is_file() for source in overlay.new_files.values())


def test_the_record_names_what_was_applied(overlay, package):
    engine.apply(overlay, package)
    record = json.loads((package / engine.RECORD).read_text())
    assert record["files"]["sub/table.py"]["before"] == sha256(TABLE)
    assert record["new_files"]["ours/module.py"] == sha256("VALUE = 1\n")
