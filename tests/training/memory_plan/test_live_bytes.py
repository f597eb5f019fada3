"""`LiveTensorBytes` compared with numbers counted by hand."""

from __future__ import annotations

import torch

from normtune.training.memory_plan.live_bytes import LiveTensorBytes


def test_storages_count_until_they_are_freed() -> None:
    outside = torch.zeros(100)
    with LiveTensorBytes() as counter:
        result = outside + 1  # 400 bytes
        view = result.view(10, 10)  # shares the storage
        outside.add_(1)  # its storage is older than the block
        temporary = torch.zeros(1000)  # 4,000 bytes
        assert (counter.now, counter.peak) == (4400, 4400)
        del temporary
        assert (counter.now, counter.peak) == (400, 4400)
        counter.reset_peak()
        assert counter.peak == 400
        del result
        assert counter.now == 400  # the view references the storage
        del view
        assert counter.now == 0


def test_saved_activations_count_until_the_backward_pass() -> None:
    x = torch.ones(50, requires_grad=True)
    with LiveTensorBytes() as counter:
        y = x.exp().sum()  # saves exp(x), 200 bytes; and the sum, 4 bytes
        assert counter.now == 204
        y.backward()
        assert counter.now == 204  # exp(x) is freed, the gradient has as many bytes
        x.grad = None
        assert counter.now == 4
