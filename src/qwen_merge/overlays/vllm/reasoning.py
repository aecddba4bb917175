"""`--reasoning-parser qwen_merge`: Qwen3's parser, for which a thought that is never closed is no answer.

The `qwen3` of vLLM 0.9.1 and 0.12 gives such a text as `content` when the answer comes whole and as `reasoning_content`
when it is streamed. A client that scores `content` would score the thought.
"""

NAME = "qwen_merge"


def register() -> None:
    """Add the parser to vLLM's list; safe to call again."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.reasoning.qwen3_reasoning_parser import Qwen3ReasoningParser

    if NAME in ReasoningParserManager.reasoning_parsers:
        return

    # Its name in vLLM 0.9.1, and in 0.12.
    old, new = "extract_reasoning_content", "extract_reasoning"
    method = old if hasattr(Qwen3ReasoningParser, old) else new
    original = getattr(Qwen3ReasoningParser, method)

    def extract(self, model_output, request):
        """(thought or None, answer or None)"""
        before, opened, thought = model_output.partition("<think>")
        if opened and not before.strip() and "</think>" not in thought:
            return thought, None
        return original(self, model_output, request)

    QwenMergeReasoningParser = type("QwenMergeReasoningParser", (Qwen3ReasoningParser,), {method: extract})

    ReasoningParserManager.register_module(NAME, module=QwenMergeReasoningParser)
