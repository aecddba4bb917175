"""The plug-in's parts that need no engine: limits, placeholders, marks of thoughts, the mend for an older libstdc++."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen_merge.overlays.vllm import libstdcxx
from qwen_merge.overlays.vllm.chat import check_processor_options, check_tokens
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
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::a9fe:a9fe", False),  # NAT64 of 169.254.169.254
        ("64:ff9b::808:808", True),
        ("2002:7f00:1::", False),  # 6to4 of 127.0.0.1
        ("::127.0.0.1", False),
        ("fec0::1", False),
        ("224.0.0.1", False),
        ("ff0e::1", False),
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
    check_size((4000, 4000), video=True)
    with pytest.raises(ValueError, match=r"a video has .* at most 16,000,000"):
        check_size((4000, 4001), video=True)
    monkeypatch.setenv("QWEN_MERGE_MAX_IMAGE_PIXELS", "100")
    with pytest.raises(ValueError, match="at most 100 are allowed"):
        check_size((11, 10))
    monkeypatch.setenv("QWEN_MERGE_MAX_IMAGE_PIXELS", "1e6")
    with pytest.raises(ValueError, match="expected a whole number of pixels"):
        check_size((1, 1))


CONFIG = SimpleNamespace(image_token_id=5, video_token_id=6, vision_start_token_id=7)


@pytest.mark.parametrize(
    ("token_ids", "media"),
    [
        ([1, 2], {}),
        ([], {}),
        ([1, 5, 5], {"image": ["a", "b"]}),
        ([5, 6], {"image": "a", "video": ["b"]}),
        ([7, 5, 8], {"image": ["a"]}),
        ([6], {"video": ("frames", {"fps": 2})}),  # vLLM 0.12: one video, and what is known of it
        ([6, 6], {"video": [("frames", {"fps": 2}), ("frames", None)]}),
        ([6, 6], {"video": ("frames", "frames")}),
    ],
)
def test_prompts_with_a_placeholder_a_picture_pass(token_ids, media):
    check_tokens(CONFIG, {"prompt_token_ids": token_ids, "multi_modal_data": media})


@pytest.mark.parametrize(
    ("token_ids", "media", "said"),
    [
        ([5], {}, r"1 image placeholder\(s\) for 0 image\(s\)"),
        ([5, 5], {"image": ["a"]}, r"2 image placeholder\(s\) for 1"),
        ([1], {"image": ["a"]}, r"0 image placeholder\(s\) for 1"),
        ([6], {"image": ["a"]}, "image placeholder"),
        ([1, 7], {}, "no picture follows"),
        ([-1, 2], {}, "token id -1"),
    ],
)
def test_prompts_that_would_stop_the_engine_are_refused(token_ids, media, said):
    with pytest.raises(ValueError, match=said):
        check_tokens(CONFIG, {"prompt_token_ids": token_ids, "multi_modal_data": media})


@pytest.mark.parametrize(
    ("options", "frames"),
    [
        ({"min_pixels": 100, "max_pixels": 1000}, []),
        ({"size": {"shortest_edge": 1, "longest_edge": 1000}, "fps": 2}, []),
        ({"fps": 0.5}, [32]),
        ({"fps": [2, 29.97]}, [32, 4]),
        ({"fps": 1}, [50, 50]),
    ],
)
def test_processor_options_within_bounds_pass(options, frames):
    check_processor_options(options, 1000, frames, longest=100)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_pixels": 1001}, "max_pixels is 1001; expected 1 to 1,000 pixels"),
        ({"min_pixels": 0}, "expected 1 to 1,000 pixels"),
        ({"max_pixels": "9"}, "expected 1 to 1,000 pixels"),
        ({"max_pixels": True}, "expected 1 to 1,000 pixels"),
        ({"max_pixels": 9.5}, "expected 1 to 1,000 pixels"),
        ({"size": {"shortest_edge": 1, "longest_edge": 4000}}, "size.longest_edge is 4000; expected 1 to 1,000"),
        ({"size": {"longest_edge": 100}}, "expected an object with shortest_edge and longest_edge"),
        ({"size": {"shortest_edge": 1, "longest_edge": 9, "height": 9}}, "expected an object with"),
        ({"size": 5}, "size is 5; expected an object with"),
        ({"size": None}, "size is None; expected an object with"),
        ({"patch_size": 28}, "patch_size cannot be set by a request; expected min_pixels, max_pixels, size, fps"),
        ({"temporal_patch_size": 1}, "temporal_patch_size cannot be set"),
        ({"merge_size": 1}, "merge_size cannot be set"),
        ({"images_kwargs": {"min_pixels": 10**9}}, "images_kwargs cannot be set"),
        ({"videos_kwargs": {"fps": 2}, "do_resize": False}, "do_resize, videos_kwargs cannot be set"),
        ({"fps": 9999}, "fps is 9999; expected 0.001 to 240 frames a second"),
        ({"fps": 1e-4}, "expected 0.001 to 240"),
        ({"fps": -1}, "expected 0.001 to 240"),
        ({"fps": 0}, "expected 0.001 to 240"),
        ({"fps": float("nan")}, "expected 0.001 to 240"),
        ({"fps": "2"}, "expected 0.001 to 240"),
        ({"fps": None}, "expected 0.001 to 240"),
        ({"fps": [2, -1]}, "expected 0.001 to 240"),
        ({"fps": [2]}, r"1 value\(s\) for 2 video\(s\)"),
        ({"fps": []}, r"0 value\(s\) for 2 video\(s\)"),
        ({"fps": 0.3}, "the videos last 120 seconds; at most 100 are allowed"),
        ({"fps": [2, 0.1]}, "the videos last 170 seconds"),
    ],
)
def test_processor_options_that_would_stop_the_engine_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        check_processor_options(options, 1000, [20, 16], longest=100)


# --- what needs vLLM's classes: in a process of its own, whose settings of PyTorch vLLM changes for good ---


@pytest.mark.parametrize("file", ["engines.py", "thinking_budget.py"])
def test_in_a_process_with_vllm(file):
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    folder = Path(__file__).parents[1] / "in_vllm"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", folder / file],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert re.search(r"^\d+ passed", result.stdout, re.MULTILINE), result.stdout[-2000:]


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
