"""The training of the DreamBooth recipe, from its options to the files it leaves."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from accelerate import DistributedDataParallelKwargs
from diffusers.training_utils import cast_training_params
from families import Family, Texts, load_family
from PIL import Image
from pictures import Pictures, load_pictures, sample, stack
from recipe_tools.accelerate_loop import DTYPES, Outcome, Training, start
from recipe_tools.adapters import boft_config, save_adapter
from recipe_tools.images import fit, image_files, load_image, save_grid
from recipe_tools.report import adapt
from torch import Tensor, nn
from tqdm import tqdm

# The fixed noise and times of the losses before and after: so many times for each of so many pictures.
_MEASURED_PICTURES, _MEASURED_TIMES = 8, 16


class Denoising(nn.Module):
    """Everything that trains, as one module, so that accelerate wraps and synchronises one."""

    def __init__(self, family: Family, encoders: list[nn.Module], prompts: list[str]) -> None:
        super().__init__()
        self.denoiser = family.denoiser
        self.encoders = nn.ModuleList(encoders)
        self._family, self._prompts = family, prompts
        self._texts: Texts | None = None
        if not encoders:
            with torch.no_grad():
                self._texts = family.encode_texts(prompts)

    def forward(self, latents: Tensor, noise: Tensor, uniform: Tensor, chosen: Tensor, sizes: Tensor) -> Tensor:
        """Losses (count,) as of `Family.losses`; `chosen` (count,) are numbers of prompts."""
        texts = self._texts if self._texts is not None else self._family.encode_texts(self._prompts)
        rows = {name: value[chosen] for name, value in texts.items()}
        return self._family.losses(latents, noise, uniform, rows, sizes)


class Run:
    """One training run: the model, its losses, and what measures and draws it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.instance = load_pictures(options.instance_data_dir, "--instance-data-dir")
        # SDXL takes the last but one layer of its first text encoder, whose last layer gets no gradient.
        unused = DistributedDataParallelKwargs(find_unused_parameters=options.train_text_encoder)
        self.accelerator = start(options, unused)
        self.family = load_family(options, DTYPES[self.accelerator.mixed_precision])
        self.family.pipeline.to(self.accelerator.device)
        self.prompts = [options.instance_prompt]
        self.classes: list[Path] = []
        if options.with_prior_preservation:
            self.prompts.append(options.class_prompt)
            self.classes = self._class_pictures()
        self.drawn_text, self.no_text = self._validation_texts()
        self.model = self._adapted_model()
        self.training = Training(self.accelerator, self.model, options, options.max_train_steps)
        # Of the grid: what was drawn when.
        self.rows: list[tuple[str, list[Image.Image]]] = []

    def _class_pictures(self) -> list[Path]:
        """Files of the class pictures; those that are missing are drawn, shared by the processes."""
        options, accelerator = self.options, self.accelerator
        folder: Path = options.class_data_dir
        absent = [number for number in range(options.num_class_images) if not _class_file(folder, number).exists()]
        missing = absent[: max(0, options.num_class_images - len(image_files(folder)))]
        accelerator.wait_for_everyone()  # all must have looked before one draws, or they would share other lists
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            with torch.no_grad():
                text, negative = self.family.encode_texts([options.class_prompt]), self.family.encode_texts([""])
            mine = missing[accelerator.process_index :: accelerator.num_processes]
            bar = tqdm(total=len(mine), desc="class pictures", disable=not accelerator.is_local_main_process)
            for first in range(0, len(mine), options.sample_batch_size):
                seeds = mine[first : first + options.sample_batch_size]
                for seed, image in zip(seeds, self.family.draw(text, negative, seeds, options), strict=True):
                    image.save(_class_file(folder, seed))
                bar.update(len(seeds))
            bar.close()
        accelerator.wait_for_everyone()
        return image_files(folder)[: options.num_class_images]

    @torch.no_grad()
    def _validation_texts(self) -> tuple[Texts | None, Texts | None]:
        if self.options.validation_prompt is None or self.options.train_text_encoder:
            return None, None
        return self.family.encode_texts([self.options.validation_prompt]), self.family.encode_texts([""])

    def _adapted_model(self) -> Denoising:
        options, family = self.options, self.family
        adapted = {family.denoiser_name: options.target_modules or family.targets}
        if options.train_text_encoder:
            adapted |= dict.fromkeys(family.text_encoder_names, family.text_targets)
        modules = {name: getattr(family.pipeline, name) for name in adapted}
        for name, targets in adapted.items():
            config = boft_config(options, targets)
            adapt(lambda module=modules[name], config=config: module.add_adapter(config))
            cast_training_params(modules[name], torch.float32)
            if options.gradient_checkpointing and name == family.denoiser_name:
                modules[name].enable_gradient_checkpointing()
            elif options.gradient_checkpointing:
                modules[name].gradient_checkpointing_enable()
        self.adapted = modules
        encoders = [module for name, module in modules.items() if name != family.denoiser_name]
        model = Denoising(family, encoders, self.prompts)
        if not encoders:
            # All texts are encoded, and FLUX's second encoder takes 9 GB.
            for name in {"text_encoder", "text_encoder_2"} & family.pipeline.components.keys():
                setattr(family.pipeline, name, None)
        return model

    def train(self) -> None:
        """Train, and leave the adapter, the metrics and the pictures in the output folder."""
        samples = Pictures(self.instance, self.classes, self.options)
        outcome = self.training.run("dreambooth", vars(self.options), samples, self._losses, self._measure)
        if self.accelerator.is_main_process:
            self._write(outcome)

    def _losses(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """The mean loss of the subject and, if there are any, of the class pictures, by its weight."""
        device = self.accelerator.device
        count, kinds = batch["pixels"].shape[:2]
        latents = self.family.encode_pictures(batch["pixels"].flatten(0, 1).to(device))
        losses = model(
            latents,
            torch.randn_like(latents),
            torch.rand(len(latents), device=device),
            torch.arange(kinds, device=device).repeat(count),
            batch["sizes"].flatten(0, 1).to(device),
        )
        losses = losses.view(count, kinds).mean(dim=0)
        logs = dict(zip(("loss/instance", "loss/class"), losses.tolist(), strict=False))
        return losses[0] + self.options.prior_loss_weight * losses[1:].sum(), logs

    def _measure(self, step: int) -> dict[str, float]:
        """Losses before and after the training, and each time a drawing of the validation prompt."""
        when = {0: "before", self.training.steps: "after"}.get(step, f"step {step}")
        self.model.eval()
        found = {} if when.startswith("step") else self._fixed_losses()
        self._draw(when)
        return found

    def _fixed_losses(self) -> dict[str, float]:
        """Mean denoising losses of the subject and of the class, at fixed noise and times, without dropout."""
        kinds = {"instance": self.instance[:_MEASURED_PICTURES]}
        if self.classes:
            kinds["class"] = [load_image(path) for path in self.classes[:_MEASURED_PICTURES]]
        device = self.accelerator.device
        found = {}
        for chosen, (kind, images) in enumerate(kinds.items()):
            generator = torch.Generator().manual_seed(self.options.seed)
            total = 0.0
            for image in images:
                pair = stack([sample(image, self.options.resolution)])
                torch.manual_seed(self.options.seed)
                latents = self.family.encode_pictures(pair["pixels"].to(device))
                for index in range(_MEASURED_TIMES):
                    noise = torch.randn(latents.shape, generator=generator).to(device)
                    uniform = torch.tensor([(index + 0.5) / _MEASURED_TIMES], device=device)
                    with self.accelerator.autocast():
                        losses = self.model(
                            latents, noise, uniform, torch.tensor([chosen], device=device), pair["sizes"].to(device)
                        )
                    total += losses.item()
            found[kind] = total / (_MEASURED_TIMES * len(images))
        return found

    def _draw(self, when: str) -> None:
        """Draw the validation prompt, if there is one, and write ``validation/WHEN.png``."""
        options = self.options
        if options.validation_prompt is None:
            return
        seeds = range(options.seed, options.seed + options.num_validation_images)
        with self.accelerator.autocast():
            text = self.drawn_text or self.family.encode_texts([options.validation_prompt])
            negative = self.no_text or self.family.encode_texts([""])
            images = self.family.draw(text, negative, seeds, options)
        self.rows.append((f"{when}: {options.validation_prompt}", images))
        save_grid(options.output_dir / "validation" / f"{when.replace(' ', '-')}.png", self.rows[-1:])

    def _write(self, outcome: Outcome) -> None:
        options = self.options
        for name, module in self.adapted.items():
            save_adapter(module, options.output_dir / name, options.pretrained_model_name_or_path)
        if self.rows:
            shown = [fit([image], options.resolution)[0][0] for image in self.instance[: len(self.rows[0][1])]]
            save_grid(options.output_dir / "validation.png", [(options.instance_prompt, shown), *self.rows])
        metrics = {"denoising_loss": outcome.measured, **outcome.facts}
        (options.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        for kind, loss in outcome.measured.items():
            print(f"denoising loss, {kind}: {loss['before']:.4f} before, {loss['after']:.4f} after")


def _class_file(folder: Path, number: int) -> Path:
    return folder / f"class-{number:05}.png"


def train(options: argparse.Namespace) -> None:
    """Run the recipe with the options of `command_line.parse`."""
    Run(options).train()
