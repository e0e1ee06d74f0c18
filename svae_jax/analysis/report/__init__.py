"""Trained runs side by side, as one self-contained page.

`content` computes what is shown of a run, with `pictures` and `curves`; `page` writes it as HTML,
with `markup`.
"""
