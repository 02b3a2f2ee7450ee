"""The axes of MM1's architecture ablations (arXiv 2403.09611, section 3.2): one preset a point of the paper.

Encoders (Table 1) stand before the 2.9B decoder and the C-Abstractor with 144 tokens; two rows of the table differ from
others by the encoder's weights alone and share their presets. Connectors (Fig. 4) stand in the 1.2B ablation model.
"""

from __future__ import annotations

from mm15_megatron.presets.mm1 import DECODER_1B, DECODER_3B, LR_1B
from mm15_megatron.presets.preset import Preset, Setting
from mm15_megatron.presets.recipe import PRETRAINING, aim, connector, peak_rate, vit_h, vit_l

_TABLE_1 = "MM1 section 3.2, Table 1"
_FIGURE_4 = "MM1 section 3.2, Fig. 4"
_LR_2_9B = peak_rate(5.9e-5, "published: MM1 appendix (recollected), the law's value at 2.9B")
_C_ABSTRACTOR = connector("c_abstractor", 144, source="derived: MM1's ablation model, one factor changed at a time")

_ENCODERS: tuple[tuple[str, str, tuple[Setting, ...]], ...] = (
    *((f"vit_l_{image}", f"CLIP ViT-L/14 at {image} px", vit_l(image, section=_TABLE_1)) for image in (224, 336)),
    *((f"vit_h_{image}", f"CLIP ViT-H/14 at {image} px", vit_h(image, section=_TABLE_1)) for image in (224, 336, 378)),
    *(
        (f"aim_{size.lower()}", f"AIM-{size} at 224 px", aim(hidden, section=_TABLE_1))
        for size, hidden in (("600M", 1536), ("1B", 2048), ("3B", 3072))
    ),
)
ENCODERS = tuple(
    Preset(
        f"mm1_encoder_{name}",
        f"MM1's encoder ablation: {words}, 2.9B decoder, C-Abstractor with 144 tokens",
        (*encoder, *_C_ABSTRACTOR, *PRETRAINING, *DECODER_3B, *_LR_2_9B),
    )
    for name, words, encoder in _ENCODERS
)

_CONNECTORS = {
    "average_pool": "average pooling",
    "attention_pool": "attention pooling",
    "c_abstractor": "C-Abstractor",
}
CONNECTORS = tuple(
    Preset(
        f"mm1_connector_{kind}_{image}_{tokens}",
        f"MM1's connector ablation: {words} to {tokens} tokens, ViT-L/14 at {image} px, 1.2B decoder",
        (
            *vit_l(image, section=_FIGURE_4),
            *connector(kind, tokens, source=f"published: {_FIGURE_4}"),
            *PRETRAINING,
            *DECODER_1B,
            *LR_1B,
        ),
    )
    for kind, words in _CONNECTORS.items()
    for image, tokens in ((224, 64), (336, 64), (336, 144))
)

PRESETS = (*ENCODERS, *CONNECTORS)
