"""The merger's small parts: safetensors headers, conversion, the new layer, shards, sizes."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_merge.errors import UserError
from qwen_merge.merger.convert import convert
from qwen_merge.merger.copying import copy_range
from qwen_merge.merger.initialise import CHUNK, initial_bytes
from qwen_merge.merger.plan import PlannedTensor
from qwen_merge.merger.safetensors_file import encode_header, read_header
from qwen_merge.merger.shards import index_json, parse_size, split_shards

PINNED = (
    "071aec7d511a6bd11514175b48588f1e29ea81d776edd7998864ede0284331d5"  # sha256 of the tiny model's new weight, seed 42
)
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


# Headers


def test_a_header_read_is_the_library_s(tmp_path):
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(5, dtype=torch.bfloat16), "c": torch.zeros(0)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, {"format": "pt"})
    header = read_header(path)
    assert {name: stored.shape for name, stored in header.items()} == {"a": (5,), "b": (2, 3), "c": (0,)}
    stored = header["b"]
    data = path.read_bytes()[stored.start : stored.end]
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(2, 3), tensors["b"])


def test_a_header_written_is_read_by_the_library(tmp_path):
    header, nbytes = encode_header([("wide", "F32", (3,)), ("narrow", "BF16", (2, 2))])
    assert len(header) % 8 == 0
    path = tmp_path / "model.safetensors"
    path.write_bytes(header + b"\0" * (nbytes - len(header)))
    loaded = load_file(path)
    assert {name: (tuple(t.shape), t.dtype) for name, t in loaded.items()} == {
        "wide": ((3,), torch.float32),
        "narrow": ((2, 2), torch.bfloat16),
    }


def write_header(path, entries, data):
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("entries", "data", "message"),
    [
        ({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234", "cut short"),
        ({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"123456789", "accounts for"),
        ({"t": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"12345678", "takes 12 bytes"),
        ({"t": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, b"123456789012", "starts at byte"),
        ({"t": {"dtype": "F32", "shape": [2]}}, b"12345678", "cannot be read"),
        ([], b"", "cannot be read"),
        ({"t": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, b"12345678", "cannot be read"),
        ({"t": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, b"12345678", "cannot be read"),
        ({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]}}, b"12345678", "cannot be read"),
    ],
)
def test_broken_headers(tmp_path, entries, data, message):
    path = tmp_path / "broken.safetensors"
    write_header(path, entries, data)
    with pytest.raises(UserError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_a_header_nested_too_deeply(tmp_path):
    text = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(UserError, match="cannot be read"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"1234", b"<html>not found</html>", (50).to_bytes(8, "little") + b"{}"])
def test_what_is_no_safetensors_file(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="Copy or download it again"):
        read_header(path)


# Conversion


@pytest.mark.parametrize("source", list(DTYPES))
@pytest.mark.parametrize("target", ["BF16", "F16", "F32"])
def test_conversion_rounds_as_torch_does(source, target):
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 10
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1.00390625, 1.01171875, 1e-8, -1e-40])
    tensor = torch.cat((values, special.double())).to(DTYPES[source])
    data = tensor.view(torch.uint8).numpy().tobytes()
    expected = tensor.to(torch.float32).to(DTYPES[target])
    converted = torch.frombuffer(bytearray(convert(data, source, target, "t")), dtype=DTYPES[target])
    assert torch.equal(converted.view(torch.uint8), expected.view(torch.uint8))


def test_nan_stays_nan():
    data = torch.tensor([float("nan")]).view(torch.uint8).numpy().tobytes()
    for target in ("BF16", "F16"):
        assert torch.frombuffer(bytearray(convert(data, "F32", target, "t")), dtype=DTYPES[target]).isnan().all()


def test_what_float16_cannot_hold_is_an_error():
    data = torch.tensor([1.0, 70000.0], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    with pytest.raises(UserError, match=r"model\.norm\.weight holds 70144.*F16.*bfloat16"):
        convert(data, "BF16", "F16", "model.norm.weight")


# The new layer


def new_weight(seed=42, dtype="BF16", shape=(64, 96)):
    name = "visual.merger.mlp.4.weight"
    return b"".join(initial_bytes(PlannedTensor(name, dtype, shape, "new"), seed))


def test_the_new_layer_is_pinned():
    """The bytes of seed 42: who changes the generator breaks `verify` for every checkpoint that exists."""
    assert hashlib.sha256(new_weight()).hexdigest() == PINNED
    assert new_weight() != new_weight(seed=43)


def test_the_new_layer_has_the_right_distribution():
    rows = 3 * CHUNK // 1024 + 1  # several chunks and a rest
    weight = torch.frombuffer(bytearray(new_weight(dtype="F32", shape=(rows, 1024))), dtype=torch.float32)
    assert weight.numel() == rows * 1024
    assert abs(weight.mean().item()) < 1e-4
    assert weight.std().item() == pytest.approx(0.02, rel=2e-3)
    assert torch.equal(weight[:6144], torch.frombuffer(bytearray(new_weight(dtype="F32")), dtype=torch.float32))


def test_the_new_bias_is_zero():
    assert b"".join(initial_bytes(PlannedTensor("visual.merger.mlp.4.bias", "F16", (10,), "new"), 1)) == bytes(20)


# Shards


def planned(name, elements, dtype="BF16"):
    return PlannedTensor(name, dtype, (elements,), "llm")


def test_shards_are_filled_in_order_and_named_as_transformers_does():
    tensors = [planned("a", 50), planned("b", 50), planned("c", 150), planned("d", 10)]
    shards = split_shards(tensors, 200)
    assert [[tensor.name for tensor in shard.tensors] for shard in shards] == [["a", "b"], ["c"], ["d"]]
    assert [shard.name for shard in shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads(index_json(shards))
    assert index["metadata"] == {"total_size": 520}
    assert index["weight_map"]["c"] == "model-00002-of-00003.safetensors"
    single = split_shards(tensors, 1000)
    assert [shard.name for shard in single] == ["model.safetensors"]
    assert index_json(single) is None


def test_wider_tensors_come_first_so_that_all_are_aligned():
    (shard,) = split_shards([planned("a", 3), planned("b", 2, "F32")], 1000)
    assert [tensor.name for tensor in shard.tensors] == ["b", "a"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5GB", 5_000_000_000), ("4GiB", 4 << 30), ("300mb", 300_000_000), ("1.5 KB", 1500), ("123", 123)],
)
def test_sizes(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "0GB", "GB", "5TB", "-1GB", "5 G B"])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match="--max-shard-size"):
        parse_size(text)


# Copying


@pytest.mark.parametrize("in_kernel", [True, False])
def test_copy_range(tmp_path, monkeypatch, in_kernel):
    if not in_kernel:
        monkeypatch.delattr("os.copy_file_range")
    data = bytes(range(256)) * 100
    (tmp_path / "source").write_bytes(data)
    advanced = []
    with (tmp_path / "source").open("rb") as source, (tmp_path / "target").open("wb") as target:
        copy_range(source.fileno(), target.fileno(), 100, 20_000, 3, tmp_path / "source", advanced.append)
    assert (tmp_path / "target").read_bytes() == bytes(3) + data[100:20_100]
    assert sum(advanced) == 20_000


def test_copying_past_the_end_is_an_error(tmp_path):
    (tmp_path / "source").write_bytes(b"1234")
    with (
        (tmp_path / "source").open("rb") as source,
        (tmp_path / "target").open("wb") as target,
        pytest.raises(UserError, match="became shorter"),
    ):
        copy_range(source.fileno(), target.fileno(), 0, 10, 0, tmp_path / "source", lambda _: None)
