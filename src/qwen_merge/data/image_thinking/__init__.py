"""Stage 3, multimodal distillation: samples of the converted LLaVA-OneVision sets, answered again by a reasoning VLM.

    qwen-merge data image-thinking ask --endpoint http://localhost:8000/v1
    qwen-merge data image-thinking judge --endpoint http://localhost:8000/v1

`samples` draws them, `ask` sends them with their pictures, `answer` reads what comes back, `judge` applies the six
filters, asks for verdicts and writes the set, with the pictures.
"""

SET = "image_thinking"
