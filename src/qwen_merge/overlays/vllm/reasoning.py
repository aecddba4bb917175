"""`--reasoning-parser qwen_merge`: Qwen3's parser, for which a thought that is never closed is no answer.

vLLM 0.9.1's `qwen3` gives such a text as `content` when the answer comes whole and as `reasoning_content` when it is
streamed. A client that scores `content` would score the thought.
"""

NAME = "qwen_merge"


def register() -> None:
    """Add the parser to vLLM's list; safe to call again."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.reasoning.qwen3_reasoning_parser import Qwen3ReasoningParser

    if NAME in ReasoningParserManager.reasoning_parsers:
        return

    class QwenMergeReasoningParser(Qwen3ReasoningParser):
        def extract_reasoning_content(self, model_output, request):
            """(thought or None, answer or None)"""
            before, opened, thought = model_output.partition(self.think_start_token)
            if opened and not before.strip() and self.think_end_token not in thought:
                return thought, None
            return super().extract_reasoning_content(model_output, request)

    ReasoningParserManager.register_module(NAME, module=QwenMergeReasoningParser)
