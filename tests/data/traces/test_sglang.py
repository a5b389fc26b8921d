"""SGLang's recordings of every mode, several in one folder, ranks and maps; what is not clear is refused."""

import numpy as np
import pytest
import torch

from data.traces.loads import read_loads
from data.traces.sglang import RING

COUNTS = np.random.default_rng(0).integers(1, 50, (5, 3, 8))
SLOTS = torch.tensor([[*range(8), 2, 5, -1]] * 3)
"""Eleven slots a layer: experts 2 and 5 have a second one, and one slot is empty."""


def test_sglang_stat(tmp_path):
    torch.save({"rank": 0, "logical_count": torch.from_numpy(COUNTS)}, tmp_path / "s.pt")
    assert np.array_equal(read_loads(tmp_path / "s.pt").loads, COUNTS)


def test_sglang_per_pass_sums_replicas_and_ranks(tmp_path):
    """Two ranks count half each."""
    for rank in (0, 1):
        records = []
        for number, counts in enumerate(torch.from_numpy(COUNTS)):
            half = counts // 2 if rank else counts - counts // 2
            physical = torch.zeros(3, 11, dtype=torch.int32)
            physical[:, :8] = half
            physical[:, 8], physical[:, 2] = half[:, 2] // 3, half[:, 2] - half[:, 2] // 3
            physical[:, 9], physical[:, 5] = half[:, 5], 0
            records.append(
                {
                    "forward_pass_id": 100 - number,
                    "rank": rank,
                    "gatherer_key": "primary",
                    "global_physical_count": physical,
                }
            )
        torch.save({"records": records, "last_physical_to_logical_map": SLOTS}, tmp_path / f"recorder_{rank}.pt")
    assert np.array_equal(read_loads(tmp_path).loads, COUNTS[::-1]), "passes come in the order of their numbers"


def record(number, rank=0, **counted):
    return {"forward_pass_id": number, "rank": rank, "gatherer_key": "primary", **counted}


def save(path, *records, slots=SLOTS):
    torch.save({"records": list(records), "last_physical_to_logical_map": slots}, path)


def physical(counts):
    """Counts `[L, E]` as counts of `SLOTS`."""
    return torch.from_numpy(np.pad(counts, ((0, 0), (0, 3))))


def test_recordings_of_a_folder_follow_one_another_in_time(tmp_path):
    for time, part in ((1700000010.5, COUNTS[:2]), (1700000011.25, COUNTS[2:]), (1700000009.0, COUNTS[:1])):
        torch.save(
            {"rank": 0, "logical_count": torch.from_numpy(part)}, tmp_path / f"expert_distribution_recorder_{time}.pt"
        )
    assert np.array_equal(read_loads(tmp_path).loads, np.concatenate([COUNTS[:1], COUNTS]))


def test_passes_of_a_server_that_was_started_again_are_not_added_up(tmp_path):
    for time, factor in ((5.5, 2), (4.5, 1)):
        for rank in (0, 1):
            records = [record(n, rank, global_physical_count=physical(factor * COUNTS[n])) for n in range(2)]
            save(tmp_path / f"expert_distribution_recorder_{time + rank / 10}_{rank}.pt", *records)
    expected = np.concatenate([COUNTS[:2] * 2, COUNTS[:2] * 4])
    assert np.array_equal(read_loads(tmp_path).loads, expected)


def test_ranks_that_counted_the_same_tokens_are_named(tmp_path, caplog):
    for rank in (0, 1):
        save(tmp_path / f"r_1.0_{rank}.pt", record(0, rank, global_physical_count=physical(COUNTS[0])))
    assert np.array_equal(read_loads(tmp_path).loads[0], 2 * COUNTS[0])
    assert "all 2 ranks counted the same tokens in every pass" in caplog.text


def test_per_token_records_are_counted_slot_by_slot(tmp_path):
    ids = torch.tensor([[[0, 8, -1], [2, 1, -1]], [[-1, -1, -1]] * 2, [[9, 3, -1], [5, 4, -1]]])
    save(tmp_path / "r.pt", record(7, topk_ids_of_layer=ids.int(), input_ids=[1, 2]))
    expected = [[1, 1, 2, 0, 0, 0, 0, 0], [0] * 8, [0, 0, 0, 1, 1, 2, 0, 0]]
    assert read_loads(tmp_path / "r.pt").loads.tolist() == [expected]


def test_counts_in_bfloat16(tmp_path):
    torch.save({"logical_count": torch.from_numpy(COUNTS).bfloat16()}, tmp_path / "s.pt")
    assert np.array_equal(read_loads(tmp_path / "s.pt").loads, COUNTS)


def test_a_ring_buffer_that_may_have_wrapped_is_named_and_its_unused_end_left_out(tmp_path, caplog):
    ring = torch.ones(RING, 1, 4, dtype=torch.int64)
    torch.save({"logical_count": ring}, tmp_path / "full.pt")
    assert read_loads(tmp_path / "full.pt").loads.shape == (RING, 1, 4)
    assert "full.pt holds 1000 steps, as many as SGLang keeps by default" in caplog.text
    caplog.clear()
    ring[40:] = 0
    torch.save({"logical_count": ring}, tmp_path / "part.pt")
    assert read_loads(tmp_path / "part.pt").loads.shape == (40, 1, 4)
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "960 of 1000 steps hold no tokens and are left out"
    ]


def write_unclear(folder):
    one = physical(COUNTS[0])
    stat = {"logical_count": torch.from_numpy(COUNTS)}
    for name in ("mixed", "uneven", "unnamed", "moved", "sums", "models"):
        (folder / name).mkdir()
    torch.save(stat, folder / "mixed" / "r_1.0.pt")
    save(folder / "mixed" / "r_2.0_0.pt", record(0, global_physical_count=one))
    for name, rank in (("r_1.0_0", 0), ("r_2.0_0", 0), ("r_2.1_1", 1)):
        save(folder / "uneven" / f"{name}.pt", record(0, rank, global_physical_count=one))
    for name in ("a", "b"):
        torch.save(stat, folder / "unnamed" / f"{name}.pt")
    save(folder / "moved" / "r_1.0_0.pt", record(0, global_physical_count=one))
    save(folder / "moved" / "r_1.0_1.pt", record(0, 1, global_physical_count=one), slots=SLOTS.flip(1))
    for rank in (0, 1):
        torch.save(stat | {"rank": rank}, folder / "sums" / f"r_1.0_{rank}.pt")
    torch.save(stat, folder / "models" / "r_1.0.pt")
    torch.save({"logical_count": torch.from_numpy(COUNTS[:, :2])}, folder / "models" / "r_2.0.pt")
    save(folder / "twice.pt", *[record(0, global_physical_count=one)] * 2)
    save(folder / "hidden.pt", record(0, global_physical_count=one), slots=torch.where(SLOTS < 0, -2, SLOTS))
    save(folder / "huge.pt", record(0, global_physical_count=one), slots=SLOTS + 2**40)
    save(folder / "beyond.pt", record(0, topk_ids_of_layer=torch.full((3, 1, 1), 11)))
    save(folder / "minus.pt", record(0, global_physical_count=-one), record(1, global_physical_count=one * 9))
    save(folder / "parts.pt", record(0, global_physical_count=one / 2))
    torch.save({"logical_count": torch.ones(1).expand(10**5, 10**4, 64)}, folder / "expanded.pt")
    torch.save({"logical_count": torch.ones(3, 8)}, folder / "total.pt")
    endless = torch.ones(1).expand(10**6, 10**6)
    torch.save({"records": endless, "last_physical_to_logical_map": SLOTS}, folder / "endless.pt")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mixed", "holds recordings of mode stat beside others; give each mode a folder of its own"),
        ("uneven", r"holds \{0: 2, 1: 1\} files by rank, expected as many of each; give"),
        ("unnamed", "holds several recordings, and a.pt does not say its time"),
        ("moved", r"r_1.0_0.pt and r_1.0_1.pt end with different maps of slots: experts moved while"),
        ("sums", "both hold sums over all ranks; keep one of them"),
        ("models", r"holds recordings of \[\(2, 8\), \(3, 8\)\] layers and experts; expected one model"),
        ("twice.pt", "forward pass 0 is recorded twice"),
        ("hidden.pt", r"the map of slots holds expert -2, expected -1 \(empty\) to 32766"),
        ("huge.pt", "the map of slots holds expert 1099511627775, expected"),
        ("beyond.pt", "topk_ids_of_layer holds 11 to 11, expected -1 to 10"),
        ("minus.pt", r"minus.pt holds -\d+; tokens cannot be negative"),
        ("parts.pt", "parts.pt holds figures that are not whole numbers"),
        ("expanded.pt", r"a tensor \(100000, 10000, 64\) is stored in 4 bytes"),
        ("endless.pt", "'records' is no list of records"),
        ("total.pt", r"logical_count has shape \(3, 8\), expected \[steps, layers, experts\]"),
    ],
)
def test_what_is_not_clear_is_refused(name, message, tmp_path):
    write_unclear(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_loads(tmp_path / name)
