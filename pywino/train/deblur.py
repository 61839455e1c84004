# SPDX-License-Identifier: BSD-3-Clause
"""How Deblur-YOLO's generator is trained (`pywino train deblur`).

    L_G = 0.5 L_C + 0.006 L_P + 0.01 L_A + 0.1 L_D

L_C is the mean squared error of pixels in -1..1, L_P that of VGG's features, L_A the relativistic
average least-squares GAN of a global and a local discriminator, their mean, and L_D a detector's
loss. Two phases: "content" trains on L_C alone; "whole" goes on from its weights with all four,
of which L_P and L_D take part where a file is given for them, and L_A unless it is turned off.

The norms. Crops of 128 pixels have other statistics than photos, and a norm that takes a photo's
own makes its parts depend on one another. So the running statistics are gathered once, in the first
steps, which train nothing, and stay: what is trained is what runs in eval mode.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pywino import models
from pywino.data.blur import LENGTH, SIZE, blur, trajectory_kernels
from pywino.losses import DetectionLoss, FeatureLoss, RelativisticCritic
from pywino.train.fields import option
from pywino.train.restoration import Learner, RestorationRecipe

PHASES = ("content", "whole")
CONTENT, PERCEPTUAL, ADVERSARIAL, DETECTION = 0.5, 0.006, 0.01, 0.1
_GATHER = 16  # steps that gather the norms' statistics
_FAINT = 4e-4  # L_C of a crop that is hardly blurred, 40 dB


class DeblurLearner(Learner):
    """The generator, and in the second phase its two discriminators.

    terms: name -> (weight, loss(restored, sharp)) beside L_C. critics: the discriminators, which
    learn by Adam at `lr`. balance, clip: as the recipe has them."""

    def __init__(
        self,
        net: models.DeblurYOLO,
        optimizer: torch.optim.Optimizer,
        terms: dict[str, tuple[float, nn.Module]],
        critics: dict[str, RelativisticCritic],
        lr: float,
        balance: bool = False,
        clip: float = 1.0,
    ):
        super().__init__(net, self._loss, optimizer)
        self.terms, self.balance, self.clip = terms, balance, clip
        self.critics = tuple(critics)
        for name, critic in critics.items():
            self.networks[name] = self.models[name] = critic
            self.optimizers[f"{name}_optimizer"] = torch.optim.Adam(
                critic.parameters(), lr, fused=True
            )

    def to(self, device: torch.device) -> None:
        super().to(device)
        for _, loss in self.terms.values():
            loss.to(device)

    def step(self, blurred: Tensor, sharp: Tensor) -> dict[str, Tensor]:
        net = self.networks["model"]
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d | nn.InstanceNorm2d)]
        seen = int(net.fpn.features[0][1].num_batches_tracked)
        gather = seen < _GATHER
        for norm in norms:
            norm.train(gather)
            norm.momentum = 1 / (seen + 1)  # the mean over all batches
        with torch.set_grad_enabled(not gather), self.autocast():
            restored = self.models["model"](blurred).float()
        terms = self.loss(restored, sharp, blurred)
        if not gather:
            optimizer = self.optimizers["optimizer"]
            optimizer.zero_grad(set_to_none=True)
            sum(terms.values()).backward()
            nn.utils.clip_grad_norm_(net.parameters(), self.clip)
            optimizer.step()
            for name in self.critics:
                self._judge(name, sharp, restored.detach())
        return {name: term.detach() for name, term in terms.items()}

    def _loss(self, restored: Tensor, sharp: Tensor, blurred: Tensor) -> dict[str, Tensor]:
        # In -1..1, where a difference is twice that in 0..1.
        content = 4 * (restored - sharp).square().mean((1, 2, 3))
        if self.balance:
            content = content / (4 * (blurred - sharp).square().mean((1, 2, 3)) + _FAINT)
        terms = {"content": CONTENT * content.mean()}
        for name, (weight, loss) in self.terms.items():
            terms[name] = weight * loss(restored, sharp)
        if self.critics:
            terms["adversarial"] = (
                ADVERSARIAL
                * sum(self._opinion(name, sharp, restored) for name in self.critics)
                / len(self.critics)
            )
        return terms

    def _opinion(self, name: str, sharp: Tensor, restored: Tensor) -> Tensor:
        critic = self.networks[name].requires_grad_(False)
        with self.autocast():
            predictions = critic(sharp).float(), critic(restored).float()
        critic.requires_grad_(True)
        return critic.generator_loss(*predictions)

    def _judge(self, name: str, sharp: Tensor, restored: Tensor) -> None:
        """A step of a discriminator."""
        with self.autocast():
            real, made = self.models[name](torch.cat((sharp, restored))).float().chunk(2)
        loss = self.networks[name].loss(real, made)
        optimizer = self.optimizers[f"{name}_optimizer"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


@dataclass(frozen=True)
class DeblurRecipe(RestorationRecipe):
    """Deblur-YOLO's generator on photos that are blurred by random camera shake, or on pairs."""

    batch_size: int = option(8, "Of all ranks together, at the start.")
    crop: int = option(128, "Pixels a side.")
    lr: float = option(1e-4, "At the start.")
    schedule: str = option(
        "cosine", "lr of Adam: constant; times 0.2 after 30, 50, 80 % (steps); to 0 (cosine)."
    )
    phase: str = option("content", "content: L_C alone. whole: all of L_G.")
    shortest: float = option(LENGTH[0], "Pixels of the camera's path, at least.")
    longest: float = option(LENGTH[1], "Pixels of the camera's path, at most.")
    balance: bool = option(
        False, "Weigh each crop's L_C by 1 over that of the blurred crop: all count alike."
    )
    clip: float = option(1.0, "The norm of the generator's gradient, at most.")
    encoder: str | None = option(None, "MobileNetV2's file (torchvision's), to start from.")
    freeze_encoder: bool = option(False, "Leave the encoder as it is.")
    dilation: int = option(2, "Of the top-down convolutions; 1 is DeblurGAN-v2.")
    adversarial: bool = option(True, "L_A, of two discriminators: most of what a step costs.")
    all_stride2: bool = option(False, "Stride 2 in all of the discriminators' convolutions.")
    vgg: str | None = option(None, "VGG-16's file, for L_P.")
    detector: str | None = option(
        None, "Weights for L_D: of the small detector, or YOLOv3's on COCO (.weights)."
    )
    classes: int = option(4, "Of the small detector.")

    def __post_init__(self):
        super().__post_init__()
        if self.phase not in PHASES:
            self.refuse("phase", f"one of {', '.join(PHASES)}")
        if self.batch_size < 2 and self.crop <= 32:
            self.refuse("batch_size", "2 or more for such small crops")
        if not 0 <= self.shortest <= self.longest:
            self.refuse("shortest", f"between 0 and longest ({self.longest})")
        if not self.clip > 0:
            self.refuse("clip", "more than 0")
        if self.phase == "content" and (self.vgg or self.detector):
            self.refuse("phase", "'whole' for vgg and detector to take part")
        if self.phase == "whole" and self.detector and self.crop % 32:
            self.refuse("crop", "a multiple of 32, for the detector")

    def degrade(self):
        length = (self.shortest, self.longest)

        def shaken(sharp: Tensor, generator: torch.Generator) -> Tensor:
            kernels = trajectory_kernels(1, generator, length=length)
            return blur(sharp[None], kernels)[0].clamp(0, 1)

        return shaken, SIZE // 2

    def build(self) -> DeblurLearner:
        net = models.deblur_yolo(encoder=self.encoder, dilation=self.dilation, trim=True)
        if self.init is None:
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d):
                    module.reset_running_stats()
            # It starts as the identity.
            nn.init.zeros_(net.final.weight)
            nn.init.zeros_(net.final.bias)
        net = self.started(net).to(memory_format=torch.channels_last)
        if self.freeze_encoder:
            net.fpn.features.requires_grad_(False)
        terms, critics = {}, {}
        if self.phase == "whole":
            if self.vgg:
                terms["perceptual"] = (PERCEPTUAL, FeatureLoss(self.vgg))
            if self.detector:
                if self.detector.endswith(".weights"):
                    detector = models.yolov3(self.detector)
                else:
                    detector = models.small_yolo(self.classes, self.detector)
                terms["detection"] = (DETECTION, DetectionLoss(detector))
            critics = {
                name: RelativisticCritic(
                    models.patch_discriminator(layers, all_stride2=self.all_stride2)
                )
                for name, layers in (("global", 5), ("local", 3))
                if self.adversarial
            }
        return DeblurLearner(
            net, self.optimize(net), terms, critics, self.lr, self.balance, self.clip
        )
