"""Batches and their shards: what one seed draws in 1, 2 and 4 shards, micro-batches, devices, what is said of them."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch

import fmkernels as fm
from fmkernels import times
from fmkernels.paths import Batch, CondOT, Path, SchrodingerBridge

ROWS = 12
PATHS = [CondOT(), SchrodingerBridge(0.3)]
SAMPLERS = [
    None,
    times.Uniform(),
    times.Uniform(0.2, 0.7),
    times.Uniform(stratified=True, size=ROWS),
    times.LogitNormal(0.3),
    times.Mode(),
    times.CosMap(),
    times.UShaped(),
    times.Beta(),
    times.Beta(2.0, 0.5),
    times.Shifted(times.LogitNormal(), times.Shift(2.0)),
]


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SOURCES = {
    "int": lambda: {"seed": 2**63 + 5},
    "tensor": lambda: {"seed": torch.tensor(-7)},
    "generator": lambda: {"generator": generator()},
}


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("source", SOURCES)
def test_shards_draw_the_noise_and_the_times_of_the_whole(path: Path, sampler, source: str) -> None:
    x_1 = torch.randn(ROWS, 5)

    def draw(first: int, last: int, store: bool) -> Batch:
        return path.sample(
            x_1[first:last], time_sampler=sampler, row_offset=first, store_noise=store, **SOURCES[source]()
        )

    whole = draw(0, ROWS, True)
    assert whole.t.unique().numel() > 1
    for count in (1, 2, 4):
        size = ROWS // count
        shards = [draw(first, first + size, store=count == 2) for first in range(0, ROWS, size)]
        for name in ("t", "x_t", "x_0", "z"):
            parts = [getattr(shard, name) for shard in shards]
            if parts[0] is not None:
                assert torch.equal(torch.cat(parts), getattr(whole, name)), name


def test_seeds_differ_and_repeat() -> None:
    x_1 = torch.randn(6, 4)
    a, b, c = (CondOT().sample(x_1, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.x_t, b.x_t)
    assert torch.equal(a.t, b.t)
    assert not torch.equal(a.t, c.t)
    assert torch.equal(a.x_0, fm.randn(6, 4, seed=1))
    assert torch.equal(a.t, fm.rand(6, seed=1, stream=2)), "a stream of its own"
    bridge = SchrodingerBridge().sample(x_1, seed=1)
    assert torch.equal(bridge.z, fm.randn(6, 4, seed=1, stream=1))


@pytest.mark.parametrize("store", [None, True, False])
@pytest.mark.parametrize("given", ["seed", "sampler", "noise"])
@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_a_seed_that_the_caller_advances_changes_no_noise_of_before(path: Path, given: str, store: bool | None) -> None:
    seed, x_1 = torch.tensor(1), torch.zeros(4, 3)
    if given == "noise":
        noises = [fm.Noise(seed, stream) for stream in (0, 1)]
        bridge = {"z": noises[1]} if path.gamma(torch.ones(())) is not None else {}
        batch = path.sample(x_1, noises[0], torch.full((4,), 0.5), store_noise=store, **bridge)
    else:
        sampler = times.Beta() if given == "sampler" else None
        batch = path.sample(x_1, seed=seed, store_noise=store, time_sampler=sampler)
    pred = torch.ones(4, 3, requires_grad=True)
    first = fm.cfm_loss(pred, batch), batch.x_0, batch.target(), batch[1:3].x_0
    seed += 1
    second = fm.cfm_loss(pred, batch), batch.x_0, batch.target(), batch[1:3].x_0
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(batch.x_0, fm.randn(4, 3, seed=1))


def test_interpolate_keeps_no_seed_of_the_callers() -> None:
    seed, x_1 = torch.tensor(1), torch.zeros(4, 3)
    point = fm.interpolate(x_1, fm.Noise(seed), alpha=0.5, sigma=0.5)
    seed += 1
    assert torch.equal(fm.combine([x_1, point.x_0], [0.0, 1.0]), fm.randn(4, 3, seed=1))


@pytest.mark.parametrize("target", ["x_0", "velocity", "score"])
def test_a_narrow_prediction_does_not_round_the_noise_it_is_compared_with(target: str) -> None:
    x_1 = torch.randn(64, 5)
    stored, redrawn = (CondOT().sample(x_1, seed=2, store_noise=store) for store in (True, False))
    pred = stored.target(target).bfloat16()
    losses = [fm.cfm_loss(pred, batch, target=target) for batch in (stored, redrawn)]
    torch.testing.assert_close(losses[0], (pred.float() - stored.target(target)).square().mean())
    torch.testing.assert_close(losses[1], losses[0])


def test_stratified_times_across_shards_hit_every_stratum_once() -> None:
    sampler = times.Uniform(stratified=True, size=64)
    t = torch.cat([sampler(16, seed=5, row_offset=first) for first in range(0, 64, 16)])
    assert torch.equal((t.double() * 64).floor().sort().values, torch.arange(64.0).double())
    assert not torch.equal(t, sampler(64, seed=6))
    tokens = torch.cat([sampler((16, 3), seed=5, row_offset=first) for first in range(0, 64, 16)])
    assert torch.equal((tokens.double() * 192).floor().flatten().sort().values, torch.arange(192.0).double())


def _shard_worker(rank: int, store: str, results: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    seed = torch.randint(2**62, ()) if rank == 0 else torch.zeros((), dtype=torch.int64)
    torch.distributed.broadcast(seed, 0)
    x_1 = torch.arange(8.0)[:, None].expand(8, 3)[4 * rank : 4 * rank + 4].contiguous()
    sampler = times.Uniform(stratified=True, size=8)
    batch = SchrodingerBridge().sample(x_1, seed=seed, row_offset=4 * rank, time_sampler=sampler)
    bins = fm.LossBins(4)
    bins.update(batch.t, fm.cfm_loss(x_1, batch, reduction="none"))
    gathered = [None, None]
    torch.distributed.all_gather_object(gathered, (seed, batch, bins.all_reduce().state_dict()))
    if rank == 0:
        torch.save(gathered, results)
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not built in")
def test_processes_draw_the_whole_and_share_their_bins(tmp_path) -> None:
    results = os.fspath(tmp_path / "batches.pt")
    torch.multiprocessing.spawn(_shard_worker, (os.fspath(tmp_path / "store"), results), nprocs=2)
    ranks = torch.load(results, weights_only=False)
    x_1 = torch.arange(8.0)[:, None].expand(8, 3).contiguous()
    whole = SchrodingerBridge().sample(x_1, seed=ranks[0][0], time_sampler=times.Uniform(stratified=True, size=8))
    for name in ("t", "x_t", "x_0", "z"):
        assert torch.equal(torch.cat([getattr(batch, name) for _, batch, _ in ranks]), getattr(whole, name))
    bins = fm.LossBins(4)
    bins.update(whole.t, fm.cfm_loss(x_1, whole, reduction="none"))
    for _, _, state in ranks:
        torch.testing.assert_close(state["total"], bins.total)
        assert torch.equal(state["count"], bins.count)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("t", [None, 0.3, "tokens", "scalar"])
def test_micro_batches_have_the_noise_of_the_batch(path: Path, store: bool, t) -> None:
    x_1, pred = torch.randn(7, 3, 2), torch.randn(7, 3, 2)
    given = {"tokens": torch.rand(7, 3), "scalar": torch.tensor(0.3)}.get(t, t) if isinstance(t, str) else t
    batch = path.sample(x_1, t=given, store_noise=store, seed=4)
    whole = fm.cfm_loss(pred, batch, reduction="none")
    for size in (1, 3, 7, 9):
        parts = batch.split(size)
        assert [len(part) for part in parts] == [len(p) for p in x_1.split(size)]
        losses = [fm.cfm_loss(p, part, reduction="none") for p, part in zip(pred.split(size), parts, strict=True)]
        torch.testing.assert_close(torch.cat(losses), whole)
        assert torch.equal(torch.cat([part.x_0 for part in parts]), batch.x_0)
        assert torch.equal(torch.cat([part.target() for part in parts]), batch.target())
    for index in (slice(2, 5), slice(-3, None), slice(5, 2), slice(None)):
        part = batch[index]
        assert torch.equal(part.x_t, batch.x_t[index])
        assert torch.equal(part.x_0, batch.x_0[index])
        assert part.z is None or torch.equal(part.z, batch.z[index])
    nested = batch[2:][1:4]
    assert torch.equal(nested.x_0, batch.x_0[3:6])


def test_rows_of_a_batch_with_stored_noise() -> None:
    batch = CondOT().sample(torch.randn(6, 2), store_noise=True)
    rows = torch.tensor([4, 0, 4])
    mask = torch.tensor([True, False, True, False, False, True])
    for index in (rows, mask, slice(None, None, 2)):
        part = batch[index]
        assert torch.equal(part.x_0, batch.x_0[index])
        assert torch.equal(part.t, batch.t[index])
    redrawn = CondOT().sample(torch.randn(6, 2), store_noise=False)
    for index in (rows, slice(None, None, 2)):
        with pytest.raises(ValueError, match="index: expected a slice of step 1, as noise was not stored"):
            redrawn[index]


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("store", [True, False])
def test_a_batch_moves_copies_and_pickles(path: Path, store: bool) -> None:
    batch = path.sample(torch.randn(4, 3), store_noise=store)
    loss = fm.cfm_loss(batch.x_1, batch)
    for again in (pickle.loads(pickle.dumps(batch)), copy.deepcopy(batch), batch.to("cpu"), batch.to(torch.device(0))
                  if torch.cuda.is_available() else batch.to("cpu", non_blocking=True)):  # fmt: skip
        assert again.path == path
        torch.testing.assert_close(fm.cfm_loss(again.x_1, again).cpu(), loss)
    assert batch.to("cpu").x_t is batch.x_t
    meta = batch.to("meta")
    for tensor in (meta.x_t, meta.t, meta.x_1, meta.source if store else meta.source.seed):
        assert tensor.is_meta
    assert meta.bridge is None or (meta.bridge if store else meta.bridge.seed).is_meta


@pytest.mark.parametrize("store", [True, False])
def test_pin_memory_pins_every_tensor(store: bool, monkeypatch) -> None:
    pinned = []

    def pin(tensor):
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch = SchrodingerBridge().sample(torch.randn(4, 3), store_noise=store)
    again = batch.pin_memory()
    assert len(pinned) == 5
    assert torch.equal(again.x_0, batch.x_0)
    assert again.x_t is not batch.x_t


def test_repr_says_what_a_batch_holds() -> None:
    batch = CondOT().sample(torch.randn(4, 3).bfloat16(), store_noise=False, row_offset=2)
    assert repr(batch) == (
        "Batch(x_t=bfloat16[4, 3], t=float32[4], x_1=bfloat16[4, 3], source=Noise(stream=0, row_offset=2), "
        "bridge=None, path=CondOT(), device=cpu)"
    )


def test_a_target_does_not_read_what_it_does_not_need() -> None:
    batch = CondOT().sample(torch.full((3, 2), float("nan")), store_noise=False)
    assert torch.isfinite(batch.target("x_0")).all()


def test_a_target_that_is_zero_throughout() -> None:
    still = type("Still", (Path,), {"alpha": lambda self, t: 1.0, "sigma": lambda self, t: 0.5,
                                    "d_alpha": lambda self, t: 0, "d_sigma": lambda self, t: 0})()  # fmt: skip
    batch = still.sample(torch.randn(3, 2))
    assert (batch.target() == 0).all()
    torch.testing.assert_close(fm.cfm_loss(batch.x_1, batch), batch.x_1.square().mean())


def plain_times(shape, device=None, generator=None):
    return torch.rand(shape, device=device, generator=generator)


def test_a_function_of_ones_own_samples_times() -> None:
    x_1 = torch.randn(4, 3)
    t = CondOT().sample(x_1, time_sampler=plain_times, generator=generator()).t
    assert torch.equal(t, torch.rand(4, generator=generator()))

    def sharded(shape, device=None, generator=None, seed=None, row_offset=0):
        assert generator is None
        return fm.rand(shape, seed=seed, row_offset=row_offset, stream=9)

    t = CondOT().sample(x_1, time_sampler=sharded, seed=5, row_offset=2).t
    assert torch.equal(t, fm.rand(6, seed=5, stream=9)[2:])
    shifted = times.Shifted(plain_times, times.Shift(2.0))
    assert torch.equal(shifted(4, generator=generator()), times.Shift(2.0)(plain_times(4, generator=generator())))

    class Mine(times.Sampler):
        def draw(self, shape, seed, row_offset):
            return fm.rand(shape, seed=seed, row_offset=row_offset, stream=7).square()

    shards = [CondOT().sample(x_1, time_sampler=Mine(), seed=5, row_offset=first).t for first in (0, 4)]
    assert torch.equal(torch.cat(shards), fm.rand(8, seed=5, stream=7).square())


@pytest.mark.parametrize("name", ["t", "x_1", "x_0", "z"])
def test_a_batch_whose_tensors_were_written_to_is_an_error(name: str) -> None:
    given = {"x_1": torch.randn(4, 3), "x_0": torch.randn(4, 3), "t": torch.rand(4), "z": torch.randn(4, 3)}
    batch, pred = SchrodingerBridge(0.3).sample(**given), torch.zeros(4, 3)
    fm.cfm_loss(pred, batch)
    given[name].mul_(0.5)
    for use in (
        lambda: fm.cfm_loss(pred, batch),
        lambda: batch.target(),
        lambda: batch[:2],
        lambda: batch.to("cpu"),
        lambda: copy.copy(batch),
        lambda: pickle.dumps(batch),
    ):
        with pytest.raises(RuntimeError, match=rf"batch: expected {name} as it was when the path was sampled"):
            use()


def test_copies_of_a_batch_have_tensors_of_their_own() -> None:
    x_1, pred = torch.randn(4, 3), torch.zeros(4, 3)
    x_1.add_(1.0)  # its version is not 0
    batch = CondOT().sample(x_1, seed=3)
    loss = fm.cfm_loss(pred, batch)
    copies = [copy.deepcopy(batch), pickle.loads(pickle.dumps(batch))]
    assert torch.equal(fm.cfm_loss(pred, copy.copy(batch)), loss)
    x_1.zero_()
    assert all(torch.equal(fm.cfm_loss(pred, other), loss) for other in copies)
    with torch.inference_mode():  # tensors made in it are not watched
        inside = CondOT().sample(torch.randn(4, 3), seed=3)
        inside.x_1.zero_()
        fm.cfm_loss(pred, inside)


def test_a_time_sampler_with_one_buffer_is_told() -> None:
    buffer = torch.empty(4)
    first = CondOT().sample(torch.randn(4, 3), time_sampler=lambda shape, device, generator: buffer.uniform_())
    CondOT().sample(torch.randn(4, 3), time_sampler=lambda shape, device, generator: buffer.uniform_())
    with pytest.raises(RuntimeError, match="batch: expected t as it was"):
        fm.cfm_loss(torch.zeros(4, 3), first)
