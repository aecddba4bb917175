"""For ms-swift: `--custom_register_path examples/simple_vl/register.py`. What it registers: src/qwen_merge/swift.py."""

from qwen_merge.swift import register

register()
