"""Token merging (ToMe). Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023, as an alternative to SDTPS's token module."""

__plugin__ = "token_merging"
__interface__ = 1
