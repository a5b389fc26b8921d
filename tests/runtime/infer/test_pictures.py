import numpy as np
import pytest

from runtime.infer.pictures import copied_share, replicas


def test_load_above_an_even_share_that_met_a_copy():
    load = np.array([[6, 2, 1, 3], [9, 9, 1, 1]])  # even shares are 3 and 5: 3 above of expert 0, then 4 and 4
    assert copied_share(load, np.ones_like(load)) == 0
    assert copied_share(load, np.array([[2, 1, 1, 1], [2, 1, 3, 3]])) == pytest.approx(7 / 11)
    assert copied_share(load, np.full_like(load, 2)) == 1
    assert copied_share(np.full((2, 4), 5), np.ones((2, 4), int)) == 0


def test_the_strip_shows_the_layer_in_which_copies_change():
    load = np.random.default_rng(0).poisson(20, (6, 2, 32))
    copies = np.ones_like(load)
    copies[3:, 1, 7] = 3
    load[3:, 1, 7] = 400
    figure = replicas(load, copies, ["encoder_1", "encoder_3"], ["steady"] * 3 + ["unseen"] * 3)
    axis = figure.axes[0]
    dots = axis.collections[0].get_offsets()
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert dots.tolist() == [[batch, labels.index("expert 7")] for batch in (3, 4, 5)]
    assert "encoder 3, in which copies changed most" in figure.texts[1].get_text()
