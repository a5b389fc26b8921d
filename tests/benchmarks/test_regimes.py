"""`benchmarks.regimes`: what its table says of a gain, and that it says where there is none."""

from benchmarks.regimes import HEADER, Regime, row


def result(adaptive):
    found = {
        "last": (0.2, 0.96), "ema": (0.19, 0.95), "own": (0.18, 0.955), "learned": (0.17, 0.97),
        "adaptive": adaptive, "oracle": (0.0, 0.999),
    }  # fmt: skip
    rows = {name: {"load_tv": error, "balancedness": balance} for name, (error, balance) in found.items()}
    return {"regime": "decode", "steps": 9, "floor": 0.1, "forecasts": rows}


def test_gains_are_over_the_best_free_rival_of_each_figure():
    cells = dict(
        zip([f"{number} {name}" for number, name in enumerate(HEADER)], row(result((0.15, 0.98))), strict=True)
    )
    assert (cells["3 best free"], cells["6 gain"]) == ("0.180 (own)", "0.030")
    assert (cells["8 best free"], cells["11 gain"]) == ("0.960 (last)", "0.020")


def test_it_says_where_there_is_no_gain():
    assert row(result((0.185, 0.9605))).count("no gain") == 2


def test_a_regime_has_a_name():
    title = "decode, 32 x 1 tokens, subjects mixed, unseen subjects"
    assert Regime("decode", 32, 1, "shuffled", "unseen").title == title
