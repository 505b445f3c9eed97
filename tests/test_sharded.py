"""DTensors in the operations: the whole's numbers and gradients, however the batch is sharded."""

from __future__ import annotations

import os
import traceback

import pytest
import torch

import fmkernels as fm

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not built in")
B, T, D = 5, 4, 6  # 5 rows on 2 ranks: uneven


def data() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y, pred = (torch.randn(B, T, D, generator=generator) for _ in range(3))
    t = torch.rand(B, generator=generator)
    token = torch.rand(B, T, generator=generator)
    return {"x": x, "y": y, "pred": pred, "t": t, "token": token, "mask": token > 0.3, "row_mask": t > 0.2}


def results(d: dict[str, torch.Tensor], noisy: bool) -> dict[str, object]:
    """Every operation on the tensors of `data`, whole or sharded."""
    noise = fm.Noise(torch.tensor(7), 1, 2)
    found: dict[str, object] = {}
    inputs = {name: d[name].detach().clone().requires_grad_() for name in ("pred", "x", "t")}
    pred, x, t = inputs.values()
    out = fm.combine([pred, d["y"]], [t, 0.5])
    found["combine"] = out
    found["combine grads"] = torch.autograd.grad(out.square().sum(), (pred, t))
    if not noisy:
        found["norm"] = fm.combine([d["x"], d["y"]], [d["t"], 0.5], atol=0.1, rtol=0.1)[1]
    dots = fm.row_dots([pred, x], [(0, 1), (0, -1), (1, 1)])
    found["row_dots"] = dots
    found["row_dots grads"] = torch.autograd.grad(dots.square().sum(), (pred, x))
    point = fm.interpolate(x, d["y"], alpha=t, sigma=1 - t)
    found["interpolate"] = point.x_t
    found["interpolate grads"] = torch.autograd.grad(point.x_t.square().sum(), (x, t))
    if noisy:
        drawn = fm.interpolate(d["x"], noise, alpha=d["t"], sigma=1 - d["t"], store_noise=True)
        found["noise"] = (drawn.x_t, drawn.x_0)
        found["noise again"] = fm.combine([d["x"], noise], [0.0, 1.0])
    for reduction in ("mean", "sum", "none", "weighted_mean"):
        for given in ({}, {"mask": d["mask"], "weight": d["token"]}, {"mask": d["row_mask"], "weight": d["t"]}):
            operands = [d["x"], noise if noisy else d["y"]]
            loss = fm.regression_loss(pred, operands, [d["t"], -1.0], reduction=reduction, **given)
            found[f"loss {reduction} {sorted(given)} {given.get('mask', t).dim()}"] = (
                loss,
                *torch.autograd.grad(loss.sum(), pred),
            )
    loss = fm.regression_loss(pred, [d["x"]], [1.0], weight=t, reduction="weighted_mean", mask=d["row_mask"])
    found["learnt weights"] = (loss, *torch.autograd.grad(loss, (pred, t)))
    for reduction in ("mean", "weighted_mean"):
        for weight in (2.5, 0.0, torch.tensor(2.5)):
            for mask in (None, "mask"):
                masked = {} if mask is None else {"mask": d[mask]}
                loss = fm.regression_loss(pred, [d["x"]], [1.0], weight=weight, reduction=reduction, **masked)
                name = f"loss {reduction} with one weight {weight} {mask}"
                found[name] = (loss, *torch.autograd.grad(loss.sum(), pred))
    for name, count in {"number": 11, "tensor": torch.tensor(11), "sum": d["mask"].sum()}.items():
        for weight in (None, 2.5):
            loss = fm.regression_loss(pred, [d["x"]], [1.0], count=count, weight=weight)
            found[f"count {name} {weight}"] = (loss, *torch.autograd.grad(loss, pred))
    given = {"x_1": d["x"], "x_0": d["y"], "t": d["t"], "path": fm.paths.VP()}
    loss = fm.cfm_loss(pred, weight="min_snr", mask=d["mask"], **given)
    found["cfm_loss"] = (loss, *torch.autograd.grad(loss, pred))
    return found


def compare(mesh, placements) -> None:
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    noisy = all(not p.is_shard() or p.is_shard(0) for p in placements)
    want = results(data(), noisy)

    def sharded(value: torch.Tensor) -> DTensor:
        kept = [p if not p.is_shard() or p.dim < value.dim() else Replicate() for p in placements]
        return distribute_tensor(value, mesh, kept)

    whole = {name: sharded(value) for name, value in data().items()}
    half = {
        name: value if name in ("t", "token", "mask", "row_mask") else whole[name] for name, value in data().items()
    }
    for given in (whole, half):  # coefficients, weights and masks as plain tensors of the whole
        got = results(given, noisy)
        assert list(want) == list(got)
        for name, values in want.items():
            pairs = zip(*((v if isinstance(v, tuple) else (v,)) for v in (values, got[name])), strict=True)
            for i, (a, b) in enumerate(pairs):
                b = b.full_tensor() if isinstance(b, DTensor) else b
                torch.testing.assert_close(a, b, msg=lambda m, n=name, i=i: f"{n} {i} {placements}: {m}")


def cases(mesh):
    from torch.distributed.tensor import Replicate, Shard

    if mesh.ndim == 1:
        return [[Shard(0)], [Replicate()], [Shard(1)], [Shard(2)]]
    return [[Replicate(), Shard(0)], [Shard(0), Shard(1)]]


def compare_draws(mesh, rank: int) -> None:
    """Ranks whose generators differ draw one batch: x_t and t of the whole, wherever its parts are."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(rank)
    others = [Replicate()] * (mesh.ndim - 1)
    ones, zeros = torch.ones(B, T), torch.zeros(B, T)
    for placement in (Shard(0), Shard(1), Replicate()):
        x_1, x_0 = (distribute_tensor(x, mesh, [placement, *others]) for x in (ones, zeros))
        for sampler in (None, fm.times.LogitNormal()):
            if not placement.is_shard(1):  # noise is drawn by rows
                torch.manual_seed(3)
                plain = fm.paths.CondOT().sample(ones, time_sampler=sampler)
                torch.manual_seed(3 + 10 * rank)  # the first rank's seeds are all ranks'
                sharded = fm.paths.CondOT().sample(x_1, time_sampler=sampler)
                assert torch.equal(plain.t, sharded.t)
                assert torch.equal(plain.x_t, sharded.x_t.full_tensor())
            batch = fm.paths.CondOT().sample(x_1, x_0, time_sampler=sampler)
            assert torch.equal(batch.x_t.full_tensor(), batch.t[:, None].expand(B, T))
            other = fm.paths.CondOT().sample(x_1, x_0, time_sampler=sampler, generator=torch.Generator())
            assert torch.equal(other.x_t.full_tensor(), other.t[:, None].expand(B, T))
        if not placement.is_shard(1):
            drawn = [fm.paths.CondOT().sample(x_1).x_t, fm.interpolate(x_1, alpha=0.0, sigma=1.0, store_noise=True)[0]]
            for x in drawn:
                gathered = [torch.empty(B, T) for _ in range(torch.distributed.get_world_size())]
                torch.distributed.all_gather(gathered, x.full_tensor())
                assert all(torch.equal(g, gathered[0]) for g in gathered)


def work(rank: int, world: int, folder: str) -> None:
    try:
        torch.set_num_threads(1)
        store = os.path.join(folder, "store")
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        for shape in ((world,), (world, 1)):
            mesh = torch.distributed.init_device_mesh("cpu", shape)
            for placements in cases(mesh):
                compare(mesh, placements)
            compare_draws(mesh, rank)
        torch.distributed.destroy_process_group()
    except BaseException:
        with open(os.path.join(folder, f"error{rank}"), "w") as file:
            file.write(traceback.format_exc())
        raise


def test_two_ranks_have_the_wholes_numbers(tmp_path) -> None:
    try:
        torch.multiprocessing.spawn(work, (2, os.fspath(tmp_path)), nprocs=2)
    except Exception as error:
        told = [path.read_text() for path in sorted(tmp_path.glob("error*"))]
        raise AssertionError("\n".join(told)) from error


def test_one_rank_has_them_too_and_says_what_does_not_fit(tmp_path) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        compare(mesh, [Shard(0)])
        x = torch.randn(B, T, D)
        rows, columns = distribute_tensor(x, mesh, [Shard(0)]), distribute_tensor(x, mesh, [Shard(1)])
        noise = fm.Noise(torch.tensor(1))
        for call, message in (
            (lambda: fm.combine([x, rows], [1.0, 1.0]), r"^operands\[0\]: expected a DTensor"),
            (lambda: fm.combine([rows, x[:2]], [1.0, 1.0]), r"^operands\[1\]: expected the shape of operands\[0\]"),
            (lambda: fm.combine([rows], [1.0], out=rows), "^out: expected None where an operand is a DTensor"),
            (lambda: fm.combine([rows], [torch.ones(3)]), r"^coefficients\[0\]: expected a leading part"),
            (
                lambda: fm.combine([columns, noise], [1.0, 1.0]),
                r"^operands\[0\]: expected a DTensor that is sharded in",
            ),
            (lambda: fm.regression_loss(x, [rows], [1.0]), "^pred: expected a DTensor"),
            (lambda: fm.regression_loss(rows, [x], [1.0], mask=torch.ones(2) > 0), "^mask: expected a leading part"),
            (
                lambda: fm.regression_loss(rows, [x], [1.0], weight="a", reduction="weighted_mean"),
                "^weight: expected a",
            ),
            (lambda: fm.row_dots([x, rows], [(0, 1)]), r"^tensors\[0\]: expected a DTensor"),
            (lambda: fm.interpolate(x, rows, alpha=0.5, sigma=0.5), "^x_1: expected a DTensor"),
        ):
            with pytest.raises((TypeError, ValueError), match=message):
                call()
    finally:
        torch.distributed.destroy_process_group()
