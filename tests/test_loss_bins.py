"""LossBins: the mean loss in bins of time."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing

import fmkernels as fm


def test_means_are_those_of_each_bin_over_all_updates() -> None:
    generator = torch.Generator().manual_seed(0)
    bins = fm.LossBins(5)
    t, loss = torch.rand(400, generator=generator), torch.rand(400, generator=generator)
    t[:2] = torch.tensor([0.0, 1.0])
    weight = torch.rand(400, generator=generator)
    for part in range(0, 400, 100):
        bins.update(t[part : part + 100], loss[part : part + 100], weight[part : part + 100])
    place = (t.double() * 5).floor().clamp(max=4)
    for i in range(5):
        inside = place == i
        want = (weight * loss)[inside].double().sum() / weight[inside].double().sum()
        torch.testing.assert_close(bins.mean[i], want, rtol=1e-6, atol=0)
        torch.testing.assert_close(bins.count[i], weight[inside].double().sum())
    torch.testing.assert_close(bins.total, bins.mean * bins.count)
    torch.testing.assert_close(bins.edges, torch.tensor([0, 0.2, 0.4, 0.6, 0.8, 1.0], dtype=torch.float64))


def test_empty_bins_are_nan_and_nan_times_count_nowhere() -> None:
    bins = fm.LossBins(4)
    assert bins.mean.isnan().all()
    bins.update(torch.tensor([0.1, float("nan"), 0.9]), torch.tensor([1.0, 2.0, 3.0]))
    assert bins.count.tolist() == [1, 0, 0, 1]
    assert bins.mean.isnan().tolist() == [False, True, True, False]
    bins.reset()
    assert bins.count.sum() == 0


def test_a_time_on_an_edge_is_in_the_bin_that_begins_there() -> None:
    for number in [*range(1, 130), 1000, 4097, 2**20]:
        bins = fm.LossBins(number)
        edges = bins.edges
        assert torch.equal(edges, torch.arange(number + 1, dtype=torch.float64) / number)
        bins.update(edges, torch.ones(number + 1))
        want = torch.ones(number, dtype=torch.float64)
        want[-1] = 2.0  # 1 as well
        assert torch.equal(bins.count, want)
        bins.reset()
        below = torch.nextafter(edges[1:], torch.zeros(()).double())
        bins.update(below, torch.ones(number))
        assert torch.equal(bins.count, torch.ones_like(want))


def test_times_outside_the_bins_and_losses_of_weight_zero_count_nowhere() -> None:
    bins = fm.LossBins(10)
    outside = torch.tensor([-0.1, -1e-30, 1.1, float("inf"), float("-inf"), 1 + 2**-20])
    bins.update(outside, torch.ones(6))
    assert bins.count.sum() == 0
    bins.update(torch.tensor([-0.0, 1.0]), torch.ones(2))
    assert bins.count.tolist() == [1.0] + [0.0] * 8 + [1.0]
    bins = fm.LossBins(10)
    losses = torch.tensor([float("nan"), 1.0, float("inf")])
    bins.update(torch.tensor([0.11, 0.15, 0.31]), losses, torch.tensor([0.0, 1.0, -0.0]))
    assert bins.mean[1] == 1
    assert bins.total[3] == 0


def test_a_bad_loss_stays_in_its_bin() -> None:
    bins = fm.LossBins(2)
    bins.update(torch.tensor([0.1, 0.9]), torch.tensor([float("inf"), 3.0]))
    assert bins.mean[1] == 3


def test_what_was_handed_out_is_not_written_again() -> None:
    bins = fm.LossBins(2)
    bins.update(torch.tensor([0.1]), torch.tensor([1.0]))
    kept = [bins.total, bins.count, bins.mean, *bins.state_dict().values()]
    copies = [k.clone() for k in kept]
    bins.update(torch.tensor([0.1]), torch.tensor([5.0]))
    for k, before in zip(kept, copies, strict=True):
        torch.testing.assert_close(k, before, equal_nan=True)
    state = {"total": torch.ones(2), "count": torch.ones(2)}
    bins.load_state_dict(state)
    bins.update(torch.tensor([0.1]), torch.tensor([5.0]))
    assert state["total"].tolist() == [1, 1]


def test_state_goes_on_in_other_bins() -> None:
    a, b = fm.LossBins(3), fm.LossBins(3, device="cpu")
    a.update(torch.rand(20), torch.rand(20).bfloat16())
    b.load_state_dict(a.state_dict())
    for bins in (a, b):
        bins.update(torch.tensor([0.5]), torch.tensor([2.0]))
    torch.testing.assert_close(a.mean, b.mean)
    assert repr(a) == "LossBins(3)"


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_bins_first_used_under_a_grad_mode_go_on_outside(mode) -> None:
    bins = fm.LossBins(2)
    with mode():
        bins.update(torch.tensor([0.1]), torch.tensor([1.0]))
    loss = torch.tensor([3.0], requires_grad=True)
    bins.update(torch.tensor([0.2]), 1 * loss)
    assert bins.mean[0] == 2
    assert not bins.mean.requires_grad


def test_bins_within_a_compiled_step() -> None:
    bins = fm.LossBins(4, device="cpu")
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def step(t, loss):
        bins.update(t, loss)

    for n in (3, 4, 5, 9):
        step(torch.rand(n), torch.rand(n))
    assert bins.count.sum() == 21
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda b: fm.LossBins(0), ValueError, "bins: expected an int >= 1"),
        (lambda b: fm.LossBins(2.0), TypeError, "bins: expected an int"),
        (lambda b: b.update(0.5, torch.ones(1)), TypeError, "t: expected a torch.Tensor"),
        (lambda b: b.update(torch.ones(2, dtype=torch.int64), torch.ones(2)), TypeError, "t: expected a float32"),
        (lambda b: b.update(torch.ones(2), 1.0), TypeError, "loss: expected a torch.Tensor"),
        (lambda b: b.update(torch.ones(2), torch.ones(())), ValueError, r"loss: expected the shape of t, \(2,\)"),
        (lambda b: b.update(torch.ones(2), torch.ones(2), 2.0), TypeError, "weight: expected a torch.Tensor"),
        (lambda b: b.update(torch.ones(2), torch.ones(2), torch.ones(3)), ValueError, "weight: expected the shape"),
        (lambda b: b.update(*torch.ones(2, 2, device="meta")), ValueError, "t: expected a tensor on cpu"),
        (lambda b: b.load_state_dict({"total": torch.ones(2)}), TypeError, "state: expected a mapping with total"),
        (lambda b: b.load_state_dict(None), TypeError, "state: expected a mapping with total"),
        (
            lambda b: b.load_state_dict({"total": torch.ones(2), "count": torch.ones(3)}),
            ValueError,
            r"state\['count'\]: expected the shape \(2,\)",
        ),
    ],
)
def test_bad_input(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(fm.LossBins(2, device="cpu"))


def test_many_bins_cost_no_comparison_with_each() -> None:
    t, loss, weight = (torch.rand(20000, generator=torch.Generator().manual_seed(i)) for i in range(3))
    bins = fm.LossBins(2**16)
    bins.update(t, loss, weight)
    place = (t.double() * 2**16).floor().long()
    expected = torch.zeros(2**16, dtype=torch.float64).index_add_(0, place, (loss.double() * weight.double()))
    torch.testing.assert_close(bins.total, expected, rtol=1e-12, atol=0.0)
    few, parts = fm.LossBins(7), fm.LossBins(7)
    few.update(t, loss, weight)
    for part in zip(t.split(333), loss.split(333), weight.split(333), strict=True):
        parts.update(*part)
    torch.testing.assert_close(parts.mean, few.mean, rtol=1e-12, atol=0.0)


def test_bins_copied_in_inference_mode_go_on() -> None:
    bins = fm.LossBins(2, device="cpu")
    with torch.inference_mode():
        copies = [copy.deepcopy(bins), pickle.loads(pickle.dumps(bins))]
    for other in copies:
        other.update(torch.tensor([0.1]), torch.tensor([3.0]))
        assert other.total.tolist() == [3.0, 0.0]
