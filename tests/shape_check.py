"""The checker that the import hook puts on every annotated function: beartype, with int accepted where float is written."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
