"""Questions drawn as pictures (stage 3, text to picture): `render.render(text) -> Rendered` or CannotDraw.

fonts.py finds faces, text.py says what can be drawn, layout.py breaks lines, colours.py picks ink and paper.
"""
