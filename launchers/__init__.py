"""How cells reach processes. A launcher keeps the protocol in supar_sweep.sweep.jobs; `complete`
and `tune` are handed one.
"""
