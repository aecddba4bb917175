"""Stage 3, text to picture: questions from public text sets, answered by a teacher, judged, and drawn as pictures.

    qwen-merge data text2image ask --endpoint http://localhost:8000/v1
    qwen-merge data text2image judge --endpoint http://localhost:8000/v1
    qwen-merge data text2image convert --workers 8

`questions` reads the sets, `ask`, `judge` and `convert` are the three steps. Answers and verdicts stay in
<output>/text2image.answers/, so that the set can be made again without asking again.
"""

SET = "text2image"
THINKING = "thinking"
PLAIN = "plain"
