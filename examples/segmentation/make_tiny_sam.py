"""Write a tiny SAM, pretrained to give coarse masks, and pictures of shapes with exact masks to tune its decoder on.

SAM's masks are right in the large and ragged in the small (that is what HQ-SAM's data is for), and so are this model's:
its pretraining sees circles and squares whose masks are blurred. The tuning data are circles, squares and triangles on
noise, with exact masks. The folders have the layout of real ones, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from mask_data import box_around  # noqa: E402
from mask_loss import mask_loss  # noqa: E402
from PIL import Image  # noqa: E402
from recipe_tools.arguments import Parser, output_folder, whole  # noqa: E402
from recipe_tools.drawn_shapes import COLOURS, SHAPES, draw, region_drawn  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import SamConfig, SamModel  # noqa: E402

SIZE, PATCH, WIDTH = 64, 4, 64
BATCH, RATE = 16, 1e-3
# In pixels: the masks of the pretraining are means over windows of this size.
BLUR = 15
MEAN, DEVIATION = 0.25, 0.25
PROCESSOR = {
    "image_processor_type": "SamImageProcessor",
    "size": {"longest_edge": SIZE},
    "pad_size": {"height": SIZE, "width": SIZE},
    "mask_size": {"longest_edge": SIZE},
    "mask_pad_size": {"height": SIZE, "width": SIZE},
    "image_mean": [MEAN] * 3,
    "image_std": [DEVIATION] * 3,
}
# Brightness of the noise in the background, below that of the shapes.
NOISE = 90


def tiny_sam() -> SamModel:
    """A SAM for 64 x 64 pixels with all parts of the real one, from torch's random state.

    The decoder is as narrow as m = 4 factors of b = 4 allow: its attention has 64 / 2 channels.
    """
    vision = {
        "hidden_size": WIDTH,
        "output_channels": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": PATCH,
        "mlp_ratio": 2.0,
        "window_size": 0,
        "global_attn_indexes": [0, 1],
        "num_pos_feats": WIDTH // 2,
        "initializer_range": 0.02,
    }
    prompt = {"hidden_size": WIDTH, "image_size": SIZE, "patch_size": PATCH, "mask_input_channels": 4}
    decoder = {"hidden_size": WIDTH, "mlp_dim": 128, "num_attention_heads": 4, "iou_head_hidden_dim": WIDTH}
    return SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder))


def picture(source: random.Random, shapes: tuple[str, ...]) -> tuple[Image.Image, Tensor]:
    """A shape on noise, and its ``(64, 64)`` bool mask."""
    radius = source.uniform(0.15, 0.35)
    centre = (source.uniform(radius, 1 - radius), source.uniform(radius, 1 - radius))
    shape, colour = source.choice(shapes), source.choice(list(COLOURS))
    image = draw(shape, colour, centre, radius, source.uniform(0, 6.3), SIZE).image
    mask = region_drawn(image)
    noise = np.frombuffer(source.randbytes(SIZE * SIZE * 3), np.uint8).reshape(SIZE, SIZE, 3) / 255 * NOISE
    pixels = np.clip(np.where(mask[..., None].numpy(), np.asarray(image) - NOISE / 2, 0) + noise, 0, 255)
    return Image.fromarray(pixels.astype(np.uint8)), mask


def pretrain(steps: int, seed: int) -> SamModel:
    """Train every weight of a new model on coarse masks of circles and squares, under a progress bar."""
    torch.manual_seed(seed)
    model, source = tiny_sam(), random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in tqdm(range(steps), desc="pretraining", unit="step"):
        images, masks = zip(*(picture(source, SHAPES[:2]) for _ in range(BATCH)))
        pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2) / 255
        truth = torch.stack(masks)
        boxes = torch.stack([box_around(mask) for mask in masks])[:, None]
        coarse = F.avg_pool2d(truth.float()[:, None], BLUR, stride=1, padding=BLUR // 2)[:, 0]
        masks = model(pixel_values=(pixels - MEAN) / DEVIATION, input_boxes=boxes, multimask_output=False).pred_masks
        loss = mask_loss(masks[:, 0, 0], coarse, torch.ones_like(coarse))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, last loss {loss.item():.3f}")
    return model.eval()


def write_pictures(folder: Path, count: int, seed: int) -> None:
    """``folder/images/NNNN.png`` and ``folder/masks/NNNN.png``."""
    source = random.Random(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image, mask = picture(source, SHAPES)
        image.save(folder / "images" / f"{index:04}.png")
        Image.fromarray(np.uint8(mask) * 255).save(folder / "masks" / f"{index:04}.png")


def main() -> None:
    """Write ``DIR/model`` and ``DIR/data/{train,test}/{images,masks}``."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument("--steps", type=whole(1, 10**6), default=300, help="of pretraining (default %(default)s)")
    parser.add_argument("--pictures", type=whole(1, 9999), default=128, help="to train on (default %(default)s)")
    parser.add_argument("--seed", type=whole(0, 2**31), default=0, help="(default %(default)s)")
    options = parser.parse_args()
    folder = output_folder(parser, options.folder, "DIR")
    pretrain(options.steps, options.seed).save_pretrained(folder / "model")
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2), encoding="utf-8")
    write_pictures(folder / "data" / "train", options.pictures, options.seed + 1)
    write_pictures(folder / "data" / "test", max(1, options.pictures // 2), options.seed + 2)
    print(f"Written to {folder}: model, data")


if __name__ == "__main__":
    main()
