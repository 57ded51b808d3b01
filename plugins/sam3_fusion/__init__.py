"""SAM3 fusion: text-prompted detection with a fusion encoder, a query decoder and a presence token."""

__plugin__ = "sam3_fusion"
__interface__ = 1
