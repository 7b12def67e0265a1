"""Which identities come in a batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_fast import IdentitySampler

sizes = st.tuples(st.integers(2, 60), st.integers(2, 20), st.integers(0, 80), st.integers(0, 3))
schemes = st.sampled_from(["shuffle", "spaced", "left_out"])


def epochs(sampler, count):
    for epoch in range(count):
        sampler.set_epoch(epoch)
        yield list(sampler)


@given(sizes, schemes)
@settings(max_examples=200, deadline=None)
def test_each_identity_at_most_once_an_epoch_and_no_epoch_is_empty(size, scheme):
    identities, batch, queue_size, seed = size
    sampler = IdentitySampler(identities, batch, queue_size=queue_size, scheme=scheme, seed=seed)
    orders = []
    for epoch, batches in enumerate(epochs(sampler, 4)):
        assert len(batches) == len(sampler)
        assert batches
        assert all(2 <= len(b) <= batch for b in batches)
        drawn = [i for b in batches for i in b]
        assert len(set(drawn)) == len(drawn)
        assert set(drawn) <= set(range(identities))
        if scheme != "left_out" or epoch == 0:
            assert len(drawn) >= identities - (batch < 4)  # the odd one out among pairs
            assert max(map(len, batches)) - min(map(len, batches)) <= 1
        orders.append(drawn)
    if identities > 2 * batch + 8:
        assert len(set(map(tuple, orders))) == 4


@given(sizes)
@settings(max_examples=200, deadline=None)
def test_spaced_keeps_what_the_queue_holds_away(size):
    identities, batch, queue_size, seed = size
    sampler = IdentitySampler(identities, batch, queue_size=queue_size, scheme="spaced", seed=seed)
    apart = min(queue_size, identities - batch)
    order = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        order += sampler.order
    seen = {}
    for at, identity in enumerate(order):
        assert at - seen.get(identity, -identities - queue_size) > apart
        seen[identity] = at


@given(sizes)
@settings(max_examples=200, deadline=None)
def test_left_out_is_what_the_queue_holds(size):
    identities, batch, queue_size, seed = size
    sampler = IdentitySampler(identities, batch, queue_size=queue_size, scheme="left_out", seed=seed)
    before = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        newest = list(dict.fromkeys(reversed(before)))[: min(queue_size, max(0, identities - batch))]
        assert set(sampler.order) == set(range(identities)) - set(newest)
        before += sampler.order


@given(sizes, schemes, st.integers(2, 3))
@settings(max_examples=100, deadline=None)
def test_processes_share_the_batch_evenly(size, scheme, world):
    identities, batch, queue_size, seed = size
    options = {"queue_size": queue_size, "scheme": scheme, "seed": seed}
    if min(identities, batch) < 2 * world:
        with pytest.raises(ValueError, match=r"must be at least \d, two for each of \d processes"):
            IdentitySampler(identities, batch, world=world, **options)
        return
    ranks = [IdentitySampler(identities, batch, rank=r, world=world, **options) for r in range(world)]
    for batches in zip(*(list(epochs(s, 3)) for s in ranks), strict=True):
        for shares in zip(*batches, strict=True):
            assert len({len(share) for share in shares}) == 1
            together = [i for share in shares for i in share]
            assert len(set(together)) == len(together) <= batch


@given(sizes, schemes, st.integers(0, 3), st.integers(0, 10), st.integers(2, 20))
@settings(max_examples=200, deadline=None)
def test_state_goes_on_at_the_same_place_under_any_batch(size, scheme, epoch, steps, other):
    identities, batch, queue_size, seed = size
    options = {"queue_size": queue_size, "scheme": scheme, "seed": seed}
    one = IdentitySampler(identities, batch, **options)
    one.set_epoch(epoch)
    for _ in range(min(steps, len(one))):
        one.step()
    two = IdentitySampler(identities, other, **options)
    two.load_state_dict(one.state_dict())
    assert (two.epoch, two.done) == (epoch, one.done)
    rest = [i for b in two for i in b]
    assert rest == one.order[one.done :][: len(rest)]
    left = list(one)
    if left:
        one.step()
        assert list(one) == left[1:]
    same = IdentitySampler(identities, batch, **options)
    same.load_state_dict(one.state_dict())
    for sampler in (one, same):
        sampler.set_epoch(epoch + 1)
    assert list(one) == list(same)


def test_a_loader_that_reads_ahead_loses_nothing():
    sampler = IdentitySampler(20, 4)
    loader = torch.utils.data.DataLoader(range(20), batch_sampler=sampler, num_workers=2, prefetch_factor=4)
    for number, batch in enumerate(loader):
        sampler.step()
        if number == 1:
            state = sampler.state_dict()
            assert batch.tolist() == sampler.order[4:8]
            break
    other = IdentitySampler(20, 4, seed=7)
    other.load_state_dict(state)
    assert next(iter(other)) == sampler.order[8:12]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "random"}, "scheme must be one of 'shuffle', 'spaced', 'left_out', got 'random'"),
        ({"identities": 1}, "identities must be at least 2"),
        ({"batch": 1}, "batch must be at least 2"),
        ({"queue_size": -1}, "queue_size must be an integer >= 0, got -1"),
        ({"rank": 1}, r"rank must be in \[0, 1\), got 1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        IdentitySampler(**({"identities": 10, "batch": 4} | arguments))


def test_a_state_of_other_data_is_refused():
    state = IdentitySampler(10, 4).state_dict()
    with pytest.raises(ValueError, match="holds identity 9, but identities=8"):
        IdentitySampler(8, 4).load_state_dict(state)
