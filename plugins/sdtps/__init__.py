"""sdtps."""

__plugin__ = "sdtps"
__interface__ = 1
