"""Experts of one model in the order of another's: a layer's experts can be permuted, with the router's columns, and the
model stays the same; the mean of two such models does not."""

from __future__ import annotations

import numpy as np

from moe_jax.merging.models import MergeError, Model, Ours


def orders(base: Model, model: Model) -> dict[str, np.ndarray]:
    """Leaf -> order_NxE: for each of N layers the expert of `model` that is likest to each expert of `base`, one to
    one (Kuhn 1955; by the inner products of their weights), for the leaves of experts and of routers.

    Raises MergeError for models without experts of ours.
    """
    from scipy.optimize import linear_sum_assignment  # half a second to import

    if not isinstance(base, Ours) or not isinstance(model, Ours) or not base.moe:
        raise MergeError(f"{base.path}: align is for mixtures of experts in checkpoints of moe_jax")
    found: dict[str, np.ndarray] = {}
    for layer_of in sorted({name.partition("/experts/")[0] for name in base.moe}):
        mine = [name for name in base.moe if name.startswith(f"{layer_of}/experts/")]
        layers, experts = base.shapes[mine[0]][:2]
        alike_NxExE = np.zeros((layers, experts, experts))
        for name in mine:
            for layer in range(layers):
                a, b = (np.asarray(m.slice(name, (layer,)), np.float32).reshape(experts, -1) for m in (base, model))
                alike_NxExE[layer] += a @ b.T
        order_NxE = np.stack([linear_sum_assignment(alike, maximize=True)[1] for alike in alike_NxExE])
        routed = [name for name in base.routed if name.startswith(f"{layer_of}/router/")]
        routed = [name for name in routed if base.shapes[name][-1] == experts]
        # A router that learns nothing, such as by the task, knows experts by their places: there they stay.
        if not routed or base.placed(layer_of) or (order_NxE == np.arange(experts)).all():
            continue
        found |= dict.fromkeys([*mine, *routed], order_NxE)
    return found
