"""The tiny world: reproducible, its held-out part apart from all training, its pixels as the real processor's."""

import random

import numpy
import pytest
import torch

from qwen_merge.demo import language, lessons
from qwen_merge.demo.world import HELD_OUT_NUMBERS, KINDS, NUMBERS, SHAPES, SIDE, TRAINING_NUMBERS, Scene, Stream, png


def drawings(name: str, count: int = 40, seed: int = 0) -> list[bytes]:
    stream = Stream(name, seed)
    return [png(stream.drawing(stream.scene(KINDS[i % len(KINDS)]))) for i in range(count)]


def test_the_same_stream_gives_the_same_pictures():
    assert drawings("text2image") == drawings("text2image")
    assert drawings("text2image") != drawings("text2image", seed=1)


def test_held_out_pictures_are_in_no_training_stream():
    held_out = set(drawings("held-out exam", 300))
    assert len(held_out) == 300
    assert not held_out & set(drawings("LLaVA_ReCap_558K", 300))


def test_training_never_shows_a_held_out_number():
    assert len(HELD_OUT_NUMBERS) == 90
    assert not HELD_OUT_NUMBERS & set(TRAINING_NUMBERS)
    assert set(NUMBERS) == HELD_OUT_NUMBERS | set(TRAINING_NUMBERS)
    training, exam = Stream("image_thinking"), Stream("held-out exam")
    assert {int(training.scene("number").text) for _ in range(3000)} <= set(TRAINING_NUMBERS)
    assert {int(exam.scene("number").text) for _ in range(3000)} == HELD_OUT_NUMBERS


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_its_colour_and_fits(shape):
    stream = Stream("test")
    for _ in range(20):
        picture = numpy.asarray(stream.drawing(Scene("shape", "red", shape))).astype(int)
        assert picture.shape == (SIDE, SIDE, 3)
        ink = (picture[..., 0] > 150) & (picture[..., 1] < 100)
        rows, columns = numpy.nonzero(ink)
        assert 24 <= numpy.ptp(columns) + 1 <= 60
        assert 22 <= numpy.ptp(rows) + 1 <= 60


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="no kind of scene 'cube'"):
        Stream("test").scene("cube")


@pytest.mark.parametrize(
    ("scene", "caption", "topic", "answer"),
    [
        (Scene("shape", "red", "circle"), "one red circle", "colour", "red"),
        (Scene("count", "black", "cross", 3), "three black crosses", "count", "three"),
        (Scene("number", "red", text="407"), "the number 407", "number", "407"),
        (Scene("word", "blue", text="sun"), "the word sun", "word", "sun"),
        (Scene("sum", "blue", text="7+5"), "the sum 7+5", "sum", "12"),
    ],
)
def test_a_scene_is_spoken_of_truly(scene, caption, topic, answer):
    assert language.caption(scene) == caption
    spoken = language.exchange(scene, topic, random.Random(0))
    assert spoken.answer == answer
    assert spoken.thinking_answer.startswith("<think>\n")
    assert spoken.thinking_answer.endswith(f"\n</think>\n\n{answer}")


def test_a_note_has_as_many_places_as_a_picture_has_tokens():
    note = language.note(Scene("number", "red", text="407"), random.Random(0)).split()
    assert len(note) == lessons.PICTURE_TOKENS
    assert [place for place in note if place != "-"] == ["4", "0", "7"]


def test_patches_are_those_of_the_real_processor():
    from transformers import Qwen2VLImageProcessor

    stream = Stream("test")
    pictures = [stream.drawing(stream.scene(kind)) for kind in KINDS]
    wanted = Qwen2VLImageProcessor()(images=pictures, return_tensors="pt")
    assert wanted["image_grid_thw"].tolist() == [[1, lessons.GRID, lessons.GRID]] * len(KINDS)
    torch.testing.assert_close(lessons.patches(pictures), wanted["pixel_values"], rtol=1e-5, atol=1e-5)
    # Control: patches in reading order instead of 2 x 2 blocks are something else.
    mirrored = [picture.transpose(0) for picture in pictures]
    assert not torch.allclose(lessons.patches(mirrored), wanted["pixel_values"], atol=1e-2)
