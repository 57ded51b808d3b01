"""The watcher that the tests of "no waiting in the step" rest on does see what waits."""

import pytest
import torch
from synchronisation import NoWaiting


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.index_put_((x > 0,), torch.tensor(1.0)),
    ],
)
def test_what_needs_a_value_on_the_host_is_refused(waits):
    x = torch.arange(-2.0, 3.0)
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        waits(x)


def test_what_stays_on_the_device_passes():
    x = torch.arange(-2.0, 3.0)
    with NoWaiting():
        kept = torch.where(x > 0, x, 0.0).sum() + x.gather(0, x.argsort()[:2]).sum()
    assert kept == 0.0
