"""The chat template: Qwen3's words for text, Qwen2.5-VL's placeholders for pictures and videos, nothing in between.

The expected strings are what Qwen3-8B's published template renders for these conversations.
"""

import pytest

from qwen_merge.merger.companions import CHAT_TEMPLATE, MATERIALS

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Wetter in <Stadt>, für heute",
            "parameters": {"city": "string"},
        },
    }
]
TOOL_PROMPT = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    '{"type": "function", "function": {"name": "weather", "description": "Wetter in <Stadt>, für heute", '
    '"parameters": {"city": "string"}}}\n'
    "</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def render():
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template = _compile_jinja_template((MATERIALS / CHAT_TEMPLATE).read_text(encoding="utf-8"))
    return lambda *messages, **variables: template.render(messages=list(messages), **variables)


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


def tool(content):
    return {"role": "tool", "content": content}


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def test_one_question(render):
    assert render(user("Hi")) == "<|im_start|>user\nHi<|im_end|>\n"
    assert render(user("Hi"), add_generation_prompt=True) == ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_thinking_switch(render):
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert render(user("Hi"), add_generation_prompt=True, enable_thinking=True) == prompt
    assert render(user("Hi"), add_generation_prompt=True, enable_thinking=False) == (prompt + "<think>\n\n</think>\n\n")
    # The soft switches are words of the user; the template leaves them alone.
    assert render(user("Hi /no_think")) == "<|im_start|>user\nHi /no_think<|im_end|>\n"


def test_system_and_several_turns(render):
    assert render(system("Be brief."), user("1+1?"), assistant("2"), user("2+2?"), assistant("4")) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n1+1?<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n4<|im_end|>\n"
    )


def test_thoughts_of_earlier_turns_are_removed_and_the_last_ones_kept(render):
    first = assistant("<think>\nadd\n</think>\n\n2")
    last = assistant("<think>\nadd again\n</think>\n\n4")
    assert render(user("1+1?"), first, user("2+2?"), last) == (
        "<|im_start|>user\n1+1?<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nadd again\n</think>\n\n4<|im_end|>\n"
    )


def test_reasoning_content_is_the_thought_and_content_the_answer(render):
    assert render(user("1+1?"), assistant("\n2", reasoning_content="\nadd\n")) == (
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<think>\nadd\n</think>\n\n2<|im_end|>\n"
    )


def test_tools_calls_and_responses(render):
    conversation = (
        system("Be brief."),
        user("Rain?"),
        assistant("", reasoning_content="ask", tool_calls=[call("weather", {"city": "Köln"})]),
        tool("dry"),
        tool("really dry"),
        assistant("Let me look again.", tool_calls=[call("weather", '{"city": "Bonn"}'), call("weather", {})]),
        tool("wet"),
    )
    assert render(*conversation, tools=TOOLS, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.\n\n" + TOOL_PROMPT + "<|im_start|>user\nRain?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nask\n</think>\n\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\ndry\n</tool_response>\n"
        "<tool_response>\nreally dry\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nLet me look again.\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nwet\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_tools_without_a_system_message(render):
    assert render(user("Rain?"), tools=TOOLS) == (
        "<|im_start|>system\n" + TOOL_PROMPT + "<|im_start|>user\nRain?<|im_end|>\n"
    )


def test_a_tool_result_in_user_text_is_not_a_question(render):
    """So the thoughts since the real question stay."""
    thought = assistant("<think>\nask\n</think>\n\nlooking")
    result = user("<tool_response>\ndry\n</tool_response>")
    expected = (
        "<|im_start|>user\nRain?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nask\n</think>\n\nlooking<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\ndry\n</tool_response><|im_end|>\n"
    )
    assert render(user("Rain?"), thought, result) == expected
    in_parts = user([{"type": "text", "text": result["content"]}])
    assert render(user("Rain?"), thought, in_parts) == expected
    # The control: a real question in the same place takes them away.
    assert "ask" not in render(user("Rain?"), thought, user("And snow?"))


def test_null_content(render):
    assert render(user("Rain?"), assistant(None, tool_calls=[call("weather", {})])) == (
        "<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call><|im_end|>\n'
    )


def test_pictures_and_videos_have_no_spaces_around_them(render):
    content = [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "and"},
        {"type": "video", "video": "b.mp4"},
        {"type": "image_url", "image_url": {"url": "c.png"}},
        {"type": "text", "text": "?"},
    ]
    assert render(user(content)) == f"<|im_start|>user\n{PICTURE}and{VIDEO}{PICTURE}?<|im_end|>\n"


@pytest.mark.parametrize("part", [{"image": "a.png"}, {"image_url": "a.png"}, {"type": "image"}])
def test_spellings_of_a_picture(render, part):
    assert render(user([part])) == f"<|im_start|>user\n{PICTURE}<|im_end|>\n"


@pytest.mark.parametrize("part", [{"video": "a.mp4"}, {"type": "video"}, {"type": "video_url", "video_url": "a"}])
def test_spellings_of_a_video(render, part):
    assert render(user([part])) == f"<|im_start|>user\n{VIDEO}<|im_end|>\n"


def test_rows_of_a_table_fill_unused_keys_with_null(render):
    """Arrow gives every part all keys; a text part with `image: None` is still text."""
    assert render(user([{"type": "text", "text": "a", "image": None, "video": None}])) == (
        "<|im_start|>user\na<|im_end|>\n"
    )


def test_vision_ids_count_over_all_messages(render):
    picture, video = {"type": "image"}, {"type": "video"}
    conversation = (user([picture, video, picture]), assistant("so"), user([picture]))
    assert render(*conversation, add_vision_id=True) == (
        f"<|im_start|>user\nPicture 1: {PICTURE}Video 1: {VIDEO}Picture 2: {PICTURE}<|im_end|>\n"
        "<|im_start|>assistant\nso<|im_end|>\n"
        f"<|im_start|>user\nPicture 3: {PICTURE}<|im_end|>\n"
    )


def test_system_assistant_and_tool_content_in_parts(render):
    def parts(*texts):
        return [{"type": "text", "text": text} for text in texts]

    in_parts = (
        system(parts("Be ", "brief.")),
        user(parts("1+1?")),
        assistant(parts("<think>\nadd\n</think>\n\n", "2"), tool_calls=[call("weather", {})]),
        tool(parts("dry")),
    )
    plain = (
        system("Be brief."),
        user("1+1?"),
        assistant("<think>\nadd\n</think>\n\n2", tool_calls=[call("weather", {})]),
        tool("dry"),
    )
    for tools in (None, TOOLS):
        assert render(*in_parts, tools=tools) == render(*plain, tools=tools)
    assert "<think>\nadd\n</think>\n\n2" in render(*in_parts)


def test_an_unknown_part_is_an_error(render):
    import jinja2

    with pytest.raises(jinja2.TemplateError, match="neither text, image nor video"):
        render(user([{"type": "audio", "audio": "a.wav"}]))
