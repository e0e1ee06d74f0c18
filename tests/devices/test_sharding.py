"""`sharding`: arrays that come back to the host."""

import jax
import numpy as np

from svae_jax.devices import sharding


def test_what_lies_on_other_processes_comes_back_by_one_program(monkeypatch, caplog):
    monkeypatch.setattr(sharding, "_is_remote", lambda leaf: True)  # as with several processes
    mesh = sharding.make_mesh()
    trees = [{"a": np.full((4 * mesh.size, 3), i, np.float32)} for i in range(3)]
    with jax.log_compiles():
        for tree in trees:
            put = {"a": sharding.put_rows(tree["a"], np.arange(len(tree["a"])), mesh)}
            found = sharding.on_host(put)
            np.testing.assert_array_equal(found["a"], tree["a"])
    assert sum("Compiling jit(<lambda>)" in line for line in caplog.messages) == 1
