"""sam3_fusion."""

__plugin__ = "sam3_fusion"
__interface__ = 1
