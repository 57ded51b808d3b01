"""sam."""

__plugin__ = "sam"
__interface__ = 1
