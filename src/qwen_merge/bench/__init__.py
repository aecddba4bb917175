"""Measurements that back the kit's figures, kept as commands so that anyone can repeat them: `qwen-merge bench`."""
