"""The device mesh, and one table of rules that shards every parameter over it.

The network holds no sharding words: a leaf is sharded by the first rule whose pattern matches in
its path, so parameters, their moving average and the optimizer's moments follow the same rule.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sedd_jax.parallel import processes

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# Blocks are stacked along axis 0. tensor splits heads and the MLP's width, fsdp the hidden size.
RULES = (
    (r"blocks/qkv/kernel$", P(None, "fsdp", None, "tensor", None)),
    (r"blocks/out/kernel$", P(None, "tensor", None, "fsdp")),
    (r"blocks/up/kernel$", P(None, "fsdp", "tensor")),
    (r"blocks/up/bias$", P(None, "tensor")),
    (r"blocks/down/kernel$", P(None, "tensor", "fsdp")),
    (r"blocks/modulation/linear/kernel$", P(None, None, "fsdp")),
    (r"modulation/linear/kernel$", P(None, "fsdp")),
    (r"(embedding|head_weight)$", P(None, "fsdp")),
    (r"(blocks/down|modulation/linear|sigma_[12])/bias$", P()),
    (r"sigma_[12]/kernel$", P()),
    (r"(norm|norm_[12])/scale$", P()),
    (r"head_bias$", P()),
    (r"(input|self_conditioning)/kernel$", P(None, "fsdp")),
    (r"(embeddings|gamma_0|gamma_log_range|gamma_log_weights)$", P()),
    (r"(^|/)(step|count|ema_updates|skipped|skipped_in_a_row)$", P()),
)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices; sizes names the axes data, fsdp and tensor, one of which may be -1.

    ValueError if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = [int(sizes[axis]) for axis in AXES]
    requested = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape))
    if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
        raise ValueError(f"mesh {requested}: every size must be at least 1, and one may be -1")
    rest = math.prod(size for size in shape if size != -1)
    if -1 in shape and len(devices) % rest == 0:
        shape[shape.index(-1)] = len(devices) // rest
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"mesh {requested} does not multiply to {len(devices)} devices; "
            "set one size to -1 to fit it to them"
        )
    kinds = (AxisType.Auto,) * len(AXES)
    slices = 1
    if devices[0].platform == "tpu":
        slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(tuple(shape), AXES, devices=devices, axis_types=kinds)
    # The data centre's network between slices is slower than the links within one: only the
    # gradients of data parallelism cross it.
    if shape[0] % slices:
        raise ValueError(
            f"mesh data={shape[0]} does not divide over {slices} TPU slices; fsdp and tensor do "
            f"not cross slices, so make data a multiple of {slices}"
        )
    inside, across = (shape[0] // slices, *shape[1:]), (slices, 1, 1)
    grid = mesh_utils.create_hybrid_device_mesh(
        inside, across, devices, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES, axis_types=kinds)


def path_name(path) -> str:
    """A tree path as params/blocks/qkv/kernel."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def spec_for(name: str, shape: tuple[int, ...]) -> P:
    """The spec of the first rule whose pattern matches in name; ValueError if there is none."""
    for pattern, spec in RULES:
        if re.search(pattern, name):
            return spec
    raise ValueError(f"no sharding rule for {name} {shape}; add one to sharding.RULES")


def tree_shardings(tree: Any, mesh: Mesh | None) -> Any:
    """The sharding of every leaf of a tree of arrays or shapes: by RULES, or, without a mesh, all
    on this process's first device."""
    if mesh is None:
        return jax.tree.map(lambda leaf: whole(mesh), tree)

    def leaf_sharding(path, leaf):
        name = path_name(path)
        spec = spec_for(name, leaf.shape)
        for size, axis in zip(leaf.shape, spec):
            if axis is not None and size % mesh.shape[axis]:
                raise ValueError(
                    f"{name} {leaf.shape}: {size} is not divisible by the mesh's "
                    f"{axis}={mesh.shape[axis]}; choose another mesh or model size"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def whole(mesh: Mesh | None) -> jax.sharding.Sharding:
    """All on each device of the mesh, or, without one, on this process's first device."""
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, P())


def with_shardings(shape: Any, shardings: Any) -> Any:
    """A tree of shapes, each leaf with its sharding."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shape,
        shardings,
    )


def batch_parts(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def put_whole(batch: Any, mesh: Mesh) -> Any:
    """A global batch, a tree of numpy arrays that every process holds, as arrays over the mesh."""
    rows = NamedSharding(mesh, BATCH)
    return put_tree("batch", batch, jax.tree.map(lambda _: rows, batch))


def put_beside(params: Any, batch: Any, mesh: Mesh | None) -> Any:
    """`put_whole`, or, without a mesh, where the weights are: elsewhere jit would compile again."""
    if mesh is not None:
        return put_whole(batch, mesh)
    leaf = next(iter(jax.tree.leaves(params)), None)
    return jax.device_put(batch, getattr(leaf, "sharding", whole(None)))


def put_tree(what: str, tree: Any, shardings: Any) -> Any:
    """A tree of numpy arrays that every process of the shardings holds, as jax arrays.

    ValueError on all of several processes, where `what` names the tree, if they hold different
    arrays: of each the others would see a part.
    """
    leaves = jax.tree.leaves(shardings)
    if not all(sharding.is_fully_addressable for sharding in leaves):
        processes.check_equal(what, tree)
    return jax.tree.map(
        lambda a, where: jax.make_array_from_callback(a.shape, where, lambda part: a[part]),
        tree,
        shardings,
    )


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of the global batch, a tree of numpy arrays, as arrays over the mesh."""
    rows = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(rows, a), batch)


@dataclasses.dataclass(frozen=True)
class Placement:
    """How the network's arrays are sharded: over a mesh, or without one as the compiler likes.

    Without these constraints the partitioner, which sees parameters split along the hidden size,
    propagates the FSDP split to activations, and sums over those of the whole batch.
    """

    mesh: Mesh | None = None

    @property
    def is_split(self) -> bool:
        """Whether arrays may be split over several devices."""
        return self.mesh is not None and self.mesh.size > 1

    @property
    def platform(self) -> str:
        """The devices' platform, as jax names it; a mesh may be of another machine's devices."""
        if self.mesh is None:
            return jax.default_backend()
        return self.mesh.devices.flat[0].platform

    @property
    def is_one_cpu(self) -> bool:
        """Whether arrays are whole, on one CPU, which kernels/ has forms for."""
        return self.platform == "cpu" and not self.is_split

    def _constrain(self, x: jax.Array, spec: P) -> jax.Array:
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def rows(self, x: jax.Array) -> jax.Array:
        """An activation [B, ...], split as the batch is, and along no other axis."""
        return self._constrain(x, BATCH)

    def whole(self, x: jax.Array) -> jax.Array:
        """A table that every row uses, on every device: gathered once, not once per block."""
        return self._constrain(x, P())

    def over_rows(self, fn: Callable, rows: Any, whole: Any) -> Any:
        """fn(rows, whole) with trees of [B, ...] and of what every row uses.

        Each device computes its rows; the gradient of whole is summed over devices.
        """
        if not self.is_split:
            return fn(rows, whole)
        # An axis that is not named is summed over for the gradient of rows, even one of size 1.
        spec = P(AXES) if self.mesh.shape["tensor"] == 1 else BATCH
        return self._shard_map(fn, (spec, P()), spec)(rows, whole)

    def over_heads(self, fn: Callable, heads: Any, rows: Any) -> Any:
        """fn(heads, rows) with trees of [B, L, H, K] and of [B, ...].

        Each device computes its rows and its heads.
        """
        if not self.is_split:
            return fn(heads, rows)
        spec = P(("data", "fsdp"), None, "tensor", None)
        return self._shard_map(fn, (spec, BATCH), spec)(heads, rows)

    def _shard_map(self, fn: Callable, in_specs: Any, out_specs: Any) -> Callable:
        return jax.shard_map(
            fn, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
