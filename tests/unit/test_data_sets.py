"""Which sets there are, how they are named, and where their rows come from.

.venv/bin/python -m pytest tests/unit/test_data_sets.py
"""

import io
import json
import re
import tarfile
from pathlib import Path

import pytest

from data_sources import (
    jpeg,
    page,
    png,
    recap_features,
    recap_row,
    synthdog_features,
    write_arrow,
    write_parquet,
    write_recap,
    write_tar,
)
from qwen_merge import cli
from qwen_merge.data import sources
from qwen_merge.data.sets import ONEVISION, ONEVISION_TEXT, SETS, configurations, dataset_name, find_sets, input_folder
from qwen_merge.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_every_set_of_the_recipes_can_be_made_and_lies_where_they_look():
    entries = json.loads((ROOT / "data/dataset_info.json").read_text(encoding="utf-8"))
    distilled = {"text2image", "image_thinking"}
    assert set(entries) - distilled <= set(SETS)
    for name in set(entries) - distilled:
        assert SETS[name].file_name == entries[name]["file_name"]
    text_only = {dataset_name(config) for config in configurations(ONEVISION_TEXT)}
    assert set(SETS) - set(entries) == text_only


def test_onevision_has_89_configurations():
    assert len(configurations(ONEVISION)) == 84
    assert len(configurations(ONEVISION_TEXT)) == 5
    assert len({*configurations(ONEVISION), *configurations(ONEVISION_TEXT)}) == 89
    assert SETS["GeoQA+_MathV360K"].config == "GeoQA+(MathV360K)"
    assert SETS["ai2d_cauldron_llava_format"].file_name == "llavaonevision_converted/ai2d_cauldron_llava_format"


def test_published_limits():
    assert {entry.maximum for entry in SETS.values() if entry.group == "recap"} == {2_000_000}
    assert {entry.max_pixels for entry in SETS.values() if entry.group == "synthdog"} == {50_000_000}
    assert SETS["LLaVA_ReCap_CC3M"].hub == "lmms-lab/LLaVA-ReCap-CC3M"
    assert SETS["synthdog_zh"].hub == "naver-clova-ix/synthdog-zh"


def test_a_set_has_several_names():
    assert [entry.name for entry in find_sets(["geo170k(qa)", "geo170k_qa", "lmms-lab/LLaVA-ReCap-558K"])] == [
        "geo170k_qa",
        "LLaVA_ReCap_558K",
    ]
    assert len(find_sets(["onevision"])) == 89
    assert [entry.name for entry in find_sets(["synthdog", "recap"])] == [
        "synthdog_en",
        "synthdog_zh",
        "LLaVA_ReCap_558K",
        "LLaVA_ReCap_CC3M",
        "LLaVA_ReCap_CC12M",
    ]


def test_unknown_sets_are_named_together():
    with pytest.raises(UserError) as error:
        find_sets(["geo3k", "geo4k", "llava_recap_558k"])
    assert "'geo4k' (do you mean geo3k?)" in str(error.value)
    assert "'llava_recap_558k' (do you mean LLaVA_ReCap_558K?)" in str(error.value)


def test_a_copy_of_onevision_has_a_folder_a_configuration(tmp_path):
    (tmp_path / "geo170k(qa)").mkdir()
    assert input_folder(tmp_path, SETS["geo170k_qa"], several=True) == tmp_path / "geo170k(qa)"
    (tmp_path / "mine").mkdir()
    assert input_folder(tmp_path / "mine", SETS["geo3k"], several=False) == tmp_path / "mine"
    with pytest.raises(UserError, match="no folder for geo3k"):
        input_folder(tmp_path, SETS["geo3k"], several=True)


@pytest.mark.parametrize("folder", ["geo170k(qa)", "geo170k_qa", "LLaVA-ReCap-558K", "LLaVA-OneVision-Data"])
def test_other_sets_folders_are_not_taken_for_a_set_that_is_not_there(tmp_path, folder):
    write_parquet(tmp_path / folder / "train.parquet", [recap_row(0, jpeg())], recap_features())
    (tmp_path / "parts").mkdir()  # a name that is no set's
    with pytest.raises(UserError, match=r"no folder for geo3k, but those of other sets \(" + re.escape(folder)):
        input_folder(tmp_path, SETS["geo3k"], several=False)
    arguments = ["data", "convert", "geo3k", "--input", str(tmp_path), "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 2
    assert not (tmp_path / "out").exists()
    (tmp_path / folder).rename(tmp_path / "mine")
    assert input_folder(tmp_path, SETS["geo3k"], several=False) == tmp_path


# Sources

ROWS = [recap_row(number, jpeg(seed=number)) for number in range(250)]
COLUMNS = ("id", "conversations", "image", "images")


def read(source: sources.Source) -> list[tuple]:
    return [
        (row["id"], row["conversations"], sources.pictures_of(row))
        for unit in range(sources.unit_count(source))
        for row in sources.rows(source, unit, COLUMNS)
    ]


EXPECTED = [(row["id"], row["conversations"], [row["image"]]) for row in ROWS]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "tar"])
def test_rows_and_pictures_come_through_as_they_are(tmp_path, kind):
    for number, part in enumerate((ROWS[:100], ROWS[100:])):
        path = tmp_path / f"[copy] (1)/train-{number}.{kind}"
        if kind == "tar":
            write_tar(path, part)
        else:
            (write_parquet if kind == "parquet" else write_arrow)(path, part, recap_features())
    source = sources.local_source(tmp_path / "[copy] (1)")
    assert sources.unit_count(source) == 2
    assert read(source) == EXPECTED
    assert sources.Source.from_json(json.loads(json.dumps(source.to_json()))) == source
    assert sources.total_rows(source) == (250 if kind == "parquet" else None)
    assert [entry["file"] for entry in source.recorded_revision()] == [f"train-{number}.{kind}" for number in (0, 1)]


def test_parquet_without_huggingface_metadata_is_read_too(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = write_parquet(tmp_path / "with.parquet", ROWS, recap_features())
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), tmp_path / "without.parquet")
    assert read(sources.local_source(tmp_path / "without.parquet")) == EXPECTED
    plain = pa.Table.from_pylist(ROWS)  # the picture as a binary column
    pq.write_table(plain, tmp_path / "plain.parquet")
    assert read(sources.local_source(tmp_path / "plain.parquet")) == EXPECTED


def test_only_wanted_columns_of_parquet_are_read(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ROWS, recap_features())
    (row, *_) = sources.rows(sources.local_source(path), 0, ("id", "conversations", "absent"))
    assert set(row) == {"id", "conversations"}


def test_a_file_a_folder_and_a_glob(tmp_path):
    write_recap(tmp_path / "data", 20, files=2)
    write_parquet(
        tmp_path / "data/validation-00000.parquet", [{"image": jpeg(), "ground_truth": page("x")}], synthdog_features()
    )
    (tmp_path / "data/.cache").mkdir()
    (tmp_path / "data/.cache/train-9.parquet").write_text("")
    (tmp_path / "README.md").write_text("")
    named = lambda given: [Path(path).name for path in sources.local_source(Path(given)).files]  # noqa: E731
    train = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert named(tmp_path) == train
    assert named(tmp_path / "data/*1-of-*.parquet") == train[1:]
    assert named(tmp_path / "data/validation-00000.parquet") == ["validation-00000.parquet"]


@pytest.mark.parametrize("split", ["validation", "val", "Test", "dev-2"])
def test_the_folder_of_another_split_is_left_out(tmp_path, split):
    for part in ("train", split):
        write_parquet(tmp_path / f"val/conv/{part}/0000.parquet", [recap_row(0, jpeg())], recap_features())
    found = sources.local_source(tmp_path / "val").files  # the folder's own name is the user's word
    assert found == [str(tmp_path / "val/conv/train/0000.parquet")]
    (tmp_path / "val/conv/train/0000.parquet").unlink()
    with pytest.raises(UserError, match=r"nothing found but 1 files of other splits, such as .*0000\.parquet"):
        sources.local_source(tmp_path / "val")


def test_local_files_are_told_apart_by_place_and_content(tmp_path):
    """The same names and sizes, which alone would be the same data; a copy elsewhere is the same."""

    def write(folder: Path, content: bytes) -> object:
        for part in ("a", "b"):
            (folder / part).mkdir(parents=True, exist_ok=True)
            (folder / part / "0.parquet").write_bytes(content)
        return sources.local_source(folder).recorded_revision()

    for size in (5, 64 * sources.PIECE + 1):
        one = write(tmp_path / f"one{size}", bytes(size))
        assert write(tmp_path / f"two{size}", bytes(size)) == one
        assert [(file["file"], file["bytes"]) for file in one] == [("a/0.parquet", size), ("b/0.parquet", size)]
        for place in (0, size - 1):
            changed = bytearray(size)
            changed[place] = 1
            assert write(tmp_path / f"one{size}", bytes(changed)) != one


PICTURES_OF_THREE_KINDS = [recap_row(number, (jpeg, png, jpeg)[number](seed=number)) for number in range(3)]


def test_a_tar_file_may_mix_kinds_of_pictures(tmp_path):
    """`datasets` wants every row to have the fields of the first ones."""
    path = write_tar(tmp_path / "a.tar", PICTURES_OF_THREE_KINDS, endings=("jpg", "png", "JPEG"))
    assert read(sources.local_source(path)) == [
        (row["id"], row["conversations"], [row["image"]]) for row in PICTURES_OF_THREE_KINDS
    ]


def test_what_is_odd_in_a_tar_file(tmp_path):
    """Folders, names without an ending, a row without JSON, JSON that is none, and keys with dots in their folder."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("v1.0")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in [
            ("README", b"x"), ("v1.0/a.jpg", b"1"), ("v1.0/b.jpg", b"2"), ("v1.0/b.json", b"{"),
            ("v1.0/c.json", b'{"conversations": [], "image": "c.jpg"}'), ("v1.0/d.seg.png", b"3"),
        ]:  # fmt: skip
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    rows = list(sources.rows(sources.local_source(tmp_path / "a.tar"), 0, COLUMNS, "conversations"))
    assert rows == [
        {"id": "v1.0/a", "images": [b"1"]}, {"id": "v1.0/b", "images": [b"2"]},
        {"id": "v1.0/c", "conversations": [], "images": []}, {"id": "v1.0/d", "images": []},
    ]  # fmt: skip


def test_a_tar_file_that_is_damaged_anywhere_is_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", ROWS[:3])
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar.getmembers()]
    second = headers[1]
    cut = [whole[:length] for length in (0, 100, 700, second, second + 100, headers[-1] + 600)]
    flipped = whole[: second + 10] + b"\xff\xff" + whole[second + 12 :]
    for broken in (*cut, flipped, b"no tar file" * 100):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"a\.tar cannot be read .* go on with --resume"):
            list(sources.rows(sources.local_source(path), 0, COLUMNS))
    path.write_bytes(whole)
    assert len(list(sources.rows(sources.local_source(path), 0, COLUMNS))) == 3


@pytest.mark.parametrize("kind", ["parquet", "arrow", "tar"])
def test_files_of_another_kind_of_set_are_refused(tmp_path, kind, capsys):
    """Control: the same file is taken for what it is."""
    path = tmp_path / f"in/a.{kind}"
    rows = [{"image": jpeg(), "ground_truth": page("x")}]
    if kind == "tar":
        write_tar(path, [{"id": "0", **rows[0]}])
    else:
        (write_parquet if kind == "parquet" else write_arrow)(path, rows, synthdog_features())
    arguments = ["--input", str(path), "--output", str(tmp_path / "out")]
    assert cli.main(["data", "convert", "geo3k", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(rf"a\.{kind} has the columns .*ground_truth.*; expected 'conversations' among them", error)
    assert not (tmp_path / "out/llavaonevision_converted/geo3k").exists()
    assert cli.main(["data", "convert", "synthdog_en", *arguments]) == 0


def test_inputs_that_cannot_be_read_are_explained(tmp_path):
    with pytest.raises(UserError, match="nothing found; expected files that end in"):
        sources.local_source(tmp_path)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match=r"a\.json is none of the kinds"):
        sources.local_source(tmp_path / "*.json")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 cut short")
    (tmp_path / "b.tar").write_bytes(b"")
    with pytest.raises(UserError, match="all of one kind, found parquet, webdataset"):
        sources.local_source(tmp_path)
    source = sources.local_source(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet cannot be read .* go on with --resume"):
        list(sources.rows(source, 0, COLUMNS))
    with pytest.raises(UserError, match=r"a\.parquet cannot be read"):
        sources.total_rows(source)


def test_a_hub_that_cannot_be_reached_is_explained(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"LLaVA-ReCap-558K cannot be read .* give a local copy with --input"):
        sources.hub_source(SETS["LLaVA_ReCap_558K"])


def test_a_hub_repository_is_streamed_file_by_file(tmp_path):
    """`datasets` reads a repository's folder as it reads the hub: its README names configurations and their files."""
    for number, part in enumerate((ROWS[:100], ROWS[100:])):
        write_parquet(tmp_path / f"geo170k(qa)/train-{number}.parquet", part, recap_features())
    write_parquet(tmp_path / "other/train-0.parquet", ROWS[:1], recap_features())
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: geo170k(qa)\n  data_files:\n  - split: train\n    path: geo170k(qa)/train-*\n"
        "- config_name: other\n  data_files:\n  - split: train\n    path: other/train-*\n"
        "dataset_info:\n- config_name: geo170k(qa)\n  splits:\n  - name: train\n    num_examples: 250\n---\n"
    )
    source = sources.Source("hub", str(tmp_path), "geo170k(qa)", "train", None)
    assert sources.unit_count(source) == 2
    assert sources.total_rows(source) == 250
    assert read(source) == EXPECTED
    assert len(list(sources.rows(source, 1, COLUMNS))) == 150
    (row, *_) = sources.rows(source, 0, ("id", "conversations", "absent"))
    assert set(row) == {"id", "conversations"}
    assert sources.total_rows(sources.Source("hub", str(tmp_path), "other", "train", None)) is None
    with pytest.raises(UserError, match="cannot be read"):
        sources.unit_count(sources.Source("hub", str(tmp_path), "absent", "train", None))
