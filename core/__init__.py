"""The framework: registry, config, trainer, data, metrics, profile. It knows no paper."""
