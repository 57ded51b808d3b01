"""sap."""

__plugin__ = "sap"
__interface__ = 1
