"""Style mixing (Karras et al. 2019, arXiv 1812.04948, section 3.1).

Coarse layers take their styles from one image and fine layers from another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ganscale.errors import ConfigError
from ganscale.generation.latent_sampler import LatentSampler


def mixed_images(sampler: LatentSampler, rows: list[int], columns: list[int], layer: int) -> Tensor:
    """Images with the row seed's styles before `layer` and the column seed's from it on.

    Returns uint8 (rows, columns, C, H, W). Raises `ConfigError` if the generator has no styles, or
    the layer is not one of 0 to their number.
    """
    w_rows, w_columns = (
        sampler.styles(sampler.latents(seeds), sampler.classes(seeds)).cpu()
        for seeds in (rows, columns)
    )
    num_layers = sampler.num_layers
    if not 0 <= layer <= num_layers:
        raise ConfigError(f"layer {layer}: this generator has layers 0 to {num_layers}")
    before = torch.arange(num_layers)[:, None] < layer  # (layers, 1)
    w = torch.where(before, w_rows[:, None, None], w_columns[None, :, None])
    images = sampler.draw_styles(w.flatten(0, 1))
    grid: Tensor = images.unflatten(0, (len(rows), len(columns)))
    return grid
