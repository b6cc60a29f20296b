"""What only a GPU can show: its kernels against the CPU's, and a draw on it."""

import pytest
import torch
from torch.nn import functional

import ranks
import tiny
from earlybert import dist
from earlybert.arithmetic import CrossEntropy, Documents, attend, visible
from earlybert.initial import seeded_model

pytestmark = pytest.mark.gpu


def attended(q, k, v, *, mask):
    """(context, gradients of the three) under a fixed gradient from above."""
    given = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*given, mask=mask, dropout=0.0)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
    (out.float() * weights).sum().backward()
    return [out.detach().float(), *(x.grad.float() for x in given)]


def test_documents_attend_within_themselves_as_a_mask_says():
    torch.manual_seed(0)
    B, N, T, H = 3, 4, 128, 64
    q, k, v = torch.randn(3, B, N, T, H, device="cuda")
    segments_BT = (torch.rand(B, T, device="cuda") < 0.05).cumsum(1)
    same_B1TT = (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    exact = attended(q, k, v, mask=same_B1TT)
    half = [x.to(torch.bfloat16) for x in (q, k, v)]
    apart = visible(None, segments_BT, x_BTD=half[0], dropout=0.0)
    assert isinstance(apart, Documents)
    masked = attended(*half, mask=same_B1TT)
    for reference, with_mask, with_bounds in zip(exact, masked, attended(*half, mask=apart), strict=True):
        allowed = 2 * (with_mask - reference).abs().max()
        assert (with_bounds - reference).abs().max() < allowed


def test_the_loss_on_a_gpu_is_torchs():
    torch.manual_seed(0)
    logits = 5 * torch.randn(300, 3000, device="cuda")
    labels = torch.randint(0, 3000, (300,), device="cuda")
    labels[::7] = -100
    own, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    total, right = CrossEntropy.apply(own, labels)
    expected = functional.cross_entropy(theirs, labels, reduction="sum")
    total.backward()
    expected.backward()
    assert torch.allclose(total, expected, rtol=1e-5)
    assert torch.allclose(own.grad, theirs.grad, atol=1e-6)
    assert right == ((logits.argmax(1) == labels) & (labels >= 0)).sum()


def test_a_sum_does_not_wait_for_what_the_gpu_got_to_do_after_it():
    numbers = dist.begin_sum(torch.tensor([1.0, 2.5], dtype=torch.float64, device="cuda"))
    torch.cuda._sleep(10**9)  # cycles, about half a second
    busy = torch.cuda.Event()
    busy.record()
    assert numbers() == [1.0, 2.5] and not busy.query()


def draws(stage, compiled):
    """Losses of 8 steps with a draw after the 4th, and what a plain model of the CPU says to the first."""
    engine = tiny.engine(stage, "bf16", tiny.settings(), clipping=1.0)
    if compiled:
        engine.compile()
    losses = []
    for step in range(8):
        for micro in range(tiny.ACCUMULATION):
            batch = tiny.batch(step, micro * dist.world_size() + dist.rank())
            loss = engine(**{name: tensor.to(engine.device) for name, tensor in batch.items()}).loss
            engine.backward(loss)
            losses.append(loss.item())
            del loss
            engine.step()
    model = seeded_model(tiny.config(), seed=7)
    first, widths = model(**tiny.batch(0, 0)).loss.item(), engine.module.config.heads_per_layer
    engine.close()
    return losses, first, widths


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_draw_on_a_gpu_goes_on_training(stage, compiled, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    ((losses, first, widths),) = ranks.run("test_gpu:draws", ranks=1, stage=stage, compiled=compiled)
    assert abs(losses[0] - first) < 0.02
    assert sum(widths) < 8 and all(loss < 5 for loss in losses)
