"""The training of the DreamBooth recipe, from its options to the files it leaves."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from families import Family, Texts, load_family
from peft import BOFTConfig
from PIL import Image
from pictures import Pictures, load_pictures, sample, stack
from recipe_tools import checkpoints
from recipe_tools.adapters import save_adapter
from recipe_tools.arguments import fail
from recipe_tools.images import fit, image_files, load_image, save_grid
from recipe_tools.report import adapt, first_line, patch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
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
    """One training run: the model, what measures and draws it, and the loop."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.instance = load_pictures(options.instance_data_dir, "--instance-data-dir")
        self.accelerator = Accelerator(
            mixed_precision=options.mixed_precision,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            log_with="tensorboard",
            project_config=ProjectConfiguration(
                project_dir=str(options.output_dir), logging_dir=str(options.output_dir / "logs")
            ),
            # SDXL takes the last but one layer of its first text encoder, whose last layer gets no gradient.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=options.train_text_encoder)],
        )
        self.checkpoint = checkpoints.find_checkpoint(options.output_dir, options.resume_from_checkpoint)
        set_seed(options.seed)
        patch()
        self.family = load_family(options, _DTYPES[self.accelerator.mixed_precision])
        self.family.pipeline.to(self.accelerator.device)
        self.prompts = [options.instance_prompt]
        self.classes: list[Path] = []
        if options.with_prior_preservation:
            self.prompts.append(options.class_prompt)
            self.classes = self._class_pictures()
        self.drawn_text, self.no_text = self._validation_texts()
        self.model = self._adapted_model()
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
        size, count = options.boft_blocks
        modules = {name: getattr(family.pipeline, name) for name in adapted}
        for name, targets in adapted.items():
            config = BOFTConfig(
                boft_block_size=size,
                boft_block_num=count,
                boft_n_butterfly_factor=options.boft_factors,
                boft_dropout=options.boft_dropout,
                bias=options.boft_bias,
                target_modules=list(targets),
            )
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
        options, accelerator = self.options, self.accelerator
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        accelerator.print(first_line(self.model))
        losses = {"before": self.measured()}
        self.validate("before")
        optimizer = torch.optim.AdamW(
            parameters, lr=options.learning_rate, weight_decay=options.adam_weight_decay, eps=options.adam_epsilon
        )
        processes = accelerator.num_processes  # a prepared schedule takes as many steps at a time
        schedule = get_scheduler(
            options.lr_scheduler,
            optimizer,
            num_warmup_steps=options.lr_warmup_steps * processes,
            num_training_steps=options.max_train_steps * processes,
        )
        model, optimizer, schedule = accelerator.prepare(self.model, optimizer, schedule)
        checkpoints.keep_only_what_trains(accelerator)
        accelerator.init_trackers(
            "dreambooth", config={name: str(value) for name, value in sorted(vars(options).items())}
        )
        set_seed(options.seed, device_specific=True)
        first_step = checkpoints.resume(accelerator, self.checkpoint)
        if first_step > options.max_train_steps:
            fail(f"--max-train-steps {options.max_train_steps}: the checkpoint is of step {first_step}")
        seconds = self._loop(model, parameters, optimizer, schedule, first_step)
        losses["after"] = self.measured()
        self.validate("after")
        self._write(losses, seconds)
        accelerator.end_training()

    def _loop(self, model, parameters, optimizer, schedule, first_step: int) -> float | None:
        """Train from `first_step` on. Returns the median seconds of a step, None if there was none."""
        options, accelerator = self.options, self.accelerator
        dataset = Pictures(self.instance, self.classes, options)
        batches = checkpoints.micro_batches(
            accelerator, len(dataset), options.train_batch_size, options.seed, first_step, options.max_train_steps
        )
        # A loader draws from the default generator where it is given none, and then a resumed run would differ.
        loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=options.dataloader_num_workers,
            generator=torch.Generator(),
        )
        bar = tqdm(
            total=options.max_train_steps,
            initial=first_step,
            desc="steps",
            disable=not accelerator.is_local_main_process,
        )
        step, seconds, start = first_step, [], time.perf_counter()
        model.train()
        for batch in loader:
            with accelerator.accumulate(model):
                losses = self._batch_losses(model, batch)
                loss = losses[0] + options.prior_loss_weight * losses[1:].sum()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(parameters, options.max_grad_norm)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            step += 1
            names = ("loss/instance", "loss/class")
            logs = dict(zip(names, losses.tolist(), strict=False)) | {"lr": schedule.get_last_lr()[0]}
            accelerator.log(logs, step=step)
            bar.set_postfix(loss=f"{loss.item():.4f}")
            bar.update()
            seconds.append(time.perf_counter() - start)
            if step % options.checkpointing_steps == 0:
                checkpoints.save_checkpoint(accelerator, options.output_dir, step, options.checkpoints_total_limit)
            if step % options.validation_steps == 0 and step < options.max_train_steps:
                self.validate(f"step {step}")
                model.train()
            start = time.perf_counter()
        bar.close()
        return sorted(seconds)[len(seconds) // 2] if seconds else None

    def _batch_losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Mean losses of the subject and, if there are any, of the class pictures: (kinds,)."""
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
        return losses.view(count, kinds).mean(dim=0)

    @torch.no_grad()
    def measured(self) -> dict[str, float]:
        """Mean denoising losses of the subject and of the class, at fixed noise and times, without dropout."""
        kinds = {"instance": self.instance[:_MEASURED_PICTURES]}
        if self.classes:
            kinds["class"] = [load_image(path) for path in self.classes[:_MEASURED_PICTURES]]
        if not self.accelerator.is_main_process:
            return {}
        self.model.eval()
        device = self.accelerator.device
        found = {}
        for chosen, (kind, images) in enumerate(kinds.items()):
            generator = torch.Generator().manual_seed(self.options.seed)
            total = 0.0
            for image in images:
                pair = stack([sample(image, self.options.resolution)])
                with torch.random.fork_rng():
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

    @torch.no_grad()
    def validate(self, when: str) -> None:
        """Draw the validation prompt and write ``validation/WHEN.png``; the main process does it."""
        options = self.options
        if options.validation_prompt is None or not self.accelerator.is_main_process:
            return
        self.model.eval()
        seeds = range(options.seed, options.seed + options.num_validation_images)
        with self.accelerator.autocast():
            text = self.drawn_text or self.family.encode_texts([options.validation_prompt])
            negative = self.no_text or self.family.encode_texts([""])
            images = self.family.draw(text, negative, seeds, options)
        self.rows.append((f"{when}: {options.validation_prompt}", images))
        save_grid(options.output_dir / "validation" / f"{when.replace(' ', '-')}.png", self.rows[-1:])

    def _write(self, losses: dict[str, dict[str, float]], seconds: float | None) -> None:
        options, accelerator = self.options, self.accelerator
        values = torch.cat([p.detach().double().flatten() for p in self.model.parameters() if p.requires_grad])
        sums = accelerator.gather(torch.stack([values.sum(), values.square().sum()])[None]).tolist()
        if not accelerator.is_main_process:
            return
        for name, module in self.adapted.items():
            save_adapter(module, options.output_dir / name, options.pretrained_model_name_or_path)
        if self.rows:
            shown = [fit([image], options.resolution)[0][0] for image in self.instance[: len(self.rows[0][1])]]
            save_grid(options.output_dir / "validation.png", [(options.instance_prompt, shown), *self.rows])
        metrics = {
            "denoising_loss": {
                kind: {when: losses[when][kind] for when in ("before", "after")} for kind in losses["before"]
            },
            "steps": options.max_train_steps,
            "median_step_seconds": seconds,
            "processes": accelerator.num_processes,
            # Of every process: sum and sum of squares of what it trained. They are equal.
            "trained_sums": sums,
        }
        (options.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        for kind, loss in metrics["denoising_loss"].items():
            print(f"denoising loss, {kind}: {loss['before']:.4f} before, {loss['after']:.4f} after")


def _class_file(folder: Path, number: int) -> Path:
    return folder / f"class-{number:05}.png"


def train(options: argparse.Namespace) -> None:
    """Run the recipe with the options of `command_line.parse`."""
    Run(options).train()
