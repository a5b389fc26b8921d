import numpy as np

from predictor.baselines.history import LastBatch
from runtime.balancing.scenarios import scenarios


def test_shares_of_a_layer_that_was_silent_before_are_shares(recwarn):
    """One expert has all of its load, and the errors of the silent batch take it away."""
    loads = np.zeros((2, 2, 16), dtype=np.int64)
    loads[:, 0] = 5
    loads[1, 1, 3] = 1
    shares, weights = scenarios(LastBatch().forecast(None, loads), loads)
    assert np.isfinite(shares).all()
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
    assert not recwarn.list
