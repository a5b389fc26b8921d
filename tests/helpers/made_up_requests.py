"""A small made-up recording, token by token: experts are a function of the token, of its neighbour and of the layer."""

from pathlib import Path

import numpy as np

VOCABULARY, EXPERTS, LAYERS, TOP_K = 48, 8, 2, 2


def arrays(subjects: int = 8, each: int = 6, seed: int = 0) -> dict[str, np.ndarray]:
    """The arrays of `data/traces/token_recording.py`; each subject uses a third of the vocabulary."""
    rng, names = np.random.default_rng(seed), [f"subject {number}" for number in range(subjects)]
    tokens, lengths, first, routed, experts, subject = [], [], [], [], [], []
    for number in range(subjects):
        for _ in range(each):
            length, before = int(rng.integers(12, 60)), int(rng.integers(0, 6))
            own = rng.integers(0, VOCABULARY // 3, length) + VOCABULARY // 3 * (number % 3)
            tokens.append(own)
            lengths.append(length)
            first.append(before)
            routed.append(length - before - 1)  # the last token is never fed
            chosen = own[before : before + routed[-1]]
            one = np.stack([(chosen + layer) % EXPERTS for layer in range(LAYERS)], 1)
            experts.append(np.stack([one, (one + 1 + chosen[:, None] % 3) % EXPERTS], -1))
            subject.append(number)
    return {
        "tokens": np.concatenate(tokens).astype(np.int32), "length": np.array(lengths), "first_routed": np.array(first),
        "routed": np.array(routed), "experts": np.concatenate(experts).astype(np.uint8), "subject": np.array(subject),
        "subjects": np.array(names), "vocabulary": np.array(VOCABULARY),
    }  # fmt: skip


def write_recording(path: Path, **changes: np.ndarray | None) -> Path:
    """Writes the recording with some arrays changed, or left out where None."""
    np.savez(path, **{name: value for name, value in (arrays() | changes).items() if value is not None})
    return path
