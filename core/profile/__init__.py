"""Exact cost of a model: MACs by operator and module, parameters, memory, latency, and what compression buys.

    record = profile(model.eval(), (images,))            # a Profile; json.dumps(record.to_dict())
    record.macs, record.flops, record.macs_with_norms    # exact integers, conventions in core.profile.formulas
    for table in record.tables(depth=2): rich.print(table)

A plugin registers what its own operators cost with `@formula("mylib::op")`, and a module that drops tokens says so with a
`token_report` method.
"""

from core.profile.account import ModuleRow, OperatorRow, Profile, profile
from core.profile.compression import Compression, Range, ScopeRow, Spread, TokenCountError, compression, spread
from core.profile.count import FlopCount, UncountedOperatorError
from core.profile.formulas import Call, Cost, einsum_macs, formula
from core.profile.measure import Latency, Memory
from core.profile.tokens import TokenReport, token_reports

__all__ = [
    "Call",
    "Compression",
    "Cost",
    "FlopCount",
    "Latency",
    "Memory",
    "ModuleRow",
    "OperatorRow",
    "Profile",
    "Range",
    "ScopeRow",
    "Spread",
    "TokenCountError",
    "TokenReport",
    "UncountedOperatorError",
    "compression",
    "einsum_macs",
    "formula",
    "profile",
    "spread",
    "token_reports",
]
