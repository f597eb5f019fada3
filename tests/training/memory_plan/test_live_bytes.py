"""Bytes of living tensors, counted by hand."""

from __future__ import annotations

import torch

from normtune.training.memory_plan.live_bytes import LiveTensorBytes


def test_what_lives_is_counted_and_what_is_freed_is_not() -> None:
    given = torch.zeros(100)
    with LiveTensorBytes() as live:
        kept = given + 1  # 400 bytes
        view = kept.view(10, 10)  # none of its own
        given.add_(1)  # made before
        gone = torch.zeros(1000)  # 4,000 bytes
        assert (live.now, live.peak) == (4400, 4400)
        del gone
        assert (live.now, live.peak) == (400, 4400)
        live.reset_peak()
        assert live.peak == 400
        del kept
        assert live.now == 400  # the view holds it
        del view
        assert live.now == 0


def test_what_autograd_keeps_counts_until_the_backward_pass() -> None:
    x = torch.ones(50, requires_grad=True)
    with LiveTensorBytes() as live:
        y = x.exp().sum()  # keeps exp(x), 200 bytes, and the sum
        assert live.now == 204
        y.backward()
        assert live.now == 204  # the sum, and the gradient that took its place
        x.grad = None
        assert live.now == 4
