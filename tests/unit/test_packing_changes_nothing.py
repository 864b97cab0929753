"""Loss and every gradient of a packed batch equal those of separate forwards, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from foveate.data.packing import pack
from foveate.learner import Learner
from foveate.model.build import load_lmm
from tests.models import mixed_samples, saved_llava


def gradients(learner: Learner, groups: list[list[object]]) -> tuple[float, dict[str, torch.Tensor]]:
    learner.zero_grad(set_to_none=True)
    total = 0.0
    for group in groups:
        loss = learner(pack(group)).terms["text"].total  # type: ignore[arg-type]
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("llm", ["qwen2", "llama", "mistral"])
def test_packed_equals_separate(llm: str, tmp_path: Path) -> None:
    saved_llava("siglip", llm, tmp_path / "llava")
    lmm, _ = load_lmm(tmp_path / "llava")
    learner = Learner(lmm.double())
    samples = mixed_samples(seed=3)
    loss, together = gradients(learner, [samples])
    alone_loss, alone = gradients(learner, [[sample] for sample in samples])
    halves_loss, halves = gradients(learner, [samples[::2], samples[1::2]])
    assert loss == pytest.approx(alone_loss, rel=1e-9) and loss == pytest.approx(halves_loss, rel=1e-9)
    assert set(together) == set(alone) == set(halves) == {name for name, _ in learner.named_parameters()}
    for name, gradient in together.items():
        scale = float(gradient.abs().max())
        assert scale > 0 or "k_proj.bias" in name or "key.bias" in name, f"{name} gets no gradient"
        torch.testing.assert_close(gradient, alone[name], atol=1e-9 * max(scale, 1e-3), rtol=1e-9)
        torch.testing.assert_close(gradient, halves[name], atol=1e-9 * max(scale, 1e-3), rtol=1e-9)
