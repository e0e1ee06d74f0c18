"""Parts that end in every way, for the tests of the process that runs them."""

import os
import time

from experiments.accelerator.parts import Part


def _rows(context):
    yield {"pid": os.getpid()}


def _failing(context):
    yield {"row": 1}
    raise ValueError("the reason\nand more")


def _dying(context):
    os._exit(3)
    yield


def _slow(context):
    yield {"row": 1}
    time.sleep(100)


def _memory(context):
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")
    yield


PARTS = {
    name: Part(measure, 1)
    for name, measure in {
        "rows": _rows, "failing": _failing, "dying": _dying, "slow": _slow, "memory": _memory,
    }.items()
}  # fmt: skip
