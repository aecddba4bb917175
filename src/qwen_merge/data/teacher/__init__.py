"""Teachers and judges: models behind OpenAI-compatible servers that answer a set's questions again, and rate answers.

    vllm serve Qwen/Qwen3-32B --max-model-len 16384 --port 8000
    qwen-merge data text2image ask --endpoint http://localhost:8000/v1

`endpoints` sends one request to whichever server can take it, `replies` reads what comes back, `answers` sends a stream
of requests and keeps every answer as it comes, `judge` asks for a verdict and reads it, `filters` says which answers
are no good whatever a judge thinks, `texts` has what they share, `steps` what the commands share. What is asked, and
what becomes of an answer, is in `data.text2image` and `data.image_thinking`.
"""
