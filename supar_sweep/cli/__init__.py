"""The roof: command words -> Hydra -> the rooms. Nothing heavy is imported before a command."""
