"""Overlays: how an installed or checked-out upstream comes to know the architecture.

One folder an upstream, with `overlay.yaml` (which versions, which files, sha256 before and after, why each hunk is
there and when it can go), one minimal unified diff a touched file, and the new files. Registration goes through an
upstream's public extension point wherever one reaches every process; a diff is for what has none.

    qwen-merge overlay apply|status|verify|revert [transformers llamafactory vllm vlmevalkit] [--root DIR]
"""
