r"""The graft: Qwen2.5-VL's vision tower and Qwen3's text model become one checkpoint, file to file.

`merge.py` is the order of events; `key_map.py` and `configuration.py` say what goes where; nothing here makes a model,
except `verify_forward.py`, which compares what the models compute.

    qwen-merge merge --vlm-path Qwen/Qwen2.5-VL-72B-Instruct --llm-path Qwen/Qwen3-4B \
        --output-path Qwen-Merge-VL-4B-base
    qwen-merge verify Qwen-Merge-VL-4B-base
"""
