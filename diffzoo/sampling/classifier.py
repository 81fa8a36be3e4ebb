"""Classifier guidance: a denoiser around a denoiser, pulled towards what a noise-aware classifier recognises.

    (1)  score = s grad_z log p(y | z, t)                  (arXiv:2105.05233, Section 4)

A sampler of the reverse chain adds variance times score to its mean (Algorithm 1); all others see a noise that is less
by sigma times score, and the data that goes with it (Algorithm 2). Either happens after x_hat was clipped, and the
result is not clipped again.

Scales of the paper, at 250 ancestral steps: 1.0 at 64 px, 0.5 at 128 px, 1.0 at 256 px, 4.0 at 512 px, and 10.0 for the
unconditional network at 256 px. With 25 DDIM steps: 1.25 at 128 px, 2.5 at 256 px, 9.0 at 512 px. A scale of 0 is none.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from diffzoo.errors import UserError
from diffzoo.process.gaussian import Estimate
from diffzoo.sampling.denoiser import Denoise, DenoiserAround, noise_levels
from diffzoo.typing import Condition, Data, NoiseLevel, Times

__all__ = ["ClassifierGuidance", "NoiseAwareClassifier"]


@runtime_checkable
class NoiseAwareClassifier(Protocol):
    """Noisy images `(b, c, h, w)` and a noise level `(b,)` to logits; `diffzoo.models.adm.ADMClassifier` is one."""

    def __call__(self, z: Data, noise_level: NoiseLevel) -> Float[Tensor, "b classes"]: ...


class ClassifierGuidance(DenoiserAround):
    """(1) around a denoiser.

    Args:
        denoise: conditional or not, guided or not.
        classifier: reads the same noise level as the network; in evaluation mode.
        scale: s.
        conditional: whether `denoise` takes the class too; False for an unconditional network.
    """

    def __init__(self, denoise: Denoise, classifier: NoiseAwareClassifier, scale: float, *, conditional: bool = True):
        self.denoise, self.classifier, self.scale, self.conditional = denoise, classifier, float(scale), conditional

    def __call__(self, z: Data, t: Times, cond: Condition | None = None) -> Estimate:
        """The guided estimate."""
        estimate, score = self.parts(z, t, cond)
        return estimate if score is None else self.process.add_score(estimate, z, t, score)

    def parts(self, z: Data, t: Times, cond: Condition | None = None) -> tuple[Estimate, Data | None]:
        """The estimate without guidance, and the score (1) to add to it; None at scale 0.

        Raises:
            UserError: without classes to guide towards, or for one that the classifier does not know.
        """
        estimate = self.denoise(z, t, self._told(cond))
        return estimate, self.score(z, t, cond) if self.scale else None

    def score(self, z: Data, t: Times, cond: Condition | None) -> Data:
        """(1), of the shape of z."""
        if cond is None or cond.label is None:
            raise UserError("classifier guidance needs class labels: say which classes to guide towards")
        level = noise_levels(self.process, z, t)
        with torch.enable_grad():
            point = z.detach().requires_grad_()
            logits = self.classifier(point, level).float()
            if cond.label.device.type == "cpu":  # reading it elsewhere would wait for the device
                _check_classes(cond.label, logits.shape[1])
            chosen = logits.log_softmax(1).gather(1, cond.label[:, None]).sum()
            (gradient,) = torch.autograd.grad(chosen, point)
        return self.scale * gradient

    def _told(self, cond: Condition | None) -> Condition | None:
        if self.conditional or cond is None:
            return cond
        kept = Condition(text=cond.text, text_mask=cond.text_mask, low_res=cond.low_res)
        return kept if len(kept) else None


def _check_classes(label: Tensor, classes: int) -> None:
    wrong = label[(label < 0) | (label >= classes)]
    if len(wrong):
        raise UserError(f"class {int(wrong[0])} is out of range: the classifier knows classes 0 to {classes - 1}")
