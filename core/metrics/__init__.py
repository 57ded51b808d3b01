"""The field's standard protocols, one module a field."""
