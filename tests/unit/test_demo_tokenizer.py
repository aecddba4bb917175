"""The small BPE is a Qwen tokenizer in everything but size; lessons built with it are those of the templates."""

import pytest

from qwen_merge.demo import lessons, tokenizer
from qwen_merge.demo.language import OCR_REQUEST, corpus
from qwen_merge.demo.world import Stream


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(tokenizer.train(corpus()), folder)
    return AutoTokenizer.from_pretrained(folder)


def test_loads_as_qwens_class_with_qwens_special_tokens(words):
    assert type(words).__name__ == "Qwen2TokenizerFast"
    assert (words.eos_token, words.pad_token, words.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    ids = [words.encode(token) for token in tokenizer.SPECIAL_TOKENS + tokenizer.PLAIN_TOKENS]
    assert all(len(one) == 1 for one in ids)
    flat = [one[0] for one in ids]
    assert flat == list(range(flat[0], flat[0] + len(flat)))
    assert len(words) == flat[-1] + 1


def test_thoughts_survive_where_special_tokens_are_skipped(words):
    ids = words.encode("<|im_start|><think>\nyes\n</think><|im_end|>")
    assert words.decode(ids, skip_special_tokens=True) == "<think>\nyes\n</think>"


@pytest.mark.parametrize("text", ["three yellow crosses", "7+5=12.", OCR_REQUEST["zh"], "never seen: ÄÖÜ ☃\n\n\t x"])
def test_any_text_comes_back(words, text):
    assert words.decode(words.encode(text)) == text


def test_digits_stand_alone_and_words_of_the_world_are_single(words):
    assert words.tokenize("472")[-3:] == ["4", "7", "2"]
    assert len(words.tokenize("one purple triangle")) == 3


def test_the_same_corpus_gives_the_same_tokenizer():
    assert tokenizer.train(corpus()).to_str() == tokenizer.train(corpus()).to_str()


def test_the_chat_template_knows_the_thinking_switch(words):
    messages = [{"role": "user", "content": "hi"}]
    open_ended = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert open_ended == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    closed = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert closed == f"{open_ended}<think>\n\n</think>\n\n"


def test_text_lessons_take_loss_on_answers_only(words):
    batch = next(lessons.text_batches(Stream("text"), words, 16))
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        learned = labels != lessons.IGNORED
        assert (ids[learned] == labels[learned]).all()
        assert not learned[mask == 0].any()
        assert words.decode(ids[learned]).endswith("<|im_end|>\n")
        assert "?" not in words.decode(ids[learned])


def test_picture_lessons_have_a_token_for_every_nine_patches(words):
    batch = next(lessons.picture_batches(Stream("test"), words, 3))
    image = words.convert_tokens_to_ids("<|image_pad|>")
    assert (batch["input_ids"] == image).sum(1).tolist() == [lessons.PICTURE_TOKENS] * 3
    assert batch["pixel_values"].shape == (3 * lessons.GRID**2, 3 * 2 * 14 * 14)
