"""Which sets there are, how they are named, and where their rows come from.

.venv/bin/python -m pytest tests/unit/test_data_sets.py
"""

import json
from pathlib import Path

import pytest

from data_sources import (
    jpeg,
    page,
    recap_features,
    recap_row,
    synthdog_features,
    write_arrow,
    write_parquet,
    write_recap,
    write_tar,
)
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
    assert input_folder(tmp_path, SETS["geo3k"], several=False) == tmp_path
    with pytest.raises(UserError, match="no folder for geo3k"):
        input_folder(tmp_path, SETS["geo3k"], several=True)


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
