"""Compiled local search over the replica slots of each layer: which copies to hold so that the load is flattest.

A plan is scored by the most loaded device after an optimal split, averaged over several scenarios of the coming load
(runtime.balancing.water_filling). The search changes one replica slot at a time. A first-order gain ranks all (slot,
expert) changes, the best few are relaxed in full, and the best of those is taken if it saves more than its price. This
is repeated until no change pays. A search that runs out of trials continues from its result before the next batch.
Layers that the search alone can fill have trials of their own. Replicas of larger layers are placed by
runtime.balancing.matching first, and the search that follows shares its trials among them: the layer with most to gain
comes next. If the forecast is sure, changes that later ones have made dispensable are then undone; if not, the copies
stay, because they help where the load comes out differently.

Two devices with one replica slot each, experts 0 and 1 at home on device 0, loads [1.2, .4 | .3, .1] in units of the
mean device load. The score is .78; a copy of expert 0 on device 1 makes both loads 1 and saves all of it:

    >>> load = np.array([[[1.2], [0.4], [0.3], [0.1]]], dtype=np.float32)
    >>> sure, free = np.ones(1, dtype=np.float32), np.zeros(1, dtype=np.float32)
    >>> factor, first = np.ones((2, 2), dtype=np.float32), np.array([[0, 1, 2]])
    >>> held, home = np.array([[-1, -1]]), np.array([[0, 0, 1, 1]])
    >>> held, saved = improve(held, first, home, load, free[None], sure, free, factor, 2)
    >>> held.tolist(), round(float(saved[0]), 3)
    ([[-1, 0]], 0.78)

Shape suffixes: L MoE layers, K scenarios, E experts, R replica slots in device order, G devices.
"""

import numpy as np
from numba import njit

from data.arrays import Float32Array, IntArray
from runtime.balancing.candidates import Effort, candidates
from runtime.balancing.matching import fill
from runtime.balancing.water_filling import Layer, copy, fork, replace, score, start, start_exactly, start_like

WORK, LARGE_WORK, SURE_WORK = 40_000, 200_000, 400_000
"""Work allowed before one batch for each layer: trials, times slots and devices, times scenarios and six. The first is
for layers that the search alone can fill; the others for larger layers, which share the work of all, the last for a
forecast without spread."""
UNSURE, SURE = Effort(20, 20, 12, 8), Effort(48, 48, 12, 8)
"""In a layer that the search alone can fill. A forecast without spread is a single scenario, which costs little."""
LARGE_UNSURE, LARGE_SURE = Effort(20, 8, 12, 8), Effort(32, 8, 8, 32)
"""In a larger layer. With one replica slot on each device, many devices are worth more than many experts."""
FIRST_GAIN = np.float32(0.03)
"""Part of its overload that a layer is expected to gain by its first change."""
ROUGH_ROUND = 3
"""Changes after which the best one is taken if any pays, while slots are empty or the overload is above `ROUGH`, when
most copies help."""
ROUGH = 0.2
"""Overload in units of the mean device load."""
FILL_PRICE = 2.0
"""Price of a copy that `fill` places, relative to one of the search: it counts the largest device alone."""
REBUILD = 1.1
"""Largest device load, in units of the mean, above which replicas are built anew if that pays for all their copies."""


@njit(cache=True, nogil=True)
def improve(
    held_LR: IntArray,
    first_LG: IntArray,
    home_LE: IntArray,
    load_LEK: Float32Array,
    waking_LK: Float32Array,
    weight_K: Float32Array,
    price_L: Float32Array,
    factor_GG: Float32Array,
    max_moves: int,
) -> tuple[IntArray, Float32Array]:
    """Improves the replicas of all layers.

    Args:
        held_LR: Expert in each replica slot, -1 where empty.
        first_LG: First replica slot of each device, and R at the end, `[L, G + 1]`.
        home_LE: Home device of each expert.
        load_LEK: Load of each expert in each scenario.
        waking_LK: Price of an active slot in each scenario, in the units of loads.
        weight_K: Weight of each scenario; they sum to 1.
        price_L: Least score that a copy must save.
        factor_GG: Factor to the price of a copy from one device to another, at least 1.
        max_moves: Most slots of a layer that may change.

    Returns:
        The improved replicas `[L, R]`, and the score that those of each layer save, prices not subtracted, `[L]`.
    """
    sure = weight_K.size == 1
    work = (held_LR.shape[1] + first_LG.shape[1] - 1) * (6 + weight_K.size)
    layers, before_L, left_L = [], np.zeros(len(held_LR), dtype=np.float32), np.full(len(held_LR), max_moves)
    alone = work * ROUGH_ROUND * held_LR.shape[1] <= WORK  # the search alone can fill all slots
    for i in range(len(held_LR)):
        if alone:
            layer = start(held_LR[i], first_LG[i], home_LE[i], load_LEK[i], waking_LK[i])
            before_L[i] = score(layer.load, weight_K)
        else:
            layer, before_L[i], placed = filled(
                held_LR[i], first_LG[i], home_LE[i], load_LEK[i], waking_LK[i], weight_K, price_L[i], factor_GG,
                max_moves,
            )  # fmt: skip
            left_L[i] -= placed
        layers.append(layer)
    if alone:
        effort = SURE if sure else UNSURE
        score_L = np.zeros_like(before_L)
        for i in range(len(layers)):
            part = slice(i, i + 1)
            score_L[part] = _search(
                layers[part], weight_K, price_L[part], factor_GG, left_L[part], WORK // work, effort
            )
    else:
        trials = len(layers) * (SURE_WORK if sure else LARGE_WORK) // work
        score_L = _search(layers, weight_K, price_L, factor_GG, left_L, trials, LARGE_SURE if sure else LARGE_UNSURE)
        if sure:
            for i, layer in enumerate(layers):
                score_L[i] = undo(layer, held_LR[i], score_L[i], weight_K, price_L[i], factor_GG)
    improved = held_LR.copy()
    for i, layer in enumerate(layers):
        improved[i] = layer.held
    return improved, before_L - score_L


@njit(cache=True, nogil=True)
def filled(
    held_R: IntArray,
    first_G: IntArray,
    home_E: IntArray,
    load_EK: Float32Array,
    waking_K: Float32Array,
    weight_K: Float32Array,
    price: float,
    factor_GG: Float32Array,
    max_moves: int,
) -> tuple[Layer, np.float32, int]:
    """A layer after `fill` for the expected load, relaxed in all scenarios; the score before; copies placed."""
    load_E1, waking_1 = _expected(load_EK, weight_K), _expected(waking_K[None], weight_K)[0]
    layer = start_exactly(held_R, first_G, home_E, load_E1, waking_1)
    scenarios = layer if weight_K.size == 1 else start_like(layer, load_EK, waking_K, load_E1[:, 0])
    before = score(scenarios.load, weight_K)
    copy_price = np.float32(FILL_PRICE * price)
    placed = fill(layer, held_R, copy_price, factor_GG, max_moves)
    if layer.load[:, 0].max() > REBUILD:
        bare = start(np.full_like(held_R, -1), first_G, home_E, load_E1, waking_1)
        copies = fill(bare, held_R, copy_price, factor_GG, max_moves)
        if bare.load[:, 0].max() + copy_price * copies < layer.load[:, 0].max() + copy_price * placed:
            layer, placed = bare, copies
    if weight_K.size == 1:
        scenarios = layer
    elif (layer.held != held_R).any():
        scenarios = start_like(layer, load_EK, waking_K, load_E1[:, 0])
    return scenarios, before, placed


@njit(cache=True, nogil=True)
def _expected(load_EK: Float32Array, weight_K: Float32Array) -> Float32Array:
    """Weighted mean of the scenarios, `[E, 1]`."""
    mean = np.zeros((len(load_EK), 1), dtype=np.float32)
    for expert in range(len(load_EK)):
        for k in range(weight_K.size):
            mean[expert, 0] += weight_K[k] * load_EK[expert, k]
    return mean


@njit(cache=True, nogil=True)
def _search(
    layers: list[Layer],
    weight_K: Float32Array,
    price_L: Float32Array,
    factor_GG: Float32Array,
    left_L: IntArray,
    trials: int,
    effort: Effort,
) -> Float32Array:
    """Improves layers in place, the one with most to gain first, until the trials are used up; returns their scores.

    A layer is expected to gain as much as by its last change, and at first a part of its overload.

    Args:
        layers: Relaxed layers.
        weight_K: Weight of each scenario.
        price_L: Least score that a copy must save.
        factor_GG: Factor to that price.
        left_L: Most slots of each layer that may change.
        trials: Changes relaxed, in all layers together.
        effort: As in `_change`.
    """
    score_L = np.zeros(len(layers), dtype=np.float32)
    for i, layer in enumerate(layers):
        score_L[i] = score(layer.load, weight_K)
    gain_L, moves_L = FIRST_GAIN * score_L, left_L.copy()
    while trials > 0:
        i = int(np.argmax(gain_L))
        if gain_L[i] <= 0:
            break
        if score_L[i] <= price_L[i] or moves_L[i] <= 0:  # even a perfect balance would save less than a move costs
            gain_L[i] = 0
            continue
        layer = layers[i]
        reached, tried = _change(layer, fork(layer), score_L[i], weight_K, price_L[i], factor_GG, effort)
        gain_L[i] = score_L[i] - reached
        score_L[i] = reached
        moves_L[i] -= 1
        trials -= tried
    return score_L


@njit(cache=True, nogil=True)
def _change(
    layer: Layer,
    scratch: Layer,
    current: np.float32,
    weight_K: Float32Array,
    price: float,
    factor_GG: Float32Array,
    effort: Effort,
) -> tuple[np.float32, int]:
    """Makes the best change of a layer, in place, if it saves more than its price; returns the score and the trials.

    Args:
        layer: A relaxed layer.
        scratch: A copy of it.
        current: Its score.
        weight_K: Weight of each scenario.
        price: Least score that a copy must save.
        factor_GG: Factor to that price.
        effort: How far the change is looked for.
    """
    slots, experts = candidates(layer, weight_K, effort)
    rough = current > ROUGH or (slots.size > 0 and layer.held[slots[0]] < 0)
    least, chosen, tried = current, -1, 0
    for i in range(slots.size):
        if chosen >= 0 and i >= (ROUGH_ROUND if rough else effort.enough):
            break
        copy(layer, scratch, experts[i])
        replace(scratch, slots[i], experts[i])
        device = layer.device[slots[i]]
        cost = score(scratch.load, weight_K) + price * factor_GG[layer.home[experts[i]], device]
        tried += 1
        if cost < least:
            least, chosen = cost, i
    if chosen < 0:
        return current, tried
    replace(layer, slots[chosen], experts[chosen])
    return score(layer.load, weight_K), tried


@njit(cache=True, nogil=True)
def undo(
    layer: Layer,
    held_R: IntArray,
    current: np.float32,
    weight_K: Float32Array,
    price: float,
    factor_GG: Float32Array,
) -> np.float32:
    """Undoes the changes of a layer that save less than their price by now, in place; returns the score.

    Copies in slots that were empty stay, and slots that were emptied get their experts back.

    Args:
        layer: A relaxed layer.
        held_R: Expert in each replica slot before the changes, -1 where empty.
        current: Its score.
        weight_K: Weight of each scenario.
        price: Least score that a copy must save.
        factor_GG: Factor to that price.
    """
    scratch = fork(layer)
    for slot in range(held_R.size):
        old, new, device = held_R[slot], layer.held[slot], layer.device[slot]
        if old == new or old < 0 or old in layer.held[layer.first[device] : layer.first[device + 1]]:
            continue
        copy(layer, scratch, old)
        replace(scratch, slot, old)
        factor = factor_GG[layer.home[new], device] if new >= 0 else np.float32(1)
        if score(scratch.load, weight_K) < current + price * factor:
            replace(layer, slot, old)
            current = score(layer.load, weight_K)
    return current
