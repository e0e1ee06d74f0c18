"""HTML as text, escaped once."""

import html


class Markup(str):
    """HTML that is written already; any other text is escaped where it enters a tag."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: str) -> Markup:
    """An element; an attribute's name may end in an underscore, as in `class_`."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for key, value in attributes.items()
    )
    return Markup(f"<{name}{given}>{join(*children)}</{name}>")


def void(name: str, /, **attributes: str) -> Markup:
    """An element without content, such as an image."""
    return Markup(tag(name, **attributes).removesuffix(f"</{name}>"))


def join(*children: str) -> Markup:
    """Children one after the other."""
    return Markup(
        "".join(child if isinstance(child, Markup) else html.escape(child) for child in children)
    )
