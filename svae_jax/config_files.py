"""Where configurations are: a file of the user's, or one that comes with the package, by its name.

A wheel holds the files of the checkout's folder `configs` in the package, as setup.py says.
"""

import os
from pathlib import Path

from svae_jax.errors import UserError

_PACKAGE = Path(__file__).parent


def names() -> list[str]:
    """The configurations that come with the package, such as "shapes"."""
    return sorted(path.stem for path in _folder().glob("*.py"))


def resolved(config: str) -> str:
    """The path of a configuration, with what stands behind its colon.

    Args:
        config: a path, or a name of `names`, such as "shapes:best", which becomes
            ".../configs/shapes.py:best". A file of one's own without a suffix is given as "./NAME".

    Raises:
        UserError: it is neither, with the names that are known.
    """
    name, colon, argument = config.partition(":")
    if os.path.dirname(name) or ".py" in config:
        return config
    if name not in names():
        raise UserError(
            f"--config={name}: there is no such configuration; give one of {', '.join(names())}, "
            "or the path of a file, such as ./mine.py"
        )
    path = _folder() / f"{name}.py"
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return f"{path}{colon}{argument}"


def _folder() -> Path:
    """The folder of configurations: in the package, or beside it in a checkout."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"
