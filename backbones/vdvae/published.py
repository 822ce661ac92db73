"""The published configurations of VDVAE, by the names of their data sets, as settings of `Architecture`.

Source: what the release of Child (2021) runs with, in the words of its command line.
"""

from __future__ import annotations

from typing import Any

COMMON: dict[str, Any] = {
    "width": 512,
    "custom_width_str": "",
    "zdim": 16,
    "bottleneck_multiple": 0.25,
    "no_bias_above": 64,
    "num_mixtures": 10,
}
"""The defaults of the command line."""

PUBLISHED: dict[str, dict[str, Any]] = {
    "cifar10": COMMON
    | {
        "width": 384,
        "enc_blocks": "32x11,32d2,16x6,16d2,8x6,8d2,4x3,4d4,1x3",
        "dec_blocks": "1x1,4m1,4x2,8m4,8x5,16m8,16x10,32m16,32x21",
    },
    "imagenet32": COMMON
    | {
        "enc_blocks": "32x15,32d2,16x9,16d2,8x8,8d2,4x6,4d4,1x6",
        "dec_blocks": "1x2,4m1,4x4,8m4,8x9,16m8,16x19,32m16,32x40",
    },
    "imagenet64": COMMON
    | {
        "enc_blocks": "64x11,64d2,32x20,32d2,16x9,16d2,8x8,8d2,4x7,4d4,1x5",
        "dec_blocks": "1x2,4m1,4x3,8m4,8x7,16m8,16x15,32m16,32x31,64m32,64x12",
    },
    "ffhq256": COMMON
    | {
        "enc_blocks": "256x3,256d2,128x8,128d2,64x12,64d2,32x17,32d2,16x7,16d2,8x5,8d2,4x5,4d4,1x4",
        "dec_blocks": "1x2,4m1,4x3,8m4,8x4,16m8,16x9,32m16,32x21,64m32,64x13,128m64,128x7,256m128",
    },
    "ffhq1024": COMMON  # as the release has it, which its own published file does not fit
    | {
        "width": 16,
        "num_mixtures": 2,
        "custom_width_str": "512:32,256:64,128:512,64:512,32:512,16:512,8:512,4:512,1:512",
        "enc_blocks": "1024x1,1024d2,512x3,512d2,256x5,256d2,128x7,128d2,64x10,64d2,32x14,32d2,16x7,16d2,8x5,8d2,4x5,"
        "4d4,1x4",
        "dec_blocks": "1x2,4m1,4x3,8m4,8x4,16m8,16x9,32m16,32x20,64m32,64x14,128m64,128x7,256m128,256x2,512m256,"
        "1024m512",
    },
}
