"""Write a small ViT, pretrained on the handwritten digits 0 to 4, and image folders of the digits 5 to 9 to tune it on.

The digits are scikit-learn's (8 x 8 pixels). The model has the layout of a real one from transformers, with its image
processor beside it, so that finetune_vit.py takes both folders unchanged. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from digits import MEAN, SIZE, Digits, load_digits  # noqa: E402
from PIL import Image  # noqa: E402
from recipe_tools.arguments import Parser, output_folder, whole  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import ViTConfig, ViTForImageClassification  # noqa: E402

PRETRAINED_ON = tuple(range(5))
TUNED_ON = tuple(range(5, 10))
BATCH = 64
RATE = 1e-3
# Written by hand: the class of the processor needs torchvision in some releases of transformers, its file does not.
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": SIZE, "width": SIZE},
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [MEAN] * 3,
    "image_std": [MEAN] * 3,
}


def small_vit(labels: list[str]) -> ViTForImageClassification:
    """A ViT for 8 x 8 pixels: 16 patches, width 64, 4 layers; 0.2 million parameters, from torch's random state."""
    config = ViTConfig(
        image_size=SIZE,
        patch_size=2,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    return ViTForImageClassification(config)


def pretrain(digits: Digits, epochs: int, seed: int) -> ViTForImageClassification:
    """Train every weight of a new model on `digits`, under a progress bar."""
    torch.manual_seed(seed)
    model = small_vit([str(digit) for digit in PRETRAINED_ON])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    steps = len(digits.labels) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * steps)
    with tqdm(total=epochs * steps, desc="pretraining on 0 to 4", unit="step") as bar:
        for _ in range(epochs):
            for rows in torch.randperm(len(digits.labels))[: steps * BATCH].split(BATCH):
                loss = F.cross_entropy(model(pixel_values=digits.images[rows]).logits, digits.labels[rows])
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                bar.update()
    return model.eval()


def write_images(digits: Digits, folder: Path) -> None:
    """``folder/LABEL/NNNN.png`` in shades of grey."""
    for index, (image, label) in enumerate(zip(digits.images, digits.labels)):
        path = folder / str(TUNED_ON[label]) / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shades = ((image[0] * MEAN + MEAN) * 255).round().numpy().astype(np.uint8)
        Image.fromarray(shades).save(path)


def main() -> None:
    """Write ``DIR/model`` and ``DIR/data/{train,test}/CLASS``."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument("--epochs", type=whole(1, 1000), default=30, help="of pretraining (default %(default)s)")
    parser.add_argument("--seed", type=whole(0, 2**31), default=0, help="(default %(default)s)")
    options = parser.parse_args()
    folder = output_folder(parser, options.folder, "DIR")

    train, test = load_digits(PRETRAINED_ON)
    model = pretrain(train, options.epochs, options.seed)
    with torch.no_grad():
        right = model(pixel_values=test.images).logits.argmax(1) == test.labels
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size:,} parameters, accuracy on digits 0 to 4: {right.float().mean():.3f}")
    model.save_pretrained(folder / "model")
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2), encoding="utf-8")
    for split, digits in zip(("train", "test"), load_digits(TUNED_ON)):
        write_images(digits, folder / "data" / split)
    print(f"Written to {folder}: model, data")


if __name__ == "__main__":
    main()
