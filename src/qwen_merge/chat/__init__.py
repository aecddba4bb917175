"""`qwen-merge chat`: one question about a picture or a video, answered on the terminal."""
