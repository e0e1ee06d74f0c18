"""Trained runs side by side, as one self-contained page.

`content` computes what is shown of a run; `page` fills the template `page.html` with it.
"""
