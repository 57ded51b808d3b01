"""One folder a paper. Nothing here imports a sibling; `core` and `repro` reach these through entry points only."""
