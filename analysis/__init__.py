"""From records to figures and numbers: rows -> a pure curve dataclass -> a matplotlib Figure.

    frames.py       rows (one per grid point, parameterization and seed) -> a checked table, its axes and parts
    wiener.py       a smooth random process: bases and covariances
    smooth.py       the model of a loss curve under seed noise with it, pooled over a panel's lines
    fit.py          a panel's lines -> optimum and confidence interval, or a censored one's bound
    basins.py       table -> BasinSet: panels, lines, points, fitted optima (no drawing)
    pairing.py      how far two optima's errors go together, because the same seeds trained both lines
    verdict.py      BasinSets -> entries, a verdict per parameterization, proposed points, their files
    statements.py   entries -> the claims of the quick start, true or false, with their numbers
    tables.py       entries -> rows of the verdict table
    coordinates.py  rows of a coordinate check -> CoordinateSets and tests of their slopes
    style.py        the one look of every figure
    lr_basins.py    BasinSet -> Figure, PNG, PDF, CSV; so do the following, each from data of its own
    coord_check.py, pareto.py, heatmap.py, scaling.py, loss_curves.py, study.py
    report.py       records of a grid and its study -> Report, with report_figures.py, report_origin.py, report_cost.py
    report_page.py  Report -> one HTML file

Nothing is imported here: every module is loaded by whoever needs it.
"""
