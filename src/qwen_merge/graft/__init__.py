"""Any vision tower, projector and LLM from one file: `qwen-merge graft FILE`."""
