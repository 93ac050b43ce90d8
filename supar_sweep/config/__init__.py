"""The schema of a cell (schema) and the strict decoder from plain dicts (decode). No torch, no Hydra."""
