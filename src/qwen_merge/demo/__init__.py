"""The tiny world: a text model learns to see in minutes, without a GPU and without a download.

`qwen-merge demo` makes two tiny checkpoints of the real architectures, joins them with the kit's own merger, trains
them with the kit's own recipes and asks them questions about pictures that no training ever showed. Everything that
the four stages mean at real size happens here in small: a text model that knows the world in words, a vision tower
that has seen pictures, and a projector that must bring the two together.
"""
