"""Pretrain a tiny vision transformer on scikit-learn's digits, in well under a minute on a CPU.

    python examples/pretrain_tiny_vit.py

It writes to ~/.cache/autopeft (AUTOPEFT_CACHE overrides):

- tiny-vit: a ViT without a head and its image processor. It learned to tell by how many quarter
  turns a digit was turned, from three fifths of the digits and without their labels.
- digits: the other digits as an image folder, upright, one folder per label, for
  `autopeft search --model ~/.cache/autopeft/tiny-vit --data ~/.cache/autopeft/digits`.

Everything is seeded. Nothing is downloaded: scikit-learn ships the digits.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import transformers
from sklearn.datasets import load_digits

SIDE = 32
SEED = 0


def pictures() -> tuple[list[PIL.Image.Image], list[int]]:
    """Return the digits as images of 32 x 32 pixels, and their labels."""
    digits = load_digits()
    images = [
        PIL.Image.fromarray(np.uint8(pixels / 16.0 * 255.0)).convert("RGB").resize((SIDE, SIDE))
        for pixels in digits.images
    ]
    return images, digits.target.tolist()


def pretrained(
    images: list[PIL.Image.Image], processor: Any, *, epochs: int
) -> transformers.ViTModel:
    """Return a ViT that has learned by how many quarter turns images were turned."""
    torch.manual_seed(SEED)
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=SIDE,
        patch_size=8,
        num_labels=4,
    )
    model = transformers.ViTForImageClassification(config)
    upright = torch.from_numpy(np.stack([processor(i)["pixel_values"][0] for i in images]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(SEED)
    for epoch in range(epochs):
        n_right = 0
        for rows in torch.randperm(len(upright), generator=generator).split(64):
            turns = torch.randint(4, (len(rows),), generator=generator)
            turned = torch.stack(
                [torch.rot90(upright[r], int(n), (1, 2)) for r, n in zip(rows, turns, strict=True)]
            )
            output = model(pixel_values=turned, labels=turns)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            n_right += int((output.logits.argmax(dim=1) == turns).sum())
        print(f"epoch {epoch + 1} of {epochs}: {n_right / len(upright):.1%} of the turns are right")
    return model.vit


def main() -> None:
    """Write the model and the image folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    epochs = parser.parse_args().epochs
    cache = Path(os.environ.get("AUTOPEFT_CACHE") or "~/.cache/autopeft").expanduser()
    images, labels = pictures()
    order = np.random.default_rng(SEED).permutation(len(images)).tolist()
    n_pretrained = len(order) * 3 // 5
    processor = transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    model = pretrained([images[i] for i in order[:n_pretrained]], processor, epochs=epochs)
    model.save_pretrained(cache / "tiny-vit")
    processor.save_pretrained(cache / "tiny-vit")
    shutil.rmtree(cache / "digits", ignore_errors=True)
    for i in order[n_pretrained:]:
        folder = cache / "digits" / str(labels[i])
        folder.mkdir(parents=True, exist_ok=True)
        images[i].save(folder / f"{i:04}.png")
    print(
        f"wrote {cache / 'tiny-vit'} and {len(order) - n_pretrained} images to {cache / 'digits'}"
    )


if __name__ == "__main__":
    main()
