"""Qwen-Merge: graft the vision encoder of Qwen2.5-VL onto Qwen3 and train the result.

Importing this package imports nothing heavy: the command line answers before torch is needed.
"""

__version__ = "0.1.0"
