"""Evaluation: Qwen-Merge models in VLMEvalKit, scored on their answers and not on their thoughts.

VLMEvalKit asks and scores; what it lacks is here: the model entries (`vlmevalkit`), the model behind them with two back
ends and a served one (`models`), what is written beside the predictions (`records`), and where an answer begins
(`thoughts`). `qwen-merge overlay apply vlmevalkit` makes its `run.py` call this; `scripts/eval.sh` runs the 13 tasks.
"""
