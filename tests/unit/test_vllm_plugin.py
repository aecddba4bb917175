"""The plug-in's parts that need no engine: limits, placeholders, marks of thoughts, the mend for an older libstdc++."""

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen_merge.overlays.vllm import libstdcxx
from qwen_merge.overlays.vllm.chat import check_placeholders
from qwen_merge.overlays.vllm.media import check_address, check_size
from qwen_merge.overlays.vllm.thinking_budget import Marks

MARKS = Marks(turn=1, think=2, end_think=3)


@pytest.mark.parametrize(
    ("token_ids", "state"),
    [
        ([1, 9, 9], "none"),
        ([1, 9, 2, 9], "open"),
        ([1, 9, 2, 9, 3, 9], "closed"),
        ([1, 2, 3, 2], "open"),
        ([2, 9, 1, 9], "none"),  # a thought, or the word, in an earlier turn
        ([2, 3, 1, 2], "open"),
        ([], "none"),
    ],
)
def test_the_last_turn_says_how_a_thought_stands(token_ids, state):
    assert MARKS.state(token_ids) == state


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2001:4860:4860::8888", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),  # where clouds keep credentials
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
    ],
)
def test_only_public_addresses_are_fetched_from(address, public, monkeypatch):
    monkeypatch.delenv("QWEN_MERGE_ALLOW_PRIVATE_MEDIA", raising=False)
    if public:
        check_address("host", address)
    else:
        with pytest.raises(ValueError, match=r"host has the address .*, which is not public"):
            check_address("host", address)
    monkeypatch.setenv("QWEN_MERGE_ALLOW_PRIVATE_MEDIA", "1")
    check_address("host", address)


def test_the_size_of_pictures_is_bounded(monkeypatch):
    monkeypatch.delenv("QWEN_MERGE_MAX_IMAGE_PIXELS", raising=False)
    check_size((8000, 8000))
    with pytest.raises(ValueError, match=r"8000 x 8001 = 64,008,000 pixels; at most 64,000,000"):
        check_size((8000, 8001))
    monkeypatch.setenv("QWEN_MERGE_MAX_IMAGE_PIXELS", "100")
    with pytest.raises(ValueError, match="at most 100 are allowed"):
        check_size((11, 10))


def test_placeholders_are_counted():
    config = SimpleNamespace(image_token_id=5, video_token_id=6)
    check_placeholders(config, {"prompt_token_ids": [1, 2]})
    check_placeholders(config, {"prompt_token_ids": [1, 5, 5], "multi_modal_data": {"image": ["a", "b"]}})
    check_placeholders(config, {"prompt_token_ids": [5, 6], "multi_modal_data": {"image": "a", "video": ["b"]}})
    for token_ids, media in (([5], {}), ([5, 5], {"image": ["a"]}), ([1], {"image": ["a"]}), ([6], {"image": ["a"]})):
        with pytest.raises(ValueError, match="placeholder"):
            check_placeholders(config, {"prompt_token_ids": token_ids, "multi_modal_data": media})


# --- the mend for an older libstdc++ ---


@pytest.fixture
def kernels(tmp_path) -> Path:
    """A copy of vLLM's CPU kernels that asks for GLIBCXX_3.4.32 as the release does."""
    found = importlib.util.find_spec("vllm")
    installed = Path(next(iter(found.submodule_search_locations)), "_C.abi3.so") if found else Path("missing")
    if not installed.is_file():
        pytest.skip("vLLM's CPU kernels are not installed")
    data = bytearray(installed.read_bytes())
    entries = [offset for offset, name in libstdcxx._needed_versions(data) if name == libstdcxx.VERSION]
    assert len(entries) == 1
    data[entries[0] + 4] = 0  # the flags, which env.sh may have set already
    copy = tmp_path / "_C.abi3.so"
    copy.write_bytes(data)
    return copy


def test_one_byte_is_changed_and_no_link_follows(kernels, tmp_path):
    before = kernels.read_bytes()
    cache = tmp_path / "cache.so"
    os.link(kernels, cache)  # as installers do
    assert libstdcxx.mend(kernels)
    after = kernels.read_bytes()
    assert cache.read_bytes() == before
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert changed == [(0, 2)]
    assert not libstdcxx.mend(kernels)  # a second time there is nothing to do
    assert kernels.read_bytes() == after
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_C.abi3.so", "cache.so"]


def test_other_versions_stay_required(kernels):
    names = [name for _, name in libstdcxx._needed_versions(bytearray(kernels.read_bytes()))]
    assert {b"GLIBCXX_3.4", b"GLIBC_2.2.5", libstdcxx.VERSION} <= set(names)


def test_another_kind_of_file_is_refused(tmp_path):
    file = tmp_path / "a.so"
    file.write_bytes(b"not a library")
    with pytest.raises(ValueError, match="not a 64-bit little-endian ELF file"):
        libstdcxx.mend(file)
    assert file.read_bytes() == b"not a library"
