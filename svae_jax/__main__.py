"""Lists the commands of the package.

python -m svae_jax
"""

import sys

COMMANDS = {
    "main": "trains a model, or goes on with a run",
    "fit_sampler": "fits a distribution of latents to a trained model",
    "evaluate": "evaluates trained models on held-out images",
    "sample": "draws images, or reconstructs pictures of your own",
    "encode": "writes the latents of a data set",
    "explore": "shows trained runs side by side, as one page",
    "pack": "writes a trained model as one small file",
    "unpack": "makes a run of such a file, or of a model that comes with the package",
}


def text() -> str:
    """The commands and what each does, one a line."""
    width = max(map(len, COMMANDS))
    lines = [f"  python -m svae_jax.{name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(["Commands, each with --help:", *lines])


if __name__ == "__main__":
    print(text())
    # A command that was meant, such as `python -m svae_jax train`, has not run.
    sys.exit(0 if set(sys.argv[1:]) <= {"--help", "-h"} else 2)
