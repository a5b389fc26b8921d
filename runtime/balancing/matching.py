"""Compiled construction of replicas: the excess of overloaded devices is matched to devices with room, best fit.

The local search (runtime.balancing.local_search) changes one slot at a time, which takes too long where hundreds of
slots are empty. `fill` places many copies at once. It aims at a target load: while a device is above it, tokens of that
device's most loaded expert go to a copy on the device with the least room that takes the whole excess, or on the device
with most room if none does. A device can also be filled exactly up to the target; the donor then has room of its own,
which further donors fill, as in Walker's alias method (Walker 1977; Vose 1991). That method needs only one replica slot
on each device to make any loads equal.

Several targets are tried. The chosen one minimises the largest load plus the price of the copies, so that a plan that
is nearly balanced changes by a few copies only.

    >>> from runtime.balancing.water_filling import start
    >>> load = np.array([[1.2], [0.4], [0.3], [0.1]], dtype=np.float32)
    >>> layer = start(np.array([-1, -1]), np.array([0, 1, 2]), np.array([0, 0, 1, 1]), load, np.zeros(1, np.float32))
    >>> fill(layer, np.array([-1, -1]), np.float32(0.001), np.ones((2, 2), dtype=np.float32), 2)
    1
    >>> layer.held.tolist(), layer.load[:, 0].round(3).tolist()
    ([-1, 0], [1.0, 1.0])

Shape suffixes: E experts, R replica slots in device order, G devices.
"""

import numpy as np
from numba import njit

from data.arrays import Float32Array, IntArray
from runtime.balancing.water_filling import FIRST_SWEEPS, Layer, fork, relax, send

LEAST_EXCESS = np.float32(0.003)
"""Excess over the mean device load, in units of it, that the first target leaves."""
UNUSED = np.float32(0.01)
"""Load of a replica, in units of the mean device load, up to which its slot may get another expert."""
LINK = np.float32(0.5)
"""Room that a donor of a nearly empty layer gets, so that a hotter expert's copy links its devices to others. Half a
device lets as many tokens flow one way as the other when loads change."""
SHORT, SHORT_LINKED = 10.0, 1.0
"""Loss for each token that finds no room, relative to room left over; the latter while links are made."""
FAR = np.float32(0.1)
"""Loss for each unit that the price factor of a copy is above 1."""
KEPT = np.float32(1)
"""Gain of a copy that finds its weights in the slot; when all replicas are built anew, most stay where they are."""
TARGETS = 6
"""Further targets tried after the first one."""


@njit(cache=True, nogil=True)
def fill(layer: Layer, kept_R: IntArray, price: np.float32, factor_GG: Float32Array, most: int) -> int:
    """Places copies in unused replica slots, in place, and relaxes the layer.

    Args:
        layer: A relaxed layer with one scenario.
        kept_R: Expert whose weights each replica slot has; a copy that finds its weights there costs no move.
        price: Largest device load that a copy must save.
        factor_GG: Factor to the price of a copy from one device to another, at least 1.
        most: Most copies to place.

    Returns:
        Copies placed that need a move.
    """
    order_E = np.argsort(layer.home, kind="mergesort")
    begin_G = np.zeros(len(layer.load) + 1, dtype=np.int64)
    for device in layer.home:
        begin_G[device + 1] += 1
    begin_G = np.cumsum(begin_G)
    top = layer.load[:, 0].max()
    empty = np.sum(layer.held < 0)
    links = bool(2 * empty > layer.held.size and most >= layer.held.size)
    best, least, copies, found = layer, top, 0, False
    low, high = np.float32(1) + LEAST_EXCESS, top
    target = low
    for _ in range(TARGETS + 1):
        if high - low < LEAST_EXCESS and target != low:
            break
        trial = fork(layer)
        placed, cost = _reach(trial, kept_R, target, most, factor_GG, order_E, begin_G, links)
        reached = trial.load[:, 0].max()
        if reached + price * cost < least:
            best, least, copies, found = trial, reached + price * cost, placed, True
        if reached <= target + LEAST_EXCESS:
            if target == low:
                break
            high = target
        else:
            low, links = target, False  # too few slots for links
        target = np.sqrt(low * high)
    if found:
        for slot in range(layer.held.size):
            layer.held[slot] = best.held[slot]
        layer.on_replica[:], layer.at_home[:], layer.load[:] = best.on_replica, best.at_home, best.load
        layer.changed[:] = 0
        relax(layer, FIRST_SWEEPS)
    return copies


@njit(cache=True, nogil=True)
def _reach(
    layer: Layer,
    kept_R: IntArray,
    target: np.float32,
    most: int,
    factor_GG: Float32Array,
    order_E: IntArray,
    begin_G: IntArray,
    links: bool,
) -> tuple[int, np.float32]:
    """Places copies until no device is above the target, in place; returns their number and sum of price factors.

    The most loaded device is relieved first. Where `links` is true it is the device with least excess: each donor gives
    more than it must, and the hottest experts fill all the room that is left, so that their copies link all devices.
    Experts at home on device g are `order_E[begin_G[g] : begin_G[g + 1]]`.
    """
    load_G, copies, cost = layer.load[:, 0], 0, np.float32(0)
    while copies < most:
        donor = int(np.argmax(load_G))
        excess = load_G[donor] - target
        if excess <= LEAST_EXCESS / 2:
            break
        for device in range(load_G.size if links else 0):
            if LEAST_EXCESS / 2 < load_G[device] - target < excess:
                donor, excess = device, load_G[device] - target
        expert, leave = _most_loaded(layer, donor, order_E[begin_G[donor] : begin_G[donor + 1]])
        held = np.float32(0)
        if expert >= 0:
            held = layer.at_home[expert, 0] if leave < 0 else layer.on_replica[leave, 0]
        tokens = min(excess, held)
        if tokens < LEAST_EXCESS / 2:
            break
        spare = _spare_slot(layer, donor)
        wanted = min(excess + LINK, held) if links and spare else tokens
        short = SHORT_LINKED if links else SHORT
        slot, room = _receiver(layer, kept_R, expert, donor, wanted, target, factor_GG, short)
        if slot < 0:
            break
        if tokens < room and spare:
            tokens = min(room, held)
        tokens = min(tokens, room)
        _place(layer, slot, expert, tokens, leave)
        if kept_R[slot] != expert:
            copies += 1
            cost += factor_GG[layer.home[expert], layer.device[slot]]
    return copies, cost


@njit(cache=True, nogil=True)
def _spare_slot(layer: Layer, device: int) -> bool:
    """Whether a device has a replica slot that is empty or hardly used."""
    for slot in range(layer.first[device], layer.first[device + 1]):
        if layer.held[slot] < 0 or layer.on_replica[slot, 0] <= UNUSED:
            return True
    return False


@njit(cache=True, nogil=True)
def _most_loaded(layer: Layer, device: int, at_home: IntArray) -> tuple[int, int]:
    """The expert with most tokens on a device and the replica slot that they are in, -1 for its home."""
    expert, leave, most = -1, -1, np.float32(0)
    for other in at_home:
        if layer.at_home[other, 0] > most:
            expert, most = other, layer.at_home[other, 0]
    for slot in range(layer.first[device], layer.first[device + 1]):
        if layer.held[slot] >= 0 and layer.on_replica[slot, 0] > most:
            expert, leave, most = layer.held[slot], slot, layer.on_replica[slot, 0]
    return expert, leave


@njit(cache=True, nogil=True)
def _receiver(
    layer: Layer,
    kept_R: IntArray,
    expert: int,
    donor: int,
    tokens: np.float32,
    target: np.float32,
    factor_GG: Float32Array,
    short: float,
) -> tuple[int, np.float32]:
    """The slot to put a copy into, or -1, and the tokens that its device has room for.

    The least loss wins: room left over, or `short` times the tokens that find no room, and tokens that are sent home
    from the slot. A used slot is taken only if all tokens fit and its expert's home has room for its own again.
    """
    best, best_room, least = -1, np.float32(0), np.float32(np.inf)
    for device in range(len(layer.load)):
        free = target - layer.load[device, 0]
        if free <= -UNUSED or device == donor or _holds(layer, device, expert):
            continue
        for slot in range(layer.first[device], layer.first[device + 1]):
            old, used = layer.held[slot], layer.on_replica[slot, 0]
            room = free + used if used > 0 else free - layer.waking[0]
            if room <= LEAST_EXCESS:
                continue
            if old >= 0 and used > 0 and (room < tokens or layer.load[layer.home[old], 0] + used > target):
                continue
            loss = used + (room - tokens if room >= tokens else np.float32(short) * (tokens - room))
            loss += FAR * (factor_GG[donor, device] - 1)
            if kept_R[slot] == expert:
                loss -= KEPT
            if loss < least:
                best, best_room, least = slot, room, loss
    return best, best_room


@njit(cache=True, nogil=True)
def _holds(layer: Layer, device: int, expert: int) -> bool:
    """Whether a device holds an expert, at home or as a replica."""
    holds = bool(layer.home[expert] == device)
    for slot in range(layer.first[device], layer.first[device + 1]):
        holds = holds or layer.held[slot] == expert
    return holds


@njit(cache=True, nogil=True)
def _place(layer: Layer, slot: int, expert: int, tokens: np.float32, leave: int) -> None:
    """Puts an expert into a slot and sends it tokens; tokens of the expert that leaves go home."""
    if layer.held[slot] >= 0:
        send(layer, slot, 0, -layer.on_replica[slot, 0])
    layer.held[slot] = expert
    layer.on_replica[slot, 0] = 0
    if leave >= 0:
        send(layer, leave, 0, -tokens)
    send(layer, slot, 0, tokens)
