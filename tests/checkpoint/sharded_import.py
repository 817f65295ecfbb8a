"""An import onto six devices against that onto one: `python sharded_import.py FOLDER`."""

import sys

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.checkpoint import import_model
from moejax.models import parameters

if __name__ == "__main__":
    mesh = jax.make_mesh((3, 2), ("expert", "model"))

    def place(name: str, shape: tuple[int, ...]) -> NamedSharding:
        if ".moe.experts." in name:
            by = P(None, "expert", "model") if shape[2] % 2 == 0 else P(None, "expert")
        else:
            by = P(*(None,) * (len(shape) - 1), "model") if shape[-1] % 2 == 0 else P()
        return NamedSharding(mesh, by)

    assert len(jax.devices()) == 6
    one, many = import_model(sys.argv[1]), import_model(sys.argv[1], sharding=place)
    bank = many.model.runs[0].moe.experts.gate.get_value()
    assert bank.addressable_shards[0].data.shape[1] == bank.shape[1] // 3
    mine, theirs = parameters(one.model), parameters(many.model)
    for name in mine:
        np.testing.assert_array_equal(np.asarray(mine[name]), np.asarray(theirs[name]))
    print("equal")
