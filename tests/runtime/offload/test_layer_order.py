"""LayerOrder: distances of layers in batches, encoders alone and decoder steps, learned from the layers that ran."""

from runtime.offload.layer_order import UNSEEN_DISTANCE, LayerOrder


def test_distances_in_a_batch_and_across_its_end():
    order = LayerOrder(4)
    order.begin()
    assert order.distances()[0].tolist() == [1, 2, 3, 4]
    order.observe(0)
    order.observe(1)
    distance, in_pass, period = order.distances()
    assert distance.tolist() == [3, 4, 1, 2]
    assert in_pass.tolist() == [False, False, True, True]
    assert period.tolist() == [4] * 4
    assert order.pass_index == 0


def test_an_encoder_alone_is_learned_from_one_pass():
    order = LayerOrder(4)
    for _ in range(2):
        order.begin()
        order.observe(0)
        order.observe(1)
    assert order.pass_length == 2
    assert order.distances()[0].tolist() == [1, 2, 2 + 2 * UNSEEN_DISTANCE, 3 + 2 * UNSEEN_DISTANCE]


def test_decoder_steps_are_passes_of_their_own():
    order = LayerOrder(4)
    order.begin()
    for layer in (0, 1, 2, 3, 2):
        order.observe(layer)
    distance, in_pass, _ = order.distances()
    assert (order.pass_index, order.pass_length) == (1, 2)
    assert distance[2:].tolist() == [2, 1]
    assert in_pass.tolist() == [False, False, False, True]
    assert (distance[:2] > 10).all()
    for layer in (3, 2, 3):
        order.observe(layer)
    order.begin()
    assert order.distances()[0].tolist() == [1, 2, 3, 4]


def test_steps_of_a_decoder_only_model_run_all_layers():
    order = LayerOrder(3)
    order.begin()
    for layer in (0, 1, 2) * 3 + (0,):  # a prompt, two steps, and a third one that has begun
        order.observe(layer)
    distance, in_pass, period = order.distances()
    assert distance.tolist() == [3, 1, 2]
    assert in_pass.tolist() == [False, True, True]
    assert period.tolist() == [3, 3, 3]
    assert order.pass_index == 3


def test_during_generation_the_encoder_is_as_far_away_as_usual():
    order = LayerOrder(4)
    for _ in range(3):  # batches of an encoder pass and ten decoder steps
        order.begin()
        for layer in [0, 1] + [2, 3] * 10:
            order.observe(layer)
    order.begin()
    for layer in (0, 1, 2, 3, 2, 3, 2):
        order.observe(layer)
    distance, _, period = order.distances()
    assert distance.tolist() == [22 - 6, 22 - 5, 2, 1]  # 22 layers a batch
    assert period.tolist() == [22, 22, 2, 2]
    for _ in range(20):  # more steps than usual: the encoder runs after the next step at the earliest
        order.observe(3)
        order.observe(2)
    assert order.distances()[0].tolist() == [4, 4, 2, 1]


def test_after_the_first_step_another_one_is_expected_not_the_next_batch():
    order = LayerOrder(4)
    for _ in range(2):
        order.begin()
        for layer in [0, 1] + [2, 3] * 10:
            order.observe(layer)
    order.begin()
    order.observe(0)
    distance, in_pass, period = order.distances()
    assert distance.tolist() == [22, 1, 2, 3]  # the encoder's first layer runs again after ten steps
    assert in_pass.tolist() == [False, True, True, True]
    assert period.tolist() == [22, 22, 2, 2]
    for layer in (1, 2, 3):
        order.observe(layer)
    assert order.distances()[0].tolist() == [19, 20, 1, 2]


def test_whole_batches_after_generation_are_learned():
    order = LayerOrder(4)
    order.begin()
    for layer in [0, 1] + [2, 3] * 10:
        order.observe(layer)
    for _ in range(6):
        order.begin()
        for layer in range(4):
            order.observe(layer)
    order.begin()
    order.observe(0)
    assert order.distances()[0].tolist() == [4, 1, 2, 3]
