"""LAMB under ZeRO equals a LAMB that never heard of it."""

import math
from types import SimpleNamespace

import pytest
import torch

import ranks
import tiny
from earlybert import mechanics, state
from earlybert.engine import initialize
from earlybert.optim import Lamb, Segment, Segments, parameter_groups

SETTINGS = {"lr": 2e-2, "betas": (0.9, 0.95), "eps": 1e-6, "trust": (0.01, 0.5)}


class Reference(torch.optim.Optimizer):
    """Algorithm 2 of the LAMB paper, a parameter at a time, in plain PyTorch."""

    def __init__(self, groups):
        super().__init__(groups, {**SETTINGS, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (b1, b2), (low, high) = group["betas"], group["trust"]
            for p in group["params"]:
                s = self.state[p]
                if not s:
                    s.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                s["t"] += 1
                s["m"] = b1 * s["m"] + (1 - b1) * p.grad
                s["v"] = b2 * s["v"] + (1 - b2) * p.grad**2
                m, v = s["m"] / (1 - b1 ** s["t"]), s["v"] / (1 - b2 ** s["t"])
                r = m / (v.sqrt() + group["eps"]) + group["weight_decay"] * p
                ratio = 1.0
                if group["trust_ratio"] and p.norm() > 0 and r.norm() > 0:
                    ratio = min(max((p.norm() / r.norm()).item(), low), high)
                p -= group["lr"] * ratio * r


class Toy(torch.nn.Module):
    """Odd shapes, some of which lie across ranks. Its gradients are given, the same on every rank, so that
    what is compared is the optimizer and not the order in which a model's gradients are added."""

    config = SimpleNamespace(coefficients="none")
    shapes = ((7, 5), (13,), (64, 3), (1, 1), (5, 9), (3,), (31, 17))

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.p = torch.nn.ParameterList(
            torch.randn(shape, generator=generator) * 0.1 ** (i % 3) for i, shape in enumerate(self.shapes)
        )

    def forward(self, step):
        generator = torch.Generator().manual_seed(100 + step)
        gradients = [torch.randn(shape, generator=generator) for shape in self.shapes]
        return sum((p * g.to(p.dtype)).sum() for p, g in zip(self.p, gradients, strict=True))


def train_with_lamb(stage):
    """Largest relative distance of a master from the reference's over twenty steps."""
    asked = tiny.mechanics_of(stage, "fp32")
    engine = initialize(
        model=Toy(),
        config=mechanics.complete(asked, micro_batch=1, accumulation=2, clipping=0.0),
        optimizer=lambda groups: Lamb(groups, **SETTINGS),
        weight_decay=0.1,
    )
    model = Toy()
    optimizer = Reference(parameter_groups(model, weight_decay=0.1))
    distances = []
    for step in range(20):
        for _ in range(2):
            engine.backward(engine(step))
            engine.step()
        optimizer.zero_grad()
        model(step).backward()
        optimizer.step()
        whole = dict(state.whole_parameters(state.read(engine.inner)))
        for name, expected in model.named_parameters():
            distances.append(((whole[name]["master"] - expected).norm() / expected.norm()).item())
    engine.close()
    assert len(distances) == 20 * len(Toy.shapes)
    return max(distances)


def train_under_each_stage():
    return {stage: train_with_lamb(stage) for stage in (0, 1, 2, 3)}


@pytest.mark.parametrize("count", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_lamb_under_zero_equals_the_unsharded_one_for_twenty_steps(count):
    for distances in ranks.run("test_optim:train_under_each_stage", ranks=count):
        assert all(0 <= distance < 1e-6 for distance in distances.values()), distances


def draw_with_lamb():
    results = []
    for stage in (0, 1, 2, 3):
        engine = tiny.engine(stage, "bf16", tiny.settings(moments="keep"), lamb=True)
        losses = tiny.train(engine, range(8))
        results.append((losses, engine.module.config.heads_per_layer))
        engine.close()
    return results


def test_a_draw_under_lamb_attaches_the_segments_of_the_small_model():
    results = ranks.run("test_optim:draw_with_lamb", ranks=2)[0]
    for losses, heads in results:
        assert heads == [3, 3] and all(map(math.isfinite, losses))
        # The stages differ in the order of sums only, before the draw and after it.
        assert losses == pytest.approx(results[0][0], abs=0.03)


def test_a_ratio_for_each_parameter_of_a_flat_tensor_and_none_where_the_group_has_none():
    flat = torch.tensor([3.0, 4.0, 0.0, 0.0, 6.0, 8.0], requires_grad=True)
    own = (Segment(0, 0, 2), Segment(1, 2, 2), Segment(2, 4, 2))
    flat.grad = torch.ones(6)
    lamb = Lamb([flat], lr=1.0, eps=0.0, weight_decay=0.0, trust=(0.0, 5.0))
    lamb.attach({flat: Segments(3, own)})
    before = flat.detach().clone()
    lamb.step()
    step = before - flat.detach()  # AdamW's first direction is sign(gradient) = 1, of norm sqrt 2
    assert step.tolist() == pytest.approx([5 / math.sqrt(2)] * 2 + [1.0] * 2 + [5.0] * 2)
    assert torch.equal(step[2:4], torch.ones(2)), "no ratio where the weights are zero"
    plain = torch.tensor([3.0, 4.0], requires_grad=True)
    plain.grad = torch.ones(2)
    Lamb([{"params": [plain], "trust_ratio": False}], lr=1.0, eps=0.0, weight_decay=0.0).step()
    assert plain.tolist() == [2.0, 3.0]


if __name__ == "__main__":
    print("| processes | ZeRO-0 | ZeRO-1 | ZeRO-2 | ZeRO-3 |\n|---|---|---|---|---|")
    for count in (1, 2, 4):
        of_ranks = ranks.run("test_optim:train_under_each_stage", ranks=count)
        worst = [max(found[stage] for found in of_ranks) for stage in range(4)]
        print(f"| {count} | {' | '.join(f'{distance:.1e}' for distance in worst)} |")
